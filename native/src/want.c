/*
 * Mover: asking the merger for away pages that somebody waits for.
 *
 * A page is asked for once on a connection, and marked. Whoever touches it meanwhile sleeps in the
 * kernel; nothing is kept of the thread. When something was not asked for after all (the connection
 * broke, too much at once) all are woken: who still needs a page comes back.
 */
#include <errno.h>

#include "mover.h"

#define AHEAD_MAX 128 /* pages asked for at one touch, at most */

/* How many pages to ask for at a touch of `page`: more and more while touches go straight on. */
static uint32_t grown_run(struct sp_away *away, uint64_t page)
{
	struct sp_stream *stream = NULL;

	for (size_t i = 0; i < SP_STREAMS && !stream; i++)
		if (away->streams[i].run > 0 && away->streams[i].next == page)
			stream = &away->streams[i];
	if (!stream) {
		stream = &away->streams[away->oldest++ % SP_STREAMS];
		stream->run = 0;
	}
	stream->run = stream->run == 0 ? 1 : stream->run * 2;
	if (stream->run > AHEAD_MAX)
		stream->run = AHEAD_MAX;
	stream->next = page + stream->run;
	return stream->run;
}

static bool is_wanting(const struct sp_arena *arena, uint64_t page)
{
	return (sp_away_mark(&arena->away, page) & (SP_MARK_AWAY | SP_MARK_WANTED)) == SP_MARK_AWAY;
}

/* Ask for what is away of [page, end). */
static void want_range(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t end)
{
	struct sp_mover *mover = &node->mover;

	while (page < end) {
		struct sp_notice *fetch = &mover->fetches[mover->fetch_count];
		uint64_t first = page;

		if (!is_wanting(arena, page)) {
			page++;
			continue;
		}
		if (mover->fetch_count == SP_FETCHES) {
			arena->away.missed = true;
			return;
		}
		for (; page < end && is_wanting(arena, page); page++)
			sp_away_set_wanted(&arena->away, page, true);
		*fetch = (struct sp_notice){.arena = arena->number,
					    .range = {.page = first, .count = page - first}};
		mover->fetch_count++;
	}
}

void sp_mover_want(struct sp_node *node, struct sp_arena *arena, uint64_t page)
{
	uint64_t run;

	if (!arena->opened || !is_wanting(arena, page))
		return; /* or else it is asked for when the merger is back */
	run = grown_run(&arena->away, page);
	want_range(node, arena, page, page + run < arena->pages ? page + run : arena->pages);
}

/* Visit the stretches that reach into [page, end). */
#define FOR_STRETCHES(arena, i, first, last)                                                       \
	for (size_t i = sp_extents_find(&(arena)->extents, first);                                 \
	     i < (arena)->extents.count && (arena)->extents.entries[i].page < (last); i++)         \
		if ((arena)->extents.entries[i].slot == SP_SLOT_AWAY)

void sp_mover_ask_again(struct sp_node *node, struct sp_arena *arena)
{
	arena->away.missed = false;
	FOR_STRETCHES(arena, i, 0, arena->pages)
	{
		const struct sp_extent *extent = &arena->extents.entries[i];

		for (uint64_t page = extent->page; page < (uint64_t)extent->page + extent->count; page++)
			sp_away_set_wanted(&arena->away, page, false);
		sp_pager_wake(&node->mover.pager, arena->data + extent->page * (size_t)SP_PAGE_SIZE,
			      extent->count);
	}
	node->mover.came_back = true;
}

static bool may_ask(const struct sp_mover *mover)
{
	return mover->link.welcomed && mover->link.version > 2;
}

void sp_mover_send_fetches(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;
	struct wire_range ranges[SP_FETCHES];
	size_t first = 0;

	while (may_ask(mover) && first < mover->fetch_count) {
		uint32_t arena = mover->fetches[first].arena;
		struct iovec part = {.iov_base = ranges};
		size_t n = 0;

		while (first + n < mover->fetch_count && mover->fetches[first + n].arena == arena) {
			ranges[n] = mover->fetches[first + n].range;
			n++;
		}
		part.iov_len = n * sizeof(*ranges);
		first += n;
		if (sp_mover_send(node, WIRE_FETCH, 0, arena, &part, 1, -1))
			break;
	}
	/* what threads asked for while this was being sent */
	mover->fetch_count -= first;
	for (size_t i = 0; i < mover->fetch_count; i++)
		mover->fetches[i] = mover->fetches[first + i];
	for (struct sp_arena *arena = mover->arenas; arena; arena = arena->mover_next) {
		if (!arena->away.missed)
			continue;
		arena->away.missed = false;
		sp_pager_wake(&mover->pager, arena->data, arena->pages);
		mover->came_back = true;
	}
	if (!mover->came_back)
		return;
	mover->came_back = false;
	sp_mailbox_renew(&mover->mailbox, SP_REQUEST_FETCH);
}

/* Ask for all of a range. -EAGAIN: there is something to wait for. -EIO: something is lost. */
static int bring_back(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count)
{
	uint64_t end = page + count;
	bool away = false, lost = false;

	if (atomic_load(&arena->away.count) + atomic_load(&arena->away.lost) == 0)
		return 0;
	FOR_STRETCHES(arena, i, page, end)
	{
		const struct sp_extent *extent = &arena->extents.entries[i];
		uint64_t last = (uint64_t)extent->page + extent->count, n;
		uint64_t at = extent->page > page ? extent->page : page;

		if (last > end)
			last = end;
		if (arena->opened)
			want_range(node, arena, at, last);
		for (; at < last; at += n) {
			uint8_t mark = sp_away_mark(&arena->away, at);

			n = sp_away_run(&arena->away, at, last);
			away |= mark & SP_MARK_AWAY;
			lost |= mark & SP_MARK_LOST;
		}
	}
	return away ? -EAGAIN : lost ? -EIO : 0;
}

int sp_mover_fetch(struct sp_node *node, const struct sp_request *request)
{
	struct sp_arena *arena = request->arena;
	int error = 0;

	if (arena)
		return bring_back(node, arena, request->page, request->count);
	node->mover.leaving = true;
	for (arena = node->mover.arenas; arena; arena = arena->mover_next) {
		int result = bring_back(node, arena, 0, arena->pages);

		error = error == -EAGAIN || !result ? error : result;
	}
	return error;
}
