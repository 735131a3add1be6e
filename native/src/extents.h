/*
 * Which pages of an arena map which slots: ascending, disjoint runs, joined where both pages and
 * slots go on. One entry mirrors one kernel mapping (VMA), so the table is as short as the
 * process's list of mappings, whatever the arena's size.
 *
 * Used by the mover alone; no locks. The memory is a reservation that costs what is touched.
 */
#ifndef SP_EXTENTS_H
#define SP_EXTENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The slot of pages that the kernel copied in place, because no mapping was left to restore them
 * properly: private, but in a mapping that can't be moved. */
#define SP_SLOT_IN_PLACE UINT64_MAX

/* The slot of stretches that pages are away from (away.h). */
#define SP_SLOT_AWAY (UINT64_MAX - 1)

struct sp_extent {
	uint32_t page;
	uint32_t count;
	uint64_t slot;
};

struct sp_extents {
	struct sp_extent *entries;
	size_t count;
	size_t pages; /* of the arena: there can't be more runs */
};

/* Whether the run maps slots of the store. */
static inline bool sp_extent_is_shared(const struct sp_extent *extent)
{
	return extent->slot < SP_SLOT_AWAY;
}

/* For an arena of so many pages. -ENOMEM. */
int sp_extents_init(struct sp_extents *extents, size_t pages);
void sp_extents_destroy(struct sp_extents *extents);

/* Number of the first run that ends behind `page`: it holds the page or lies after it; may be
 * extents->count. */
size_t sp_extents_find(const struct sp_extents *extents, uint64_t page);

/* The run that holds `page`, or NULL. */
const struct sp_extent *sp_extents_at(const struct sp_extents *extents, uint64_t page);

/* How many pages from `page` on, before `end`, are in its run, or (*extent: NULL) in none. */
uint64_t sp_extents_look(const struct sp_extents *extents, uint64_t page, uint64_t end,
			 const struct sp_extent **extent);

/* Put in a range that is free. */
void sp_extents_insert(struct sp_extents *extents, uint64_t page, uint64_t count, uint64_t slot);

/* Take out a range, whatever of it is there. */
void sp_extents_remove(struct sp_extents *extents, uint64_t page, uint64_t count);

#endif
