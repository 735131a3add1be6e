/*
 * Threads count up in pages that are frozen under their hands, all in one page or each anywhere:
 * from the freeze to the thaw no byte changes and a page is replaced at the first attempt, or is
 * protected again; afterwards they go on, and no count is lost. The same for system calls that
 * write, for a child, and where the application has changed its mappings meanwhile.
 */
#include <sys/wait.h>

#include "pagemap.h"
#include "racing.h"

#define PAGES 2048 /* so that huge pages are among them */
#define BYTES (PAGES * SP_PAGE_SIZE)
#define THREADS 3
#define FREEZES OFTEN(150)
#define RUN 64
#define HOT 1000
#define PAUSE_US 1000

static uint64_t slot_of[PAGES];
static struct racing racing = {.slot_of = slot_of};
static struct sp_frozen frozen;
static atomic_bool stop, hot;

/* Each thread has a counter of its own in every page. */
struct counts {
	uint32_t number;
	atomic_size_t all;
	uint64_t expected[PAGES];
};

static struct counts counts[THREADS];

static uint64_t *counter(size_t page, uint32_t thread)
{
	return (uint64_t *)(void *)(racing.data + page * SP_PAGE_SIZE) + thread * 64;
}

static void *hammer(void *argument)
{
	struct counts *own = argument;
	uint32_t random = own->number + 1;

	while (!atomic_load(&stop)) {
		size_t page = atomic_load(&hot) ? HOT : (random >> 8) % PAGES;
		volatile uint64_t *at = counter(page, own->number);

		random = random * 1664525 + 1013904223;
		*at = *at + 1;
		own->expected[page]++;
		atomic_fetch_add(&own->all, 1);
	}
	return NULL;
}

/* Do something to each stretch of private pages. */
static void visit_private(void (*change)(uint8_t *address, size_t n))
{
	for (size_t page = 0, end; page < PAGES; page = end) {
		for (end = page + 1; end < PAGES && !slot_of[end] == !slot_of[page];)
			end++;
		if (!slot_of[page])
			change(racing.data + page * SP_PAGE_SIZE, end - page);
	}
}

static void freeze_stretch(uint8_t *address, size_t n)
{
	CHECK(sp_pager_freeze(&racing.pager, address, n) == 0);
}

static void thaw_stretch(uint8_t *address, size_t n)
{
	sp_pager_thaw(&racing.pager, address, n);
}

static uint64_t took; /* to freeze, ns */

static void freeze(void)
{
	uint64_t started = sp_faults_now();

	frozen = (struct sp_frozen){.start = racing.data, .length = BYTES};
	sp_pager_begin_freeze(&racing.pager, &frozen);
	visit_private(freeze_stretch);
	took += sp_faults_now() - started;
}

static void thaw(void)
{
	sp_pager_end_freeze(&racing.pager, &frozen);
	visit_private(thaw_stretch);
	sp_pager_wake(&racing.pager, racing.data, PAGES);
}

static uint64_t entry_of(const uint8_t *address)
{
	uint64_t entry;

	CHECK(sp_pagemap_read(racing.pager.pagemap, address, 1, &entry) == 0);
	return entry;
}

/* Replace private pages of a run by slots with these bytes; all have the same outcome. */
static void replace(size_t first, uint8_t outcome, const uint8_t *bytes)
{
	uint8_t outcomes[RUN];

	if (!racing_is_private(&racing, first, RUN))
		return;
	for (size_t i = 0; i < RUN; i++)
		write_slot(racing.store, 1 + first + i, bytes + i * SP_PAGE_SIZE);
	racing_replace(&racing, first, RUN, 1 + first, outcomes);
	for (size_t i = 0; i < RUN; i++) {
		CHECK(outcomes[i] == outcome);
		CHECK(entry_of(racing.data + (first + i) * SP_PAGE_SIZE) & PAGEMAP_UFFD_WP);
	}
}

static size_t random_run(void)
{
	return (size_t)random() % (PAGES / RUN) * RUN;
}

static void freeze_once(uint8_t *before, uint8_t *other)
{
	size_t first = atomic_load(&hot) ? HOT / RUN * RUN : random_run(), since[THREADS];

	freeze();
	memcpy(before, racing.data, BYTES);
	usleep(PAUSE_US);
	CHECK(memcmp(before, racing.data, BYTES) == 0);
	replace(random_run(), WIRE_DIFFERS, other);
	replace(first, WIRE_MERGED, before + first * SP_PAGE_SIZE);
	usleep(PAUSE_US);
	CHECK(memcmp(before, racing.data, BYTES) == 0);
	for (size_t i = 0; i < THREADS; i++)
		since[i] = atomic_load(&counts[i].all);
	thaw();
	for (size_t i = 0; i < THREADS; i++)
		while (atomic_load(&counts[i].all) <= since[i] + 1)
			racing_serve(&racing);
}

static void freeze_under_writers(void)
{
	uint8_t *before = map_pages(PAGES), *other = map_pages(RUN);
	pthread_t threads[THREADS];

	memset(other, 'x', RUN * SP_PAGE_SIZE);
	for (uint32_t i = 0; i < THREADS; i++) {
		counts[i].number = i;
		CHECK(pthread_create(&threads[i], NULL, hammer, &counts[i]) == 0);
	}
	for (size_t i = 0; i < FREEZES; i++) {
		atomic_store(&hot, i % 2);
		freeze_once(before, other);
	}
	atomic_store(&stop, true);
	for (uint32_t i = 0; i < THREADS; i++)
		racing_join(&racing, threads[i]);
	for (uint32_t i = 0; i < THREADS; i++)
		for (size_t page = 0; page < PAGES; page++)
			CHECK(*counter(page, i) == counts[i].expected[page]);
	printf("%d freezes of %d pages under %d writers, %.0f us each\n", FREEZES, PAGES, THREADS,
	       (double)took / FREEZES / 1000);
}

static void restore_all(void)
{
	for (size_t page = 0; page < PAGES; page++) {
		if (slot_of[page])
			CHECK(sp_pager_restore(&racing.pager, racing.data + page * SP_PAGE_SIZE,
					       racing.shadow + page * SP_PAGE_SIZE, 1, racing.store,
					       slot_of[page]) == 0);
		slot_of[page] = 0;
	}
}

static int pipes[2];

static void *read_into_a_page(void *page)
{
	CHECK(read(pipes[0], page, SP_PAGE_SIZE) == SP_PAGE_SIZE);
	return NULL;
}

static void *touch(void *page)
{
	*(volatile uint8_t *)page = 1;
	return NULL;
}

/* The kernel, who writes for a system call, and who touches a page that is not there wait, too. */
static void freeze_under_system_calls(void)
{
	uint8_t *page = racing.data + 5 * SP_PAGE_SIZE, *absent = racing.data + 9 * SP_PAGE_SIZE;
	uint8_t *bytes = map_pages(1);
	pthread_t reading, touching;

	memset(page, 'a', SP_PAGE_SIZE);
	memset(bytes, 'b', SP_PAGE_SIZE);
	CHECK(madvise(absent, SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	CHECK(pipe(pipes) == 0);
	freeze();
	CHECK(pthread_create(&reading, NULL, read_into_a_page, page) == 0);
	CHECK(pthread_create(&touching, NULL, touch, absent) == 0);
	CHECK(write(pipes[1], bytes, SP_PAGE_SIZE) == SP_PAGE_SIZE);
	usleep(50 * PAUSE_US);
	CHECK(page[0] == 'a' && page[SP_PAGE_SIZE - 1] == 'a');
	CHECK(!sp_pagemap_has_page(entry_of(absent)));
	thaw();
	racing_join(&racing, reading);
	racing_join(&racing, touching);
	CHECK(memcmp(page, bytes, SP_PAGE_SIZE) == 0 && absent[0] == 1);
}

/* A child's copy of a frozen page is its own. */
static void freeze_before_fork(void)
{
	uint8_t *page = racing.data + 20 * SP_PAGE_SIZE;
	int status;
	pid_t child;

	memset(page, 'p', SP_PAGE_SIZE);
	CHECK(madvise(page, SP_PAGE_SIZE, MADV_DOFORK) == 0);
	freeze();
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		page[1] = 'c';
		_exit(page[0] == 'p' && page[1] == 'c' ? 0 : 1);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(page[1] == 'p' && (entry_of(page) & PAGEMAP_UFFD_WP));
	thaw();
	page[1] = 'q';
	CHECK(madvise(page, SP_PAGE_SIZE, MADV_DONTFORK) == 0);
}

/* The thaw leaves nothing protected beside what the application has put into the middle. */
static void freeze_of_changed_mappings(void)
{
	int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	uint8_t *at = racing.data;

	memset(at, 7, PAGES * SP_PAGE_SIZE);
	freeze();
	CHECK(munmap(at + 10 * SP_PAGE_SIZE, 4 * SP_PAGE_SIZE) == 0);
	CHECK(mmap(at + 20 * SP_PAGE_SIZE, SP_PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0) !=
	      MAP_FAILED);
	CHECK(mprotect(at + 30 * SP_PAGE_SIZE, 4 * SP_PAGE_SIZE, PROT_NONE) == 0);
	CHECK(mprotect(at + 40 * SP_PAGE_SIZE, 4 * SP_PAGE_SIZE, PROT_READ) == 0);
	thaw();
	CHECK(mprotect(at + 30 * SP_PAGE_SIZE, 14 * SP_PAGE_SIZE, PROT_READ | PROT_WRITE) == 0);
	for (size_t i = 0; i < PAGES; i++, at += SP_PAGE_SIZE) {
		CHECK(!(entry_of(at) & PAGEMAP_UFFD_WP));
		if ((i >= 10 && i < 14) || i == 20)
			continue;
		CHECK(*at == 7);
		*at = 8;
	}
	close(file);
}

int main(void)
{
	racing_start(&racing, PAGES);
	madvise(racing.data, BYTES, MADV_HUGEPAGE); /* where there are any */
	memset(racing.data, 0, BYTES);
	racing.store = make_store(PAGES + 1);
	srandom(7);
	freeze_under_writers();
	restore_all();
	freeze_under_system_calls();
	freeze_before_fork();
	freeze_of_changed_mappings();
	racing_stop(&racing);
	return 0;
}
