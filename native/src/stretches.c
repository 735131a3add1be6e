/*
 * Mover: stretches of an arena that pages are away from (away.h): how they shrink, and what the
 * application does to them.
 */
#include "kernel.h"
#include "maps.h"
#include "mover.h"
#include "pagemap.h"

static uint8_t *address_of(const struct sp_arena *arena, uint64_t page)
{
	return arena->data + page * SP_PAGE_SIZE;
}

/* Take pages out of their stretch. */
static void take_out(struct sp_arena *arena, uint64_t page, uint64_t count)
{
	sp_away_end(&arena->away, page, count, 0);
	sp_extents_remove(&arena->extents, page, count);
	sp_away_give_back(&arena->away, &arena->extents, page, count);
}

void sp_mover_release(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count)
{
	sp_pager_end_away(&node->mover.pager, address_of(arena, page), count);
	take_out(arena, page, count);
}

static bool is_free(const struct sp_arena *arena, uint64_t page)
{
	return !(sp_away_mark(&arena->away, page) & (SP_MARK_AWAY | SP_MARK_LOST));
}

static void shrink(struct sp_node *node, struct sp_arena *arena, uint64_t first, uint64_t end)
{
	uint64_t low = first, high = end;

	while (low < high && is_free(arena, low))
		low++;
	while (high > low && is_free(arena, high - 1))
		high--;
	if (low > first)
		sp_mover_release(node, arena, first, low - first);
	if (high < end && high > low)
		sp_mover_release(node, arena, high, end - high);
}

void sp_mover_settle(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count)
{
	uint64_t end = page + count;

	while (page < end) {
		size_t i = sp_extents_find(&arena->extents, page);
		const struct sp_extent *extent = &arena->extents.entries[i];
		uint64_t first, last;

		if (i == arena->extents.count || extent->page >= end)
			return;
		first = extent->page;
		last = first + extent->count;
		if (extent->slot == SP_SLOT_AWAY)
			shrink(node, arena, first, last);
		page = last;
	}
}

void sp_mover_settle_around(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			    uint64_t count)
{
	if (page > 0)
		sp_mover_settle(node, arena, page - 1, 1);
	if (page + count < arena->pages)
		sp_mover_settle(node, arena, page + count, 1);
}

/* The application has put something else at pages of a stretch: they are its own now. */
static void strike_out(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count)
{
	take_out(arena, page, count);
	sp_pager_wake(&node->mover.pager, address_of(arena, page), count);
	sp_mover_settle_around(node, arena, page, count);
	node->mover.came_back = true;
}

uint64_t sp_mover_check_away(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			     uint64_t count, int *protection)
{
	struct sp_pager *pager = &node->mover.pager;
	struct sp_slots there = sp_maps_anonymous(pager->maps, address_of(arena, page), count);

	*protection = there.protection;
	if (there.pages == 0) {
		strike_out(node, arena, page, there.foreign);
		return 0;
	}
	if (sp_pager_is_expected(pager, address_of(arena, page), there.pages))
		return there.pages;
	/* some of them: the first one tells how to go on */
	if (sp_pager_is_expected(pager, address_of(arena, page), 1))
		return 1;
	strike_out(node, arena, page, 1);
	return 0;
}

int sp_mover_discard_away(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_extent *extent, uint64_t page, uint64_t *n)
{
	uint64_t left = extent->page + extent->count - page;
	int protection, error;

	*n = sp_mover_check_away(node, arena, page, *n < left ? *n : left, &protection);
	if (*n == 0) /* something else is there: look again */
		return 0;
	error = sp_pager_discard(&node->mover.pager, address_of(arena, page),
				 arena->shadow + page * SP_PAGE_SIZE, *n);
	if (error)
		return error;
	sp_mover_keep_protection(address_of(arena, page), *n, protection);
	take_out(arena, page, *n);
	sp_mover_settle_around(node, arena, page, *n);
	node->mover.came_back = true;
	return 0;
}

void sp_mover_follow_removal(struct sp_node *node, struct sp_arena *arena,
			     const struct sp_extent *extent, uint64_t page, uint64_t count)
{
	uint64_t left = extent->page + extent->count - page;
	uint64_t first = page, end = page + (count < left ? count : left), n;

	for (; page < end; page += n) {
		n = sp_away_run(&arena->away, page, end);
		if (sp_away_mark(&arena->away, page) & SP_MARK_AWAY)
			sp_away_end(&arena->away, page, n, 0);
	}
	sp_pager_wake(&node->mover.pager, address_of(arena, first), end - first);
	sp_mover_settle(node, arena, first, end - first);
	node->mover.came_back = true;
}

void sp_mover_follow_away(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint8_t *to)
{
	struct sp_pager *pager = &node->mover.pager;

	if (sp_away_mark(&arena->away, page) & SP_MARK_AWAY)
		sp_pager_poison(pager, to, 1);
	uffd_unregister(pager->uffds.store, to, SP_PAGE_SIZE);
	uffd_unregister(pager->uffds.store, address_of(arena, page), SP_PAGE_SIZE);
	take_out(arena, page, 1);
	sp_mover_settle_around(node, arena, page, 1);
	node->mover.came_back = true;
}

void sp_mover_serve_away(struct sp_node *node, struct sp_arena *arena, uint64_t page)
{
	static const uint8_t zero_page[SP_PAGE_SIZE];
	struct sp_pager *pager = &node->mover.pager;
	uint8_t mark = sp_away_mark(&arena->away, page);
	uint8_t *address = address_of(arena, page);
	uint64_t entry;

	if (mark & SP_MARK_AWAY) {
		sp_mover_want(node, arena, page);
		return;
	}
	if (mark & SP_MARK_LOST) {
		/* poisoned, unless the application has discarded it since then */
		if (sp_pagemap_read(pager->pagemap, address, 1, &entry) || sp_pagemap_has_page(entry)) {
			sp_pager_wake(pager, address, 1);
			return;
		}
		sp_away_end(&arena->away, page, 1, 0);
	}
	sp_pager_bring(pager, address, zero_page);
	sp_pager_wake(pager, address, 1);
	sp_mover_settle(node, arena, page, 1);
}

void sp_mover_lose_away(struct sp_node *node, struct sp_arena *arena)
{
	for (size_t i = 0; i < arena->extents.count; i++) {
		const struct sp_extent *extent = &arena->extents.entries[i];
		uint64_t end = (uint64_t)extent->page + extent->count, n;

		if (extent->slot != SP_SLOT_AWAY)
			continue;
		for (uint64_t page = extent->page; page < end; page += n) {
			n = sp_away_run(&arena->away, page, end);
			if (!(sp_away_mark(&arena->away, page) & SP_MARK_AWAY))
				continue;
			sp_away_end(&arena->away, page, n, SP_MARK_LOST);
			sp_pager_poison(&node->mover.pager, address_of(arena, page), n);
		}
	}
}
