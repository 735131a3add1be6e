/*
 * The page primitive with nobody racing: every outcome, and what the addresses map afterwards.
 *
 * The test's own thread plays the mover, so a watcher is needed for remap events, and nothing may
 * fault on a protected page here.
 */
#include "check.h"
#include "kernel.h"
#include "pagemap.h"

#define N 16

static struct sp_mailbox mailbox;
static struct sp_faults faults;
static struct sp_pager pager;

static uint64_t entry(const uint8_t *page)
{
	uint64_t value;

	CHECK(sp_pagemap_read(pager.pagemap, page, 1, &value) == 0);
	return value;
}

static uint8_t *at(uint8_t *data, size_t page)
{
	return data + page * SP_PAGE_SIZE;
}

static void replace_and_restore(void)
{
	uint8_t *shadow, *data = map_arena(&pager, N, &shadow), expected[SP_PAGE_SIZE], outcomes[N];
	int store = make_store(N + 1);

	for (size_t i = 0; i < N; i++)
		memset(at(data, i), 'a' + (int)i, SP_PAGE_SIZE);
	for (size_t i = 0; i < N; i++)
		write_slot(store, i + 1, at(data, i));
	at(data, 5)[17] = 'X';
	CHECK(madvise(at(data, 9), SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	sp_pager_replace(&pager, data, N, store, 1, outcomes);
	for (size_t i = 0; i < N; i++) {
		uint8_t wanted = i == 5 ? WIRE_DIFFERS : i == 9 ? WIRE_ABSENT : WIRE_MERGED;

		CHECK(outcomes[i] == wanted);
		CHECK(sp_pagemap_is_shared(entry(at(data, i))) == (wanted == WIRE_MERGED));
	}
	CHECK(!sp_pagemap_is_there(entry(at(data, 9))));
	CHECK(at(data, 5)[17] == 'X' && at(data, 5)[18] == 'f');
	memset(expected, 'a', SP_PAGE_SIZE);
	CHECK(memcmp(data, expected, SP_PAGE_SIZE) == 0);

	CHECK(sp_pager_restore(&pager, at(data, 2), at(shadow, 2), 2, store, 3) == 0);
	CHECK(!sp_pagemap_is_shared(entry(at(data, 2))) && !sp_pagemap_is_shared(entry(at(data, 3))));
	CHECK(sp_pagemap_is_shared(entry(at(data, 4))));
	memset(at(data, 2), '!', SP_PAGE_SIZE); /* traps on nothing any more */
	CHECK(at(data, 3)[4095] == 'd');
	memset(at(data, 2), 'c', SP_PAGE_SIZE);
	sp_pager_replace(&pager, at(data, 2), 2, store, 3, outcomes); /* and merges again */
	CHECK(outcomes[0] == WIRE_MERGED && outcomes[1] == WIRE_MERGED);

	CHECK(sp_pager_copy_in_place(&pager, data) == 0);
	CHECK(!sp_pagemap_is_shared(entry(data)));
	/* the slot may go at once: nobody maps it any more */
	CHECK(fallocate(store, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, SP_PAGE_SIZE,
			SP_PAGE_SIZE) == 0);
	CHECK(memcmp(data, expected, SP_PAGE_SIZE) == 0);
	data[0] = 'Z';
	CHECK(data[0] == 'Z' && data[1] == 'a');
	sp_pager_replace(&pager, data, 1, store, 1, outcomes);
	CHECK(outcomes[0] == WIRE_UNSUPPORTED && data[0] == 'Z');
	unmap_arena(data, shadow, N);
	close(store);
}

static void zero_pages(void)
{
	uint8_t *shadow, *data = map_arena(&pager, 3, &shadow), outcomes[3];

	memset(data, 0, 3 * SP_PAGE_SIZE);
	at(data, 1)[4095] = 1;
	sp_pager_drop_zero(&pager, data, 3, outcomes);
	CHECK(outcomes[0] == WIRE_MERGED && outcomes[1] == WIRE_DIFFERS &&
	      outcomes[2] == WIRE_MERGED);
	CHECK(!sp_pagemap_is_there(entry(data)) && !sp_pagemap_is_there(entry(at(data, 2))));
	CHECK(at(data, 1)[4095] == 1 && data[0] == 0 && at(data, 2)[9] == 0);
	data[0] = 7;
	CHECK(data[0] == 7);
	unmap_arena(data, shadow, 3);
}

static void protected_pages(void)
{
	uint8_t *shadow, *data = map_arena(&pager, 4, &shadow), outcomes[4];
	int store = make_store(5);

	memset(data, 'p', 4 * SP_PAGE_SIZE);
	for (uint64_t slot = 1; slot <= 4; slot++)
		write_slot(store, slot, data);
	CHECK(mprotect(at(data, 1), SP_PAGE_SIZE, PROT_READ) == 0);
	sp_pager_replace(&pager, data, 4, store, 1, outcomes);
	CHECK(outcomes[0] == WIRE_MERGED && outcomes[1] == WIRE_UNSUPPORTED);
	CHECK(outcomes[2] == WIRE_MERGED && outcomes[3] == WIRE_MERGED);
	CHECK(at(data, 1)[0] == 'p' && at(data, 1)[4095] == 'p');
	unmap_arena(data, shadow, 4);
	close(store);
}

/* Runs that are replaced together, with one of every kind among them. */
static void pieces(void)
{
	uint8_t *shadow, *data = map_arena(&pager, N, &shadow), outcomes[N];
	struct sp_piece some[] = {{.address = at(data, 1), .n = 2},
				  {.address = at(data, 4), .n = 3},
				  {.address = at(data, 8), .n = 1},
				  {.address = at(data, 10), .n = 2},
				  {.address = at(data, 14), .n = 1}};
	static const uint8_t page_of[] = {1, 2, 4, 5, 6, 8, 10, 11, 14};
	int store = make_store(10);

	for (size_t i = 0; i < N; i++)
		memset(at(data, i), 'a' + (int)i, SP_PAGE_SIZE);
	for (size_t i = 0; i < sizeof(page_of); i++)
		write_slot(store, i + 1, at(data, page_of[i]));
	at(data, 5)[4095] = 'X';
	CHECK(mprotect(at(data, 8), SP_PAGE_SIZE, PROT_READ) == 0);
	CHECK(madvise(at(data, 11), SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	CHECK(munmap(at(data, 14), SP_PAGE_SIZE) == 0);
	sp_pager_replace_pieces(&pager, some, 5, store, 1, outcomes);
	for (size_t i = 0; i < sizeof(page_of); i++) {
		uint8_t page = page_of[i], wanted = page == 5 ? WIRE_DIFFERS : page == 11 ? WIRE_ABSENT
				: page == 8 || page == 14 ? WIRE_UNSUPPORTED : WIRE_MERGED;

		CHECK(outcomes[i] == wanted);
		CHECK(sp_pagemap_is_shared(entry(at(data, page))) == (wanted == WIRE_MERGED));
	}
	for (size_t i = 0; i < N; i++)
		CHECK(i == 11 || i == 14 || (at(data, i)[0] == 'a' + (int)i && at(data, i)[1] == 'a' + (int)i));
	CHECK(at(data, 5)[4095] == 'X' && at(data, 11)[0] == 0);
	at(data, 5)[1] = at(data, 7)[1] = at(data, 11)[1] = '!'; /* what is private is nobody's to wait for */
	CHECK(sp_pager_restore(&pager, at(data, 4), at(shadow, 4), 1, store, 3) == 0);
	CHECK(at(data, 4)[9] == 'e');
	unmap_arena(data, shadow, N);
	close(store);
}

static void fill(void)
{
	uint8_t *shadow, *data = map_arena(&pager, 4, &shadow), *bytes = map_pages(4), outcomes[4];

	memset(data, 'o', 4 * SP_PAGE_SIZE);
	memset(bytes, 'n', 4 * SP_PAGE_SIZE);
	CHECK(sp_pager_take(&pager, data, 4, outcomes) == 0);
	for (size_t i = 0; i < 4; i++)
		CHECK(outcomes[i] == WIRE_MERGED && !sp_pagemap_is_there(entry(at(data, i))));
	sp_pager_put_back(&pager, data, 2, 1);
	CHECK(sp_pager_fill(&pager, data, bytes, 4) == 0);
	CHECK(data[0] == 'n' && at(data, 1)[5] == 'n' && at(data, 3)[4095] == 'n');
	CHECK(at(data, 2)[0] == 'o'); /* what is there keeps its bytes */
	sp_pager_end_missing(&pager, data, 4);
	CHECK(madvise(pager.staging, 4 * SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	unmap_arena(data, shadow, 4);
	munmap(bytes, 4 * SP_PAGE_SIZE);
}

/* mlockall() puts zero pages where the pager expects none. */
static void filled_side_memory(void)
{
	uint8_t *shadow, *data = map_arena(&pager, 4, &shadow), outcomes[4];
	uint8_t *zeros = map_pages(4);
	int store = make_store(5);

	memset(data, 's', 4 * SP_PAGE_SIZE);
	for (uint64_t slot = 1; slot <= 4; slot++)
		write_slot(store, slot, data);
	CHECK(sp_pager_fill(&pager, at(pager.staging, 1), zeros, 2) == 0);
	sp_pager_replace(&pager, data, 4, store, 1, outcomes);
	for (size_t i = 0; i < 4; i++)
		CHECK(outcomes[i] == WIRE_MERGED);
	CHECK(sp_pager_fill(&pager, at(shadow, 2), zeros, 1) == 0);
	CHECK(sp_pager_restore(&pager, data, shadow, 4, store, 1) == 0);
	for (size_t i = 0; i < 4 * SP_PAGE_SIZE; i++)
		CHECK(data[i] == 's');
	munmap(zeros, 4 * SP_PAGE_SIZE);
	unmap_arena(data, shadow, 4);
	close(store);
}

int main(void)
{

	start_pager(&pager, &faults, &mailbox);
	replace_and_restore();
	zero_pages();
	protected_pages();
	pieces();
	fill();
	filled_side_memory();
	stop_pager(&pager, &faults, &mailbox);
	return 0;
}
