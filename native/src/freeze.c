/*
 * Mover: the orders FREEZE and LEAVE, by which an arena moves to another host.
 *
 * THEORY
 * From the answer to FREEZE until the thaw nobody writes a byte of the arena, and everybody may
 * read what is there. All it takes is that every page traps on what would change it, and that no
 * such fault is served: its thread sleeps in the kernel, and is woken at the thaw to come back.
 * Shared pages trap as they are. Private and absent memory is registered with the userfaultfd for
 * private memory, which never keeps writers waiting; a freeze hands it over to that of the store's
 * mappings, for write and missing faults, and protects it. One call protects a whole stretch, and
 * when it returns no processor has a right to write there left, however busily a page was being
 * written.
 *
 * While it is frozen, the page primitive works as ever (pager.h), with the other userfaultfd: a
 * page that is taken and returns is protected again before anybody is woken. A thread that comes by
 * in between can write such a page; as the page was refused by then, the merger reads it again.
 * Devices go on writing what they have pinned; UFFDIO_MOVE refuses those pages, as always, and
 * LEAVE does as well. So LEAVE need not know what happened in between: it asks that no private page
 * is left, and that all else traps.
 *
 * The other userfaultfd also tells when the application discards or moves memory, so that a freeze
 * ends by whatever the application itself does to the arena, but for munmap() and mprotect(), of
 * which nobody tells: those pages are simply not there, or not writable. The thaw gives all back to
 * the first userfaultfd, where it counts as written. Should something be left behind, since the
 * application has changed its mappings meanwhile, the next fault finds the arena not frozen, and
 * lifts it.
 */
#include <errno.h>
#include <string.h>

#include "kernel.h"
#include "mover.h"
#include "pagemap.h"

#define MS_NS 1000000
#define STEP_PAGES 16384 /* stopped at once, before other threads' faults are looked at */

/* Stop the writers of all that is private, by `stop` what is in no run. In the others there are
 * private pages as well: some that came back in a stretch of away ones, and those that were copied
 * in place. */
static int stop_writers(struct sp_node *node, struct sp_arena *arena,
			int (*stop)(struct sp_pager *pager, uint8_t *address, size_t n))
{
	struct sp_pager *pager = &node->mover.pager;
	int error = 0;

	if (atomic_load(&arena->sealed)) /* it has none */
		return 0;
	for (uint64_t page = 0, n; page < arena->pages && !error; page += n) {
		uint8_t *address = arena->data + page * SP_PAGE_SIZE;
		const struct sp_extent *extent;

		n = page + STEP_PAGES < arena->pages ? page + STEP_PAGES : arena->pages;
		n = sp_extents_look(&arena->extents, page, n, &extent);
		if (!extent)
			error = stop(pager, address, n);
		else if (!sp_extent_is_shared(extent))
			sp_pager_protect(pager, address, n);
		sp_mover_serve_faults(node);
		if (arena->frozen_until == 0)
			error = -EBUSY; /* for something that the application has done */
	}
	return error;
}

static int freeze(struct sp_node *node, struct sp_arena *arena, uint32_t milliseconds)
{
	bool again = arena->frozen_until > 0;
	int error;

	arena->frozen_until = sp_faults_now() + (uint64_t)milliseconds * MS_NS;
	if (!again) {
		arena->frozen.start = arena->data;
		arena->frozen.length = arena->pages * SP_PAGE_SIZE;
		sp_pager_begin_freeze(&node->mover.pager, &arena->frozen);
	}
	error = stop_writers(node, arena, again ? sp_pager_hold : sp_pager_freeze);
	if (error)
		sp_mover_thaw(node, arena);
	return error;
}

void sp_mover_thaw(struct sp_node *node, struct sp_arena *arena)
{
	struct sp_pager *pager = &node->mover.pager;

	if (arena->frozen_until == 0)
		return;
	arena->frozen_until = 0;
	sp_pager_end_freeze(pager, &arena->frozen);
	for (uint64_t page = 0, n; page < arena->pages; page += n) {
		uint8_t *address = arena->data + page * SP_PAGE_SIZE;
		const struct sp_extent *extent;

		n = sp_extents_look(&arena->extents, page, arena->pages, &extent);
		if (!extent)
			sp_pager_thaw(pager, address, n);
		else if (!sp_extent_is_shared(extent))
			sp_pager_unprotect(pager, address, n);
	}
	sp_pager_wake(pager, arena->data, arena->pages);
}

int sp_mover_thaw_due(struct sp_node *node)
{
	uint64_t now = sp_faults_now(), next = UINT64_MAX;

	for (struct sp_arena *arena = node->mover.arenas; arena; arena = arena->mover_next) {
		if (arena->frozen_until > 0 && arena->frozen_until <= now)
			sp_mover_thaw(node, arena);
		else if (arena->frozen_until > 0 && arena->frozen_until < next)
			next = arena->frozen_until;
	}
	return next == UINT64_MAX ? -1 : (int)((next - now) / MS_NS) + 1;
}

bool sp_mover_is_kept_aside(struct sp_node *node, struct sp_arena *arena, enum sp_fault_kind kind)
{
	if (arena->frozen_until == 0 || kind == SP_FAULT_UNMAPPED)
		return false;
	if (kind != SP_FAULT_REMOVED && kind != SP_FAULT_MOVED &&
	    sp_faults_now() < arena->frozen_until)
		return true;
	sp_mover_thaw(node, arena);
	return false;
}

int sp_mover_order_freeze(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_message *order)
{
	uint32_t milliseconds;
	int error = 0;

	if (order->length != sizeof(milliseconds))
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	if (!node->mover.pager.can_away)
		return sp_mover_send_done(node, order, ENOTSUP, 0);
	memcpy(&milliseconds, order->payload, sizeof(milliseconds));
	if (milliseconds == 0)
		sp_mover_thaw(node, arena);
	else
		error = freeze(node, arena, milliseconds);
	if (error == -EINVAL) /* the application has mapped something there that can't be registered */
		error = -ENOTSUP;
	return sp_mover_send_done(node, order, -error, 0);
}

/* Whether a page is the application's own still. What is in no run is, whatever its entry looks
 * like: a page that is swapped out and protected has the same one as a slot that reclaim took. */
static bool is_private(const struct sp_extent *extent, uint64_t entry)
{
	if (extent && sp_extent_is_shared(extent))
		return sp_pagemap_has_page(entry) && !sp_pagemap_is_shared(entry);
	return sp_pagemap_is_there(entry);
}

/* Whether a page could be written when the freeze is over, or is now, by a device that has pinned
 * it. */
static bool has_private(struct sp_node *node, const struct sp_arena *arena)
{
	struct sp_pager *pager = &node->mover.pager;

	for (uint64_t page = 0, n; page < arena->pages; page += n) {
		const struct sp_extent *extent;

		n = arena->pages - page < SP_TAKE_PAGES ? arena->pages : page + SP_TAKE_PAGES;
		n = sp_extents_look(&arena->extents, page, n, &extent);
		if (sp_pagemap_read(pager->pagemap, arena->data + page * SP_PAGE_SIZE, n,
				    pager->page_states))
			return true;
		sp_away_hide_lost(&arena->away, page, n, pager->page_states);
		for (uint64_t i = 0; i < n; i++)
			if (is_private(extent, pager->page_states[i]))
				return true;
		sp_mover_serve_faults(node);
	}
	return false;
}

/* Whether nobody can write any page. The application may have mapped something there since it was
 * frozen, so the writers are stopped once more. */
static bool is_still(struct sp_node *node, struct sp_arena *arena)
{
	return atomic_load(&arena->sealed) ||
	       (stop_writers(node, arena, sp_pager_hold) == 0 && !has_private(node, arena));
}

/* In one step: it was frozen and whole, and is another host's. */
static int leave(struct sp_node *node, struct sp_arena *arena, const uint8_t *snapshot)
{
	int error = sp_pager_ruin(&node->mover.pager, arena->data, arena->shadow, arena->pages);

	if (error)
		return error;
	memcpy(arena->left, snapshot, sizeof(arena->left));
	atomic_store(&arena->gone, true);
	arena->frozen_until = 0;
	sp_pager_end_freeze(&node->mover.pager, &arena->frozen);
	sp_away_end(&arena->away, 0, arena->pages, 0);
	sp_extents_remove(&arena->extents, 0, arena->pages);
	sp_away_give_back(&arena->away, &arena->extents, 0, arena->pages);
	if (arena->store >= 0)
		close(arena->store);
	arena->store = -1;
	arena->lock = 0;
	sp_mailbox_ring(&node->reader.mailbox); /* it tells the scanner */
	return 0;
}

int sp_mover_order_leave(struct sp_node *node, struct sp_arena *arena,
			 const struct sp_message *order)
{
	static const uint8_t none[WIRE_SNAPSHOT_SIZE];
	int error = EBUSY, result;

	if (order->length != WIRE_SNAPSHOT_SIZE || !memcmp(order->payload, none, sizeof(none)))
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	if (atomic_load(&arena->gone)) /* asked again */
		return sp_mover_send_done(
			node, order, memcmp(arena->left, order->payload, sizeof(none)) ? EBUSY : 0, 0);
	if (arena->frozen_until > 0 && atomic_load(&arena->away.count) == 0 &&
	    is_still(node, arena) && sp_mover_stop_reader(node)) {
		/* the last look at what the application did meanwhile, and at the time */
		sp_mover_serve_faults(node);
		sp_mover_thaw_due(node);
		if (arena->frozen_until > 0 && leave(node, arena, order->payload) == 0)
			error = 0;
		sp_mover_resume_reader(node);
	}
	result = sp_mover_send_done(node, order, error, 0);
	if (!error) /* not before: it may be the process's end */
		sp_pager_wake(&node->mover.pager, arena->data, arena->pages);
	return result;
}
