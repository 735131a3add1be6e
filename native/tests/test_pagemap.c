/*
 * Counting pages by whose memory they take: what was never written takes none, also where it was
 * read, or where a written page was discarded.
 */
#include <sys/mman.h>

#include "check.h"
#include "pagemap.h"

#define PAGES 300

static struct sp_page_counts count(int pagemap, const uint8_t *data, size_t n)
{
	struct sp_page_counts counts = {0};

	CHECK(sp_pagemap_count(pagemap, data, n, &counts) == 0);
	CHECK(counts.private_pages + counts.shared_pages + counts.absent_pages == n);
	return counts;
}

/* Whether this kernel can tell the zero page from others: PAGEMAP_SCAN is there. */
static bool knows_zero(int pagemap)
{
	struct pm_scan_arg scan = {.size = sizeof(scan), .category_mask = PAGE_IS_PFNZERO};

	return ioctl(pagemap, PAGEMAP_SCAN, &scan) >= 0;
}

int main(void)
{
	int pagemap = sp_pagemap_open();
	uint8_t *data = mmap(NULL, PAGES * SP_PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile uint8_t *read = data;
	uint64_t sum = 0;

	CHECK(pagemap >= 0 && data != MAP_FAILED);
	madvise(data, PAGES * SP_PAGE_SIZE, MADV_NOHUGEPAGE);
	CHECK(count(pagemap, data, PAGES).absent_pages == PAGES);
	for (size_t page = 0; page < PAGES; page += 2)
		data[page * SP_PAGE_SIZE] = 1;
	CHECK(count(pagemap, data, PAGES).private_pages == PAGES / 2);
	CHECK(count(pagemap, data + SP_PAGE_SIZE, 1).absent_pages == 1);
	for (size_t page = 0; page < PAGES; page++)
		sum += read[page * SP_PAGE_SIZE];
	CHECK(sum == PAGES / 2);
	if (knows_zero(pagemap))
		CHECK(count(pagemap, data, PAGES).private_pages == PAGES / 2);
	CHECK(madvise(data, PAGES / 2 * SP_PAGE_SIZE, MADV_DONTNEED) == 0);
	if (knows_zero(pagemap))
		CHECK(count(pagemap, data, PAGES).private_pages == PAGES / 4);
	CHECK(count(pagemap, data, PAGES / 2).absent_pages == PAGES / 2);
	munmap(data, PAGES * SP_PAGE_SIZE);
	close(pagemap);
	return 0;
}
