/*
 * Pager: from a mapping of the store back to private memory.
 */
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "kernel.h"
#include "pagemap.h"
#include "pager.h"

int sp_pager_read_slots(int store, uint8_t *to, size_t length, uint64_t slot)
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

/* Whether mremap() can put pages of a shadow over others. It keeps the shadow mapped, so the kernel
 * asks for address space once more, and only after it has unmapped what was there: where a limit
 * was lowered under what is in use, that would leave a hole. */
bool sp_pager_may_map(void)
{
	struct rlimit space, data;
	char text[128];
	unsigned long size, data_size;
	ssize_t length;
	int statm;

	if (getrlimit(RLIMIT_AS, &space) || getrlimit(RLIMIT_DATA, &data))
		return false;
	if (space.rlim_cur == RLIM_INFINITY && data.rlim_cur == RLIM_INFINITY)
		return true;
	statm = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
	if (statm < 0)
		return false;
	length = read(statm, text, sizeof(text) - 1);
	close(statm);
	text[length > 0 ? length : 0] = '\0';
	if (sscanf(text, "%lu %*u %*u %*u %*u %lu", &size, &data_size) != 2)
		return false;
	return size <= space.rlim_cur / SP_PAGE_SIZE && data_size <= data.rlim_cur / SP_PAGE_SIZE;
}

static int fill_shadow(struct sp_pager *pager, uint8_t *shadow, size_t length)
{
	size_t done = 0, copied;
	bool cleared = false;
	int error = 0;

	while (done < length) {
		error = uffd_copy(pager->uffds.memory, shadow + done, pager->bounce + done,
				  length - done, &copied);
		done += copied;
		if (!error || copied)
			continue;
		if (error == -EEXIST && !cleared)
			memory_drop(shadow + done, length - done); /* mlockall() has filled it */
		else if (error == -EAGAIN)
			sp_pager_back_off();
		else
			break;
		cleared |= error == -EEXIST;
	}
	return done < length ? error : 0;
}

/* Move n pages of the shadow, filled or empty, over shared ones. */
static int move_over(struct sp_pager *pager, uint8_t *shadow, size_t n, uint8_t *address)
{
	int error = sp_pager_may_map() ? 0 : -ENOMEM;

	if (!error)
		error = sp_pager_remap(pager, shadow, n, MREMAP_DONTUNMAP, address);
	if (!error)
		sp_pager_follow(pager, address, n);
	return error;
}

int sp_pager_restore(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n, int store,
		     uint64_t slot)
{
	size_t length = n * SP_PAGE_SIZE;
	int error = sp_pager_read_slots(store, pager->bounce, length, slot);

	if (!error)
		error = fill_shadow(pager, shadow, length);
	if (!error)
		error = move_over(pager, shadow, n, address);
	if (error) {
		memory_drop(shadow, length);
		return error;
	}
	sp_pager_wake(pager, address, n);
	return 0;
}

int sp_pager_discard(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n)
{
	int error = move_over(pager, shadow, n, address);

	if (!error)
		sp_pager_wake(pager, address, n);
	return error;
}

void sp_pager_map_again(struct sp_pager *pager, uint8_t *address, size_t n)
{
	/* short of an error it has woken; after one, who waits comes back when it was worth trying */
	if (uffd_continue(pager->uffds.store, address, n * SP_PAGE_SIZE) != 0)
		sp_pager_wake(pager, address, 1);
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
	int error = uffd_writeprotect(pager->uffds.store, address, SP_PAGE_SIZE, 0);

	if (error)
		return error;
	/* now, and not at the next write: until then the page is still the slot's */
	error = sys_result(madvise(address, SP_PAGE_SIZE, MADV_POPULATE_WRITE));
	if (!error)
		return 0;
	uffd_writeprotect(pager->uffds.store, address, SP_PAGE_SIZE, UFFDIO_WRITEPROTECT_MODE_WP);
	if (!is_copied(pager, address))
		return error;
	/* a thread wrote before the protection was back, so the kernel did copy */
	return uffd_writeprotect(pager->uffds.store, address, SP_PAGE_SIZE, 0);
}

