/*
 * What is at an address now, as /proc/self/pagemap shows it without touching it.
 */
#ifndef SP_PAGEMAP_H
#define SP_PAGEMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

/* A descriptor, or -errno. */
int sp_pagemap_open(void);

/* The entries of n pages from `address` on. 0 or -errno. */
int sp_pagemap_read(int pagemap, const void *address, size_t n, uint64_t *entries);

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
