/*
 * Threads count up in pages that are evicted and brought back under their hands: no count is lost,
 * and nobody ever reads zeros.
 */
#include <stdatomic.h>

#include "pagemap.h"
#include "racing.h"

#define PAGES 64
#define THREADS 2
#define EVICTIONS OFTEN(20000)

static uint64_t slot_of[PAGES];
static struct racing racing = {.slot_of = slot_of};
static bool away[PAGES];
static uint8_t held[PAGES][SP_PAGE_SIZE]; /* what others have */
static atomic_bool stop;

struct counts {
	uint32_t number;
	uint64_t expected[PAGES];
};

static uint8_t *at(uint8_t *memory, size_t page)
{
	return memory + page * SP_PAGE_SIZE;
}

static void *hammer(void *argument)
{
	struct counts *counts = argument;
	uint32_t random = counts->number + 1;

	while (!atomic_load(&stop)) {
		size_t page = (random >> 8) % PAGES;
		volatile uint64_t *counter =
			(uint64_t *)(void *)at(racing.data, page) + 1 + counts->number;

		random = random * 1664525 + 1013904223;
		CHECK(*counter == counts->expected[page]);
		*counter = ++counts->expected[page];
		CHECK(*(volatile uint64_t *)(void *)at(racing.data, page) == page + 1);
		if (random % 4 == 0)
			usleep(50);
	}
	return NULL;
}

static void bring(size_t page)
{
	CHECK(sp_pager_bring(&racing.pager, at(racing.data, page), held[page]) == 0);
	sp_pager_end_away(&racing.pager, at(racing.data, page), 1);
	sp_pager_wake(&racing.pager, at(racing.data, page), 1);
	away[page] = false;
}

static void serve(void)
{
	struct sp_fault fault;
	bool overflow;

	while (sp_faults_next(&racing.faults, &fault, &overflow)) {
		size_t page = (fault.address - (uintptr_t)racing.data) / SP_PAGE_SIZE;

		CHECK(!overflow);
		if (fault.kind == SP_FAULT_MOVED || page >= PAGES)
			continue;
		if (away[page])
			bring(page);
		else
			sp_pager_wake(&racing.pager, at(racing.data, page), 1);
	}
}

static size_t evict(size_t first, size_t n)
{
	uint8_t outcomes[PAGES];
	size_t evicted = 0;

	for (size_t i = first; i < first + n; i++)
		if (away[i])
			return 0;
	memcpy(held[first], at(racing.data, first), n * SP_PAGE_SIZE); /* perhaps torn */
	sp_pager_evict(&racing.pager, at(racing.data, first), at(racing.shadow, first), n, held[first],
		       outcomes);
	for (size_t i = 0; i < n; i++) {
		CHECK(outcomes[i] == WIRE_MERGED || outcomes[i] == WIRE_DIFFERS);
		if (outcomes[i] != WIRE_MERGED)
			continue;
		CHECK(sp_pager_is_expected(&racing.pager, at(racing.data, first + i), 1));
		away[first + i] = true;
		evicted++;
	}
	return evicted;
}

int main(void)
{
	struct counts counts[THREADS] = {0};
	pthread_t threads[THREADS];
	struct timespec soon;
	size_t evictions = 0;

	racing_start(&racing, PAGES);
	if (!racing.pager.can_away)
		skip("this kernel lacks what away pages need");
	for (size_t page = 0; page < PAGES; page++)
		*(uint64_t *)(void *)at(racing.data, page) = page + 1;
	srandom(4);
	for (uint32_t i = 0; i < THREADS; i++) {
		counts[i].number = i;
		CHECK(pthread_create(&threads[i], NULL, hammer, &counts[i]) == 0);
	}
	while (evictions < EVICTIONS) {
		size_t first = (size_t)random() % PAGES, n = (size_t)random() % 8 + 1;

		evictions += evict(first, n > PAGES - first ? PAGES - first : n);
		serve();
		if (random() % 4 == 0 && away[first])
			bring(first);
	}
	atomic_store(&stop, true);
	for (uint32_t i = 0; i < THREADS; i++)
		do {
			serve();
			clock_gettime(CLOCK_REALTIME, &soon);
			soon.tv_sec += soon.tv_nsec >= 999000000;
			soon.tv_nsec = (soon.tv_nsec + 1000000) % 1000000000;
		} while (pthread_timedjoin_np(threads[i], NULL, &soon));
	for (size_t page = 0; page < PAGES; page++) {
		if (away[page])
			bring(page);
		CHECK(((uint64_t *)(void *)at(racing.data, page))[0] == page + 1);
		for (uint32_t i = 0; i < THREADS; i++)
			CHECK(((uint64_t *)(void *)at(racing.data, page))[1 + i] ==
			      counts[i].expected[page]);
	}
	racing_stop(&racing);
	printf("%zu pages evicted and brought back, no count lost\n", evictions);
	return 0;
}
