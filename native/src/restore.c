/*
 * Mover: from a shared page back to a private one, on a write or on order; and telling the merger.
 */
#include <errno.h>

#include "kernel.h"
#include "mover.h"

#define GROW_MAX 128 /* pages restored for one write, at most */

static void add_notice(struct sp_mover *mover, const struct sp_arena *arena, uint64_t page,
		       uint64_t count)
{
	struct sp_notice *last =
		mover->notice_count > 0 ? &mover->notices[mover->notice_count - 1] : NULL;

	if (!arena->announced)
		return;
	if (last && last->arena == arena->number && last->range.page + last->range.count == page) {
		last->range.count += count;
	} else if (mover->notice_count < SP_NOTICES) {
		mover->notices[mover->notice_count++] = (struct sp_notice){
			.arena = arena->number, .range = {.page = page, .count = count}};
	} else {
		mover->notices_lost = true;
	}
}

bool sp_mover_was_restored(const struct sp_mover *mover, uint32_t arena, uint64_t page,
			   uint64_t count)
{
	for (size_t i = 0; i < mover->notice_count; i++) {
		const struct sp_notice *notice = &mover->notices[i];

		if (notice->arena == arena && notice->range.page < page + count &&
		    page < notice->range.page + notice->range.count)
			return true;
	}
	return mover->notices_lost;
}

void sp_mover_send_notices(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;
	struct wire_range ranges[256];
	size_t first = 0;

	if (mover->notices_lost) {
		sp_link_close(&mover->link);
		return;
	}
	while (first < mover->notice_count) {
		uint32_t arena = mover->notices[first].arena;
		struct iovec part = {.iov_base = ranges};
		size_t n = 0;

		while (n < 256 && first + n < mover->notice_count &&
		       mover->notices[first + n].arena == arena) {
			ranges[n] = mover->notices[first + n].range;
			n++;
		}
		part.iov_len = n * sizeof(*ranges);
		if (sp_mover_send(node, WIRE_RESTORED, 0, arena, &part, 1, -1))
			return;
		first += n;
	}
	mover->notice_count = 0;
}

/* The way out when a page can't be restored: have the kernel copy it where it is. */
static bool leave_in_place(struct sp_node *node, struct sp_arena *arena, uint64_t page)
{
	if (sp_pager_copy_in_place(&node->mover.pager, arena->data + page * SP_PAGE_SIZE))
		return false;
	sp_extents_remove(&arena->extents, page, 1);
	sp_extents_insert(&arena->extents, page, 1, SP_SLOT_IN_PLACE);
	return true;
}

/* Restore at most `count` pages from a shared page on, within its run. Returns how many are
 * private now; 0: there is no memory for a copy, and nothing has changed. */
static uint64_t restore_stretch(struct sp_node *node, struct sp_arena *arena,
				const struct sp_extent *extent, uint64_t page, uint64_t count)
{
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	uint64_t slot = extent->slot + (page - extent->page);
	uint64_t left = extent->page + extent->count - page;

	if (count > left)
		count = left;
	if (sp_pager_restore(&node->mover.pager, address, count, arena->store, slot)) {
		count = 1;
		if (!leave_in_place(node, arena, page)) {
			sp_pager_wake(&node->mover.pager, address, 1);
			return 0;
		}
	} else {
		sp_extents_remove(&arena->extents, page, count);
	}
	add_notice(&node->mover, arena, page, count);
	return count;
}

int sp_mover_restore(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count)
{
	uint64_t end = page + count;

	while (page < end) {
		size_t i = sp_extents_find(&arena->extents, page);
		const struct sp_extent *extent = &arena->extents.entries[i];
		uint64_t length, restored;

		if (i == arena->extents.count || extent->page >= end)
			return 0;
		if (extent->page > page)
			page = extent->page;
		if (extent->slot == SP_SLOT_IN_PLACE) {
			page = (uint64_t)extent->page + extent->count;
			continue;
		}
		length = end - page < SP_TAKE_PAGES ? end - page : SP_TAKE_PAGES;
		restored = restore_stretch(node, arena, extent, page, length);
		page += restored;
		sp_mover_serve_faults(node);
		if (restored == 0)
			return -ENOMEM;
	}
	return 0;
}

/* How many pages to restore for a write to `page`: more and more while writes go straight on. */
static uint64_t grown_run(struct sp_arena *arena, uint64_t page)
{
	uint32_t run = 1;

	if (page == arena->restore_next && arena->restore_run > 0)
		run = arena->restore_run < GROW_MAX ? arena->restore_run * 2 : GROW_MAX;
	arena->restore_run = run;
	return run;
}

static void serve(struct sp_node *node, struct sp_arena *arena, const struct sp_fault *fault)
{
	struct sp_pager *pager = &node->mover.pager;
	uint64_t page = (fault->address - (uintptr_t)arena->data) / SP_PAGE_SIZE;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	const struct sp_extent *extent = sp_extents_at(&arena->extents, page);

	if (extent && extent->slot != SP_SLOT_IN_PLACE && !fault->missing) {
		uint64_t run = grown_run(arena, page);

		arena->restore_next = page + restore_stretch(node, arena, extent, page, run);
		return;
	}
	/* dealt with already; a registration left behind would bring the thread back here */
	if (!extent && fault->missing)
		uffd_unregister(pager->uffd, address, SP_PAGE_SIZE);
	sp_pager_wake(pager, address, 1);
}

static struct sp_arena *arena_at(const struct sp_mover *mover, uint64_t address)
{
	struct sp_arena *arena = mover->arenas;

	while (arena && address - (uintptr_t)arena->data >= arena->pages * SP_PAGE_SIZE)
		arena = arena->mover_next;
	return arena;
}

void sp_mover_serve_faults(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;
	struct sp_fault fault;
	bool overflow, found = mover->can_share;

	while (found) {
		struct sp_arena *arena;

		found = sp_faults_next(&node->faults, &fault, &overflow);
		arena = found ? arena_at(mover, fault.address) : NULL;
		if (arena)
			serve(node, arena, &fault);
		for (arena = overflow ? mover->arenas : NULL; arena; arena = arena->mover_next)
			sp_pager_wake(&mover->pager, arena->data, arena->pages);
	}
}
