/*
 * Which pages of an arena were written since they were asked for last (PAGEMAP_SCAN).
 */
#ifndef SP_CHANGES_H
#define SP_CHANGES_H

#include <stddef.h>
#include <stdint.h>

#include "kernel.h"
#include "wire.h"

#define SP_REGIONS 2048

/* Room to work in. */
struct sp_regions {
	struct page_region tracked[SP_REGIONS];
	struct page_region other[SP_REGIONS];
};

/* Tell of the range's written pages, and count them as unwritten from now on. The answer holds
 * `most` ranges; when it is full, it tells up to where it goes. A private page is told of, or is
 * the same as when it was told of last; those in mappings that can't be followed are told of each
 * time. 0 or -errno. */
int sp_changes_take(int pagemap, const uint8_t *data, struct wire_range range,
		    struct sp_regions *regions, struct wire_changed *answer, size_t most);

#endif
