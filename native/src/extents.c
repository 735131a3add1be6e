#include "extents.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

int sp_extents_init(struct sp_extents *extents, size_t pages)
{
	void *memory = mmap(NULL, pages * sizeof(struct sp_extent), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return -errno;
	*extents = (struct sp_extents){.entries = memory, .pages = pages};
	return 0;
}

void sp_extents_destroy(struct sp_extents *extents)
{
	if (extents->entries)
		munmap(extents->entries, extents->pages * sizeof(struct sp_extent));
	*extents = (struct sp_extents){0};
}

static uint64_t end_of(const struct sp_extent *extent)
{
	return (uint64_t)extent->page + extent->count;
}

size_t sp_extents_find(const struct sp_extents *extents, uint64_t page)
{
	size_t low = 0, high = extents->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (end_of(&extents->entries[middle]) <= page)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

const struct sp_extent *sp_extents_at(const struct sp_extents *extents, uint64_t page)
{
	size_t i = sp_extents_find(extents, page);

	if (i == extents->count || extents->entries[i].page > page)
		return NULL;
	return &extents->entries[i];
}

uint64_t sp_extents_look(const struct sp_extents *extents, uint64_t page, uint64_t end,
			 const struct sp_extent **extent)
{
	size_t i = sp_extents_find(extents, page);
	const struct sp_extent *next = i < extents->count ? &extents->entries[i] : NULL;
	uint64_t border = next ? next->page : end;

	*extent = next && next->page <= page ? next : NULL;
	if (*extent)
		border += next->count;
	return (border < end ? border : end) - page;
}

/* Replace `removed` entries from i on by the `added` ones. */
static void splice(struct sp_extents *extents, size_t i, size_t removed,
		   const struct sp_extent *added, size_t n)
{
	struct sp_extent *at = extents->entries + i;

	memmove(at + n, at + removed, (extents->count - i - removed) * sizeof(*at));
	memcpy(at, added, n * sizeof(*at));
	extents->count = extents->count - removed + n;
}

/* Whether `right` goes on where `left` ends, in pages and in slots. */
static bool continues(const struct sp_extent *left, const struct sp_extent *right)
{
	if (end_of(left) != right->page)
		return false;
	if (!sp_extent_is_shared(left) || !sp_extent_is_shared(right))
		return left->slot == right->slot;
	return left->slot + left->count == right->slot;
}

void sp_extents_insert(struct sp_extents *extents, uint64_t page, uint64_t count, uint64_t slot)
{
	struct sp_extent new = {.page = (uint32_t)page, .count = (uint32_t)count, .slot = slot};
	size_t i = sp_extents_find(extents, page), first = i, last = i;

	if (i > 0 && continues(&extents->entries[i - 1], &new)) {
		first = i - 1;
		new.page = extents->entries[first].page;
		new.count += extents->entries[first].count;
		new.slot = extents->entries[first].slot;
	}
	if (i < extents->count && continues(&new, &extents->entries[i])) {
		new.count += extents->entries[i].count;
		last = i + 1;
	}
	splice(extents, first, last - first, &new, 1);
}

/* What is left of a run in front of or behind a range. */
static struct sp_extent part_of(const struct sp_extent *extent, uint64_t page, uint64_t end)
{
	uint64_t slot = extent->slot;

	if (sp_extent_is_shared(extent))
		slot += page - extent->page;
	return (struct sp_extent){
		.page = (uint32_t)page, .count = (uint32_t)(end - page), .slot = slot};
}

void sp_extents_remove(struct sp_extents *extents, uint64_t page, uint64_t count)
{
	struct sp_extent rest[2];
	size_t n = 0, first = sp_extents_find(extents, page), last = first;
	uint64_t end = page + count;

	for (; last < extents->count && extents->entries[last].page < end; last++) {
		const struct sp_extent *extent = &extents->entries[last];

		if (extent->page < page)
			rest[n++] = part_of(extent, extent->page, page);
		if (end_of(extent) > end)
			rest[n++] = part_of(extent, end, end_of(extent));
	}
	splice(extents, first, last - first, rest, n);
}
