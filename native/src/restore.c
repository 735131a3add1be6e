/*
 * Mover: from a shared page back to a private one, or to none.
 */
#include <errno.h>

#include "kernel.h"
#include "maps.h"
#include "mover.h"
#include "sealed.h"

void sp_mover_keep_protection(uint8_t *address, uint64_t count, int protection)
{
	if (protection != (PROT_READ | PROT_WRITE))
		mprotect(address, count * SP_PAGE_SIZE, protection);
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

uint64_t sp_mover_restore_stretch(struct sp_node *node, struct sp_arena *arena,
				const struct sp_extent *extent, uint64_t page, uint64_t count)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	uint64_t slot = extent->slot + (page - extent->page);
	uint64_t left = extent->page + extent->count - page;
	struct sp_slots slots = sp_maps_slots(pager->maps, address, count < left ? count : left,
					      arena->store, slot);

	if (slots.pages == 0)
		return sp_mover_strike_out(node, arena, page, slots.foreign);
	count = slots.pages;
	if (node->mover.can_share ? sp_pager_restore(pager, address,
						     arena->shadow + page * SP_PAGE_SIZE, count,
						     arena->store, slot)
				  : sp_sealed_restore(address, count, arena->store, slot)) {
		count = 1;
		if (!leave_in_place(node, arena, page)) {
			sp_pager_wake(pager, address, 1);
			return 0;
		}
	} else {
		sp_mover_keep_protection(address, count, slots.protection);
		sp_extents_remove(&arena->extents, page, count);
	}
	sp_mover_add_notice(&node->mover, arena, page, count);
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
		if (!sp_extent_is_shared(extent)) {
			page = (uint64_t)extent->page + extent->count;
			continue;
		}
		length = end - page < SP_TAKE_PAGES ? end - page : SP_TAKE_PAGES;
		restored = sp_mover_restore_stretch(node, arena, extent, page, length);
		page += restored;
		sp_mover_serve_faults(node);
		if (restored == 0)
			return -ENOMEM;
	}
	return 0;
}

int sp_mover_discard_shared(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_extent *extent, uint64_t page, uint64_t *n)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	uint64_t left = extent->page + extent->count - page;
	bool in_place = extent->slot == SP_SLOT_IN_PLACE;
	struct sp_slots slots = {.pages = 1, .protection = PROT_READ | PROT_WRITE};
	int error;

	if (*n > left)
		*n = left;
	if (!in_place)
		slots = sp_maps_slots(pager->maps, address, *n, arena->store,
				      extent->slot + (page - extent->page));
	if (slots.pages == 0) {
		*n = sp_mover_strike_out(node, arena, page, slots.foreign);
		return 0;
	}
	if (!in_place)
		*n = slots.pages;
	error = sp_pager_discard(pager, address, arena->shadow + page * SP_PAGE_SIZE, *n);
	if (error)
		return error;
	sp_mover_keep_protection(address, *n, slots.protection);
	sp_extents_remove(&arena->extents, page, *n);
	if (!in_place)
		sp_mover_add_notice(&node->mover, arena, page, *n);
	return 0;
}

int sp_mover_discard(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count)
{
	uint64_t end = page + count;
	int error = 0;

	while (page < end && !error) {
		uint8_t *address = arena->data + page * SP_PAGE_SIZE;
		size_t i = sp_extents_find(&arena->extents, page);
		const struct sp_extent *extent = &arena->extents.entries[i];
		uint64_t n = end - page;

		if (i == arena->extents.count || extent->page > page) {
			if (i < arena->extents.count && extent->page - page < n)
				n = extent->page - page;
			error = memory_drop(address, n * SP_PAGE_SIZE);
		} else if (extent->slot == SP_SLOT_AWAY) {
			error = sp_mover_discard_away(node, arena, extent, page, &n);
		} else {
			error = sp_mover_discard_shared(node, arena, extent, page, &n);
		}
		page += n;
		sp_mover_serve_faults(node);
	}
	return error;
}
