/*
 * The page primitive: take, replace, restore, fill.
 *
 * THEORY
 * The pager changes what an address maps without the application ever seeing anything but its own
 * bytes, while the application's threads go on reading and writing. Two facts carry it:
 *
 *  - UFFDIO_MOVE takes a page away from an address together with everyone's right to write it. It
 *    refuses pages that are pinned for I/O or shared with a forked child. Once it has moved the
 *    page to the staging area, nobody knows an address at which to write it: what is compared
 *    there stays as it is. Before the move the address is registered for missing faults, so that a
 *    thread that comes by meanwhile sleeps instead of finding a fresh zero page.
 *  - mremap() puts a prepared mapping in place of another one in a single step. The store's run is
 *    mapped at a side address, populated, registered and write-protected there first, so that it
 *    arrives protected; the pages of a restore are filled at a side address first, so that they
 *    arrive with their bytes.
 *
 * So at every instant an address maps its private page, or nothing (and whoever touches it waits),
 * or a slot with the same bytes that traps on write. Whatever fails on the way, the page is put
 * back where it was; a step that could not be undone is not begun.
 *
 * Side mappings are made where the kernel likes and moved away whole or unmapped by their own
 * addresses: a fixed area would have holes after a partial move that other threads' mmap() fills.
 *
 * A pager belongs to one thread (the mover) which must not touch arena memory itself. That thread
 * sleeps in mremap() of a registered range until the remap event has been read, so another one
 * (the watcher) has to read events, and must not wait for the first.
 */
#ifndef SP_PAGER_H
#define SP_PAGER_H

#include <stddef.h>
#include <stdint.h>

#include "samepage.h"

#define SP_TAKE_PAGES 256 /* longest run taken at once: bounds how long a thread may wait */

struct sp_pager {
	int uffd;
	int pagemap;	       /* /proc/self/pagemap */
	uint8_t *staging;      /* SP_TAKE_PAGES pages, registered for missing faults */
	uint64_t *page_states; /* pagemap entries of a run */
};

/* -errno when the kernel has no UFFDIO_MOVE, remap events or write-protect faults on tmpfs. Takes
 * over `uffd`. */
int sp_pager_init(struct sp_pager *pager, int uffd);
void sp_pager_destroy(struct sp_pager *pager);

/* Move n <= SP_TAKE_PAGES pages from `address` to the staging area. Sets outcomes[i] to
 * WIRE_PINNED, WIRE_BUSY or WIRE_UNSUPPORTED for a page that stays, WIRE_ABSENT for a hole and
 * WIRE_MERGED for a page that was taken. The range stays registered: end with
 * sp_pager_put_back(). -errno: nothing was taken. */
int sp_pager_take(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes);

/* Move staged pages [first, first + n) back to `address` + first pages. Does not give up. */
void sp_pager_put_back(struct sp_pager *pager, uint8_t *address, size_t first, size_t n);

/* Replace n <= SP_TAKE_PAGES private pages at `address` by slots of `store` from `slot` on,
 * wherever the bytes are equal. One outcome a page (enum wire_outcome). */
void sp_pager_replace(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot,
		      uint8_t *outcomes);

/* Give n <= SP_TAKE_PAGES pages at `address` back to the kernel where they hold only zeros. One
 * outcome a page. */
void sp_pager_drop_zero(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes);

/* Put fresh private pages with the bytes of n slots from `slot` on in place of the shared pages at
 * `address`, and wake who waits for them. -ENOMEM when no mapping (or no memory) is left, another
 * -errno when the store can't be read: nothing was changed, and nobody was woken. */
int sp_pager_restore(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot);

/* Have the kernel copy one shared page where it is. The way out when restore fails: the page is
 * private afterwards, but can never be moved again. -errno: it still maps the slot, protected. */
int sp_pager_copy_in_place(struct sp_pager *pager, uint8_t *address);

/* Put bytes into n missing pages at `address` that are registered for missing faults, and wake
 * who waits. A page that is there already keeps its bytes. -errno: some are still missing. */
int sp_pager_fill(struct sp_pager *pager, uint8_t *address, const uint8_t *bytes, size_t n);

/* Wake threads that wait for n pages at `address`; they look again. */
void sp_pager_wake(struct sp_pager *pager, const uint8_t *address, size_t n);

#endif
