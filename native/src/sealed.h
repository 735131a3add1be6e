/*
 * Sealed arenas: read-only from some moment on.
 *
 * Nobody can write a sealed page: its mapping does not permit it, neither to threads nor to I/O that
 * begins later. So it may be compared where it is, and a slot mapped over it, without taking it
 * away first. That needs no userfaultfd, and UFFDIO_MOVE would not have it anyway: it moves pages
 * between writable mappings only.
 *
 * What it rests on: whoever seals has let I/O into the arena come to its end (where UFFDIO_MOVE is
 * there, pages that are pinned are found out before), and does not make the memory writable again.
 */
#ifndef SP_SEALED_H
#define SP_SEALED_H

#include "mover.h"

/* Make the arena read-only for good. -EBUSY: pages are pinned for I/O. -ENOMEM: no mapping left. */
int sp_mover_seal(struct sp_node *node, struct sp_arena *arena);

/* The same for an arena that the application does not have yet, so that no page of it is pinned.
 * -ENOMEM. */
int sp_mover_seal_clone(struct sp_node *node, struct sp_arena *arena);

/* Let the merger know that an arena is sealed; of one that is announced again, before ARENA_OPEN. */
int sp_mover_tell_sealed(struct sp_node *node, const struct sp_arena *arena);

/* Replace n <= SP_TAKE_PAGES private pages of a sealed arena by slots with the same bytes; slot 0
 * gives pages of zeros back to the kernel. One outcome a page. */
void sp_sealed_replace(struct sp_pager *pager, uint8_t *address, size_t n, int store, uint64_t slot,
		       uint8_t *outcomes);

/* Let n <= SP_TAKE_PAGES private pages of a sealed arena go that are equal to `bytes`. One outcome a
 * page. */
void sp_sealed_evict(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n,
		     const uint8_t *bytes, uint8_t *outcomes);

/* Put private, read-only pages with the bytes of n <= SP_TAKE_PAGES slots in place of shared ones,
 * without a userfaultfd. -errno: nothing was changed. */
int sp_sealed_restore(uint8_t *address, size_t n, int store, uint64_t slot);

#endif
