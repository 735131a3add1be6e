/*
 * Which pages were written: every write is told of once, whatever happens to the page meanwhile; and
 * with threads that write while this one asks, fingerprints, replaces and restores, what differs
 * from the last fingerprint has been told of in the end.
 */
#include <stdatomic.h>

#include "changes.h"
#include "racing.h"

#define PAGES 256
#define THREADS 2
#define ROUNDS OFTEN(4000)
#define MOST 512

static struct sp_regions regions;
static uint64_t window[2 * MOST + 2];
static uint64_t slot_of[PAGES];
static struct racing racing = {.slot_of = slot_of};
static atomic_bool stop;

static struct wire_changed *ask(uint64_t page, uint64_t count, size_t most)
{
	struct wire_changed *answer = (struct wire_changed *)window;
	struct wire_range range = {.page = page, .count = count};

	CHECK(sp_changes_take(racing.pager.pagemap, racing.data, range, &regions, answer, most) == 0);
	return answer;
}

static const struct wire_range *ranges_of(const struct wire_changed *answer)
{
	return (const struct wire_range *)(answer + 1);
}

/* Exactly these ranges of the whole arena were written; ends with count 0. */
static void expect(const struct wire_range *wanted)
{
	const struct wire_changed *answer = ask(0, PAGES, MOST);
	size_t n = 0;

	CHECK(answer->told == PAGES);
	for (; wanted[n].count > 0; n++)
		CHECK(n < answer->ranges && ranges_of(answer)[n].page == wanted[n].page &&
		      ranges_of(answer)[n].count == wanted[n].count);
	CHECK(answer->ranges == n);
}

#define EXPECT(...) expect((const struct wire_range[]){__VA_ARGS__, {0}})
#define NOTHING {0}

static uint8_t *at(size_t page)
{
	return racing.data + page * SP_PAGE_SIZE;
}

/* Nobody writes meanwhile. */
static void one_by_one(void)
{
	uint8_t outcomes[PAGES];
	uint64_t told = 0;
	uint8_t *other;

	EXPECT(NOTHING); /* never touched */
	memset(at(10), 1, 20 * SP_PAGE_SIZE);
	EXPECT({10, 20});
	EXPECT(NOTHING);
	*at(12) = 2;
	*at(14) = 2;
	*at(15) = 2;
	EXPECT({12, 1}, {14, 2});
	*at(10) = 3;
	*at(29) = 3;
	CHECK(ask(0, 20, MOST)->ranges == 1);
	EXPECT({29, 1});

	/* a full answer tells up to where it goes, and loses nothing */
	for (size_t i = 10; i < 30; i += 2)
		*at(i) = 4;
	for (uint64_t page = 0; page < PAGES; page += ((struct wire_changed *)window)->told) {
		const struct wire_changed *answer = ask(page, PAGES - page, 4);

		CHECK(answer->ranges <= 4 && answer->told > 0);
		told += answer->ranges;
	}
	CHECK(told == 10);

	/* refused, replaced, restored, discarded */
	CHECK(pwrite(racing.store, at(10), 4 * SP_PAGE_SIZE, SP_PAGE_SIZE) == 4 * SP_PAGE_SIZE);
	*at(11) = 99;
	EXPECT({11, 1});
	CHECK(racing_replace(&racing, 10, 4, 1, outcomes) == 3 && outcomes[1] == WIRE_DIFFERS);
	EXPECT({11, 1}); /* put back */
	EXPECT(NOTHING);
	CHECK(sp_pager_restore(&racing.pager, at(12), racing.shadow + 12 * SP_PAGE_SIZE, 1,
			       racing.store, 3) == 0);
	slot_of[12] = 0;
	EXPECT({12, 1});
	CHECK(sp_pager_copy_in_place(&racing.pager, at(13)) == 0);
	slot_of[13] = 0;
	EXPECT({13, 1});
	EXPECT({13, 1}); /* can't be followed: told of each time */
	CHECK(madvise(at(13), SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	CHECK(sp_pager_discard(&racing.pager, at(13), racing.shadow + 13 * SP_PAGE_SIZE, 1) == 0);
	EXPECT(NOTHING);
	CHECK(madvise(at(20), 2 * SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	EXPECT(NOTHING);
	CHECK(*at(20) == 0);
	*at(21) = 1;
	EXPECT({20, 2});

	/* the application's own mapping inside the arena, and protection */
	other = mmap(at(25), SP_PAGE_SIZE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(other == at(25));
	*at(25) = 1;
	EXPECT({25, 1});
	EXPECT({25, 1});
	CHECK(mprotect(at(26), SP_PAGE_SIZE, PROT_READ) == 0);
	EXPECT({25, 1});
	CHECK(mprotect(at(26), SP_PAGE_SIZE, PROT_READ | PROT_WRITE) == 0);
	*at(26) = 5;
	EXPECT({25, 2});
	CHECK(racing_replace(&racing, 10, 1, 1, outcomes) == 0);
	CHECK(sp_pager_restore(&racing.pager, at(10), racing.shadow + 10 * SP_PAGE_SIZE, 1,
			       racing.store, 1) == 0);
	slot_of[10] = 0;
}

static void *scribble(void *argument)
{
	uint32_t random = *(uint32_t *)argument;

	while (!atomic_load(&stop)) {
		random = random * 1664525 + 1013904223;
		((volatile uint64_t *)(void *)at((random >> 8) % PAGES))[random >> 24] = random;
		if (random % 64 == 0)
			usleep(20);
	}
	return NULL;
}

static uint8_t seen[PAGES][SP_FINGERPRINT_SIZE];

/* Fingerprint what is told of, as a scanner would. */
static void look(void)
{
	const struct wire_changed *answer = ask(0, PAGES, MOST);

	CHECK(answer->told == PAGES);
	for (size_t i = 0; i < answer->ranges; i++)
		for (uint64_t k = 0; k < ranges_of(answer)[i].count; k++) {
			uint64_t page = ranges_of(answer)[i].page + k;

			/* not on this thread, the mover's, when the page is shared by now */
			if (!slot_of[page])
				sp_fingerprint(at(page), 1, 7, seen[page]);
		}
}

static void move_about(uint64_t *slot)
{
	uint8_t outcomes[16];
	size_t first = (size_t)random() % (PAGES - 16);

	if (!racing_is_private(&racing, first, 16))
		return;
	*slot = *slot > 2000 ? 1 : *slot + 16;
	for (size_t i = 0; i < PAGES; i++)
		if (slot_of[i] >= *slot && slot_of[i] < *slot + 16)
			return;
	CHECK(pwrite(racing.store, at(first), 16 * SP_PAGE_SIZE,
		     (off_t)(*slot * SP_PAGE_SIZE)) == 16 * SP_PAGE_SIZE);
	racing_replace(&racing, first, 16, *slot, outcomes);
}

static void restore_all(void)
{
	for (size_t i = 0; i < PAGES; i++)
		if (slot_of[i]) {
			CHECK(sp_pager_restore(&racing.pager, at(i),
					       racing.shadow + i * SP_PAGE_SIZE, 1, racing.store,
					       slot_of[i]) == 0);
			slot_of[i] = 0;
		}
}

int main(void)
{
	uint32_t seeds[THREADS];
	pthread_t threads[THREADS];
	uint64_t slot = 1;

	racing_start(&racing, PAGES);
	if (!racing.pager.tracks)
		skip("this kernel does not follow writes");
	racing.store = make_store(2100);
	one_by_one();
	memset(racing.data, 0, PAGES * SP_PAGE_SIZE);
	look();
	srandom(11);
	for (uint32_t i = 0; i < THREADS; i++) {
		seeds[i] = i + 1;
		CHECK(pthread_create(&threads[i], NULL, scribble, &seeds[i]) == 0);
	}
	for (int round = 0; round < ROUNDS; round++) {
		look();
		move_about(&slot);
		racing_serve(&racing);
	}
	atomic_store(&stop, true);
	for (uint32_t i = 0; i < THREADS; i++)
		racing_join(&racing, threads[i]);
	restore_all();
	look();
	for (size_t i = 0; i < PAGES; i++) {
		uint8_t now[SP_FINGERPRINT_SIZE];

		sp_fingerprint(at(i), 1, 7, now);
		CHECK(memcmp(now, seen[i], sizeof(now)) == 0);
	}
	CHECK(ask(0, PAGES, MOST)->ranges <= 1); /* page 25, which the application mapped */
	racing_stop(&racing);
	return 0;
}
