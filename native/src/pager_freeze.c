/*
 * Pager: private memory that nobody can write for a while (freeze.c).
 */
#include <string.h>

#include "kernel.h"
#include "maps.h"
#include "pager.h"

static size_t bytes_of(size_t pages)
{
	return pages * SP_PAGE_SIZE;
}

bool sp_pager_is_frozen(const struct sp_pager *pager, const uint8_t *address)
{
	const struct sp_frozen *frozen = pager->frozen;

	while (frozen && (uintptr_t)address - (uintptr_t)frozen->start >= frozen->length)
		frozen = frozen->next;
	return frozen;
}

void sp_pager_begin_freeze(struct sp_pager *pager, struct sp_frozen *frozen)
{
	frozen->next = pager->frozen;
	pager->frozen = frozen;
}

void sp_pager_end_freeze(struct sp_pager *pager, const struct sp_frozen *frozen)
{
	struct sp_frozen **at = &pager->frozen;

	while (*at && *at != frozen)
		at = &(*at)->next;
	if (*at)
		*at = frozen->next;
}

/* EAGAIN: an event waits to be read, which is the watcher's. */
static int change_protection(struct sp_pager *pager, uint8_t *address, size_t n, uint64_t mode)
{
	int error;

	while ((error = uffd_writeprotect(pager->uffds.store, address, bytes_of(n), mode)) == -EAGAIN)
		sp_pager_back_off();
	return error;
}

int sp_pager_protect(struct sp_pager *pager, uint8_t *address, size_t n)
{
	return change_protection(pager, address, n, UFFDIO_WRITEPROTECT_MODE_WP);
}

void sp_pager_unprotect(struct sp_pager *pager, uint8_t *address, size_t n)
{
	change_protection(pager, address, n, 0);
}

int sp_pager_hold(struct sp_pager *pager, uint8_t *address, size_t n)
{
	int error = uffd_register(pager->uffds.store, address, bytes_of(n),
				  UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);

	return error ? error : sp_pager_protect(pager, address, n);
}

int sp_pager_freeze(struct sp_pager *pager, uint8_t *address, size_t n)
{
	uffd_unregister(pager->uffds.memory, address, bytes_of(n));
	return sp_pager_hold(pager, address, n);
}

/* One mapping after the other, since the kernel refuses all of a range for one that it can't
 * register; and anonymous memory alone: what maps a file there is the application's, or a slot that
 * it has just moved there, which must stay protected until that is followed. */
void sp_pager_thaw(struct sp_pager *pager, uint8_t *address, size_t n)
{
	for (size_t some; n > 0; address += bytes_of(some), n -= some) {
		struct sp_slots there = sp_maps_anonymous(pager->maps, address, n);

		some = there.pages > 0 ? there.pages : there.foreign;
		if (there.pages == 0)
			continue;
		uffd_unregister(pager->uffds.store, address, bytes_of(some));
		sp_pager_end_missing(pager, address, some);
	}
}
