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
 *    arrives protected; the pages of a restore are filled in the arena's shadow (memory.h) first,
 *    so that they arrive with their bytes.
 *
 * So at every instant an address maps its private page, or nothing (and whoever touches it waits),
 * or a slot with the same bytes that traps on write. Whatever fails on the way, the page is put
 * back where it was; a step that could not be undone is not begun.
 *
 * Two userfaultfds share the work (probe.h). Private memory is registered for asynchronous write
 * protection where the kernel has it: who writes is not kept waiting, and PAGEMAP_SCAN tells which
 * pages were written (docs/decisions/0003-dirty-tracking.md). A take adds missing faults to that
 * and ends by registering anew, which leaves what was put back counted as written. While an arena
 * is frozen (freeze.c), its private memory is registered with the store's.
 *
 * Side mappings are made where the kernel likes and moved away whole or unmapped by their own
 * addresses: a fixed area would have holes after a partial move that other threads' mmap() fills.
 *
 * A pager belongs to one thread (the mover) which must not touch memory that it has taken. That
 * thread sleeps in mremap() of a registered range until the remap event has been read, so another
 * one (the watcher) has to read events, and must not wait for the first.
 */
#ifndef SP_PAGER_H
#define SP_PAGER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "probe.h"
#include "samepage.h"

/* What is taken at once bounds how long a thread may wait. */
#define SP_TAKE_PAGES 256 /* longest run */
#define SP_PIECES 16	  /* short runs side by side */
#define SP_PIECE_PAGES 8  /* longest of those */

/* A range whose private pages nobody can write for a while, nor touch where there is none. */
struct sp_frozen {
	const uint8_t *start;
	size_t length;
	struct sp_frozen *next;
};

struct sp_pager {
	struct sp_uffds uffds;
	bool tracks;	       /* writes to private memory are followed */
	bool can_away;	       /* addresses can be waited for: pages may be away */
	bool discards;	       /* what is discarded of a mapping of the store is told of */
	int pagemap;	       /* /proc/self/pagemap */
	int maps;	       /* /proc/self/maps */
	uint8_t *staging;      /* SP_TAKE_PAGES pages, registered for missing faults */
	uint8_t *bounce;       /* as many, for slots' bytes on their way */
	uint64_t *page_states; /* pagemap entries of a run */
	struct sp_frozen *frozen; /* what nobody can write now */

	/* For the watcher. */
	atomic_int thread;		     /* the mover's id */
	atomic_bool moving;		     /* it is in mremap() */
	atomic_uintptr_t moved_from, moved_to; /* addresses of its last one */
};

/* A run of private pages that is replaced together with others. */
struct sp_piece {
	uint8_t *address;
	size_t n;
	bool taken; /* the pager's */
};

/* A pager that holds nothing; destroying it does nothing. */
#define SP_PAGER_NONE                                                                              \
	((struct sp_pager){.uffds = {.memory = -1, .store = -1}, .pagemap = -1, .maps = -1})

/* -errno when the kernel has no UFFDIO_MOVE, remap events or write-protect faults on tmpfs. Takes
 * over `uffds`, which have `features`; without any (-1) the pager serves sealed arenas alone. */
int sp_pager_init(struct sp_pager *pager, struct sp_uffds uffds, uint32_t features);
void sp_pager_destroy(struct sp_pager *pager);

/* From now on the calling thread is the pager's. */
void sp_pager_claim(struct sp_pager *pager);

/* Prepare n pages of an arena and their shadow. *tracked: writes to them are followed. -errno. */
int sp_pager_adopt(struct sp_pager *pager, uint8_t *data, uint8_t *shadow, size_t n, bool *tracked);

/* n private pages are as before a take: missing faults on them are the kernel's again, or, while
 * they are frozen, nobody can write them again. */
void sp_pager_end_missing(struct sp_pager *pager, uint8_t *address, size_t n);

/* Follow the writes to n private pages, which count as written now; while they are frozen, stop
 * them. */
void sp_pager_follow(struct sp_pager *pager, uint8_t *address, size_t n);

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

/* The same for the pages of several pieces, ascending and SP_TAKE_PAGES together at most, by as many
 * slots from `slot` on. Costs less than one by one: the slots are mapped aside together. */
void sp_pager_replace_pieces(struct sp_pager *pager, struct sp_piece *pieces, size_t n, int store,
			     uint64_t slot, uint8_t *outcomes);

/* Give n <= SP_TAKE_PAGES pages at `address` back to the kernel where they hold only zeros. One
 * outcome a page. */
void sp_pager_drop_zero(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes);

/* Put private pages with the bytes of n <= SP_TAKE_PAGES slots from `slot` on in place of the
 * shared pages at `address`, by way of its shadow, and wake who waits for them. -ENOMEM when no
 * mapping (or no memory) is left, another -errno when the store can't be read: nothing was changed,
 * and nobody was woken. */
int sp_pager_restore(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n, int store,
		     uint64_t slot);

/* Put absent private pages in place of n shared pages. -ENOMEM: nothing was changed. */
int sp_pager_discard(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n);

/* Map shared pages that the kernel has taken out of the page table, and wake who waits for the
 * first. Does not wait, and may be called from any thread. */
void sp_pager_map_again(struct sp_pager *pager, uint8_t *address, size_t n);

/* Have the kernel copy one shared page where it is. The way out when restore fails: the page is
 * private afterwards, but can never be moved again. -errno: it still maps the slot, protected. */
int sp_pager_copy_in_place(struct sp_pager *pager, uint8_t *address);

/* Put bytes into n missing pages at `address` that are registered for missing faults, and wake
 * who waits. A page that is there already keeps its bytes. -errno: some are still missing. */
int sp_pager_fill(struct sp_pager *pager, uint8_t *address, const uint8_t *bytes, size_t n);

/* Wake threads that wait for n pages at `address`; they look again. */
void sp_pager_wake(struct sp_pager *pager, const uint8_t *address, size_t n);

/* Whether one of n <= SP_TAKE_PAGES private pages is pinned for I/O. */
bool sp_pager_is_pinned(struct sp_pager *pager, uint8_t *address, size_t n);

/* Have n absent private pages at `address` be waited for: a touch is a missing fault from now on.
 * Pages that were touched before are there. -errno: nothing was changed. */
int sp_pager_expect(struct sp_pager *pager, uint8_t *address, size_t n);

/* Put empty memory that is waited for in place of n pages, whatever is there. -ENOMEM or another
 * -errno: nothing was changed. */
int sp_pager_let_go(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n);

/* Let n <= SP_TAKE_PAGES private pages go that are equal to `bytes`. One outcome a page. */
void sp_pager_evict(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n,
		    const uint8_t *bytes, uint8_t *outcomes);

/* Whether n pages at `address`, of one mapping, are waited for still: the application may have put
 * another mapping there. */
bool sp_pager_is_expected(struct sp_pager *pager, uint8_t *address, size_t n);

/* Put bytes into a page that is waited for; who waits is not woken. -EEXIST: it is there. -ENOENT:
 * it is not waited for any more. -ENOMEM. */
int sp_pager_bring(struct sp_pager *pager, uint8_t *address, const uint8_t *bytes);

/* Make a touch of n pages that are waited for an error, and wake. -errno of UFFDIO_POISON. */
int sp_pager_poison(struct sp_pager *pager, uint8_t *address, size_t n);

/* Make a touch of an arena's n pages an error, all of them in one step, whatever they map. Its bytes
 * are gone then. -errno: nothing was changed. */
int sp_pager_ruin(struct sp_pager *pager, uint8_t *data, uint8_t *shadow, size_t n);

/* Nobody need wait for n private pages any more. */
void sp_pager_end_away(struct sp_pager *pager, uint8_t *address, size_t n);

/* From here to sp_pager_end_freeze(), what the pager itself does to private pages of the range
 * leaves them frozen. The caller freezes what is there, and thaws it. */
void sp_pager_begin_freeze(struct sp_pager *pager, struct sp_frozen *frozen);
void sp_pager_end_freeze(struct sp_pager *pager, const struct sp_frozen *frozen);

/* Stop writes to n private pages, and touches of absent ones, until sp_pager_thaw(). 0: from now on
 * nobody can write them, but for a device that has pinned them already. -errno: some can be
 * written, as when the application has put something there that can't be registered. */
int sp_pager_freeze(struct sp_pager *pager, uint8_t *address, size_t n);

/* The same for pages that are frozen already, or were mapped there since. */
int sp_pager_hold(struct sp_pager *pager, uint8_t *address, size_t n);

/* Let n private pages be written again, when their range is frozen no more; they count as written.
 * Nobody is woken. */
void sp_pager_thaw(struct sp_pager *pager, uint8_t *address, size_t n);

/* Protect n pages against writes, and no more, that are registered with the store's userfaultfd.
 * -errno. */
int sp_pager_protect(struct sp_pager *pager, uint8_t *address, size_t n);
void sp_pager_unprotect(struct sp_pager *pager, uint8_t *address, size_t n);

/* Between the pager's own files, sealed.c and evict.c. */

/* Whether a page is in a range that is frozen. */
bool sp_pager_is_frozen(const struct sp_pager *pager, const uint8_t *address);

/* Read slots' bytes. 0 or -errno. */
int sp_pager_read_slots(int store, uint8_t *to, size_t length, uint64_t slot);

/* The outcome of pages that were not even taken. */
uint8_t sp_pager_failure(int error);

/* End a take of n pages by themselves, and wake; of what is staged nothing is left then. */
void sp_pager_finish(struct sp_pager *pager, uint8_t *address, size_t n, const uint8_t *outcomes,
		     bool mapped);

/* Whether mremap() can put pages of a shadow over others without being refused half way. */
bool sp_pager_may_map(void);

/* Drop n pages that are registered with the store's userfaultfd. 0 or -errno. */
int sp_pager_drop(struct sp_pager *pager, uint8_t *address, size_t n);

/* Have missing faults on n private pages wait, as a take begins. -errno. */
int sp_pager_register_missing(struct sp_pager *pager, uint8_t *address, size_t n);

/* Move what will move of n pages, to the staged pages from `staged` on. Sets all outcomes as
 * sp_pager_take() does, but holes, which look like pages. */
void sp_pager_move_out(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *staged,
		       uint8_t *outcomes);

/* Tell holes from pages among the first n of the staging area. -errno: nothing may be read there. */
int sp_pager_find_holes(struct sp_pager *pager, size_t n, uint8_t *outcomes);

/* End a take of the staged pages [first, end), which belong at `base` + first pages: what WIRE_MERGED
 * stands at is gone from its address already (something else is mapped there, or it is to be dropped);
 * the other pages return, and the range is as it was. Nobody is woken, nothing staged is dropped. */
void sp_pager_end_take(struct sp_pager *pager, uint8_t *base, size_t first, size_t end,
		       const uint8_t *outcomes, bool mapped);

/* Where the pages from `first` on end that have one outcome. */
size_t sp_pager_stretch(const uint8_t *outcomes, size_t first, size_t n);

/* Map slots at a side address so that they are there, and trap on write. -errno. */
int sp_pager_map_side(struct sp_pager *pager, size_t n, int store, uint64_t slot, uint8_t **side);

/* Move stretches of the side mapping over the pages whose outcome is WIRE_MERGED, and unmap the
 * rest; outcomes of pages that could not be mapped are set. */
void sp_pager_map_over(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *side,
		       uint8_t *outcomes);

/* mremap() in a way that the watcher knows as the pager's own. 0 or -errno. */
int sp_pager_remap(struct sp_pager *pager, uint8_t *from, size_t n, int flags, uint8_t *to);

/* Pause for an instant, before trying again. */
void sp_pager_back_off(void);

#endif
