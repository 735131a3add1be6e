#include "away.h"

#include <errno.h>
#include <string.h>

#include "kernel.h"
#include "samepage.h"
#include "wire.h"

#define KINDS (SP_MARK_AWAY | SP_MARK_LOST)

static void *reserve(size_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	madvise(memory, length, MADV_NOHUGEPAGE);
	return memory;
}

int sp_away_prepare(struct sp_away *away, size_t pages)
{
	atomic_uchar *marks;

	if (atomic_load(&away->marks))
		return 0;
	away->digests = reserve(pages * WIRE_DIGEST_SIZE);
	if (!away->digests)
		return -ENOMEM;
	marks = reserve(pages);
	if (!marks) {
		munmap(away->digests, pages * WIRE_DIGEST_SIZE);
		return -ENOMEM;
	}
	away->pages = pages;
	atomic_store(&away->marks, marks);
	return 0;
}

void sp_away_destroy(struct sp_away *away)
{
	atomic_uchar *marks = atomic_load(&away->marks);

	if (!marks)
		return;
	munmap(marks, away->pages);
	munmap(away->digests, away->pages * WIRE_DIGEST_SIZE);
}

uint8_t sp_away_mark(const struct sp_away *away, uint64_t page)
{
	atomic_uchar *marks = atomic_load(&away->marks);

	return marks ? atomic_load(&marks[page]) : 0;
}

const uint8_t *sp_away_digest(const struct sp_away *away, uint64_t page)
{
	return away->digests + page * WIRE_DIGEST_SIZE;
}

uint64_t sp_away_run(const struct sp_away *away, uint64_t page, uint64_t end)
{
	uint8_t kind = sp_away_mark(away, page) & KINDS;
	uint64_t n = 1;

	while (page + n < end && (sp_away_mark(away, page + n) & KINDS) == kind)
		n++;
	return n;
}

void sp_away_hide_lost(const struct sp_away *away, uint64_t page, size_t n, uint64_t *entries)
{
	for (size_t i = 0; i < n && atomic_load(&away->lost) > 0; i++)
		if (sp_away_mark(away, page + i) & SP_MARK_LOST)
			entries[i] = 0;
}

void sp_away_begin(struct sp_away *away, uint64_t page, uint64_t count, const uint8_t *digests)
{
	atomic_uchar *marks = atomic_load(&away->marks);

	memcpy(away->digests + page * WIRE_DIGEST_SIZE, digests, count * WIRE_DIGEST_SIZE);
	for (uint64_t i = 0; i < count; i++)
		atomic_store(&marks[page + i], SP_MARK_AWAY);
	atomic_fetch_add(&away->count, count);
}

void sp_away_end(struct sp_away *away, uint64_t page, uint64_t count, uint8_t mark)
{
	atomic_uchar *marks = atomic_load(&away->marks);

	for (uint64_t i = 0; marks && i < count; i++) {
		uint8_t was = atomic_exchange(&marks[page + i], mark);

		if (was & SP_MARK_AWAY)
			atomic_fetch_sub(&away->count, 1);
		if (was & SP_MARK_LOST)
			atomic_fetch_sub(&away->lost, 1);
		if (mark & SP_MARK_LOST)
			atomic_fetch_add(&away->lost, 1);
	}
}

void sp_away_set_wanted(struct sp_away *away, uint64_t page, bool set)
{
	atomic_uchar *marks = atomic_load(&away->marks);

	if (set)
		atomic_fetch_or(&marks[page], SP_MARK_WANTED);
	else
		atomic_fetch_and(&marks[page], (uint8_t)~SP_MARK_WANTED);
}

/* Whether a stretch reaches into [page, end). */
static bool has_stretch(const struct sp_extents *extents, uint64_t page, uint64_t end)
{
	for (size_t i = sp_extents_find(extents, page);
	     i < extents->count && extents->entries[i].page < end; i++)
		if (extents->entries[i].slot == SP_SLOT_AWAY)
			return true;
	return false;
}

/* Give back the pages of a table with entries of `size` bytes that [page, end) shares with no
 * stretch. */
static void give_back(uint8_t *table, size_t size, const struct sp_extents *extents, size_t pages,
		      uint64_t page, uint64_t end)
{
	uint64_t entries = SP_PAGE_SIZE / size;
	uint64_t first = page / entries * entries, last = (end + entries - 1) / entries * entries;

	if (has_stretch(extents, first, page))
		first += entries;
	if (last > pages)
		last = pages;
	if (has_stretch(extents, end, last))
		last = end / entries * entries;
	if (first < last)
		memory_drop(table + first * size, (last - first) * size);
}

void sp_away_give_back(struct sp_away *away, const struct sp_extents *extents, uint64_t page,
		       uint64_t count)
{
	if (!atomic_load(&away->marks))
		return;
	give_back(away->digests, WIRE_DIGEST_SIZE, extents, away->pages, page, page + count);
	give_back((uint8_t *)atomic_load(&away->marks), 1, extents, away->pages, page, page + count);
}
