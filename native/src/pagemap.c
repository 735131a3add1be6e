#include "pagemap.h"

#include "samepage.h"

int sp_pagemap_open(void)
{
	return sys_result(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

/* A swapped-out private page whose writes are followed has the same bits as a mapping of the store
 * that reclaim took out of the page table. The kind of mapping tells them apart. */
static void mark_swapped(int pagemap, const uint8_t *address, size_t n, uint64_t *entries)
{
	struct page_region regions[64];
	struct pm_scan_arg scan = {.size = sizeof(scan),
				   .start = (uintptr_t)address,
				   .end = (uintptr_t)address + n * SP_PAGE_SIZE,
				   .vec = (uintptr_t)regions,
				   .vec_len = sizeof(regions) / sizeof(*regions),
				   .category_mask = PAGE_IS_WPALLOWED | PAGE_IS_SWAPPED,
				   .return_mask = PAGE_IS_SWAPPED};
	uint64_t start = scan.start;
	int found;

	while (scan.start < scan.end && (found = ioctl(pagemap, PAGEMAP_SCAN, &scan)) >= 0) {
		for (int i = 0; i < found; i++)
			for (uint64_t at = regions[i].start; at < regions[i].end; at += SP_PAGE_SIZE)
				entries[(at - start) / SP_PAGE_SIZE] &= ~PAGEMAP_UFFD_WP;
		scan.start = scan.walk_end;
	}
}

static bool is_ambiguous(uint64_t entry)
{
	return !(entry & PAGEMAP_PRESENT) && (entry & PAGEMAP_UFFD_WP);
}

int sp_pagemap_read(int pagemap, const void *address, size_t n, uint64_t *entries)
{
	size_t length = n * sizeof(*entries), done = 0;
	off_t at = (off_t)((uintptr_t)address / SP_PAGE_SIZE * sizeof(*entries));

	while (done < length) {
		ssize_t got = pread(pagemap, (uint8_t *)entries + done, length - done,
				    at + (off_t)done);

		if (got < 0)
			return -errno;
		if (got == 0)
			return -EFAULT;
		done += (size_t)got;
	}
	for (size_t i = 0, end; i < n; i = end) {
		bool ambiguous = is_ambiguous(entries[i]);

		for (end = i + 1; end < n && is_ambiguous(entries[end]) == ambiguous;)
			end++;
		if (ambiguous)
			mark_swapped(pagemap, (const uint8_t *)address + i * SP_PAGE_SIZE, end - i,
				     entries + i);
	}
	return 0;
}

/* How many of n pages map the kernel's zero page. */
static uint64_t count_zero(int pagemap, const void *address, size_t n)
{
	struct page_region regions[64];
	struct pm_scan_arg scan = {.size = sizeof(scan),
				   .start = (uintptr_t)address,
				   .end = (uintptr_t)address + n * SP_PAGE_SIZE,
				   .vec = (uintptr_t)regions,
				   .vec_len = sizeof(regions) / sizeof(*regions),
				   .category_mask = PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
				   .return_mask = PAGE_IS_PFNZERO};
	uint64_t count = 0;
	int found;

	while (scan.start < scan.end && (found = ioctl(pagemap, PAGEMAP_SCAN, &scan)) >= 0) {
		for (int i = 0; i < found; i++)
			count += (regions[i].end - regions[i].start) / SP_PAGE_SIZE;
		scan.start = scan.walk_end;
	}
	return count;
}

int sp_pagemap_count(int pagemap, const void *address, size_t n, struct sp_page_counts *counts)
{
	uint64_t entries[SP_COUNT_PAGES], zero = 0;
	bool may_be_zero = false;
	int error = sp_pagemap_read(pagemap, address, n, entries);

	if (error)
		return error;
	for (size_t i = 0; i < n; i++) {
		if (sp_pagemap_is_shared(entries[i])) {
			counts->shared_pages++;
		} else if (sp_pagemap_has_page(entries[i])) {
			counts->private_pages++;
			may_be_zero |= !(entries[i] & (PAGEMAP_EXCLUSIVE | PAGEMAP_SWAPPED));
		} else {
			counts->absent_pages++;
		}
	}
	if (may_be_zero)
		zero = count_zero(pagemap, address, n);
	/* some may have become zero pages since the entries were read */
	if (zero > counts->private_pages)
		zero = counts->private_pages;
	counts->private_pages -= zero;
	counts->absent_pages += zero;
	return 0;
}
