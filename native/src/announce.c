/*
 * Mover: announcing an arena to the merger, with what it maps and what is away.
 */
#include <errno.h>
#include <string.h>

#include "credential.h"
#include "kernel.h"
#include "mover.h"
#include "sealed.h"

/* The runs that map slots, in the protocol's form, as they are now. Returns their number; *runs is
 * a mapping of *length bytes, or NULL for none. */
static size_t copy_extents(const struct sp_extents *extents, struct wire_run **runs, size_t *length)
{
	size_t n = 0;

	*runs = NULL;
	*length = extents->count * sizeof(**runs);
	if (*length == 0)
		return 0;
	*runs = mmap(NULL, *length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (*runs == MAP_FAILED)
		*runs = NULL;
	for (size_t i = 0; *runs && i < extents->count; i++) {
		const struct sp_extent *extent = &extents->entries[i];

		if (sp_extent_is_shared(extent))
			(*runs)[n++] = (struct wire_run){.page = extent->page,
							 .count = extent->count,
							 .slot = extent->slot};
	}
	return n;
}

static int send_extents(struct sp_node *node, const struct sp_arena *arena, struct wire_run *runs,
			size_t n)
{
	size_t most = (WIRE_MESSAGE_MAX - sizeof(struct wire_header)) / sizeof(*runs);
	int error = 0;

	while (n > 0 && !error) {
		size_t some = n < most ? n : most;
		struct iovec part = {.iov_base = runs, .iov_len = some * sizeof(*runs)};

		error = sp_mover_send(node, WIRE_EXTENTS, 0, arena->number, &part, 1, -1);
		runs += some;
		n -= some;
	}
	return error;
}

/* The next page from *page on that is away. false: there is none. */
static bool next_away(const struct sp_arena *arena, uint64_t *page)
{
	while (*page < arena->pages) {
		size_t i = sp_extents_find(&arena->extents, *page);
		const struct sp_extent *extent = &arena->extents.entries[i];

		if (i == arena->extents.count)
			return false;
		if (extent->page > *page)
			*page = extent->page;
		if (extent->slot != SP_SLOT_AWAY)
			*page = (uint64_t)extent->page + extent->count;
		else if (sp_away_mark(&arena->away, *page) & SP_MARK_AWAY)
			return true;
		else
			++*page;
	}
	return false;
}

/* Tell of all pages that are away, of which ARENA_OPEN said that they are n. */
static int send_away(struct sp_node *node, struct sp_arena *arena, uint64_t n)
{
	struct wire_away records[WIRE_AWAY_PAGES_MAX / 8];
	size_t most = sizeof(records) / sizeof(*records), some = 0;
	uint64_t page = 0;
	int error = 0;

	for (bool more = n > 0; more && !error; page++) {
		struct iovec part = {.iov_base = records};

		more = next_away(arena, &page);
		if (more) {
			records[some].page = page;
			memcpy(records[some++].digest, sp_away_digest(&arena->away, page),
			       WIRE_DIGEST_SIZE);
		}
		if (some == 0 || (more && some < most))
			continue;
		if (some > n) /* the application has changed it meanwhile */
			return -EAGAIN;
		part.iov_len = some * sizeof(*records);
		error = sp_mover_send(node, WIRE_AWAY_PAGES, 0, arena->number, &part, 1, -1);
		n -= some;
		some = 0;
	}
	return error ? error : n > 0 ? -EAGAIN : 0;
}

void sp_mover_show_credential(struct sp_node *node)
{
	char token[SP_CREDENTIAL_MAX];
	struct iovec part = {.iov_base = token,
			     .iov_len = sp_credential_read(node->token_file, token)};

	if (part.iov_len > 0 && node->mover.link.version >= 3)
		sp_mover_send(node, WIRE_CREDENTIAL, 0, 0, &part, 1, -1);
}

int sp_mover_announce(struct sp_node *node, struct sp_arena *arena, uint32_t seq)
{
	struct sp_link *link = &node->mover.link;
	const char *domain = *arena->domain || link->version > 2 ? arena->domain : SP_DEFAULT_DOMAIN;
	struct wire_arena_open open = {.pages = arena->pages,
				       .lock = arena->lock,
				       .away = atomic_load(&arena->away.count)};
	struct iovec parts[] = {{.iov_base = &open, .iov_len = sp_link_open_length(link)},
				{.iov_base = arena->name, .iov_len = strlen(arena->name)},
				{.iov_base = (void *)domain, .iov_len = strlen(domain)}};
	struct wire_run *runs;
	size_t length, n = copy_extents(&arena->extents, &runs, &length);
	int error;

	open.extents = (uint32_t)n;
	open.name_bytes = (uint16_t)parts[1].iov_len;
	open.domain_bytes = (uint16_t)parts[2].iov_len;
	memcpy(open.left, arena->left, sizeof(open.left));
	arena->announced = true; /* from the copy on, changes are noticed */
	error = atomic_load(&arena->sealed) ? sp_mover_tell_sealed(node, arena) : 0;
	if (!error)
		error = sp_mover_send(node, WIRE_ARENA_OPEN, seq, arena->number, parts, 3,
				      arena->store);
	if (!error)
		error = send_extents(node, arena, runs, n);
	if (runs)
		munmap(runs, length);
	if (!error && link->version > 2)
		error = send_away(node, arena, open.away);
	if (error) /* announced anew with the next connection */
		sp_link_close(link);
	return error;
}
