/*
 * Mover: the merger's orders.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "kernel.h"
#include "maps.h"
#include "mover.h"
#include "pagemap.h"
#include "sealed.h"

#define READ_PAGES 256 /* read after one look at their mapping: some 30 us */

int sp_mover_send_done(struct sp_node *node, const struct sp_message *order, int error,
		       size_t outcomes)
{
	struct wire_done done = {.error = error, .outcomes = (uint32_t)outcomes};
	struct iovec parts[] = {{.iov_base = &done, .iov_len = sizeof(done)},
				{.iov_base = node->mover.outcomes, .iov_len = outcomes}};

	return sp_mover_send(node, WIRE_DONE, order->header->seq, order->header->arena, parts, 2, -1);
}

static bool is_inside(const struct sp_arena *arena, uint64_t page, uint64_t count)
{
	return count > 0 && page < arena->pages && count <= arena->pages - page;
}

/* Copy pages [i, end) of an answer to the window, those that may be read. The application may protect
 * or unmap parts of its arena: a fault of this thread would end it, so it asks for a few pages at a
 * time, as the reader does. */
static void read_stretch(struct sp_mover *mover, const uint8_t *data, size_t i, size_t end)
{
	while (i < end) {
		size_t n = end - i < READ_PAGES ? end - i : READ_PAGES;

		n = sp_maps_readable(mover->pager.maps, data, n);
		memcpy(mover->link.window + i * SP_PAGE_SIZE, data, n * SP_PAGE_SIZE);
		memset(mover->outcomes + i, n > 0 ? WIRE_MERGED : WIRE_UNSUPPORTED, n > 0 ? n : 1);
		n = n > 0 ? n : 1;
		data += n * SP_PAGE_SIZE;
		i += n;
	}
}

/* Read n pages from `page` on, to place `first` of the answer. */
static int read_range(struct sp_mover *mover, const struct sp_arena *arena, uint64_t page,
		      size_t first, size_t n)
{
	const uint8_t *data = arena->data + page * SP_PAGE_SIZE;
	uint64_t states[READ_PAGES];
	size_t end;

	for (size_t done = 0, some; done < n; done += some) {
		const uint8_t *from = data + done * SP_PAGE_SIZE;
		int error;

		some = n - done < READ_PAGES ? n - done : READ_PAGES;
		error = sp_pagemap_read(mover->pager.pagemap, from, some, states);
		if (error)
			return error;
		sp_away_hide_lost(&arena->away, page + done, some, states);
		for (size_t i = 0; i < some; i = end) {
			bool there = sp_pagemap_is_there(states[i]);

			for (end = i + 1; end < some && sp_pagemap_is_there(states[end]) == there;)
				end++;
			if (there)
				read_stretch(mover, from + i * SP_PAGE_SIZE, first + done + i,
					     first + done + end);
			else
				memset(mover->outcomes + first + done + i, WIRE_ABSENT, end - i);
		}
	}
	return 0;
}

static int order_read(struct sp_node *node, struct sp_arena *arena, const struct sp_message *order)
{
	const struct wire_range *ranges = (const struct wire_range *)order->payload;
	struct sp_mover *mover = &node->mover;
	size_t n = order->length / sizeof(*ranges), first = 0;
	uint64_t most = mover->link.window_bytes / SP_PAGE_SIZE, pages;
	int error = 0;

	if (n == 0 || order->length % sizeof(*ranges))
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	pages = wire_count_pages(ranges, n, arena->pages,
				 most < WIRE_READ_PAGES_MAX ? most : WIRE_READ_PAGES_MAX);
	if (pages == 0)
		return -EPROTO;
	if (!mover->can_share && !atomic_load(&arena->sealed))
		return sp_mover_send_done(node, order, ENOTSUP, 0);
	for (size_t i = 0; i < n && !error; i++) {
		error = read_range(mover, arena, ranges[i].page, first, ranges[i].count);
		first += ranges[i].count;
	}
	return sp_mover_send_done(node, order, -error, error ? 0 : pages);
}

static void record(struct sp_arena *arena, const struct wire_run *run, const uint8_t *outcomes)
{
	size_t end;

	for (size_t i = 0; i < run->count; i = end) {
		for (end = i + 1; end < run->count && outcomes[end] == outcomes[i];)
			end++;
		if (outcomes[i] == WIRE_MERGED)
			sp_extents_insert(&arena->extents, run->page + i, end - i, run->slot + i);
	}
}

/* Replace one stretch of at most SP_TAKE_PAGES pages that are private by the extents. */
static void replace_stretch(struct sp_node *node, struct sp_arena *arena,
			    const struct wire_run *stretch, uint8_t *outcomes)
{
	struct sp_mover *mover = &node->mover;
	uint8_t *address = arena->data + stretch->page * SP_PAGE_SIZE;

	bool sealed = atomic_load(&arena->sealed);

	if (!mover->can_share && !sealed) {
		memset(outcomes, WIRE_UNSUPPORTED, stretch->count);
	} else if (sp_mover_was_restored(mover, arena->number, stretch->page, stretch->count)) {
		memset(outcomes, WIRE_BUSY, stretch->count);
	} else if (sealed && stretch->slot == WIRE_ZERO_SLOT) {
		sp_sealed_replace(&mover->pager, address, stretch->count, -1, WIRE_ZERO_SLOT, outcomes);
	} else if (stretch->slot == WIRE_ZERO_SLOT) {
		sp_pager_drop_zero(&mover->pager, address, stretch->count, outcomes);
	} else if (arena->extents.count >= mover->extents_budget) {
		memset(outcomes, WIRE_NO_MAPPING, stretch->count);
	} else {
		(sealed ? sp_sealed_replace : sp_pager_replace)(&mover->pager, address,
								stretch->count, arena->store,
								stretch->slot, outcomes);
		record(arena, stretch, outcomes);
	}
	sp_mover_serve_faults(node);
}

/* Replace pages that are private by the extents, from the first on; returns how many it was. */
static uint64_t replace_private(struct sp_node *node, struct sp_arena *arena,
				struct wire_run stretch, bool fresh, uint8_t *outcomes)
{
	uint64_t mapped = 0;

	if (stretch.count > SP_TAKE_PAGES)
		stretch.count = SP_TAKE_PAGES;
	if (fresh && stretch.slot != WIRE_ZERO_SLOT)
		mapped = sp_mover_replace_absent(node, arena, &stretch, outcomes);
	if (mapped > 0)
		return mapped;
	replace_stretch(node, arena, &stretch, outcomes);
	return stretch.count;
}

/* `fresh`: absent pages map their slots. */
static void replace_run(struct sp_node *node, struct sp_arena *arena, const struct wire_run *run,
			bool fresh, uint8_t *outcomes)
{
	uint64_t done = 0;

	while (done < run->count) {
		uint64_t page = run->page + done, left = run->count - done;
		size_t i = sp_extents_find(&arena->extents, page);
		const struct sp_extent *extent = &arena->extents.entries[i];
		struct wire_run stretch = {.page = page, .count = left, .slot = run->slot};

		if (run->slot != WIRE_ZERO_SLOT)
			stretch.slot += done;
		if (i < arena->extents.count && extent->page <= page) {
			uint64_t mapped = (uint64_t)extent->page + extent->count - page;

			stretch.count = mapped < left ? mapped : left;
			if (extent->slot == SP_SLOT_AWAY)
				stretch.count = sp_mover_replace_away(node, arena, &stretch,
								      outcomes + done);
			else
				memset(outcomes + done, WIRE_BUSY, stretch.count);
		} else {
			if (i < arena->extents.count && extent->page - page < left)
				stretch.count = extent->page - page;
			stretch.count = replace_private(node, arena, stretch, fresh, outcomes + done);
		}
		done += stretch.count;
	}
}

/* How many of the runs can be replaced in one go, up to SP_PIECES: short ones that ascend, of slots
 * that follow each other, all of whose pages are private by the extents. */
static size_t gather(const struct sp_mover *mover, const struct sp_arena *arena,
		     const struct wire_run *runs, size_t n, struct sp_piece *pieces)
{
	const struct sp_extents *extents = &arena->extents;
	size_t left = mover->extents_budget > extents->count ? mover->extents_budget - extents->count
							     : 0;
	size_t i = 0;

	if (!mover->can_share || atomic_load(&arena->sealed))
		return 0;
	for (; i < n && i < left && i < SP_PIECES; i++) {
		const struct wire_run *run = &runs[i], *before = run - 1;
		size_t at = sp_extents_find(extents, run->page);

		if (run->count > SP_PIECE_PAGES || run->slot == WIRE_ZERO_SLOT)
			break;
		if (i > 0 && (run->slot != before->slot + before->count ||
			      run->page < before->page + before->count))
			break;
		if (at < extents->count && extents->entries[at].page < run->page + run->count)
			break;
		if (sp_mover_was_restored(mover, arena->number, run->page, run->count))
			break;
		pieces[i] = (struct sp_piece){.address = arena->data + run->page * SP_PAGE_SIZE,
					      .n = run->count};
	}
	return i;
}

/* Replace a run, or several that are short. Returns how many it was. */
static size_t replace_some(struct sp_node *node, struct sp_arena *arena,
			   const struct wire_run *runs, size_t n, bool fresh, uint8_t *outcomes)
{
	struct sp_piece pieces[SP_PIECES];

	n = fresh ? 1 : gather(&node->mover, arena, runs, n, pieces);
	if (n < 2) {
		replace_run(node, arena, runs, fresh, outcomes);
		return 1;
	}
	sp_pager_replace_pieces(&node->mover.pager, pieces, n, arena->store, runs[0].slot, outcomes);
	for (size_t i = 0; i < n; i++) {
		record(arena, &runs[i], outcomes);
		outcomes += runs[i].count;
	}
	sp_mover_serve_faults(node);
	return n;
}

/* Whether the runs lie in the arena and the store. */
static bool are_valid(const struct sp_arena *arena, const struct wire_run *runs, size_t n)
{
	uint64_t pages = 0, slots;
	struct stat store;

	if (arena->store < 0 || fstat(arena->store, &store) < 0)
		return false;
	slots = (uint64_t)store.st_size / SP_PAGE_SIZE;
	for (size_t i = 0; i < n; i++) {
		if (!is_inside(arena, runs[i].page, runs[i].count))
			return false;
		if (runs[i].slot != WIRE_ZERO_SLOT &&
		    (runs[i].slot >= slots || runs[i].count > slots - runs[i].slot))
			return false;
		pages += runs[i].count;
		if (pages > WIRE_REPLACE_PAGES_MAX)
			return false;
	}
	return true;
}

static int order_replace(struct sp_node *node, struct sp_arena *arena,
			 const struct sp_message *order)
{
	const struct wire_replace *replace = (const struct wire_replace *)order->payload;
	const struct wire_run *runs = (const struct wire_run *)(replace + 1);
	uint8_t *outcomes = node->mover.outcomes;
	bool fresh;

	if (order->length < sizeof(*replace) ||
	    order->length != sizeof(*replace) + replace->runs * sizeof(*runs))
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	if (!are_valid(arena, runs, replace->runs))
		return -EPROTO;
	fresh = arena->cloning && replace->flags & WIRE_REPLACE_ABSENT;
	for (size_t i = 0, end; i < replace->runs;) {
		end = i + replace_some(node, arena, &runs[i], replace->runs - i, fresh, outcomes);
		for (; i < end; i++)
			outcomes += runs[i].count;
	}
	return sp_mover_send_done(node, order, 0, (size_t)(outcomes - node->mover.outcomes));
}

static int order_restore(struct sp_node *node, struct sp_arena *arena,
			 const struct sp_message *order)
{
	const struct wire_range *range = (const struct wire_range *)order->payload;
	int error;

	if (order->length != sizeof(*range))
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	if (!is_inside(arena, range->page, range->count))
		return -EPROTO;
	error = sp_mover_restore(node, arena, range->page, range->count);
	sp_mover_send_notices(node);
	return sp_mover_send_done(node, order, -error, 0);
}

/* Count with faults served in between: an arena may have millions of pages. */
static int count_absent(struct sp_node *node, const struct sp_arena *arena, uint64_t *absent)
{
	struct sp_page_counts counts = {0};
	int pagemap = sp_pagemap_open(), error = 0;

	if (pagemap < 0)
		return pagemap;
	for (size_t page = 0; page < arena->pages && !error; page += SP_COUNT_PAGES) {
		size_t left = arena->pages - page, n = left < SP_COUNT_PAGES ? left : SP_COUNT_PAGES;

		error = sp_pagemap_count(pagemap, arena->data + page * SP_PAGE_SIZE, n, &counts);
		sp_mover_serve_faults(node);
	}
	close(pagemap);
	/* a lost page looks like one that is swapped out */
	*absent = counts.absent_pages + atomic_load(&arena->away.lost);
	*absent -= *absent < atomic_load(&arena->away.count) ? *absent
							      : atomic_load(&arena->away.count);
	return error;
}

static int order_count(struct sp_node *node, const struct sp_arena *arena,
		       const struct sp_message *order)
{
	struct wire_counted counted;
	int error;

	if (order->length != 0)
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	error = count_absent(node, arena, &counted.absent);
	if (!error && pwrite(node->mover.link.window_fd, &counted, sizeof(counted), 0) < 0)
		error = -errno;
	return sp_mover_send_done(node, order, -error, 0);
}

int sp_mover_order(struct sp_node *node, const struct sp_message *message)
{
	struct sp_arena *arena = sp_mover_find(&node->mover, message->header->arena);
	uint8_t type = message->header->type;

	if (type >= WIRE_AWAY && node->mover.link.version < 3)
		return -EPROTO;
	if (arena && atomic_load(&arena->gone) && type != WIRE_LEAVE)
		arena = NULL;
	switch (type) {
	case WIRE_READ:
		return order_read(node, arena, message);
	case WIRE_REPLACE:
		return order_replace(node, arena, message);
	case WIRE_RESTORE:
		return order_restore(node, arena, message);
	case WIRE_COUNT:
		return order_count(node, arena, message);
	case WIRE_AWAY:
		return sp_mover_order_away(node, arena, message);
	case WIRE_EVICT:
		return sp_mover_order_evict(node, arena, message);
	case WIRE_FILL:
		return sp_mover_order_fill(node, arena, message);
	case WIRE_POISON:
		return sp_mover_order_poison(node, arena, message);
	case WIRE_FREEZE:
		return sp_mover_order_freeze(node, arena, message);
	case WIRE_LEAVE:
		return sp_mover_order_leave(node, arena, message);
	default:
		return -EPROTO;
	}
}
