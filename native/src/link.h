/*
 * One connection to one daemon, from the agent's side (docs/protocol.md). Never blocks.
 */
#ifndef SP_LINK_H
#define SP_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "wire.h"

#define SP_LINK_PATH_MAX 108
#define SP_LINK_DESCRIPTORS 2

struct sp_link {
	char path[SP_LINK_PATH_MAX];
	int sock;	 /* -1: not connected */
	uint8_t version; /* of the protocol, on this connection */
	bool welcomed;
	int window_fd;
	uint8_t *window;
	size_t window_bytes;
	uint32_t last_seq;
	_Alignas(8) uint8_t packet[WIRE_MESSAGE_MAX]; /* the message received last */
};

struct sp_message {
	const struct wire_header *header;
	const uint8_t *payload;
	size_t length; /* of the payload, bytes */
	int descriptors[SP_LINK_DESCRIPTORS]; /* -1 where none came; closed by the receiver */
};

/* `path` is DIR/NAME. -ENAMETOOLONG. */
int sp_link_init(struct sp_link *link, const char *dir, const char *name);

/* Connect and say HELLO, in the newest version. -errno of connect(2) and sendmsg(2). */
int sp_link_open(struct sp_link *link, const struct wire_hello *hello);

/* A message that came instead of WELCOME: if the daemon refuses the version, and speaks one that
 * this library does too, connect anew and say HELLO in that. -ECONNREFUSED: it refuses something
 * else. -EPROTONOSUPPORT: there is no version that both speak. Else as sp_link_open(). */
int sp_link_step_back(struct sp_link *link, const struct wire_hello *hello,
		      const struct sp_message *refused);

/* Forget the connection and the window. Safe to call at any time. */
void sp_link_close(struct sp_link *link);

uint32_t sp_link_next_seq(struct sp_link *link);

/* Send one message whose payload is in `n` <= 3 parts, with a descriptor (-1: none). -EAGAIN: the
 * daemon does not read; other -errno: the connection is dead. */
int sp_link_send(struct sp_link *link, uint8_t type, uint32_t seq, uint32_t arena,
		 const struct iovec *parts, size_t n, int descriptor);

/* Receive one message; it stands in link->packet until the next call. 1, or 0 when there is none
 * now, or -errno: the connection is over (-EPROTO: what came is no message). */
int sp_link_receive(struct sp_link *link, struct sp_message *message);

/* Bytes in front of the names in ARENA_OPEN, in the connection's version. */
size_t sp_link_open_length(const struct sp_link *link);

void sp_message_close(struct sp_message *message);

/* Take a WELCOME: map its window of at least `window_bytes`. -EPROTO or -ENOMEM. */
int sp_link_welcome(struct sp_link *link, struct sp_message *message, size_t window_bytes);

/* Errno (positive) and text of a REFUSED message; `text` gets at most `size` bytes with the NUL. */
int sp_link_refusal(const struct sp_message *message, char *text, size_t size);

#endif
