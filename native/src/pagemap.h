/*
 * What is at an address now, as /proc/self/pagemap shows it without touching it.
 */
#ifndef SP_PAGEMAP_H
#define SP_PAGEMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

#define SP_COUNT_PAGES 512 /* counted at once */

/* Pages by whose memory they take. The kernel's zero page, which reading a page that is not there
 * brings, counts as absent; without PAGEMAP_SCAN it cannot be told from a private page. */
struct sp_page_counts {
	uint64_t private_pages;
	uint64_t shared_pages;
	uint64_t absent_pages;
};

/* A descriptor, or -errno. */
int sp_pagemap_open(void);

/* The entries of n pages from `address` on. 0 or -errno. */
int sp_pagemap_read(int pagemap, const void *address, size_t n, uint64_t *entries);

/* Add n <= SP_COUNT_PAGES pages from `address` on to the counts. 0 or -errno. */
int sp_pagemap_count(int pagemap, const void *address, size_t n, struct sp_page_counts *counts);

/* The page maps a file: for an arena's page, the store. A mapping of the store that reclaim took
 * out of the page table keeps its write-protect mark. */
static inline bool sp_pagemap_is_shared(uint64_t entry)
{
	return entry & PAGEMAP_PRESENT ? entry & PAGEMAP_FILE : entry & PAGEMAP_UFFD_WP;
}

/* There is a page, in memory or swapped out, and no guard region of the application's. */
static inline bool sp_pagemap_has_page(uint64_t entry)
{
	return entry & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) && !(entry & PAGEMAP_GUARD);
}

/* Reading the page brings no fresh zero page. */
static inline bool sp_pagemap_is_there(uint64_t entry)
{
	return sp_pagemap_is_shared(entry) || sp_pagemap_has_page(entry);
}

#endif
