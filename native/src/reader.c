#include "reader.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "kernel.h"
#include "pagemap.h"
#include "thread.h"

#define RECONNECT_FIRST_MS 50
#define RECONNECT_MAX_MS 1000
#define SEND_PATIENCE_MS 1000
#define SCANNER_AWAY "the scanner is away; the arena's memory is safe, try again later"

static const uint8_t zero_page[SP_PAGE_SIZE];

static struct sp_arena *find(const struct sp_reader *reader, uint32_t number)
{
	struct sp_arena *arena = reader->arenas;

	while (arena && arena->number != number)
		arena = arena->reader_next;
	return arena;
}

static int send_message(struct sp_reader *reader, uint8_t type, uint32_t seq, uint32_t arena,
			const struct iovec *parts, size_t n)
{
	struct pollfd polled = {.fd = reader->link.sock, .events = POLLOUT};
	int error = sp_link_send(&reader->link, type, seq, arena, parts, n, -1);

	if (error == -EAGAIN && poll(&polled, 1, SEND_PATIENCE_MS) > 0)
		error = sp_link_send(&reader->link, type, seq, arena, parts, n, -1);
	if (error)
		sp_link_close(&reader->link);
	return error;
}

static int announce(struct sp_reader *reader, struct sp_arena *arena)
{
	struct wire_arena_open open = {.pages = arena->pages};
	struct iovec parts[] = {{.iov_base = &open, .iov_len = sizeof(open)},
				{.iov_base = arena->name, .iov_len = strlen(arena->name)},
				{.iov_base = arena->domain, .iov_len = strlen(arena->domain)}};

	open.name_bytes = (uint16_t)parts[1].iov_len;
	open.domain_bytes = (uint16_t)parts[2].iov_len;
	return send_message(reader, WIRE_ARENA_OPEN, sp_link_next_seq(&reader->link), arena->number,
			    parts, 3);
}

/* Pages [i, end) have bytes: fingerprint them, and say which are private, shared and zero. */
static void fingerprint_stretch(struct sp_reader *reader, const struct sp_arena *arena,
				const uint8_t *data, size_t i, size_t end, uint8_t *states)
{
	uint8_t *fingerprints = reader->link.window;
	uint8_t zero[SP_FINGERPRINT_SIZE];

	sp_fingerprint(zero_page, 1, arena->seed, zero);
	sp_fingerprint(data + i * SP_PAGE_SIZE, end - i, arena->seed,
		       fingerprints + i * SP_FINGERPRINT_SIZE);
	for (; i < end; i++) {
		if (sp_pagemap_is_shared(reader->page_states[i]))
			states[i] = WIRE_PAGE_SHARED;
		else if (!memcmp(fingerprints + i * SP_FINGERPRINT_SIZE, zero, sizeof(zero)))
			states[i] = WIRE_PAGE_ZERO;
		else
			states[i] = WIRE_PAGE_PRIVATE;
	}
}

static int fingerprint(struct sp_reader *reader, const struct sp_arena *arena, uint64_t page,
		       size_t n)
{
	const uint8_t *data = arena->data + page * SP_PAGE_SIZE;
	uint8_t *window = reader->link.window;
	uint8_t *states = window + n * SP_FINGERPRINT_SIZE;
	size_t end;
	int error = sp_pagemap_read(reader->pagemap, data, n, reader->page_states);

	if (error)
		return error;
	for (size_t i = 0; i < n; i = end) {
		bool there = sp_pagemap_is_there(reader->page_states[i]);

		for (end = i + 1; end < n && sp_pagemap_is_there(reader->page_states[end]) == there;)
			end++;
		if (there) {
			fingerprint_stretch(reader, arena, data, i, end, states);
		} else {
			memset(window + i * SP_FINGERPRINT_SIZE, 0, (end - i) * SP_FINGERPRINT_SIZE);
			memset(states + i, WIRE_PAGE_ABSENT, end - i);
		}
	}
	return 0;
}

static int order_fingerprint(struct sp_reader *reader, const struct sp_message *order)
{
	const struct wire_range *range = (const struct wire_range *)order->payload;
	struct sp_arena *arena = find(reader, order->header->arena);
	struct wire_done done = {0};
	struct iovec part = {.iov_base = &done, .iov_len = sizeof(done)};

	if (order->length != sizeof(*range) || range->count == 0 ||
	    range->count > WIRE_FINGERPRINT_PAGES_MAX)
		return -EPROTO;
	if (!arena || !arena->seeded)
		done.error = ENOENT;
	else if (range->page >= arena->pages || range->count > arena->pages - range->page)
		return -EPROTO;
	else
		done.error = -fingerprint(reader, arena, range->page, range->count);
	return send_message(reader, WIRE_DONE, order->header->seq, order->header->arena, &part, 1);
}

static int receive_opened(struct sp_reader *reader, const struct sp_message *message)
{
	const struct wire_arena_opened *opened = (const struct wire_arena_opened *)message->payload;
	struct sp_arena *arena = find(reader, message->header->arena);

	if (message->length != sizeof(*opened))
		return -EPROTO;
	if (arena) {
		arena->seed = opened->lock_or_seed;
		arena->seeded = true;
	}
	return 0;
}

static int receive_refused(struct sp_node *node, const struct sp_message *message)
{
	struct sp_reader *reader = &node->reader;
	struct sp_request *request = sp_mailbox_awaited(&reader->mailbox, message->header->seq);
	char text[SP_REQUEST_TEXT];
	int error = sp_link_refusal(message, text, sizeof(text));

	if (!reader->link.welcomed)
		return sp_link_step_back(&reader->link, &node->hello, message);
	if (request)
		sp_mailbox_done(&reader->mailbox, request, -error, text);
	return 0;
}

static int receive_shared(struct sp_reader *reader, const struct sp_message *message)
{
	struct sp_request *request = sp_mailbox_awaited(&reader->mailbox, message->header->seq);

	if (message->length != sizeof(struct wire_shared))
		return -EPROTO;
	if (request) {
		memcpy(request->answer, message->payload, sizeof(struct wire_shared));
		sp_mailbox_done(&reader->mailbox, request, 0, NULL);
	}
	return 0;
}

static int receive(struct sp_node *node, struct sp_message *message)
{
	struct sp_reader *reader = &node->reader;
	int error;

	switch (message->header->type) {
	case WIRE_WELCOME:
		error = sp_link_welcome(&reader->link, message, SP_SCANNER_WINDOW);
		reader->reconnect_ms = RECONNECT_FIRST_MS;
		for (struct sp_arena *a = reader->arenas; a && !error; a = a->reader_next)
			error = announce(reader, a);
		return error;
	case WIRE_ARENA_OPENED:
		return receive_opened(reader, message);
	case WIRE_REFUSED:
		return receive_refused(node, message);
	case WIRE_SHARED:
		return receive_shared(reader, message);
	case WIRE_FINGERPRINT:
		return reader->link.welcomed ? order_fingerprint(reader, message) : -EPROTO;
	default:
		return -EPROTO;
	}
}

static void receive_one(struct sp_node *node)
{
	struct sp_reader *reader = &node->reader;
	struct sp_message message;
	int result = sp_link_receive(&reader->link, &message);

	if (result > 0) {
		result = receive(node, &message);
		sp_message_close(&message);
	}
	if (result < 0)
		sp_link_close(&reader->link);
}

static void forget(struct sp_reader *reader, struct sp_arena *arena)
{
	struct sp_arena **at = &reader->arenas;

	while (*at && *at != arena)
		at = &(*at)->reader_next;
	if (!*at)
		return;
	*at = arena->reader_next;
	if (reader->link.welcomed)
		send_message(reader, WIRE_ARENA_CLOSE, 0, arena->number, NULL, 0);
	sp_arena_put(arena);
}

static void ask_share(struct sp_reader *reader, struct sp_request *request)
{
	uint32_t seq = sp_link_next_seq(&reader->link);

	if (!reader->link.welcomed ||
	    send_message(reader, WIRE_SHARE, seq, request->arena->number, NULL, 0))
		sp_mailbox_done(&reader->mailbox, request, -ENOTCONN, SCANNER_AWAY);
	else
		sp_mailbox_await(&reader->mailbox, request, seq);
}

/* Carry out one request; false: it was the last one. */
static bool carry_out(struct sp_reader *reader, struct sp_request *request)
{
	struct sp_arena *arena = request->arena;
	bool stop = request->kind == SP_REQUEST_STOP;

	if (request->kind == SP_REQUEST_SHARE) {
		ask_share(reader, request);
		return true;
	}
	if (request->kind == SP_REQUEST_ADD) {
		atomic_fetch_add(&arena->references, 1);
		arena->reader_next = reader->arenas;
		reader->arenas = arena;
		if (reader->link.welcomed)
			announce(reader, arena);
	} else if (request->kind == SP_REQUEST_CLOSE) {
		forget(reader, arena);
	}
	while (stop && reader->arenas)
		forget(reader, reader->arenas);
	sp_mailbox_done(&reader->mailbox, request, 0, NULL);
	return !stop;
}

/* Connect again when the link is down; returns how long poll() may sleep, ms. */
static int reconnect(struct sp_node *node)
{
	struct sp_reader *reader = &node->reader;

	if (reader->link.sock >= 0)
		return -1;
	sp_mailbox_fail_awaited(&reader->mailbox, -ENOTCONN, SCANNER_AWAY);
	for (struct sp_arena *arena = reader->arenas; arena; arena = arena->reader_next)
		arena->seeded = false;
	if (!sp_link_open(&reader->link, &node->hello))
		return -1;
	if (reader->reconnect_ms < RECONNECT_MAX_MS)
		reader->reconnect_ms *= 2;
	return reader->reconnect_ms;
}

static void *run(void *argument)
{
	struct sp_node *node = argument;
	struct sp_reader *reader = &node->reader;
	bool go_on = true;

	while (go_on) {
		struct sp_request *request;
		int timeout = reconnect(node);
		struct pollfd polled[] = {{.fd = reader->mailbox.wake, .events = POLLIN},
					  {.fd = reader->link.sock, .events = POLLIN}};

		poll(polled, 2, timeout);
		sp_mailbox_hear(&reader->mailbox);
		while (go_on && (request = sp_mailbox_take(&reader->mailbox)))
			go_on = carry_out(reader, request);
		if (reader->link.sock >= 0 && polled[1].revents)
			receive_one(node);
	}
	sp_mailbox_close(&reader->mailbox, -EBADF);
	sp_link_close(&reader->link);
	return NULL;
}

int sp_reader_start(struct sp_node *node)
{
	node->reader.reconnect_ms = RECONNECT_FIRST_MS;
	node->reader.pagemap = sp_pagemap_open();
	if (node->reader.pagemap < 0)
		return node->reader.pagemap;
	return sp_thread_start(&node->reader.thread, "samepage-read", run, node);
}

void sp_reader_stop(struct sp_node *node)
{
	struct sp_request request = {.kind = SP_REQUEST_STOP};

	sp_mailbox_call(&node->reader.mailbox, &request, -1);
	pthread_join(node->reader.thread, NULL);
	close(node->reader.pagemap);
}
