/*
 * For tests in which threads use pages while this thread, as the mover, replaces them: one arena,
 * its books, and the faults served.
 */
#ifndef SP_TEST_RACING_H
#define SP_TEST_RACING_H

#include <pthread.h>
#include <time.h>

#include "check.h"

/* How often to meet by chance: under the thread sanitizer, which finds a race the first time that it
 * sees it and makes each access many times slower, a tenth of that. */
#ifdef __SANITIZE_THREAD__
#define OFTEN(n) ((n) / 10)
#else
#define OFTEN(n) (n)
#endif

struct racing {
	struct sp_mailbox mailbox;
	struct sp_faults faults;
	struct sp_pager pager;
	uint8_t *data, *shadow;
	int store;
	uint64_t *slot_of; /* of each page, 0: private */
};

/* Starts the pager, and makes an arena of n pages. */
static inline void racing_start(struct racing *racing, size_t n)
{
	start_pager(&racing->pager, &racing->faults, &racing->mailbox);
	racing->data = map_arena(&racing->pager, n, &racing->shadow);
}

static inline void racing_stop(struct racing *racing)
{
	stop_pager(&racing->pager, &racing->faults, &racing->mailbox);
}

static inline void racing_serve(struct racing *racing)
{
	struct sp_fault fault;
	bool overflow;

	while (sp_faults_next(&racing->faults, &fault, &overflow)) {
		size_t page = (fault.address - (uintptr_t)racing->data) / SP_PAGE_SIZE;
		uint8_t *address = racing->data + page * SP_PAGE_SIZE;
		uint64_t slot;

		CHECK(!overflow);
		if (fault.kind == SP_FAULT_MOVED)
			continue; /* this thread's own */
		slot = racing->slot_of[page];
		if (slot && fault.kind == SP_FAULT_WRITE) {
			CHECK(sp_pager_restore(&racing->pager, address,
					       racing->shadow + page * SP_PAGE_SIZE, 1,
					       racing->store, slot) == 0);
			racing->slot_of[page] = 0;
		} else {
			sp_pager_wake(&racing->pager, address, 1);
		}
	}
}

/* Replace pages from `first` on that are private by slots from `slot` on. One outcome a page;
 * returns how many were replaced. */
static inline size_t racing_replace(struct racing *racing, size_t first, size_t n, uint64_t slot,
				    uint8_t *outcomes)
{
	size_t merged = 0;

	sp_pager_replace(&racing->pager, racing->data + first * SP_PAGE_SIZE, n, racing->store,
			 slot, outcomes);
	for (size_t i = 0; i < n; i++) {
		if (outcomes[i] != WIRE_MERGED)
			continue;
		racing->slot_of[first + i] = slot + i;
		merged++;
	}
	return merged;
}

/* The same for every second page of 2 * n, in pieces of one. */
static inline size_t racing_replace_scattered(struct racing *racing, size_t first, size_t n,
					      uint64_t slot, uint8_t *outcomes)
{
	struct sp_piece pieces[SP_PIECES];
	size_t merged = 0;

	for (size_t i = 0; i < n; i++)
		pieces[i] = (struct sp_piece){
			.address = racing->data + (first + 2 * i) * SP_PAGE_SIZE, .n = 1};
	sp_pager_replace_pieces(&racing->pager, pieces, n, racing->store, slot, outcomes);
	for (size_t i = 0; i < n; i++) {
		if (outcomes[i] != WIRE_MERGED)
			continue;
		racing->slot_of[first + 2 * i] = slot + i;
		merged++;
	}
	return merged;
}

static inline bool racing_is_private(const struct racing *racing, size_t first, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (racing->slot_of[first + i])
			return false;
	return true;
}

/* Wait for a thread's end, which may need its faults served. */
static inline void racing_join(struct racing *racing, pthread_t thread)
{
	struct timespec soon;

	do {
		racing_serve(racing);
		clock_gettime(CLOCK_REALTIME, &soon);
		soon.tv_nsec += 1000000;
		soon.tv_sec += soon.tv_nsec / 1000000000;
		soon.tv_nsec %= 1000000000;
	} while (pthread_timedjoin_np(thread, NULL, &soon));
}

#endif
