#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

int sp_link_init(struct sp_link *link, const char *dir, const char *name)
{
	int length;

	memset(link, 0, offsetof(struct sp_link, packet));
	link->sock = -1;
	link->window_fd = -1;
	length = snprintf(link->path, sizeof(link->path), "%s/%s", dir, name);
	return length < (int)sizeof(link->path) ? 0 : -ENAMETOOLONG;
}

static int open_in(struct sp_link *link, const struct wire_hello *hello, uint8_t version)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct iovec part = {.iov_base = (void *)hello, .iov_len = sizeof(*hello)};
	int error;

	link->version = version;
	link->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (link->sock < 0)
		return -errno;
	memcpy(address.sun_path, link->path, strlen(link->path));
	if (connect(link->sock, (struct sockaddr *)&address, sizeof(address)) < 0)
		error = -errno;
	else
		error = sp_link_send(link, WIRE_HELLO, sp_link_next_seq(link), 0, &part, 1, -1);
	if (error)
		sp_link_close(link);
	return error;
}

int sp_link_open(struct sp_link *link, const struct wire_hello *hello)
{
	return open_in(link, hello, WIRE_VERSION);
}

int sp_link_step_back(struct sp_link *link, const struct wire_hello *hello,
		      const struct sp_message *refused)
{
	uint8_t theirs = refused->header->version;
	char text[1];

	if (sp_link_refusal(refused, text, sizeof(text)) != EPROTONOSUPPORT)
		return -ECONNREFUSED;
	if (theirs < WIRE_VERSION_OLDEST || theirs >= link->version)
		return -EPROTONOSUPPORT;
	sp_link_close(link);
	return open_in(link, hello, theirs);
}

void sp_link_close(struct sp_link *link)
{
	if (link->sock >= 0)
		close(link->sock);
	if (link->window)
		munmap(link->window, link->window_bytes);
	if (link->window_fd >= 0)
		close(link->window_fd);
	link->sock = -1;
	link->window_fd = -1;
	link->window = NULL;
	link->welcomed = false;
}

uint32_t sp_link_next_seq(struct sp_link *link)
{
	if (++link->last_seq == 0)
		link->last_seq = 1;
	return link->last_seq;
}

int sp_link_send(struct sp_link *link, uint8_t type, uint32_t seq, uint32_t arena,
		 const struct iovec *parts, size_t n, int descriptor)
{
	struct wire_header header = {.magic = WIRE_MAGIC,
				     .version = link->version,
				     .type = type,
				     .length = sizeof(header),
				     .seq = seq,
				     .arena = arena};
	struct iovec all[4] = {{.iov_base = &header, .iov_len = sizeof(header)}};
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct msghdr message = {.msg_iov = all, .msg_iovlen = n + 1};

	if (link->sock < 0)
		return -ENOTCONN;
	for (size_t i = 0; i < n; i++) {
		all[i + 1] = parts[i];
		header.length += (uint32_t)parts[i].iov_len;
	}
	if (descriptor >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control);
		control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
						  .cmsg_type = SCM_RIGHTS,
						  .cmsg_len = CMSG_LEN(sizeof(int))};
		memcpy(CMSG_DATA(&control.header), &descriptor, sizeof(int));
	}
	return sendmsg(link->sock, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static void take_descriptors(struct msghdr *received, struct sp_message *message)
{
	struct cmsghdr *control = CMSG_FIRSTHDR(received);
	size_t n = 0;

	for (size_t i = 0; i < SP_LINK_DESCRIPTORS; i++)
		message->descriptors[i] = -1;
	if (!control || control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
		return;
	n = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
	memcpy(message->descriptors, CMSG_DATA(control), n * sizeof(int));
}

int sp_link_receive(struct sp_link *link, struct sp_message *message)
{
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(SP_LINK_DESCRIPTORS * sizeof(int))];
	} control;
	struct iovec part = {.iov_base = link->packet, .iov_len = sizeof(link->packet)};
	struct msghdr received = {.msg_iov = &part,
				  .msg_iovlen = 1,
				  .msg_control = &control,
				  .msg_controllen = sizeof(control)};
	const struct wire_header *header = (const struct wire_header *)link->packet;
	ssize_t length = recvmsg(link->sock, &received, MSG_CMSG_CLOEXEC);

	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (length == 0)
		return -ECONNRESET;
	take_descriptors(&received, message);
	message->header = header;
	message->payload = link->packet + sizeof(*header);
	message->length = (size_t)length - sizeof(*header);
	if ((size_t)length >= sizeof(*header) && header->magic == WIRE_MAGIC &&
	    header->length == (size_t)length && !(received.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) &&
	    (header->version == link->version || header->type == WIRE_REFUSED))
		return 1;
	sp_message_close(message);
	return -EPROTO;
}

size_t sp_link_open_length(const struct sp_link *link)
{
	return link->version > 2 ? sizeof(struct wire_arena_open) : WIRE_ARENA_OPEN_V2;
}

void sp_message_close(struct sp_message *message)
{
	for (size_t i = 0; i < SP_LINK_DESCRIPTORS; i++)
		if (message->descriptors[i] >= 0)
			close(message->descriptors[i]);
}

int sp_link_welcome(struct sp_link *link, struct sp_message *message, size_t window_bytes)
{
	const struct wire_welcome *welcome = (const struct wire_welcome *)message->payload;
	struct stat window;
	void *memory;

	/* sealed, or else the daemon could take the memory from under this process */
	if (link->welcomed || message->header->type != WIRE_WELCOME ||
	    message->length != sizeof(*welcome) || message->descriptors[0] < 0 ||
	    fstat(message->descriptors[0], &window) < 0 || window.st_size < 0 ||
	    (uint64_t)window.st_size != welcome->window_bytes || welcome->window_bytes < window_bytes ||
	    !(fcntl(message->descriptors[0], F_GET_SEALS) & F_SEAL_SHRINK))
		return -EPROTO;
	memory = mmap(NULL, welcome->window_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
		      message->descriptors[0], 0);
	if (memory == MAP_FAILED)
		return -ENOMEM;
	madvise(memory, welcome->window_bytes, MADV_DONTFORK);
	link->window = memory;
	link->window_bytes = welcome->window_bytes;
	link->window_fd = message->descriptors[0];
	message->descriptors[0] = -1;
	link->welcomed = true;
	return 0;
}

int sp_link_refusal(const struct sp_message *message, char *text, size_t size)
{
	size_t length = message->length > sizeof(uint32_t) ? message->length - sizeof(uint32_t) : 0;
	uint32_t error = EPROTO;

	if (message->length >= sizeof(error))
		memcpy(&error, message->payload, sizeof(error));
	if (length >= size)
		length = size - 1;
	memcpy(text, message->payload + sizeof(error), length);
	text[length] = '\0';
	return error > 0 && error < 4096 ? (int)error : EPROTO;
}
