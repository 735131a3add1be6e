/*
 * Mover: mappings of the store that the application has taken away. It may unmap parts of an arena,
 * which no event tells: an event at every unmapping would double what replacing a page costs.
 */
#include "kernel.h"
#include "maps.h"
#include "mover.h"

#define GONE_NS 500000000 /* from mremap() to the reading of its event, at most */
#define AUDIT_MS 5000

/* Serve faults, and what else the watcher read, for a while. */
static void serve_for(struct sp_node *node, uint64_t ns)
{
	uint64_t end = sp_faults_now() + ns;

	while (sp_faults_now() < end) {
		sp_mover_serve_faults(node);
		sp_pager_back_off();
	}
}

/* Something else than its slots is at a shared page: the application has unmapped it, or moved it
 * away. In the second case the slots are in use elsewhere, and the watcher is about to read so;
 * only what is still unexplained after a while is gone. Returns how many pages were looked at. */
uint64_t sp_mover_strike_out(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			     uint64_t foreign)
{
	const uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	const struct sp_extent *extent;
	struct sp_slots slots;

	serve_for(node, GONE_NS);
	extent = sp_extents_at(&arena->extents, page);
	if (!extent || !sp_extent_is_shared(extent))
		return 1;
	if (foreign > extent->page + extent->count - page)
		foreign = extent->page + extent->count - page;
	slots = sp_maps_slots(node->mover.pager.maps, address, foreign, arena->store,
			      extent->slot + (page - extent->page));
	if (slots.pages > 0)
		return 1;
	sp_extents_remove(&arena->extents, page, slots.foreign);
	sp_pager_wake(&node->mover.pager, address, slots.foreign);
	sp_mover_add_notice(&node->mover, arena, page, slots.foreign);
	return slots.foreign;
}

/* A run that maps no slots; returns the page to go on at. */
static uint64_t audit_private(struct sp_node *node, struct sp_arena *arena,
			      const struct sp_extent *extent)
{
	int protection;

	if (extent->slot == SP_SLOT_IN_PLACE)
		return (uint64_t)extent->page + extent->count;
	return extent->page +
	       sp_mover_check_away(node, arena, extent->page, extent->count, &protection);
}

static void audit_arena(struct sp_node *node, struct sp_arena *arena)
{
	struct sp_mover *mover = &node->mover;
	uint64_t page = 0;

	for (;;) {
		size_t i = sp_extents_find(&arena->extents, page);
		struct sp_extent extent;
		struct sp_slots slots;

		if (i == arena->extents.count)
			return;
		extent = arena->extents.entries[i];
		if (extent.page < page) {
			extent.slot += sp_extent_is_shared(&extent) ? page - extent.page : 0;
			extent.count -= (uint32_t)(page - extent.page);
			extent.page = (uint32_t)page;
		}
		if (!sp_extent_is_shared(&extent)) {
			page = audit_private(node, arena, &extent);
			sp_mover_serve_faults(node);
			continue;
		}
		slots = sp_maps_slots(mover->pager.maps, arena->data + extent.page * (uint64_t)SP_PAGE_SIZE,
				      extent.count, arena->store, extent.slot);
		if (slots.pages == 0)
			page = extent.page + sp_mover_strike_out(node, arena, extent.page, slots.foreign);
		else
			page = (uint64_t)extent.page + slots.pages;
		sp_mover_serve_faults(node);
	}
}

int sp_mover_audit(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;
	int64_t now = (int64_t)(sp_faults_now() / 1000000);
	bool any = false;

	for (struct sp_arena *arena = mover->arenas; arena; arena = arena->mover_next)
		any |= arena->extents.count > 0;
	if (!any || !mover->can_share)
		return -1;
	if (now >= mover->audit_next) {
		for (struct sp_arena *arena = mover->arenas; arena; arena = arena->mover_next)
			audit_arena(node, arena);
		mover->audit_next = now + AUDIT_MS;
	}
	return (int)(mover->audit_next - now);
}
