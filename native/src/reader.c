#include "reader.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "changes.h"
#include "credential.h"
#include "kernel.h"
#include "maps.h"
#include "pagemap.h"
#include "thread.h"

#define RECONNECT_FIRST_MS 50
#define RECONNECT_MAX_MS 1000
#define SEND_PATIENCE_MS 1000
#define READ_PAGES 256 /* read after one look at their mapping: some 100 us */
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

/* Before arenas are announced, as the mover does. */
static void show_credential(struct sp_node *node)
{
	char token[SP_CREDENTIAL_MAX];
	struct iovec part = {.iov_base = token,
			     .iov_len = sp_credential_read(node->token_file, token)};

	if (part.iov_len > 0 && node->reader.link.version >= 3)
		send_message(&node->reader, WIRE_CREDENTIAL, 0, 0, &part, 1);
}

static int announce(struct sp_reader *reader, struct sp_arena *arena)
{
	struct wire_arena_open open = {.pages = arena->pages};
	struct iovec parts[] = {{.iov_base = &open, .iov_len = sp_link_open_length(&reader->link)},
				{.iov_base = arena->name, .iov_len = strlen(arena->name)},
				{.iov_base = arena->domain, .iov_len = strlen(arena->domain)}};

	open.name_bytes = (uint16_t)parts[1].iov_len;
	open.domain_bytes = (uint16_t)parts[2].iov_len;
	return send_message(reader, WIRE_ARENA_OPEN, sp_link_next_seq(&reader->link), arena->number,
			    parts, 3);
}

/* Where an answer's fingerprints and page states go. */
struct answer {
	uint8_t *fingerprints;
	uint8_t *states;
};

/* Pages from `page` on, places [i, end) of the answer, have bytes: fingerprint them, and say which
 * are private, shared and zero. */
static void fingerprint_stretch(struct sp_reader *reader, const struct sp_arena *arena,
				uint64_t page, size_t i, size_t end, struct answer answer)
{
	uint8_t *fingerprints = answer.fingerprints;
	uint8_t zero[SP_FINGERPRINT_SIZE];

	sp_fingerprint(zero_page, 1, arena->seed, zero);
	sp_fingerprint(arena->data + page * SP_PAGE_SIZE, end - i, arena->seed,
		       fingerprints + i * SP_FINGERPRINT_SIZE);
	for (; i < end; i++) {
		if (sp_pagemap_is_shared(reader->page_states[i]))
			answer.states[i] = WIRE_PAGE_SHARED;
		else if (!memcmp(fingerprints + i * SP_FINGERPRINT_SIZE, zero, sizeof(zero)))
			answer.states[i] = WIRE_PAGE_ZERO;
		else
			answer.states[i] = WIRE_PAGE_PRIVATE;
	}
}

/* Fingerprint what may be read of pages [i, end) that have bytes; returns up to where, or i. The
 * application may protect or unmap parts of its arena: a fault of this thread would end it. */
static size_t fingerprint_readable(struct sp_reader *reader, const struct sp_arena *arena,
				   uint64_t page, size_t i, size_t end, struct answer answer)
{
	size_t n = end - i < READ_PAGES ? end - i : READ_PAGES;

	n = sp_maps_readable(reader->maps, arena->data + page * SP_PAGE_SIZE, n);
	if (n > 0)
		fingerprint_stretch(reader, arena, page, i, i + n, answer);
	return i + n;
}

/* Look at n pages from `page` on, and put what they are from place `first` of the answer on. */
static int fingerprint(struct sp_reader *reader, const struct sp_arena *arena, uint64_t page,
		       size_t n, size_t first, struct answer answer)
{
	size_t end = first + n;
	int error = sp_pagemap_read(reader->pagemap, arena->data + page * SP_PAGE_SIZE, n,
				    reader->page_states + first);

	if (error)
		return error;
	sp_away_hide_lost(&arena->away, page, n, reader->page_states + first);
	for (size_t i = first; i < end;) {
		size_t there = i, next;

		while (there < end && sp_pagemap_is_there(reader->page_states[there]))
			there++;
		next = i < there ? fingerprint_readable(reader, arena, page + (i - first), i, there,
							answer)
				 : i;
		if (next == i) {
			memset(answer.fingerprints + i * SP_FINGERPRINT_SIZE, 0, SP_FINGERPRINT_SIZE);
			answer.states[next++] = WIRE_PAGE_ABSENT;
		}
		i = next;
	}
	return 0;
}

static int send_done(struct sp_reader *reader, const struct sp_message *order, int error)
{
	struct wire_done done = {.error = error};
	struct iovec part = {.iov_base = &done, .iov_len = sizeof(done)};

	return send_message(reader, WIRE_DONE, order->header->seq, order->header->arena, &part, 1);
}

static int order_fingerprint(struct sp_node *node, const struct sp_message *order)
{
	const struct wire_range *ranges = (const struct wire_range *)order->payload;
	struct sp_reader *reader = &node->reader;
	struct sp_arena *arena = find(reader, order->header->arena);
	size_t n = order->length / sizeof(*ranges), first = 0;
	struct answer answer = {.fingerprints = reader->link.window};
	uint64_t pages;
	int error = 0;

	if (n == 0 || order->length % sizeof(*ranges))
		return -EPROTO;
	if (!arena || !arena->seeded)
		return send_done(reader, order, ENOENT);
	pages = wire_count_pages(ranges, n, arena->pages, WIRE_FINGERPRINT_PAGES_MAX);
	if (pages == 0)
		return -EPROTO;
	answer.states = reader->link.window + pages * SP_FINGERPRINT_SIZE;
	for (size_t i = 0; i < n && !error; i++) {
		pthread_mutex_lock(&node->reading);
		error = atomic_load(&arena->gone) ? -ENOENT
						  : fingerprint(reader, arena, ranges[i].page,
								ranges[i].count, first, answer);
		pthread_mutex_unlock(&node->reading);
		first += ranges[i].count;
	}
	return send_done(reader, order, -error);
}

static int order_changed(struct sp_reader *reader, const struct sp_message *order)
{
	const struct wire_range *range = (const struct wire_range *)order->payload;
	struct sp_arena *arena = find(reader, order->header->arena);
	struct wire_changed *changed = (struct wire_changed *)reader->link.window;
	size_t most = (SP_SCANNER_WINDOW - sizeof(*changed)) / sizeof(struct wire_range);
	int error;

	if (order->length != sizeof(*range))
		return -EPROTO;
	if (!arena)
		return send_done(reader, order, ENOENT);
	if (range->count == 0 || range->page >= arena->pages ||
	    range->count > arena->pages - range->page)
		return -EPROTO;
	if (!arena->tracked)
		return send_done(reader, order, ENOTSUP);
	error = sp_changes_take(reader->pagemap, arena->data, *range, &reader->regions, changed, most);
	return send_done(reader, order, -error);
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
		if (!error)
			show_credential(node);
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
		return reader->link.welcomed ? order_fingerprint(node, message) : -EPROTO;
	case WIRE_CHANGED:
		return reader->link.welcomed ? order_changed(reader, message) : -EPROTO;
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

/* What was left to another host is no arena of the scanner's any more. */
static void forget_gone(struct sp_reader *reader)
{
	struct sp_arena *arena = reader->arenas, *next;

	for (; arena; arena = next) {
		next = arena->reader_next;
		if (atomic_load(&arena->gone))
			forget(reader, arena);
	}
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
static bool carry_out(struct sp_node *node, struct sp_request *request)
{
	struct sp_reader *reader = &node->reader;
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
		if (reader->link.welcomed) {
			show_credential(node);
			announce(reader, arena);
		}
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
		forget_gone(reader);
		while (go_on && (request = sp_mailbox_take(&reader->mailbox)))
			go_on = carry_out(node, request);
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
	node->reader.maps = sp_maps_open();
	if (node->reader.maps < 0) {
		close(node->reader.pagemap);
		return node->reader.maps;
	}
	return sp_thread_start(&node->reader.thread, "samepage-read", run, node);
}

void sp_reader_stop(struct sp_node *node)
{
	struct sp_request request = {.kind = SP_REQUEST_STOP};

	sp_mailbox_call(&node->reader.mailbox, &request, -1);
	pthread_join(node->reader.thread, NULL);
	close(node->reader.pagemap);
	close(node->reader.maps);
}
