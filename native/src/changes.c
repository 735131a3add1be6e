#include "changes.h"

#include <stdbool.h>

#include "samepage.h"

/* Regions of [*start, end) that a scan selects; *start becomes the end of what was looked at. */
static int scan(int pagemap, struct pm_scan_arg selection, uint64_t *start, uint64_t end,
		struct page_region *regions, size_t n)
{
	struct pm_scan_arg argument = selection;
	int found;

	argument.size = sizeof(argument);
	argument.start = *start;
	argument.end = end;
	argument.vec = (uintptr_t)regions;
	argument.vec_len = n;
	argument.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
	argument.return_mask = PAGE_IS_PRESENT;
	found = sys_result(ioctl(pagemap, PAGEMAP_SCAN, &argument));
	*start = argument.walk_end;
	return found;
}

/* Where both kinds of mapping are looked at, this goes second: what a scan of `tracked` has told of
 * is unwritten from then on, so all of it must go into the answer. */
static const struct pm_scan_arg tracked = {.flags = PM_SCAN_WP_MATCHING,
					   .category_mask = PAGE_IS_WRITTEN};

/* Private pages in mappings whose writes the kernel does not follow: copied in place by it, in the
 * middle of a take, or mapped there by the application. */
static const struct pm_scan_arg untracked = {.category_inverted = PAGE_IS_WPALLOWED | PAGE_IS_FILE,
					     .category_mask = PAGE_IS_WPALLOWED | PAGE_IS_FILE};

struct output {
	const uint8_t *data;
	struct wire_range *ranges; /* in memory that the daemon can change, so never read */
	struct wire_range last;
	size_t n;
};

static void put(struct output *output, const struct page_region *region, uint64_t end)
{
	uint64_t page = (region->start - (uintptr_t)output->data) / SP_PAGE_SIZE;
	uint64_t count = ((region->end < end ? region->end : end) - region->start) / SP_PAGE_SIZE;

	if (output->n > 0 && output->last.page + output->last.count == page) {
		output->last.count += count;
	} else {
		output->last = (struct wire_range){.page = page, .count = count};
		output->n++;
	}
	output->ranges[output->n - 1] = output->last;
}

/* Both lists in order, up to `end`. They are disjoint, unless a page changed hands between the
 * scans; then it is told of once. */
static void put_both(struct output *output, const struct sp_regions *regions, size_t n, size_t others,
		     uint64_t end)
{
	uint64_t from = 0;
	size_t i = 0, k = 0;

	while (i < n || (k < others && regions->other[k].start < end)) {
		bool other = i == n || (k < others && regions->other[k].start < end &&
					regions->other[k].start < regions->tracked[i].start);
		struct page_region region = other ? regions->other[k++] : regions->tracked[i++];

		if (region.start < from)
			region.start = from;
		if (region.end <= region.start)
			continue;
		put(output, &region, end);
		from = region.end;
	}
}

int sp_changes_take(int pagemap, const uint8_t *data, struct wire_range range,
		    struct sp_regions *regions, struct wire_changed *answer, size_t most)
{
	struct output output = {.data = data,
				.ranges = (struct wire_range *)(answer + 1)};
	uint64_t first = (uintptr_t)data + range.page * SP_PAGE_SIZE;
	uint64_t start = first, end = first + range.count * SP_PAGE_SIZE;

	while (start < end && output.n + 2 <= most) {
		size_t room = (most - output.n) / 2;
		uint64_t looked = start;
		int others, n;

		if (room > SP_REGIONS)
			room = SP_REGIONS;
		others = scan(pagemap, untracked, &looked, end, regions->other, room);
		if (others < 0)
			return others;
		n = scan(pagemap, tracked, &start, looked, regions->tracked, room);
		if (n < 0)
			return n;
		put_both(&output, regions, (size_t)n, (size_t)others, start);
	}
	answer->ranges = output.n;
	answer->told = (start - first) / SP_PAGE_SIZE;
	return 0;
}
