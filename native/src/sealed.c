#include "sealed.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "kernel.h"
#include "pagemap.h"

static const uint8_t zero_page[SP_PAGE_SIZE];

/* Of a stretch, only what is private again matters. Go on to the first such page and make it ordinary
 * memory; false: there is none. */
static bool release_first(struct sp_node *node, struct sp_arena *arena, uint64_t *page)
{
	const struct sp_extent *extent = sp_extents_at(&arena->extents, *page);
	uint64_t end = (uint64_t)extent->page + extent->count, n;

	for (; *page < end; *page += n) {
		n = sp_away_run(&arena->away, *page, end);
		if (sp_away_mark(&arena->away, *page) & (SP_MARK_AWAY | SP_MARK_LOST))
			continue;
		sp_mover_release(node, arena, *page, n);
		return true;
	}
	return false;
}

/* Whether a private page is pinned; pages are taken and put back, in the order of the extents. */
static bool is_pinned(struct sp_node *node, struct sp_arena *arena)
{
	uint64_t page = 0;

	while (page < arena->pages) {
		size_t i = sp_extents_find(&arena->extents, page);
		const struct sp_extent *extent = &arena->extents.entries[i];
		bool last = i == arena->extents.count;
		uint64_t end = last ? arena->pages : extent->page;
		uint64_t n = end > page ? end - page : 0;

		if (n > SP_TAKE_PAGES)
			n = SP_TAKE_PAGES;
		if (n == 0 && extent->slot == SP_SLOT_AWAY && release_first(node, arena, &page))
			continue;
		if (n == 0) {
			page = (uint64_t)extent->page + extent->count;
			continue;
		}
		if (sp_pager_is_pinned(&node->mover.pager, arena->data + page * SP_PAGE_SIZE, n))
			return true;
		sp_mover_serve_faults(node);
		page += n;
	}
	return false;
}

int sp_mover_tell_sealed(struct sp_node *node, const struct sp_arena *arena)
{
	const struct sp_link *link = &node->mover.link;

	if (!link->welcomed || link->version < 3)
		return 0;
	return sp_mover_send(node, WIRE_SEALED, 0, arena->number, NULL, 0, -1);
}

int sp_mover_seal_clone(struct sp_node *node, struct sp_arena *arena)
{
	int error = sys_result(mprotect(arena->data, arena->pages * SP_PAGE_SIZE, PROT_READ));

	if (error)
		return error;
	atomic_store(&arena->sealed, true);
	if (sp_mover_tell_sealed(node, arena)) /* told anew with the next connection */
		sp_link_close(&node->mover.link);
	return 0;
}

int sp_mover_seal(struct sp_node *node, struct sp_arena *arena)
{
	if (atomic_load(&arena->sealed))
		return 0;
	if (node->mover.can_share && is_pinned(node, arena))
		return -EBUSY;
	return sp_mover_seal_clone(node, arena);
}

/* Copy the pages that are there to the bounce buffer, in a way that can't fault: the application
 * may have unmapped some. */
static void read_pages(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	int error = sp_pagemap_read(pager->pagemap, address, n, pager->page_states);

	for (size_t i = 0; i < n; i++) {
		struct iovec to = {.iov_base = pager->bounce + i * SP_PAGE_SIZE,
				   .iov_len = SP_PAGE_SIZE};
		struct iovec from = {.iov_base = address + i * SP_PAGE_SIZE, .iov_len = SP_PAGE_SIZE};

		if (error)
			outcomes[i] = WIRE_UNSUPPORTED;
		else if (!sp_pagemap_has_page(pager->page_states[i]))
			outcomes[i] = WIRE_ABSENT;
		else if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != SP_PAGE_SIZE)
			outcomes[i] = WIRE_UNSUPPORTED;
		else
			outcomes[i] = WIRE_MERGED;
	}
}

static void drop_zero(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	read_pages(pager, address, n, outcomes);
	for (size_t i = 0; i < n; i++) {
		if (outcomes[i] != WIRE_MERGED)
			continue;
		if (memcmp(pager->bounce + i * SP_PAGE_SIZE, zero_page, SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
		else if (madvise(address + i * SP_PAGE_SIZE, SP_PAGE_SIZE, MADV_DONTNEED) != 0)
			outcomes[i] = WIRE_BUSY;
	}
}

void sp_sealed_replace(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot,
		       uint8_t *outcomes)
{
	uint8_t *side;
	int error;

	if (slot == WIRE_ZERO_SLOT) {
		drop_zero(pager, address, n, outcomes);
		return;
	}
	error = sp_pager_map_side(pager, n, store, slot, &side);
	if (!error) {
		error = sys_result(mprotect(side, n * SP_PAGE_SIZE, PROT_READ));
		if (error)
			munmap(side, n * SP_PAGE_SIZE);
	}
	if (error) {
		memset(outcomes, error == -ENOMEM ? WIRE_NO_MAPPING : WIRE_UNSUPPORTED, n);
		return;
	}
	read_pages(pager, address, n, outcomes);
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED && memcmp(pager->bounce + i * SP_PAGE_SIZE,
							 side + i * SP_PAGE_SIZE,
							 SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
	sp_pager_map_over(pager, address, n, side, outcomes);
}

void sp_sealed_evict(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n,
		     const uint8_t *bytes, uint8_t *outcomes)
{
	size_t end;

	read_pages(pager, address, n, outcomes);
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED && memcmp(pager->bounce + i * SP_PAGE_SIZE,
							 bytes + i * SP_PAGE_SIZE, SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
	for (size_t i = 0; i < n; i = end) {
		for (end = i + 1; end < n && outcomes[end] == outcomes[i];)
			end++;
		if (outcomes[i] != WIRE_MERGED)
			continue;
		if (sp_pager_let_go(pager, address + i * SP_PAGE_SIZE, shadow + i * SP_PAGE_SIZE, end - i))
			memset(outcomes + i, WIRE_NO_MAPPING, end - i);
		else /* who comes to write meanwhile waits, and then may not */
			mprotect(address + i * SP_PAGE_SIZE, (end - i) * SP_PAGE_SIZE, PROT_READ);
	}
}

int sp_sealed_restore(uint8_t *address, size_t n, int store, uint64_t slot)
{
	size_t length = n * SP_PAGE_SIZE, done = 0;
	uint8_t *fresh =
		mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int error = 0;

	if (fresh == MAP_FAILED)
		return -errno;
	while (done < length && !error) {
		ssize_t got = pread(store, fresh + done, length - done,
				    (off_t)(slot * SP_PAGE_SIZE + done));

		error = got > 0 ? 0 : got < 0 ? -errno : -EIO;
		done += got > 0 ? (size_t)got : 0;
	}
	if (!error)
		error = sys_result(madvise(fresh, length, MADV_DONTFORK));
	if (!error)
		error = sys_result(mprotect(fresh, length, PROT_READ));
	if (!error && mremap(fresh, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address) ==
			      MAP_FAILED)
		error = -errno;
	if (error)
		munmap(fresh, length);
	return error;
}
