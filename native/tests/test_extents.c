/*
 * The table of extents against an array with a slot for every page: random inserts and removals,
 * the same content after each, and never two neighbours that could be one.
 */
#include "check.h"
#include "extents.h"

#define PAGES 200
#define ROUNDS 20000

static uint64_t model[PAGES]; /* slot of a page, 0 for none */

static void compare(const struct sp_extents *extents)
{
	uint64_t seen[PAGES] = {0};

	for (size_t i = 0; i < extents->count; i++) {
		const struct sp_extent *e = &extents->entries[i];

		CHECK(e->count > 0);
		for (uint32_t k = 0; k < e->count; k++)
			seen[e->page + k] = e->slot == SP_SLOT_IN_PLACE ? e->slot : e->slot + k;
		if (i > 0) {
			const struct sp_extent *left = e - 1;
			int touches = left->page + left->count == e->page;
			int in_place = left->slot == SP_SLOT_IN_PLACE;

			CHECK(left->page + left->count <= e->page);
			CHECK(!(touches && in_place && e->slot == SP_SLOT_IN_PLACE));
			CHECK(!(touches && !in_place && left->slot + left->count == e->slot));
		}
	}
	CHECK(memcmp(seen, model, sizeof(model)) == 0);
	for (int page = 0; page < PAGES; page++) {
		const struct sp_extent *e = sp_extents_at(extents, (uint64_t)page);

		CHECK((e != NULL) == (model[page] != 0));
	}
}

static int is_free(uint64_t page, uint64_t count)
{
	for (uint64_t i = page; i < page + count; i++)
		if (model[i])
			return 0;
	return 1;
}

int main(void)
{
	struct sp_extents extents;
	uint64_t next_slot = 1;

	srandom(1);
	CHECK(sp_extents_init(&extents, PAGES) == 0);
	for (int round = 0; round < ROUNDS; round++) {
		uint64_t page = (uint64_t)random() % PAGES;
		uint64_t count = (uint64_t)random() % (PAGES - page) % 12 + 1;
		uint64_t slot = random() % 5 ? page + 1000 : next_slot;

		if (random() % 10 == 0)
			slot = SP_SLOT_IN_PLACE;
		if (random() % 2) {
			sp_extents_remove(&extents, page, count);
			memset(model + page, 0, count * sizeof(*model));
		} else if (is_free(page, count)) {
			sp_extents_insert(&extents, page, count, slot);
			for (uint64_t k = 0; k < count; k++)
				model[page + k] = slot == SP_SLOT_IN_PLACE ? slot : slot + k;
			next_slot += 5000;
		}
		compare(&extents);
	}
	sp_extents_destroy(&extents);
	return 0;
}
