/*
 * Threads count up in pages that are replaced and restored under their hands, at least 60,000
 * times: no count is lost, and no page that the extents call shared was ever copied by the kernel.
 */
#include <stdatomic.h>

#include "pagemap.h"
#include "racing.h"

#define PAGES 64
#define THREADS 2
#define SWAPS OFTEN(60000)
#define SLOTS 4096

static uint64_t slot_of[PAGES];
static struct racing racing = {.slot_of = slot_of};
static atomic_bool stop;

/* Each thread has a counter of its own in every page. */
struct counts {
	uint32_t number;
	uint64_t expected[PAGES];
};

static uint64_t *counter(size_t page, uint32_t thread)
{
	return (uint64_t *)(void *)(racing.data + page * SP_PAGE_SIZE) + thread * 64;
}

static void *hammer(void *argument)
{
	struct counts *counts = argument;
	uint32_t random = counts->number + 1;

	while (!atomic_load(&stop)) {
		size_t page = (random >> 8) % PAGES;

		random = random * 1664525 + 1013904223;
		for (int i = 0; i < 8; i++) {
			volatile uint64_t *at = counter(page, counts->number);

			*at = *at + 1;
			counts->expected[page]++;
		}
		if (random % 16 == 0)
			usleep(20);
	}
	return NULL;
}

/* What the books call shared maps the store, and what they call private does not. */
static void check_books(void)
{
	uint64_t entries[PAGES];

	CHECK(sp_pagemap_read(racing.pager.pagemap, racing.data, PAGES, entries) == 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(!slot_of[i] == !sp_pagemap_is_shared(entries[i]));
}

/* Replace n pages from `first` on, or every second one. */
static size_t replace_run(size_t first, size_t n, size_t step, uint64_t slot)
{
	uint8_t outcomes[PAGES];
	size_t merged;

	if (!racing_is_private(&racing, first, n * step))
		return 0;
	/* while others write: a torn copy will just differ */
	for (size_t i = 0; i < n; i++)
		write_slot(racing.store, slot + i, racing.data + (first + i * step) * SP_PAGE_SIZE);
	merged = step == 1 ? racing_replace(&racing, first, n, slot, outcomes)
			   : racing_replace_scattered(&racing, first, n, slot, outcomes);
	for (size_t i = 0; i < n; i++)
		CHECK(outcomes[i] == WIRE_MERGED || outcomes[i] == WIRE_DIFFERS);
	return merged;
}

static bool is_slot_used(uint64_t slot, size_t n)
{
	for (size_t i = 0; i < PAGES; i++)
		if (slot_of[i] >= slot && slot_of[i] < slot + n)
			return true;
	return false;
}

int main(void)
{
	struct counts counts[THREADS] = {0};
	pthread_t threads[THREADS];
	size_t swaps = 0, rounds = 0;
	uint64_t slot = 1;

	racing_start(&racing, PAGES);
	memset(racing.data, 0, PAGES * SP_PAGE_SIZE);
	racing.store = make_store(SLOTS);
	srandom(3);
	for (uint32_t i = 0; i < THREADS; i++) {
		counts[i].number = i;
		CHECK(pthread_create(&threads[i], NULL, hammer, &counts[i]) == 0);
	}
	for (; swaps < SWAPS; rounds++) {
		size_t first = (size_t)random() % PAGES, n = (size_t)random() % 16 + 1;
		size_t step = (size_t)random() % 2 + 1;

		if (first + step > PAGES)
			step = 1;
		if (n * step > PAGES - first)
			n = (PAGES - first) / step;
		if (slot + n > SLOTS)
			slot = 1;
		if (!is_slot_used(slot, n))
			swaps += replace_run(first, n, step, slot);
		slot += n;
		racing_serve(&racing);
		if (rounds % 64 == 0)
			check_books();
	}
	atomic_store(&stop, true);
	for (uint32_t i = 0; i < THREADS; i++)
		racing_join(&racing, threads[i]);
	check_books();
	for (uint32_t i = 0; i < THREADS; i++)
		for (size_t page = 0; page < PAGES; page++)
			CHECK(*counter(page, i) == counts[i].expected[page]);
	racing_stop(&racing);
	printf("%zu swaps in %zu rounds, no count lost\n", swaps, rounds);
	return 0;
}
