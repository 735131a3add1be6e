#include "pager.h"

#include <stdbool.h>
#include <string.h>
#include <time.h>

#include "kernel.h"
#include "pagemap.h"
#include "wire.h"

#define BUSY_TRIES 8

static const uint8_t zero_page[SP_PAGE_SIZE];

static size_t bytes_of(size_t pages)
{
	return pages * SP_PAGE_SIZE;
}

static void back_off(void)
{
	struct timespec pause = {.tv_nsec = 20000};

	clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
}

static void *map_anonymous(size_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	madvise(memory, length, MADV_DONTFORK);
	return memory;
}

int sp_pager_init(struct sp_pager *pager, int uffd)
{
	size_t length = bytes_of(SP_TAKE_PAGES);
	int error;

	*pager = (struct sp_pager){.uffd = uffd, .pagemap = -1};
	pager->pagemap = sp_pagemap_open();
	if (pager->pagemap < 0) {
		error = pager->pagemap;
		goto fail;
	}
	pager->staging = map_anonymous(length);
	pager->page_states = map_anonymous(SP_TAKE_PAGES * sizeof(uint64_t));
	if (!pager->staging || !pager->page_states) {
		error = -ENOMEM;
		goto fail;
	}
	error = uffd_register(uffd, pager->staging, length, UFFDIO_REGISTER_MODE_MISSING);
	if (!error)
		return 0;
fail:
	sp_pager_destroy(pager);
	return error;
}

void sp_pager_destroy(struct sp_pager *pager)
{
	if (pager->staging)
		munmap(pager->staging, bytes_of(SP_TAKE_PAGES));
	if (pager->page_states)
		munmap(pager->page_states, SP_TAKE_PAGES * sizeof(uint64_t));
	if (pager->pagemap >= 0)
		close(pager->pagemap);
	close(pager->uffd);
}

void sp_pager_wake(struct sp_pager *pager, const uint8_t *address, size_t n)
{
	uffd_wake(pager->uffd, address, bytes_of(n));
}

/* What becomes of a page that did not move, from the errno of a single-page attempt. */
static uint8_t refusal(int error)
{
	switch (error) {
	case -EBUSY:
		return WIRE_PINNED;
	case -EAGAIN:
	case -ENOMEM:
		return WIRE_BUSY;
	default:
		return WIRE_UNSUPPORTED;
	}
}

/* Move what will move. A failing stretch is narrowed to its first page, which is then given up and
 * marked: an error other than EBUSY and EAGAIN can mean just that the stretch crosses mappings. */
static void move_out(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	size_t done = 0, length = n, moved;
	int tries = 0, error;

	while (done < n) {
		if (length > n - done)
			length = n - done;
		error = uffd_move(pager->uffd, pager->staging + bytes_of(done),
				  address + bytes_of(done), bytes_of(length), &moved);
		moved /= SP_PAGE_SIZE;
		memset(outcomes + done, WIRE_MERGED, moved);
		done += moved;
		if (!error || moved) {
			length = error ? 1 : n - done;
			tries = 0;
		} else if (length > 1) {
			length = error == -EBUSY ? 1 : length / 2;
		} else if (error == -EAGAIN && ++tries < BUSY_TRIES) {
			back_off();
		} else {
			outcomes[done++] = refusal(error);
			length = n - done;
			tries = 0;
		}
	}
}

int sp_pager_take(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	int error = uffd_register(pager->uffd, address, bytes_of(n), UFFDIO_REGISTER_MODE_MISSING);

	if (error)
		return error;
	move_out(pager, address, n, outcomes);
	error = sp_pagemap_read(pager->pagemap, pager->staging, n, pager->page_states);
	if (error) { /* can't tell holes from pages: nothing may be read there */
		sp_pager_put_back(pager, address, 0, n);
		uffd_unregister(pager->uffd, address, bytes_of(n));
		sp_pager_wake(pager, address, n);
		return error;
	}
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED && !sp_pagemap_has_page(pager->page_states[i]))
			outcomes[i] = WIRE_ABSENT;
	return 0;
}

/* The application changed the address's protection or lock under a take, so that the page itself
 * can't go back: its bytes can. 1: done, or there is nothing (any more) to put where; 0: again. */
static size_t copy_back(struct sp_pager *pager, uint8_t *address, const uint8_t *page)
{
	uint64_t state;
	size_t copied;

	if (sp_pagemap_read(pager->pagemap, page, 1, &state) || !sp_pagemap_has_page(state))
		return 1;
	return uffd_copy(pager->uffd, address, page, SP_PAGE_SIZE, &copied) != -EAGAIN;
}

void sp_pager_put_back(struct sp_pager *pager, uint8_t *address, size_t first, size_t n)
{
	size_t done = 0, length = n, moved;
	int error;

	while (done < n) {
		size_t at = bytes_of(first + done);

		if (length > n - done)
			length = n - done;
		error = uffd_move(pager->uffd, address + at, pager->staging + at, bytes_of(length),
				  &moved);
		done += moved / SP_PAGE_SIZE;
		if (!error || moved)
			length = n - done;
		else if (length > 1)
			length /= 2;
		else if (error == -ENOENT || error == -EINVAL || error == -EEXIST)
			done += copy_back(pager, address + at, pager->staging + at);
		else
			back_off();
	}
}

/* Map slots at a side address so that they are there, and trap on write. */
static int map_side(struct sp_pager *pager, size_t n, int store, uint64_t slot, uint8_t **side)
{
	size_t length = bytes_of(n);
	uint8_t *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, store,
			       (off_t)(slot * SP_PAGE_SIZE));
	int error;

	if (memory == MAP_FAILED)
		return -errno;
	error = sys_result(madvise(memory, length, MADV_DONTFORK));
	if (!error)
		error = sys_result(madvise(memory, length, MADV_POPULATE_READ));
	if (!error)
		error = uffd_register(pager->uffd, memory, length, UFFDIO_REGISTER_MODE_WP);
	if (!error)
		error = uffd_writeprotect(pager->uffd, memory, length, UFFDIO_WRITEPROTECT_MODE_WP);
	if (error)
		munmap(memory, length);
	else
		*side = memory;
	return error;
}

/* The outcome of pages that were not even taken. */
static uint8_t failure(int error)
{
	return error == -ENOMEM ? WIRE_NO_MAPPING : error == -EAGAIN ? WIRE_BUSY : WIRE_UNSUPPORTED;
}

static size_t stretch(const uint8_t *outcomes, size_t first, size_t n)
{
	size_t end = first + 1;

	while (end < n && outcomes[end] == outcomes[first])
		end++;
	return end;
}

/* End a take: what WIRE_MERGED stands at is gone from its address already (mapped to a slot, or
 * dropped); the other pages return, and the range is as it was. */
static void finish(struct sp_pager *pager, uint8_t *address, size_t n, const uint8_t *outcomes,
		   bool mapped)
{
	size_t end, private_from = 0;

	for (size_t i = 0; i < n; i = end) {
		end = stretch(outcomes, i, n);
		if (outcomes[i] == WIRE_DIFFERS || outcomes[i] == WIRE_NO_MAPPING)
			sp_pager_put_back(pager, address, i, end - i);
		if (outcomes[i] != WIRE_MERGED)
			continue;
		madvise(pager->staging + bytes_of(i), bytes_of(end - i), MADV_DONTNEED);
		if (!mapped)
			continue;
		/* what mremap() put there is registered for writes, and must stay so */
		if (i > private_from)
			uffd_unregister(pager->uffd, address + bytes_of(private_from),
					bytes_of(i - private_from));
		private_from = end;
	}
	if (n > private_from)
		uffd_unregister(pager->uffd, address + bytes_of(private_from),
				bytes_of(n - private_from));
	sp_pager_wake(pager, address, n);
}

/* Move stretches of the side mapping over the pages that compared equal, and unmap the rest. */
static void map_over(uint8_t *address, size_t n, uint8_t *side, uint8_t *outcomes)
{
	size_t end;

	for (size_t i = 0; i < n; i = end) {
		uint8_t *from = side + bytes_of(i);
		size_t length;
		void *to = MAP_FAILED;

		end = stretch(outcomes, i, n);
		length = bytes_of(end - i);
		if (outcomes[i] == WIRE_MERGED) {
			to = mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
				    address + bytes_of(i));
			if (to == MAP_FAILED)
				memset(outcomes + i, WIRE_NO_MAPPING, end - i);
		}
		if (to == MAP_FAILED)
			munmap(from, length);
	}
}

void sp_pager_replace(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot,
		      uint8_t *outcomes)
{
	uint8_t *side = NULL;
	int error = map_side(pager, n, store, slot, &side);

	if (!error) {
		error = sp_pager_take(pager, address, n, outcomes);
		if (error)
			munmap(side, bytes_of(n));
	}
	if (error) {
		memset(outcomes, failure(error), n);
		return;
	}
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED && memcmp(pager->staging + bytes_of(i),
							 side + bytes_of(i), SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
	map_over(address, n, side, outcomes);
	finish(pager, address, n, outcomes, true);
}

void sp_pager_drop_zero(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	int error = sp_pager_take(pager, address, n, outcomes);

	if (error) {
		memset(outcomes, failure(error), n);
		return;
	}
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED &&
		    memcmp(pager->staging + bytes_of(i), zero_page, SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
	finish(pager, address, n, outcomes, false);
}

static int read_slots(int store, uint8_t *to, size_t length, uint64_t slot)
{
	size_t done = 0;

	while (done < length) {
		ssize_t n = pread(store, to + done, length - done,
				  (off_t)(slot * SP_PAGE_SIZE + done));

		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		done += (size_t)n;
	}
	return 0;
}

int sp_pager_restore(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot)
{
	size_t length = bytes_of(n);
	uint8_t *fresh = map_anonymous(length);
	int error;

	if (!fresh)
		return -ENOMEM;
	error = read_slots(store, fresh, length, slot);
	if (!error &&
	    mremap(fresh, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address) == MAP_FAILED)
		error = -errno;
	if (error) {
		munmap(fresh, length);
		return error;
	}
	sp_pager_wake(pager, address, n);
	return 0;
}

/* Whether the address holds a page of its own, and no slot. */
static bool is_copied(struct sp_pager *pager, const uint8_t *address)
{
	uint64_t state;

	(void)*(const volatile uint8_t *)address; /* from swap, so that the entry tells */
	return !sp_pagemap_read(pager->pagemap, address, 1, &state) && (state & PAGEMAP_PRESENT) &&
	       !(state & PAGEMAP_FILE);
}

int sp_pager_copy_in_place(struct sp_pager *pager, uint8_t *address)
{
	int error = uffd_writeprotect(pager->uffd, address, SP_PAGE_SIZE, 0);

	if (error)
		return error;
	/* now, and not at the next write: until then the page is still the slot's */
	error = sys_result(madvise(address, SP_PAGE_SIZE, MADV_POPULATE_WRITE));
	if (!error)
		return 0;
	uffd_writeprotect(pager->uffd, address, SP_PAGE_SIZE, UFFDIO_WRITEPROTECT_MODE_WP);
	if (!is_copied(pager, address))
		return error;
	/* a thread wrote before the protection was back, so the kernel did copy */
	return uffd_writeprotect(pager->uffd, address, SP_PAGE_SIZE, 0);
}

int sp_pager_fill(struct sp_pager *pager, uint8_t *address, const uint8_t *bytes, size_t n)
{
	size_t done = 0, length = bytes_of(n), copied;
	int error = 0;

	while (done < length) {
		error = uffd_copy(pager->uffd, address + done, bytes + done, length - done, &copied);
		done += copied;
		if (!error || copied)
			continue;
		if (error == -EEXIST)
			done += SP_PAGE_SIZE;
		else if (error == -EAGAIN)
			back_off();
		else
			break;
	}
	sp_pager_wake(pager, address, n);
	return done < length ? error : 0;
}
