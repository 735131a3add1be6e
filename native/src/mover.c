/*
 * Mover: its loop, the application's requests, the link to the merger.
 */
#include "mover.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"
#include "sealed.h"
#include "thread.h"

#define RECONNECT_FIRST_MS 50
#define RECONNECT_MAX_MS 1000
#define SEND_PATIENCE_MS 1000
#define MESSAGES_A_TURN 16
#define NO_MEMORY "there is no memory for private copies; the pages stay shared and readable"
#define NO_MAPPING "the system gives no mapping (see vm.max_map_count) or no memory"
#define PINNED "pages of the arena are pinned for I/O: let it finish, then seal"
#define LOST "bytes of the arena are lost: no host that held them is left"
#define MERGER_AWAY "the merger is away; the arena's memory is safe, try again later"

struct sp_arena *sp_mover_find(const struct sp_mover *mover, uint32_t number)
{
	struct sp_arena *arena = mover->arenas;

	while (arena && arena->number != number)
		arena = arena->mover_next;
	return arena;
}

static void remove_arena(struct sp_mover *mover, struct sp_arena *arena)
{
	struct sp_arena **at = &mover->arenas;

	while (*at && *at != arena)
		at = &(*at)->mover_next;
	if (!*at)
		return;
	sp_mover_thaw(arena->node, arena);
	*at = arena->mover_next;
	sp_arena_put(arena);
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int sp_mover_send(struct sp_node *node, uint8_t type, uint32_t seq, uint32_t arena,
		  const struct iovec *parts, size_t n, int descriptor)
{
	struct sp_mover *mover = &node->mover;
	int64_t deadline = now_ms() + SEND_PATIENCE_MS;
	bool rung = false;
	int error;

	while ((error = sp_link_send(&mover->link, type, seq, arena, parts, n, descriptor)) ==
	       -EAGAIN) {
		struct pollfd polled[] = {{.fd = mover->link.sock, .events = POLLOUT},
					  {.fd = mover->mailbox.wake, .events = POLLIN}};

		if (now_ms() >= deadline)
			break;
		poll(polled, 2, 10);
		if (polled[1].revents) {
			sp_mailbox_hear(&mover->mailbox);
			rung = true;
		}
		sp_mover_serve_faults(node);
	}
	if (rung) /* it may have been for a request, which is the main loop's */
		sp_mailbox_ring(&mover->mailbox);
	if (error)
		sp_link_close(&mover->link);
	return error;
}

static void announce_all(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;

	mover->notice_count = 0;
	mover->notices_lost = false;
	sp_mover_show_credential(node);
	for (struct sp_arena *arena = mover->arenas; arena; arena = arena->mover_next)
		if (sp_mover_announce(node, arena, sp_link_next_seq(&mover->link)))
			return;
}

/* The store is not the merger's any more: leave it, and begin anew. */
static void leave_store(struct sp_node *node, struct sp_arena *arena)
{
	arena->announced = false; /* its books were refused: nobody waits for notices */
	if (sp_mover_restore(node, arena, 0, arena->pages))
		return; /* no memory now: it stays as it is until the next connection */
	close(arena->store);
	arena->store = -1;
	arena->lock = 0;
	sp_mover_announce(node, arena, sp_link_next_seq(&node->mover.link));
}

/* The domain of an arena that was opened without one: its process's own, as the merger has it. */
static int take_domain(struct sp_arena *arena, uint8_t version, const char *domain, size_t length)
{
	char name[SP_DOMAIN_MAX + 1] = SP_DEFAULT_DOMAIN;

	if (*arena->domain)
		return length > 0 ? -EPROTO : 0;
	if (version >= 3) {
		if (length > SP_DOMAIN_MAX)
			return -EPROTO;
		memcpy(name, domain, length);
		name[length] = '\0';
	}
	if (!sp_is_domain(name))
		return -EPROTO;
	strcpy(arena->domain, name);
	return 0;
}

static int receive_opened(struct sp_node *node, struct sp_message *message)
{
	const struct wire_arena_opened *opened = (const struct wire_arena_opened *)message->payload;
	struct sp_mover *mover = &node->mover;
	struct sp_arena *arena = sp_mover_find(mover, message->header->arena);
	struct sp_request *request;

	if (message->length < sizeof(*opened) ||
	    (arena && take_domain(arena, mover->link.version,
				  (const char *)message->payload + sizeof(*opened),
				  message->length - sizeof(*opened))))
		return -EPROTO;
	request = sp_mailbox_awaited(&mover->mailbox, message->header->seq);
	if (arena && message->descriptors[0] >= 0 && arena->store < 0 &&
	    !atomic_load(&arena->gone)) {
		arena->store = message->descriptors[0];
		message->descriptors[0] = -1;
	}
	if (arena) {
		arena->lock = opened->lock_or_seed;
		arena->opened = mover->link.version > 2;
		if (arena->opened)
			sp_mover_ask_again(node, arena);
		if (arena->cloning)
			sp_mailbox_renew(&mover->mailbox, SP_REQUEST_CLONE);
	}
	if (request)
		sp_mailbox_done(&mover->mailbox, request, 0, NULL);
	return 0;
}

static int receive_refused(struct sp_node *node, const struct sp_message *message)
{
	struct sp_mover *mover = &node->mover;
	struct sp_arena *arena = sp_mover_find(mover, message->header->arena);
	struct sp_request *request = sp_mailbox_awaited(&mover->mailbox, message->header->seq);
	char text[SP_REQUEST_TEXT];
	int error = sp_link_refusal(message, text, sizeof(text));

	if (!mover->link.welcomed)
		return sp_link_step_back(&mover->link, &node->hello, message);
	if (!request && arena && arena->cloning) /* the new arena was refused, not the clone */
		request = sp_mailbox_awaited(&mover->mailbox, arena->clone_seq);
	if (request) {
		if (request->kind == SP_REQUEST_ADD) {
			request->arena->announced = false;
			remove_arena(mover, request->arena);
		}
		sp_mailbox_done(&mover->mailbox, request, -error, text);
	} else if (arena && error == ESTALE && arena->store >= 0) {
		leave_store(node, arena);
	} else if (arena) {
		arena->announced = false;
	}
	return 0;
}

/* An answer of `length` bytes, which go to the request as they are. */
static int receive_answer(struct sp_node *node, const struct sp_message *message, size_t length)
{
	struct sp_mailbox *mailbox = &node->mover.mailbox;
	struct sp_request *request;

	if (message->length != length)
		return -EPROTO;
	request = sp_mailbox_awaited(mailbox, message->header->seq);
	if (!request)
		return 0;
	memcpy(request->answer, message->payload, length);
	sp_mailbox_done(mailbox, request, 0, NULL);
	return 0;
}

static int receive(struct sp_node *node, struct sp_message *message)
{
	struct sp_mover *mover = &node->mover;
	int error;

	switch (message->header->type) {
	case WIRE_WELCOME:
		error = sp_link_welcome(&mover->link, message, SP_MERGER_WINDOW);
		if (!error) {
			mover->reconnect_ms = RECONNECT_FIRST_MS;
			announce_all(node);
		}
		return error;
	case WIRE_REFUSED:
		return receive_refused(node, message);
	case WIRE_ARENA_OPENED:
		return receive_opened(node, message);
	case WIRE_ACCOUNTED:
		return receive_answer(node, message, sizeof(struct wire_accounted));
	case WIRE_EVICTED:
		return receive_answer(node, message, sizeof(struct wire_evicted));
	case WIRE_CLONING:
	case WIRE_CLONED:
		return sp_mover_receive_cloning(node, message);
	default:
		return mover->link.welcomed ? sp_mover_order(node, message) : -EPROTO;
	}
}

static void receive_some(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;

	for (int i = 0; i < MESSAGES_A_TURN && mover->link.sock >= 0; i++) {
		struct sp_message message;
		int result = sp_link_receive(&mover->link, &message);

		if (result == 0)
			return;
		if (result > 0) {
			/* whoever gave the order may know what the application has done before */
			sp_mover_catch_up(node);
			result = receive(node, &message);
			sp_message_close(&message);
			sp_mover_serve_faults(node);
			sp_mover_send_notices(node);
			sp_mover_send_fetches(node);
		}
		if (result < 0)
			sp_link_close(&mover->link);
	}
}

/* Requests that end with a message to the merger and wait for its answer. */
static void ask_merger(struct sp_node *node, struct sp_request *request)
{
	struct sp_mover *mover = &node->mover;
	uint32_t seq = sp_link_next_seq(&mover->link);
	struct sp_arena *arena = request->arena;
	struct wire_range range = {.page = request->page, .count = request->count};
	int error = -ENOTCONN;

	if (mover->link.welcomed && request->kind == SP_REQUEST_ADD) {
		sp_mover_show_credential(node);
		error = sp_mover_announce(node, arena, seq);
	} else if (mover->link.welcomed && request->kind == SP_REQUEST_ACCOUNT) {
		error = sp_mover_send(node, WIRE_ACCOUNT, seq, arena->number, NULL, 0, -1);
	} else if (mover->link.welcomed && mover->link.version > 2) {
		error = sp_mover_send(node, WIRE_EVICT_ARENA, seq, arena->number,
				      &(struct iovec){.iov_base = &range, .iov_len = sizeof(range)},
				      1, -1);
	}
	if (!error)
		sp_mailbox_await(&mover->mailbox, request, seq);
	else {
		if (request->kind == SP_REQUEST_ADD)
			remove_arena(mover, arena);
		sp_mailbox_done(&mover->mailbox, request, -ENOTCONN, MERGER_AWAY);
	}
}

/* Forget an arena whose pages map no slot any more. */
static void forget(struct sp_node *node, struct sp_arena *arena)
{
	sp_mover_send_notices(node);
	if (arena->announced || arena->cloning)
		sp_mover_send(node, WIRE_ARENA_CLOSE, 0, arena->number, NULL, 0, -1);
	remove_arena(&node->mover, arena);
}

/* End an arena for good. Where there is no memory to restore it, it goes on mapping the store: the
 * descriptor stays open, and with it the lock that tells the merger so. */
static void leave(struct sp_node *node, struct sp_arena *arena)
{
	atomic_store(&arena->closed, true);
	sp_mover_thaw(node, arena);
	sp_mover_lose_away(node, arena); /* what could not be brought back: never zeros */
	if (!sp_mover_restore(node, arena, 0, arena->pages)) {
		forget(node, arena);
		return;
	}
	arena->store = -1;
	remove_arena(&node->mover, arena);
}

/* Every page private again. -EAGAIN: pages are away, and must be fetched first. */
static int make_private(struct sp_node *node, struct sp_arena *arena)
{
	if (atomic_load(&arena->away.count) > 0)
		return -EAGAIN;
	return sp_mover_restore(node, arena, 0, arena->pages);
}

static void drop_memory(struct sp_arena *arena)
{
	if (arena->data)
		munmap(arena->data, arena->pages * SP_PAGE_SIZE);
	arena->data = NULL;
}

void sp_mover_enlist(struct sp_mover *mover, struct sp_arena *arena)
{
	atomic_fetch_add(&arena->references, 1);
	arena->mover_next = mover->arenas;
	mover->arenas = arena;
}

/* Take a new arena into the list and announce it. */
static void add_arena(struct sp_node *node, struct sp_request *request)
{
	struct sp_mover *mover = &node->mover;
	struct sp_arena *arena = request->arena;
	int error = 0;

	if (mover->can_share)
		error = sp_pager_adopt(&mover->pager, arena->data, arena->shadow, arena->pages,
				       &arena->tracked);
	if (error) {
		sp_mailbox_done(&mover->mailbox, request, error, NO_MAPPING);
		return;
	}
	sp_mover_enlist(mover, arena);
	ask_merger(node, request);
}

/* Carry out one request; false: it was the last one. */
static bool carry_out(struct sp_node *node, struct sp_request *request)
{
	struct sp_mover *mover = &node->mover;
	struct sp_arena *arena = request->arena;
	bool stop = request->kind == SP_REQUEST_STOP;
	const char *text = NO_MEMORY;
	int error = 0;

	/* what the application itself does to an arena ends its freeze */
	if (arena && request->kind != SP_REQUEST_ACCOUNT)
		sp_mover_thaw(node, arena);
	switch (request->kind) {
	case SP_REQUEST_ADD:
		add_arena(node, request);
		return true;
	case SP_REQUEST_CLONE:
		sp_mover_ask_clone(node, request);
		return true;
	case SP_REQUEST_ACCOUNT:
	case SP_REQUEST_EVICT:
		ask_merger(node, request);
		return true;
	case SP_REQUEST_FETCH:
		error = sp_mover_fetch(node, request);
		if (error == -EAGAIN) { /* it comes here again when pages have come */
			sp_mailbox_await(&mover->mailbox, request, 0);
			return true;
		}
		text = LOST;
		break;
	case SP_REQUEST_UNSHARE:
		error = make_private(node, arena);
		break;
	case SP_REQUEST_DISCARD:
		error = sp_mover_discard(node, arena, request->page, request->count);
		text = NO_MAPPING;
		break;
	case SP_REQUEST_SEAL:
		error = sp_mover_seal(node, arena);
		text = error == -EBUSY ? PINNED : NO_MAPPING;
		break;
	case SP_REQUEST_CLOSE:
		error = make_private(node, arena);
		if (!error)
			forget(node, arena);
		break;
	case SP_REQUEST_DROP:
		drop_memory(arena);
		forget(node, arena);
		break;
	default:
		while (mover->arenas)
			leave(node, mover->arenas);
	}
	sp_mailbox_done(&mover->mailbox, request, error, error ? text : NULL);
	return !stop;
}

static void lose_link(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;

	for (struct sp_arena *arena = mover->arenas; arena; arena = arena->mover_next) {
		sp_mover_thaw(node, arena);
		arena->announced = arena->opened = false;
	}
	mover->fetch_count = 0;
	mover->notice_count = 0;
	mover->notices_lost = false;
	sp_mailbox_fail_awaited(&mover->mailbox, -ENOTCONN, MERGER_AWAY);
}

/* Connect again when it is time to; returns how long poll() may sleep, ms. */
static int reconnect(struct sp_node *node, int64_t *next)
{
	struct sp_mover *mover = &node->mover;
	int64_t now = now_ms();

	if (mover->link.sock >= 0) {
		*next = 0;
		return -1;
	}
	if (*next == 0) {
		lose_link(node);
		*next = now + mover->reconnect_ms;
	}
	if (now < *next)
		return (int)(*next - now);
	if (mover->reconnect_ms < RECONNECT_MAX_MS)
		mover->reconnect_ms *= 2;
	*next = now + mover->reconnect_ms;
	return sp_link_open(&mover->link, &node->hello) ? mover->reconnect_ms : -1;
}

/* The shorter of two times to sleep, ms; -1 is for ever. */
static int sooner(int one, int other)
{
	return one < 0 || (other >= 0 && other < one) ? other : one;
}

static void *run(void *argument)
{
	struct sp_node *node = argument;
	struct sp_mover *mover = &node->mover;
	int64_t next = 0;
	bool go_on = true;

	if (mover->can_share)
		sp_pager_claim(&mover->pager);
	while (go_on) {
		struct sp_request *request;
		int timeout = sooner(reconnect(node, &next),
				     sooner(sooner(sp_mover_send_stalls(node), sp_mover_audit(node)),
					    sp_mover_thaw_due(node)));
		struct pollfd polled[] = {{.fd = mover->mailbox.wake, .events = POLLIN},
					  {.fd = mover->link.sock, .events = POLLIN}};

		poll(polled, 2, timeout);
		sp_mailbox_hear(&mover->mailbox);
		sp_mover_serve_faults(node);
		while (go_on && (request = sp_mailbox_take(&mover->mailbox)))
			go_on = carry_out(node, request);
		sp_mover_send_notices(node);
		sp_mover_send_fetches(node);
		if (mover->link.sock >= 0 && polled[1].revents)
			receive_some(node);
	}
	sp_mailbox_close(&mover->mailbox, -EBADF);
	sp_link_close(&mover->link);
	return NULL;
}

int sp_mover_start(struct sp_node *node)
{
	node->mover.reconnect_ms = RECONNECT_FIRST_MS;
	return sp_thread_start(&node->mover.thread, "samepage-move", run, node);
}

void sp_mover_stop(struct sp_node *node)
{
	struct sp_request request = {.kind = SP_REQUEST_STOP};

	sp_mailbox_call(&node->mover.mailbox, &request, -1);
	pthread_join(node->mover.thread, NULL);
}
