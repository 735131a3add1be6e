/*
 * Mover: what the watcher has read: faults of threads, and what the application does to mappings of
 * the store.
 */
#include "kernel.h"
#include "maps.h"
#include "mover.h"

#define GROW_MAX 128	 /* pages restored for one write, at most */
#define MAP_AGAIN_MAX 16 /* pages mapped again for one access, at most */

static const uint8_t zero_page[SP_PAGE_SIZE];

/* The application's own madvise(MADV_DONTNEED) of shared pages. The kernel would show the slots'
 * bytes again, so the pages become absent ones. Who touches one meanwhile waits behind this. */
static void follow_removal(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			   uint64_t count)
{
	uint64_t end = page + count;

	while (page < end) {
		size_t i = sp_extents_find(&arena->extents, page);
		const struct sp_extent *extent = &arena->extents.entries[i];
		uint64_t n;

		if (i == arena->extents.count || extent->page >= end)
			return;
		if (extent->page > page)
			page = extent->page;
		n = end - page;
		if (extent->slot == SP_SLOT_AWAY) {
			uint64_t last = (uint64_t)extent->page + extent->count;

			n = last - page < n ? last - page : n;
			sp_mover_follow_removal(node, arena, extent, page, n);
		} else {
			sp_mover_discard_shared(node, arena, extent, page, &n);
		}
		page += n;
	}
}

/* The application's own mremap() of shared pages: they map the slots at another address now, of
 * which the books know nothing. Make them private there before the merger hears that they are
 * gone here; that is owed, so it waits for memory. */
static void follow_move(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count,
			uint64_t to)
{
	struct sp_pager *pager = &node->mover.pager;

	for (uint64_t i = 0, n; i < count; i += n) {
		uint8_t *target = (uint8_t *)(uintptr_t)(to + i * SP_PAGE_SIZE);
		const struct sp_extent *extent;
		uint64_t slot;

		n = sp_extents_look(&arena->extents, page + i, page + count, &extent);
		if (!extent) { /* private pages, that were frozen when they were moved */
			uffd_unregister(pager->uffds.store, target, n * SP_PAGE_SIZE);
			sp_pager_wake(pager, target, n);
			continue;
		}
		n = 1;
		if (extent->slot == SP_SLOT_AWAY) {
			sp_mover_follow_away(node, arena, page + i, target);
			continue;
		}
		slot = extent->slot + (page + i - extent->page);
		while (extent->slot != SP_SLOT_IN_PLACE && sp_pager_copy_in_place(pager, target) &&
		       sp_maps_slots(pager->maps, target, 1, arena->store, slot).pages > 0)
			sp_pager_back_off();
		if (extent->slot != SP_SLOT_IN_PLACE)
			sp_mover_add_notice(&node->mover, arena, page + i, 1);
		sp_extents_remove(&arena->extents, page + i, 1);
	}
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

static void serve_write(struct sp_node *node, struct sp_arena *arena, uint64_t page)
{
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	const struct sp_extent *extent = sp_extents_at(&arena->extents, page);

	if (extent && sp_extent_is_shared(extent)) {
		arena->restore_next = page + sp_mover_restore_stretch(node, arena, extent, page,
								      grown_run(arena, page));
		return;
	}
	/* a protection that a freeze has left behind would bring the thread back here */
	sp_pager_unprotect(&node->mover.pager, address, 1);
	sp_pager_wake(&node->mover.pager, address, 1);
}

/* A registration of a take or a freeze that was left behind would bring the thread back here. */
static void serve_missing(struct sp_node *node, struct sp_arena *arena, uint64_t page)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	const struct sp_extent *extent = sp_extents_at(&arena->extents, page);

	if (extent && extent->slot == SP_SLOT_AWAY) {
		sp_mover_serve_away(node, arena, page);
		return;
	}
	if (!extent)
		sp_pager_thaw(pager, address, 1);
	sp_pager_wake(pager, address, 1);
}

static void serve_unmapped(struct sp_node *node, struct sp_arena *arena, uint64_t page)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	const struct sp_extent *extent = sp_extents_at(&arena->extents, page);
	uint64_t left = extent ? extent->page + extent->count - page : 0;

	if (left > 0)
		sp_pager_map_again(pager, address, left < MAP_AGAIN_MAX ? left : MAP_AGAIN_MAX);
	else
		sp_pager_wake(pager, address, 1);
}

static void serve(struct sp_node *node, struct sp_arena *arena, const struct sp_fault *fault)
{
	uint64_t offset = fault->address - (uintptr_t)arena->data;
	uint64_t page = offset / SP_PAGE_SIZE, count = fault->length / SP_PAGE_SIZE;

	if (count > arena->pages - page)
		count = arena->pages - page;
	if (sp_mover_is_kept_aside(node, arena, fault->kind))
		return;
	if (atomic_load(&arena->gone)) {
		if (fault->kind == SP_FAULT_MISSING)
			sp_pager_poison(&node->mover.pager, arena->data + page * SP_PAGE_SIZE, 1);
		sp_pager_wake(&node->mover.pager, arena->data + page * SP_PAGE_SIZE, 1);
		return;
	}
	switch (fault->kind) {
	case SP_FAULT_WRITE:
		serve_write(node, arena, page);
		break;
	case SP_FAULT_MISSING:
		serve_missing(node, arena, page);
		break;
	case SP_FAULT_UNMAPPED:
		serve_unmapped(node, arena, page);
		break;
	case SP_FAULT_REMOVED:
		follow_removal(node, arena, page, count);
		return;
	case SP_FAULT_MOVED:
		follow_move(node, arena, page, count, fault->to);
		return;
	}
	sp_mover_count_stall(&node->mover, fault->when);
}

/* Whether an address is memory of the agent's own, which holds nothing of the application's. */
static bool is_own(const struct sp_mover *mover, uint64_t address)
{
	const struct sp_arena *arena = mover->arenas;

	if (address - (uintptr_t)mover->pager.staging < SP_TAKE_PAGES * SP_PAGE_SIZE)
		return true;
	while (arena && address - (uintptr_t)arena->shadow >= arena->pages * SP_PAGE_SIZE)
		arena = arena->mover_next;
	return arena;
}

/* A fault in no arena: in a mapping that the application has moved away from one, or, under
 * mlockall(), which touches everything, in memory of the agent's own. What is moved and missing was
 * away: nobody knows any more what it held, and it must not read as zeros. */
static void serve_stray(struct sp_mover *mover, const struct sp_fault *fault)
{
	struct sp_pager *pager = &mover->pager;
	uint8_t *address = (uint8_t *)(uintptr_t)fault->address;

	if (fault->kind == SP_FAULT_WRITE)
		sp_pager_copy_in_place(pager, address);
	else if (fault->kind == SP_FAULT_UNMAPPED)
		sp_pager_map_again(pager, address, 1);
	else if (fault->kind == SP_FAULT_MISSING && is_own(mover, fault->address))
		sp_pager_fill(pager, address, zero_page, 1);
	else if (fault->kind == SP_FAULT_MISSING)
		sp_pager_poison(pager, address, 1);
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
		else if (found)
			serve_stray(mover, &fault);
		for (arena = overflow ? mover->arenas : NULL; arena; arena = arena->mover_next)
			sp_pager_wake(&mover->pager, arena->data, arena->pages);
	}
}

void sp_mover_catch_up(struct sp_node *node)
{
	sp_faults_settle(&node->faults);
	sp_mover_serve_faults(node);
}
