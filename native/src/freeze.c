/*
 * Mover: the orders FREEZE and LEAVE, by which an arena moves to another host.
 *
 * While an arena is frozen, its absent pages trap as its shared ones do, and neither are served. No
 * fault is kept: its thread sleeps in the kernel, and is woken at the thaw to come back. Whatever the
 * application itself asks for ends the freeze; then the arena can't be left.
 */
#include <errno.h>
#include <string.h>

#include "kernel.h"
#include "mover.h"
#include "pagemap.h"

#define MS_NS 1000000

/* Visit what is in no run of the table; `change` is told of stretches. */
static int visit_gaps(struct sp_node *node, struct sp_arena *arena,
		      int (*change)(struct sp_pager *pager, uint8_t *address, size_t n))
{
	uint64_t page = 0;
	int error = 0;

	for (size_t i = 0; i <= arena->extents.count && !error; i++) {
		const struct sp_extent *extent = &arena->extents.entries[i];
		bool last = i == arena->extents.count;
		uint64_t end = last ? arena->pages : extent->page;

		if (end > page)
			error = change(&node->mover.pager, arena->data + page * SP_PAGE_SIZE, end - page);
		if (!last)
			page = (uint64_t)extent->page + extent->count;
	}
	return error;
}

static int begin_missing(struct sp_pager *pager, uint8_t *address, size_t n)
{
	return uffd_register(pager->uffds.memory, address, n * SP_PAGE_SIZE,
			     UFFDIO_REGISTER_MODE_MISSING |
				     (pager->tracks ? UFFDIO_REGISTER_MODE_WP : 0));
}

static int end_missing(struct sp_pager *pager, uint8_t *address, size_t n)
{
	sp_pager_end_missing(pager, address, n);
	return 0;
}

void sp_mover_thaw(struct sp_node *node, struct sp_arena *arena)
{
	if (arena->frozen_until == 0)
		return;
	arena->frozen_until = 0;
	visit_gaps(node, arena, end_missing);
	sp_pager_wake(&node->mover.pager, arena->data, arena->pages);
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
	if (milliseconds == 0) {
		sp_mover_thaw(node, arena);
	} else {
		arena->frozen_until = sp_faults_now() + (uint64_t)milliseconds * MS_NS;
		error = visit_gaps(node, arena, begin_missing);
		if (error)
			sp_mover_thaw(node, arena);
	}
	return sp_mover_send_done(node, order, -error, 0);
}

/* Whether the application could still write a page. */
static bool is_writable(struct sp_node *node, const struct sp_arena *arena)
{
	struct sp_pager *pager = &node->mover.pager;

	if (atomic_load(&arena->sealed))
		return false;
	for (uint64_t page = 0, n; page < arena->pages; page += n) {
		n = arena->pages - page < SP_TAKE_PAGES ? arena->pages - page : SP_TAKE_PAGES;
		if (sp_pagemap_read(pager->pagemap, arena->data + page * SP_PAGE_SIZE, n,
				    pager->page_states))
			return true;
		sp_away_hide_lost(&arena->away, page, n, pager->page_states);
		for (uint64_t i = 0; i < n; i++)
			if (sp_pagemap_has_page(pager->page_states[i]) &&
			    !sp_pagemap_is_shared(pager->page_states[i]))
				return true;
		sp_mover_serve_faults(node);
	}
	return false;
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
	    !is_writable(node, arena) && sp_mover_stop_reader(node)) {
		/* the last look at the time, and at what the application did meanwhile */
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
