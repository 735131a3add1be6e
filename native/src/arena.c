/*
 * sp_arena_*(): what an application does with an arena.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clone.h"
#include "error.h"
#include "node.h"
#include "pagemap.h"

#define CREATE_MS 5000
#define ACCOUNT_MS 1000

static bool is_name(const char *name)
{
	size_t length = strlen(name);

	if (length == 0 || length > SP_NAME_MAX)
		return false;
	for (size_t i = 0; i < length; i++)
		if (name[i] == '/' || (uint8_t)name[i] < 0x20 || name[i] == 0x7f)
			return false;
	return true;
}

bool sp_is_domain(const char *domain)
{
	size_t length = strlen(domain);

	return length > 0 && length <= SP_DOMAIN_MAX &&
	       strspn(domain, "abcdefghijklmnopqrstuvwxyz0123456789-.") == length &&
	       !strchr("-.", domain[0]) && !strchr("-.", domain[length - 1]);
}

static int check_names(const char *name, const char *domain)
{
	if (sysconf(_SC_PAGESIZE) != SP_PAGE_SIZE)
		return sp_fail(-ENOTSUP, "this machine's pages are not of %d bytes", SP_PAGE_SIZE);
	if (!name || !is_name(name))
		return sp_fail(-EINVAL, "an arena's name is 1 to %d bytes without '/' or control "
					"characters",
			       SP_NAME_MAX);
	if (domain && !sp_is_domain(domain))
		return sp_fail(-EINVAL, "a domain's name is 1 to %d characters of a-z, 0-9, '-' and "
					"'.', and neither begins nor ends with '-' or '.'",
			       SP_DOMAIN_MAX);
	return 0;
}

static int check_size(size_t size)
{
	size_t memory = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);

	if (size == 0)
		return sp_fail(-EINVAL, "an arena needs a size of at least 1 byte");
	if (size > memory)
		return sp_fail(-ENOMEM, "%zu bytes are more than this machine's memory (%zu bytes)",
			       size, memory);
	return 0;
}

static void unmap_memory(struct sp_arena *arena)
{
	if (arena->data)
		sp_memory_unmap(arena->data, arena->pages);
	if (arena->shadow)
		sp_memory_unmap(arena->shadow, arena->pages);
}

int sp_arena_map(struct sp_arena *arena, uint64_t pages)
{
	arena->pages = pages;
	arena->data = sp_memory_map(pages, &arena->shadow);
	if (!arena->data)
		return -ENOMEM;
	if (!sp_extents_init(&arena->extents, pages))
		return 0;
	unmap_memory(arena);
	arena->data = arena->shadow = NULL;
	return -ENOMEM;
}

int sp_arena_make(struct sp_node *node, const char *name, const char *domain,
		  struct sp_arena **out)
{
	struct sp_arena *arena;
	int error;

	if (atomic_load(&node->forked))
		return sp_fail(-ECHILD, "the connection is the parent's: connect anew in the child");
	if (atomic_load(&node->closed))
		return sp_fail(-EBADF, "the connection is closed");
	error = check_names(name, domain);
	if (error)
		return error;
	arena = calloc(1, sizeof(*arena));
	if (!arena)
		return sp_fail(-ENOMEM, "no memory is left");
	strcpy(arena->name, name);
	strcpy(arena->domain, domain ? domain : "");
	arena->node = node;
	arena->number = atomic_fetch_add(&node->last_arena, 1) + 1;
	arena->store = -1;
	atomic_init(&arena->references, 1);
	atomic_fetch_add(&node->references, 1);
	*out = arena;
	return 0;
}

void sp_arena_put(struct sp_arena *arena)
{
	struct sp_node *node = arena->node;

	if (atomic_fetch_sub(&arena->references, 1) != 1)
		return;
	if (!atomic_load(&node->forked)) {
		unmap_memory(arena);
		if (arena->store >= 0)
			close(arena->store);
	}
	sp_extents_destroy(&arena->extents);
	sp_away_destroy(&arena->away);
	free(arena);
	sp_node_put(node);
}

static int usable(const struct sp_arena *arena)
{
	if (atomic_load(&arena->node->forked))
		return sp_fail(-ECHILD, "an arena is not inherited over fork: connect anew in the child");
	if (atomic_load(&arena->closed))
		return sp_fail(-EBADF, "the arena is closed");
	if (atomic_load(&arena->gone))
		return sp_fail(-EREMOTE, "the arena was migrated to another host: use it there");
	return 0;
}

static int ask(struct sp_mailbox *mailbox, enum sp_request_kind kind, struct sp_arena *arena,
	       void *answer, int timeout_ms)
{
	struct sp_request request = {.kind = kind, .arena = arena, .answer = answer};

	return sp_mailbox_call(mailbox, &request, timeout_ms);
}

int sp_arena_create(struct sp_node *node, const char *name, const char *domain, size_t size,
		    struct sp_arena **out)
{
	struct sp_arena *arena;
	int error = check_size(size);

	if (!error)
		error = sp_arena_make(node, name, domain, &arena);
	if (error)
		return error;
	if (sp_arena_map(arena, (size + SP_PAGE_SIZE - 1) / SP_PAGE_SIZE)) {
		sp_arena_put(arena);
		return sp_fail(-ENOMEM, "the system gives no %zu bytes", size);
	}
	error = ask(&node->mover.mailbox, SP_REQUEST_ADD, arena, NULL, CREATE_MS);
	if (error == -ETIMEDOUT)
		sp_fail(error, "the merger did not answer within %d s", CREATE_MS / 1000);
	if (error) {
		/* or the mover would announce it to the next merger */
		ask(&node->mover.mailbox, SP_REQUEST_DROP, arena, NULL, -1);
		sp_arena_put(arena);
		return error;
	}
	ask(&node->reader.mailbox, SP_REQUEST_ADD, arena, NULL, -1);
	*out = arena;
	return 0;
}

void *sp_arena_data(const struct sp_arena *arena)
{
	return arena->data;
}

const char *sp_arena_domain(const struct sp_arena *arena)
{
	return arena->domain;
}

size_t sp_arena_size(const struct sp_arena *arena)
{
	return arena->pages * SP_PAGE_SIZE;
}

int sp_arena_sealed(const struct sp_arena *arena)
{
	return atomic_load(&arena->sealed);
}

int sp_arena_share(struct sp_arena *arena, int timeout_ms, struct sp_share_report *report)
{
	struct wire_shared shared;
	int error = usable(arena);

	if (!error)
		error = ask(&arena->node->reader.mailbox, SP_REQUEST_SHARE, arena, &shared,
			    timeout_ms);
	if (error)
		return error;
	*report = (struct sp_share_report){.merged = shared.merged,
					   .differs = shared.differs,
					   .pinned = shared.pinned,
					   .absent = shared.absent,
					   .busy = shared.busy,
					   .no_mapping = shared.no_mapping,
					   .unsupported = shared.unsupported,
					   .unique = shared.unique,
					   .shared = shared.shared,
					   .pages = shared.pages,
					   .no_headroom = shared.no_headroom};
	return 0;
}

static uint64_t at_most(uint64_t count, uint64_t most)
{
	return count < most ? count : most;
}

static int count_pages(const struct sp_arena *arena, int pagemap, struct sp_arena_stats *stats)
{
	struct sp_page_counts counts = {0};
	uint64_t away, lost;

	for (size_t page = 0; page < arena->pages; page += SP_COUNT_PAGES) {
		size_t left = arena->pages - page, n = left < SP_COUNT_PAGES ? left : SP_COUNT_PAGES;
		int error = sp_pagemap_count(pagemap, arena->data + page * SP_PAGE_SIZE, n, &counts);

		if (error)
			return error;
	}
	/* away pages look absent, and lost ones as if they were swapped out */
	away = at_most(atomic_load(&arena->away.count), counts.absent_pages);
	lost = at_most(atomic_load(&arena->away.lost), counts.private_pages);
	stats->private_pages = counts.private_pages - lost;
	stats->shared_pages = counts.shared_pages;
	stats->absent_pages = counts.absent_pages - away;
	stats->evicted_pages = away + lost;
	return 0;
}

int sp_arena_stats(struct sp_arena *arena, struct sp_arena_stats *stats)
{
	struct wire_accounted accounted;
	int pagemap, error = usable(arena);

	if (error)
		return error;
	*stats = (struct sp_arena_stats){.pages = arena->pages};
	pagemap = sp_pagemap_open();
	if (pagemap < 0)
		return sp_fail(pagemap, "cannot open /proc/self/pagemap: %s", strerror(-pagemap));
	error = count_pages(arena, pagemap, stats);
	close(pagemap);
	if (error)
		return sp_fail(error, "cannot read /proc/self/pagemap: %s", strerror(-error));
	if (!ask(&arena->node->mover.mailbox, SP_REQUEST_ACCOUNT, arena, &accounted, ACCOUNT_MS))
		stats->saved_bytes = accounted.saved_bytes;
	return 0;
}

int sp_arena_seal(struct sp_arena *arena)
{
	int error = usable(arena);

	return error ? error : ask(&arena->node->mover.mailbox, SP_REQUEST_SEAL, arena, NULL, -1);
}

static int check_range(const struct sp_arena *arena, size_t offset, size_t length)
{
	size_t size = arena->pages * SP_PAGE_SIZE;

	if (offset % SP_PAGE_SIZE || length % SP_PAGE_SIZE)
		return sp_fail(-EINVAL, "offset %zu and length %zu are not whole pages of %d bytes",
			       offset, length, SP_PAGE_SIZE);
	if (offset > size || length > size - offset)
		return sp_fail(-EINVAL, "%zu bytes at offset %zu are not inside the arena's %zu bytes",
			       length, offset, size);
	return 0;
}

int sp_arena_discard(struct sp_arena *arena, size_t offset, size_t length)
{
	struct sp_request request = {.kind = SP_REQUEST_DISCARD,
				     .arena = arena,
				     .page = offset / SP_PAGE_SIZE,
				     .count = length / SP_PAGE_SIZE};
	int error = usable(arena);

	if (error)
		return error;
	if (atomic_load(&arena->sealed))
		return sp_fail(-EPERM, "the arena is sealed: it can only be read");
	error = check_range(arena, offset, length);
	if (error)
		return error;
	return sp_mailbox_call(&arena->node->mover.mailbox, &request, -1);
}

int sp_arena_fetch(struct sp_arena *arena, size_t offset, size_t length, int timeout_ms)
{
	struct sp_request request = {.kind = SP_REQUEST_FETCH,
				     .arena = arena,
				     .page = offset / SP_PAGE_SIZE,
				     .count = length / SP_PAGE_SIZE};
	int error = usable(arena);

	if (!error)
		error = check_range(arena, offset, length);
	if (error)
		return error;
	return sp_mailbox_call(&arena->node->mover.mailbox, &request, timeout_ms);
}

int sp_arena_evict(struct sp_arena *arena, size_t offset, size_t length, int timeout_ms,
		   struct sp_evict_report *report)
{
	struct wire_evicted evicted;
	struct sp_request request = {.kind = SP_REQUEST_EVICT,
				     .arena = arena,
				     .answer = &evicted,
				     .page = offset / SP_PAGE_SIZE,
				     .count = length / SP_PAGE_SIZE};
	int error = usable(arena);

	if (!error)
		error = check_range(arena, offset, length);
	if (error)
		return error;
	*report = (struct sp_evict_report){0};
	if (request.count == 0)
		return 0;
	error = sp_mailbox_call(&arena->node->mover.mailbox, &request, timeout_ms);
	if (!error)
		*report = (struct sp_evict_report){.held_elsewhere = evicted.held,
						   .spilled = evicted.spilled,
						   .kept = evicted.kept,
						   .no_room = evicted.no_room};
	return error;
}

/* Bring away pages back, however long it takes, then have the mover do what needs them all here.
 * -EIO: done, but bytes are lost. */
static int ask_with_all(struct sp_arena *arena, enum sp_request_kind kind)
{
	struct sp_mailbox *mailbox = &arena->node->mover.mailbox;
	struct sp_request fetch = {
		.kind = SP_REQUEST_FETCH, .arena = arena, .count = arena->pages};
	int fetched, error;

	atomic_store(&arena->keep, true);
	do {
		fetched = sp_mailbox_call(mailbox, &fetch, -1);
		if (fetched && fetched != -EIO)
			return fetched;
		error = ask(mailbox, kind, arena, NULL, -1);
	} while (error == -EAGAIN);
	atomic_store(&arena->keep, false);
	return error ? error : fetched;
}

int sp_arena_unshare(struct sp_arena *arena)
{
	int error = usable(arena);

	return error ? error : ask_with_all(arena, SP_REQUEST_UNSHARE);
}

int sp_arena_close(struct sp_arena *arena)
{
	int error;

	if (atomic_load(&arena->node->forked))
		return usable(arena);
	if (atomic_exchange(&arena->closed, true))
		return 0;
	error = ask_with_all(arena, SP_REQUEST_CLOSE);
	if (error == -ENOMEM) {
		atomic_store(&arena->closed, false);
		return error;
	}
	ask(&arena->node->reader.mailbox, SP_REQUEST_CLOSE, arena, NULL, -1);
	return error == -EIO ? sp_fail(error, "the arena is closed; bytes of it are lost") : 0;
}

void sp_arena_free(struct sp_arena *arena)
{
	if (!atomic_load(&arena->node->forked) && !atomic_exchange(&arena->closed, true)) {
		/* the reader first: it must not be reading what is unmapped */
		ask(&arena->node->reader.mailbox, SP_REQUEST_CLOSE, arena, NULL, -1);
		ask(&arena->node->mover.mailbox, SP_REQUEST_DROP, arena, NULL, -1);
	}
	sp_arena_put(arena);
}
