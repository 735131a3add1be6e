/*
 * Mover: orders of the merger that make pages away, and bring them back.
 */
#include <errno.h>
#include <string.h>

#include "kernel.h"
#include "mover.h"
#include "pagemap.h"
#include "sealed.h"

/* Pages that are absent become away: [page, page + count) is in no run of the table. */
static void expect(struct sp_node *node, struct sp_arena *arena, uint64_t page, size_t count,
		   const struct wire_away *records, uint8_t *outcomes)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	int error = arena->extents.count < node->mover.extents_budget ? 0 : -ENOMEM;

	if (arena->cloning) /* nobody knows it yet: what is there is mlockall()'s */
		memory_drop(address, count * SP_PAGE_SIZE);
	if (!error)
		error = sp_pager_expect(pager, address, count);
	memset(outcomes, error ? WIRE_NO_MAPPING : WIRE_BUSY, count);
	if (error)
		return;
	sp_extents_insert(&arena->extents, page, count, SP_SLOT_AWAY);
	for (size_t i = 0, some; i < count; i += some) {
		some = count - i < SP_TAKE_PAGES ? count - i : SP_TAKE_PAGES;
		if (sp_pagemap_read(pager->pagemap, address + i * SP_PAGE_SIZE, some,
				    pager->page_states))
			break;
		for (size_t k = i; k < i + some; k++) {
			if (sp_pagemap_is_there(pager->page_states[k - i]))
				continue;
			sp_away_begin(&arena->away, page + k, 1, records[k].digest);
			outcomes[k] = WIRE_MERGED;
		}
	}
	sp_mover_settle(node, arena, page, count);
}

int sp_mover_order_away(struct sp_node *node, struct sp_arena *arena,
			const struct sp_message *order)
{
	const struct wire_away *records = (const struct wire_away *)order->payload;
	size_t n = order->length / sizeof(*records), end;
	uint8_t *outcomes = node->mover.outcomes;

	if (n == 0 || n > WIRE_AWAY_PAGES_MAX || order->length % sizeof(*records))
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	for (size_t i = 0; i < n; i++)
		if (records[i].page >= arena->pages || (i > 0 && records[i].page <= records[i - 1].page))
			return -EPROTO;
	if (!node->mover.pager.can_away)
		return sp_mover_send_done(node, order, ENOTSUP, 0);
	if (sp_away_prepare(&arena->away, arena->pages))
		return sp_mover_send_done(node, order, ENOMEM, 0);
	memset(outcomes, WIRE_BUSY, n);
	if (!sp_mover_may_let_go(node, arena) || !sp_mover_stop_reader(node))
		return sp_mover_send_done(node, order, 0, n);
	for (size_t i = 0; i < n; i = end) {
		uint64_t page = records[i].page;
		size_t at = sp_extents_find(&arena->extents, page);
		const struct sp_extent *next = &arena->extents.entries[at];
		bool last = at == arena->extents.count;

		end = i + 1;
		if (!last && next->page <= page)
			continue;
		while (end < n && records[end].page == page + (end - i) &&
		       (last || records[end].page < next->page))
			end++;
		expect(node, arena, page, end - i, records + i, outcomes + i);
		sp_mover_serve_faults(node);
	}
	sp_mover_resume_reader(node);
	return sp_mover_send_done(node, order, 0, n);
}

/* The ranges of an order and the pages that they hold, which is 0 for an order to be refused. */
struct ranges {
	const struct wire_range *list;
	size_t n;
	uint64_t pages;
};

static struct ranges ranges_of(const struct sp_arena *arena, const struct sp_message *order,
			       uint64_t most)
{
	struct ranges ranges = {.list = (const struct wire_range *)order->payload,
				.n = order->length / sizeof(struct wire_range)};

	if (order->length % sizeof(struct wire_range) == 0)
		ranges.pages = wire_count_pages(ranges.list, ranges.n, arena->pages, most);
	return ranges;
}

static uint8_t fill_page(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			 const uint8_t *bytes)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	int error;

	if (!(sp_away_mark(&arena->away, page) & SP_MARK_AWAY))
		return WIRE_BUSY;
	error = sp_pager_bring(pager, address, bytes);
	if (error == -ENOMEM)
		return WIRE_NO_MAPPING;
	if (error == -ENOENT) /* it may have been moved: that is to be followed while it is away */
		sp_mover_catch_up(node);
	sp_away_end(&arena->away, page, 1, 0);
	return error ? WIRE_BUSY : WIRE_MERGED; /* with an error the application has it otherwise */
}

int sp_mover_order_fill(struct sp_node *node, struct sp_arena *arena,
			const struct sp_message *order)
{
	struct sp_mover *mover = &node->mover;
	uint64_t most = mover->link.window_bytes / SP_PAGE_SIZE, done = 0;
	struct ranges ranges;

	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	ranges = ranges_of(arena, order, most < WIRE_READ_PAGES_MAX ? most : WIRE_READ_PAGES_MAX);
	if (ranges.pages == 0)
		return -EPROTO;
	for (size_t i = 0; i < ranges.n; i++) {
		struct wire_range range = ranges.list[i];

		for (uint64_t k = 0; k < range.count; k++, done++)
			mover->outcomes[done] = fill_page(node, arena, range.page + k,
							  mover->link.window + done * SP_PAGE_SIZE);
		sp_pager_wake(&mover->pager, arena->data + range.page * SP_PAGE_SIZE, range.count);
		sp_mover_settle(node, arena, range.page, range.count);
		sp_mover_serve_faults(node);
	}
	mover->came_back = true;
	return sp_mover_send_done(node, order, 0, ranges.pages);
}

static void poison_range(struct sp_node *node, struct sp_arena *arena, struct wire_range range,
			 uint8_t *outcomes)
{
	uint64_t end = range.page + range.count, n;

	for (uint64_t page = range.page; page < end; page += n) {
		n = sp_away_run(&arena->away, page, end);
		if (!(sp_away_mark(&arena->away, page) & SP_MARK_AWAY))
			continue;
		/* the mark first: the reader must not touch what it says */
		sp_away_end(&arena->away, page, n, SP_MARK_LOST);
		sp_pager_poison(&node->mover.pager, arena->data + page * SP_PAGE_SIZE, n);
		memset(outcomes + (page - range.page), WIRE_MERGED, n);
	}
}

int sp_mover_order_poison(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_message *order)
{
	uint8_t *outcomes = node->mover.outcomes;
	struct ranges ranges;

	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	ranges = ranges_of(arena, order, WIRE_REPLACE_PAGES_MAX);
	if (ranges.pages == 0)
		return -EPROTO;
	memset(outcomes, WIRE_BUSY, ranges.pages);
	for (size_t i = 0; i < ranges.n; i++) {
		if (atomic_load(&arena->away.count) > 0)
			poison_range(node, arena, ranges.list[i], outcomes);
		outcomes += ranges.list[i].count;
	}
	node->mover.came_back = true;
	return sp_mover_send_done(node, order, 0, ranges.pages);
}

/* Map slots over pages that have no bytes: there is nothing to compare. */
static int map_slots(struct sp_node *node, struct sp_arena *arena, const struct wire_run *run)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *side, *address = arena->data + run->page * SP_PAGE_SIZE;
	int error = sp_pager_map_side(pager, run->count, arena->store, run->slot, &side);

	if (!error && atomic_load(&arena->sealed))
		error = sys_result(mprotect(side, run->count * SP_PAGE_SIZE, PROT_READ));
	if (error)
		return error;
	error = sp_pager_remap(pager, side, run->count, 0, address);
	if (error)
		munmap(side, run->count * SP_PAGE_SIZE);
	return error;
}

uint64_t sp_mover_replace_absent(struct sp_node *node, struct sp_arena *arena,
				 const struct wire_run *stretch, uint8_t *outcomes)
{
	struct sp_pager *pager = &node->mover.pager;
	const uint8_t *address = arena->data + stretch->page * SP_PAGE_SIZE;
	struct wire_run run = {.page = stretch->page, .slot = stretch->slot};

	if (sp_pagemap_read(pager->pagemap, address, stretch->count, pager->page_states))
		return 0;
	while (run.count < stretch->count && !sp_pagemap_is_there(pager->page_states[run.count]))
		run.count++;
	if (run.count == 0)
		return 0;
	if (arena->extents.count >= node->mover.extents_budget || map_slots(node, arena, &run)) {
		memset(outcomes, WIRE_NO_MAPPING, run.count);
		return run.count;
	}
	sp_extents_insert(&arena->extents, run.page, run.count, run.slot);
	memset(outcomes, WIRE_MERGED, run.count);
	sp_mover_serve_faults(node);
	return run.count;
}

uint64_t sp_mover_replace_away(struct sp_node *node, struct sp_arena *arena,
			       const struct wire_run *stretch, uint8_t *outcomes)
{
	struct wire_run run = *stretch;
	uint64_t n = sp_away_run(&arena->away, run.page, run.page + run.count);
	uint8_t mark = sp_away_mark(&arena->away, run.page);
	int protection;

	if (n > SP_TAKE_PAGES)
		n = SP_TAKE_PAGES;
	memset(outcomes, WIRE_BUSY, n);
	if (mark & SP_MARK_LOST)
		return n;
	if (!(mark & SP_MARK_AWAY)) {
		sp_mover_release(node, arena, run.page, n);
		sp_mover_settle_around(node, arena, run.page, n);
		return 0; /* private as any: once more */
	}
	run.count = sp_mover_check_away(node, arena, run.page, n, &protection);
	if (run.count == 0)
		return 1;
	if (run.slot == WIRE_ZERO_SLOT) {
		struct sp_extent away = {.page = (uint32_t)run.page, .count = (uint32_t)run.count};

		if (sp_mover_discard_away(node, arena, &away, run.page, &run.count))
			memset(outcomes, WIRE_NO_MAPPING, n);
		else
			memset(outcomes, WIRE_MERGED, run.count);
		return run.count > 0 ? run.count : 1;
	}
	if (arena->extents.count >= node->mover.extents_budget || map_slots(node, arena, &run)) {
		memset(outcomes, WIRE_NO_MAPPING, run.count);
		return run.count;
	}
	sp_away_end(&arena->away, run.page, run.count, 0);
	sp_extents_remove(&arena->extents, run.page, run.count);
	sp_extents_insert(&arena->extents, run.page, run.count, run.slot);
	sp_away_give_back(&arena->away, &arena->extents, run.page, run.count);
	if (!atomic_load(&arena->sealed))
		sp_mover_keep_protection(arena->data + run.page * SP_PAGE_SIZE, run.count, protection);
	sp_pager_wake(&node->mover.pager, arena->data + run.page * SP_PAGE_SIZE, run.count);
	memset(outcomes, WIRE_MERGED, run.count);
	sp_mover_settle_around(node, arena, run.page, run.count);
	node->mover.came_back = true;
	return run.count;
}
