/*
 * Pager: from private memory to a mapping of the store.
 */
#include <string.h>

#include "kernel.h"
#include "pager.h"
#include "wire.h"

static size_t bytes_of(size_t pages)
{
	return pages * SP_PAGE_SIZE;
}

int sp_pager_map_side(struct sp_pager *pager, size_t n, int store, uint64_t slot, uint8_t **side)
{
	size_t length = bytes_of(n);
	uint8_t *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, store,
			       (off_t)(slot * SP_PAGE_SIZE));
	uint64_t mode = UFFDIO_REGISTER_MODE_WP |
			(pager->discards ? UFFDIO_REGISTER_MODE_MINOR : 0);
	int error;

	if (memory == MAP_FAILED)
		return -errno;
	error = sys_result(madvise(memory, length, MADV_DONTFORK));
	if (!error)
		error = sys_result(madvise(memory, length, MADV_POPULATE_READ));
	if (!error && pager->uffds.store >= 0)
		error = uffd_register(pager->uffds.store, memory, length, mode);
	if (!error && pager->uffds.store >= 0)
		error = sp_pager_protect(pager, memory, n);
	if (error)
		munmap(memory, length);
	else
		*side = memory;
	return error;
}

void sp_pager_map_over(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *side,
		       uint8_t *outcomes)
{
	size_t end;

	for (size_t i = 0; i < n; i = end) {
		uint8_t *from = side + bytes_of(i);
		int error = -ENOMEM;

		end = sp_pager_stretch(outcomes, i, n);
		if (outcomes[i] == WIRE_MERGED) {
			error = sp_pager_remap(pager, from, end - i, 0, address + bytes_of(i));
			if (error)
				memset(outcomes + i, WIRE_NO_MAPPING, end - i);
		}
		if (error)
			munmap(from, bytes_of(end - i));
	}
}

/* Take all pieces, one behind the other; of those that can't be taken the outcomes are set. -errno:
 * holes can't be told from pages. */
static int take_pieces(struct sp_pager *pager, struct sp_piece *pieces, size_t n, size_t pages,
		       uint8_t *outcomes)
{
	uint8_t *staged = pager->staging, *piece_outcomes = outcomes;

	for (size_t i = 0; i < n; i++) {
		int error = sp_pager_register_missing(pager, pieces[i].address, pieces[i].n);

		pieces[i].taken = !error;
		if (error)
			memset(piece_outcomes, sp_pager_failure(error), pieces[i].n);
		else
			sp_pager_move_out(pager, pieces[i].address, pieces[i].n, staged,
					  piece_outcomes);
		staged += bytes_of(pieces[i].n);
		piece_outcomes += pieces[i].n;
	}
	return sp_pager_find_holes(pager, pages, outcomes);
}

/* Of what was taken, tell the pages that are equal to the slots from those that differ. */
static void compare(struct sp_pager *pager, const uint8_t *side, size_t n, uint8_t *outcomes)
{
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED && memcmp(pager->staging + bytes_of(i),
							 side + bytes_of(i), SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
}

void sp_pager_replace_pieces(struct sp_pager *pager, struct sp_piece *pieces, size_t n, int store,
			     uint64_t slot, uint8_t *outcomes)
{
	uint8_t *start = pieces[0].address;
	const uint8_t *end = pieces[n - 1].address + bytes_of(pieces[n - 1].n);
	size_t pages = 0, first = 0;
	uint8_t *side = NULL;
	int error;

	for (size_t i = 0; i < n; i++)
		pages += pieces[i].n;
	error = sp_pager_map_side(pager, pages, store, slot, &side);
	if (error) {
		memset(outcomes, sp_pager_failure(error), pages);
		return;
	}
	error = take_pieces(pager, pieces, n, pages, outcomes);
	if (error)
		for (size_t i = 0; i < pages; i++) /* all goes back, unread */
			outcomes[i] = outcomes[i] == WIRE_MERGED ? WIRE_DIFFERS : outcomes[i];
	compare(pager, side, pages, outcomes);
	for (size_t i = 0; i < n; first += pieces[i++].n) {
		sp_pager_map_over(pager, pieces[i].address, pieces[i].n, side + bytes_of(first),
				  outcomes + first);
		if (pieces[i].taken)
			sp_pager_end_take(pager, pieces[i].address - bytes_of(first), first,
					  first + pieces[i].n, outcomes, true);
	}
	if (error)
		memset(outcomes, sp_pager_failure(error), pages);
	memory_drop(pager->staging, bytes_of(pages));
	sp_pager_wake(pager, start, (size_t)(end - start) / SP_PAGE_SIZE);
}

void sp_pager_replace(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot,
		      uint8_t *outcomes)
{
	struct sp_piece piece = {.address = address, .n = n};

	sp_pager_replace_pieces(pager, &piece, 1, store, slot, outcomes);
}
