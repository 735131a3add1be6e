/*
 * sp_arena_clone() and the mover's part of it: an arena that is a copy of one on another host.
 *
 * The application's thread makes the handle and waits. The mover asks the merger, maps the memory
 * when it hears how large it is, and carries out the merger's orders as for any arena; none of it is
 * seen before CLONED comes. A clone that fails is dropped whole. One that migrates may be the only
 * copy by then: it waits for the merger's word, also over a broken connection.
 */
#include "clone.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "error.h"
#include "mover.h"
#include "sealed.h"

#define NO_MEMORY "there is no memory, or no address space, for an arena of that size"
#define NOT_HERE                                                                                   \
	"this kernel, or the merger's version, lacks what arenas of other hosts need: see sp_probe()"
#define MERGER_AWAY "the merger is away; try again later"

struct sp_clone_fields {
	struct wire_clone clone;
	char text[2 * (SP_NAME_MAX + 1) + SP_HOST_MAX + SP_DOMAIN_MAX];
};

static void put(struct sp_clone_fields *fields, size_t *length, const char *text, uint16_t *bytes)
{
	*bytes = (uint16_t)strlen(text);
	memcpy(fields->text + *length, text, *bytes);
	*length += *bytes;
}

static int send_clone(struct sp_node *node, const struct sp_request *request, uint32_t seq)
{
	const struct sp_clone *clone = request->answer;
	struct sp_clone_fields fields = {
		.clone = {.flags = clone->flags, .freeze_ms = clone->freeze_ms}};
	struct iovec part = {.iov_base = &fields};
	size_t length = 0;

	put(&fields, &length, clone->host, &fields.clone.host_bytes);
	put(&fields, &length, clone->source, &fields.clone.source_bytes);
	put(&fields, &length, request->arena->name, &fields.clone.name_bytes);
	put(&fields, &length, request->arena->domain, &fields.clone.domain_bytes);
	part.iov_len = sizeof(fields.clone) + length;
	sp_mover_show_credential(node);
	return sp_mover_send(node, WIRE_CLONE, seq, request->arena->number, &part, 1, -1);
}

void sp_mover_ask_clone(struct sp_node *node, struct sp_request *request)
{
	struct sp_mover *mover = &node->mover;
	struct sp_arena *arena = request->arena;
	uint32_t seq = sp_link_next_seq(&mover->link);

	if (arena->data && !arena->opened) /* it migrates: once more, when the merger knows it again */
		sp_mailbox_await(&mover->mailbox, request, 0);
	else if (!mover->link.welcomed)
		sp_mailbox_done(&mover->mailbox, request, -ENOTCONN, MERGER_AWAY);
	else if (!mover->pager.can_away || mover->link.version < 3)
		sp_mailbox_done(&mover->mailbox, request, -ENOTSUP, NOT_HERE);
	else if (send_clone(node, request, seq))
		sp_mailbox_done(&mover->mailbox, request, -ENOTCONN, MERGER_AWAY);
	else
		sp_mailbox_await(&mover->mailbox, request, seq);
	arena->cloning = true;
	arena->clone_seq = seq;
}

/* Make the arena, now that its size is known, and announce it. */
static int make(struct sp_node *node, struct sp_arena *arena, uint64_t pages)
{
	uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES);
	int error;

	if (pages == 0)
		return -EPROTO;
	error = pages > memory ? -ENOMEM : sp_arena_map(arena, pages);
	if (!error)
		error = sp_pager_adopt(&node->mover.pager, arena->data, arena->shadow, arena->pages,
				       &arena->tracked);
	if (error)
		return -ENOMEM;
	sp_mover_enlist(&node->mover, arena);
	sp_mover_announce(node, arena, sp_link_next_seq(&node->mover.link));
	return 0;
}

int sp_mover_receive_cloning(struct sp_node *node, const struct sp_message *message)
{
	struct sp_mailbox *mailbox = &node->mover.mailbox;
	struct wire_cloned cloned = {0};
	struct sp_request *request;
	const struct sp_clone *clone;
	bool last = message->header->type == WIRE_CLONED;
	int error = 0;

	if (message->length != (last ? sizeof(cloned) : offsetof(struct wire_cloned, freeze_us)))
		return -EPROTO;
	memcpy(&cloned, message->payload, message->length);
	request = sp_mailbox_awaited(mailbox, message->header->seq);
	if (!request)
		return 0; /* given up */
	clone = request->answer;
	if (!request->arena->data)
		error = last ? -EPROTO : make(node, request->arena, cloned.pages);
	if (!error && cloned.pages != request->arena->pages)
		error = -EPROTO;
	if (!error && cloned.sealed && !atomic_load(&request->arena->sealed))
		error = sp_mover_seal_clone(node, request->arena);
	if (error) {
		sp_mailbox_done(mailbox, request, error == -EPROTO ? -ENOTCONN : error,
				error == -EPROTO ? "the merger broke the protocol" : NO_MEMORY);
		return error == -EPROTO ? error : 0;
	}
	request->firm = clone->flags & SP_CLONE_MIGRATE;
	request->arena->cloning = !last;
	sp_mailbox_tell(mailbox, request,
			&(struct sp_clone_progress){.local_bytes = cloned.local * SP_PAGE_SIZE,
						    .fetched_bytes = cloned.fetched * SP_PAGE_SIZE,
						    .missing_bytes = cloned.missing * SP_PAGE_SIZE,
						    .freeze_us = cloned.freeze_us});
	if (last)
		sp_mailbox_done(mailbox, request, 0, NULL);
	else
		sp_mailbox_await(mailbox, request, message->header->seq);
	return 0;
}

/* In the caller's thread. */
static void tell(const struct sp_request *request, const struct sp_clone_progress *progress)
{
	const struct sp_clone *clone = request->answer;

	if (clone->tell)
		clone->tell(progress, clone->context);
}

static int check_source(const char *host, const char *source, uint32_t flags)
{
	size_t length = host ? strlen(host) : 0;

	if (length == 0 || length > SP_HOST_MAX || strchr(host, '/'))
		return sp_fail(-EINVAL, "a host's name is 1 to %d bytes without '/'", SP_HOST_MAX);
	if (!source || !*source || strlen(source) > SP_NAME_MAX || strchr(source, '/'))
		return sp_fail(-EINVAL, "the source is HOST/ARENA, each a name");
	if (flags & ~(uint32_t)(SP_CLONE_LAZY | SP_CLONE_MIGRATE))
		return sp_fail(-EINVAL, "unknown flags 0x%x", flags);
	if (flags == (SP_CLONE_LAZY | SP_CLONE_MIGRATE))
		return sp_fail(-EINVAL, "an arena that migrates is here when it arrives: not lazily");
	return 0;
}

int sp_arena_clone(struct sp_node *node, const struct sp_clone_options *options, int timeout_ms,
		   void (*progress)(const struct sp_clone_progress *, void *), void *context,
		   struct sp_arena **out)
{
	const char *name = options->name ? options->name : options->source_arena;
	struct sp_clone clone = {.host = options->source_host,
				 .source = options->source_arena,
				 .flags = options->flags,
				 .freeze_ms = options->max_freeze_ms,
				 .tell = progress,
				 .context = context};
	struct sp_request request = {.kind = SP_REQUEST_CLONE,
				     .answer = &clone,
				     .told = tell,
				     .give_up = options->give_up};
	struct sp_request drop = {.kind = SP_REQUEST_DROP}, add = {.kind = SP_REQUEST_ADD};
	int error = check_source(clone.host, clone.source, clone.flags);

	if (!error && options->give_up && *options->give_up)
		error = sp_fail(-ECANCELED, "it was given up");
	if (!error)
		error = sp_arena_make(node, name, options->domain, &request.arena);
	if (error)
		return error;
	do
		error = sp_mailbox_call(&node->mover.mailbox, &request, timeout_ms);
	while (error == -ENOTCONN && request.firm);
	if (error) {
		drop.arena = request.arena;
		sp_mailbox_call(&node->mover.mailbox, &drop, -1);
		sp_arena_put(request.arena);
		return error;
	}
	add.arena = request.arena;
	sp_mailbox_call(&node->reader.mailbox, &add, -1);
	*out = request.arena;
	return 0;
}
