/*
 * Mover: the order EVICT, by which pages go away from this host.
 *
 * The window has the bytes that others hold. A page is compared with them when nobody can write it
 * (a private one is taken first, a shared one is a slot), and then goes in one step: in its place
 * there is empty memory that is waited for. A page that was written meanwhile stays.
 */
#include <errno.h>
#include <string.h>

#include "kernel.h"
#include "maps.h"
#include "mover.h"
#include "sealed.h"

#define READER_TRIES 5000 /* with a pause in between: some 100 ms at least */

bool sp_mover_may_let_go(const struct sp_node *node, const struct sp_arena *arena)
{
	return !atomic_load(&arena->keep) && !node->mover.leaving && arena->frozen_until == 0;
}

bool sp_mover_stop_reader(struct sp_node *node)
{
	for (int i = 0; i < READER_TRIES; i++) {
		if (pthread_mutex_trylock(&node->reading) == 0)
			return true;
		/* it may just be waiting for a page */
		sp_mover_serve_faults(node);
		sp_pager_back_off();
	}
	return false;
}

void sp_mover_resume_reader(struct sp_node *node)
{
	pthread_mutex_unlock(&node->reading);
}

/* What an order brings for a stretch of pages. */
struct held {
	const uint8_t *bytes;
	const uint8_t *digests;
};

static void record(struct sp_arena *arena, uint64_t page, size_t n, const uint8_t *digests,
		   const uint8_t *outcomes)
{
	size_t end;

	for (size_t i = 0; i < n; i = end) {
		for (end = i + 1; end < n && outcomes[end] == outcomes[i];)
			end++;
		if (outcomes[i] != WIRE_MERGED)
			continue;
		sp_extents_remove(&arena->extents, page + i, end - i);
		sp_extents_insert(&arena->extents, page + i, end - i, SP_SLOT_AWAY);
		sp_away_begin(&arena->away, page + i, end - i, digests + i * WIRE_DIGEST_SIZE);
	}
}

/* Let runs of n shared pages go whose slots are equal to what is held. */
static void evict_shared(struct sp_node *node, struct sp_arena *arena, uint64_t page, size_t n,
			 uint64_t slot, const uint8_t *bytes, uint8_t *outcomes)
{
	struct sp_pager *pager = &node->mover.pager;
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;
	struct sp_slots slots = sp_maps_slots(pager->maps, address, n, arena->store, slot);
	size_t end;

	memset(outcomes, WIRE_BUSY, n); /* what is not its slots any more, the audit finds */
	n = slots.pages;
	if (n == 0 || sp_pager_read_slots(arena->store, pager->bounce, n * SP_PAGE_SIZE, slot))
		return;
	for (size_t i = 0; i < n; i++)
		outcomes[i] = memcmp(pager->bounce + i * SP_PAGE_SIZE, bytes + i * SP_PAGE_SIZE,
				     SP_PAGE_SIZE) == 0
				      ? WIRE_MERGED
				      : WIRE_DIFFERS;
	for (size_t i = 0; i < n; i = end) {
		for (end = i + 1; end < n && outcomes[end] == outcomes[i];)
			end++;
		if (outcomes[i] != WIRE_MERGED)
			continue;
		if (sp_pager_let_go(pager, address + i * SP_PAGE_SIZE,
				    arena->shadow + (page + i) * SP_PAGE_SIZE, end - i)) {
			memset(outcomes + i, WIRE_NO_MAPPING, end - i);
			continue;
		}
		sp_mover_keep_protection(address + i * SP_PAGE_SIZE, end - i, slots.protection);
		sp_pager_wake(pager, address + i * SP_PAGE_SIZE, end - i);
	}
}

/* Let some of `count` pages of one kind go, from `page` on; returns how many have their outcome, 0:
 * look again. */
static size_t evict_some(struct sp_node *node, struct sp_arena *arena, uint64_t page, size_t count,
			 struct held held, uint8_t *outcomes)
{
	struct sp_mover *mover = &node->mover;
	size_t i = sp_extents_find(&arena->extents, page), n = count;
	const struct sp_extent *extent = &arena->extents.entries[i];
	bool last = i == arena->extents.count, inside = !last && extent->page <= page;
	uint64_t border = last ? UINT64_MAX
			       : extent->page + (inside ? (uint64_t)extent->count : 0);
	uint8_t *address = arena->data + page * SP_PAGE_SIZE;

	if (n > border - page)
		n = border - page;
	if (n > SP_TAKE_PAGES)
		n = SP_TAKE_PAGES;
	if (inside && extent->slot == SP_SLOT_AWAY) {
		n = sp_away_run(&arena->away, page, page + n);
		if (sp_away_mark(&arena->away, page) & (SP_MARK_AWAY | SP_MARK_LOST)) {
			memset(outcomes, WIRE_ABSENT, n);
			return n;
		}
		sp_mover_release(node, arena, page, n);
		sp_mover_settle_around(node, arena, page, n);
		return 0;
	}
	if (sp_mover_was_restored(mover, arena->number, page, n)) {
		memset(outcomes, WIRE_BUSY, n);
		return n;
	}
	if (arena->extents.count >= mover->extents_budget) {
		memset(outcomes, WIRE_NO_MAPPING, n);
		return n;
	}
	if (inside && extent->slot == SP_SLOT_IN_PLACE)
		memset(outcomes, WIRE_UNSUPPORTED, n);
	else if (inside)
		evict_shared(node, arena, page, n, extent->slot + (page - extent->page), held.bytes,
			     outcomes);
	else
		(atomic_load(&arena->sealed) ? sp_sealed_evict : sp_pager_evict)(
			&mover->pager, address, arena->shadow + page * SP_PAGE_SIZE, n, held.bytes,
			outcomes);
	record(arena, page, n, held.digests, outcomes);
	sp_mover_serve_faults(node);
	return n;
}

/* How many ranges an order has: they are followed by a digest for each of their pages. 0: it is
 * malformed. */
static size_t count_ranges(const struct sp_message *order)
{
	const struct wire_range *ranges = (const struct wire_range *)order->payload;
	size_t n = 0, length = 0;

	while (length < order->length) {
		if (order->length - length < sizeof(*ranges) ||
		    ranges[n].count > WIRE_READ_PAGES_MAX)
			return 0;
		length += sizeof(*ranges) + ranges[n++].count * WIRE_DIGEST_SIZE;
	}
	return length == order->length ? n : 0;
}

int sp_mover_order_evict(struct sp_node *node, struct sp_arena *arena,
			 const struct sp_message *order)
{
	const struct wire_range *ranges = (const struct wire_range *)order->payload;
	struct sp_mover *mover = &node->mover;
	size_t n = count_ranges(order), done = 0;
	struct held held = {.bytes = mover->link.window,
			    .digests = order->payload + n * sizeof(*ranges)};
	uint64_t most = mover->link.window_bytes / SP_PAGE_SIZE, pages;

	if (n == 0)
		return -EPROTO;
	if (!arena)
		return sp_mover_send_done(node, order, ENOENT, 0);
	pages = wire_count_pages(ranges, n, arena->pages,
				 most < WIRE_READ_PAGES_MAX ? most : WIRE_READ_PAGES_MAX);
	if (pages == 0)
		return -EPROTO;
	if (!mover->pager.can_away)
		return sp_mover_send_done(node, order, ENOTSUP, 0);
	if (sp_away_prepare(&arena->away, arena->pages))
		return sp_mover_send_done(node, order, ENOMEM, 0);
	memset(mover->outcomes, WIRE_BUSY, pages);
	if (!sp_mover_may_let_go(node, arena) || !sp_mover_stop_reader(node))
		return sp_mover_send_done(node, order, 0, pages);
	for (size_t i = 0; i < n; i++) {
		for (uint64_t at = 0, some; at < ranges[i].count; at += some, done += some) {
			struct held part = {.bytes = held.bytes + done * SP_PAGE_SIZE,
					    .digests = held.digests + done * WIRE_DIGEST_SIZE};

			some = evict_some(node, arena, ranges[i].page + at, ranges[i].count - at, part,
					  mover->outcomes + done);
		}
	}
	sp_mover_resume_reader(node);
	return sp_mover_send_done(node, order, 0, pages);
}
