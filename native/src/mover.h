/*
 * The mover thread: the only one that changes what an arena's addresses map.
 *
 * THEORY
 * It serves three parties, in this order: threads that wait on a fault, the application's
 * requests, the merger's orders. A long order is cut into stretches, and faults are served between
 * them. The merger's books follow the messages one by one, so their order is the order of the
 * changes, with one twist: an order's outcomes travel in one DONE at its end. Hence
 *  - notices of pages restored meanwhile wait until DONE is sent, and
 *  - an order leaves pages alone (WIRE_BUSY) that were restored since it began.
 * A connection that breaks, or a notice that does not fit, costs nothing but work: the arenas are
 * announced anew with what they really map.
 */
#ifndef SP_MOVER_H
#define SP_MOVER_H

#include <sys/uio.h>

#include "node.h"

/* Start the thread on a node whose link is welcomed and whose pager is ready. -errno. */
int sp_mover_start(struct sp_node *node);

/* Close what is still open, end the thread and wait for its end. */
void sp_mover_stop(struct sp_node *node);

/* Between the mover's own files. */

/* Serve all queued faults. */
void sp_mover_serve_faults(struct sp_node *node);

/* The same, and all that the application's calls have told of before they returned. */
void sp_mover_catch_up(struct sp_node *node);

/* Make [page, page + count) of the arena private, serving faults in between. -ENOMEM or what
 * restoring says: some pages are still shared. */
int sp_mover_restore(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count);

/* Whether a page of the range was restored since notices were last sent. */
bool sp_mover_was_restored(const struct sp_mover *mover, uint32_t arena, uint64_t page,
			   uint64_t count);

/* Send, waiting for room in the socket for a while, with faults served meanwhile. A failure closes
 * the link; the main loop finds it so. -errno. */
int sp_mover_send(struct sp_node *node, uint8_t type, uint32_t seq, uint32_t arena,
		  const struct iovec *parts, size_t n, int descriptor);

/* Note that pages map no slot any more. */
void sp_mover_add_notice(struct sp_mover *mover, const struct sp_arena *arena, uint64_t page,
			 uint64_t count);

/* Tell the merger what was restored. */
void sp_mover_send_notices(struct sp_node *node);

/* Tell the merger who this process is, before arenas are announced. The token is read anew each
 * time, for it may be a newer one. */
void sp_mover_show_credential(struct sp_node *node);

/* Announce an arena with what it maps. The answer comes with the message of number `seq`. */
int sp_mover_announce(struct sp_node *node, struct sp_arena *arena, uint32_t seq);

/* Answer an order; the outcomes are in the mover's array. */
int sp_mover_send_done(struct sp_node *node, const struct sp_message *order, int error,
		       size_t outcomes);

/* Carry out an order of the merger. -EPROTO: it is malformed. */
int sp_mover_order(struct sp_node *node, const struct sp_message *message);

/* A thread's fault that was read at `since` (ns) is served. */
void sp_mover_count_stall(struct sp_mover *mover, uint64_t since);

/* Tell the merger of stalls, when it is time to. Returns in how many ms it will be; -1: never. */
int sp_mover_send_stalls(struct sp_node *node);

/* Restore at most `count` pages from a shared page on, within its run. Returns how many are dealt
 * with now; 0: there is no memory for a copy, and nothing has changed. */
uint64_t sp_mover_restore_stretch(struct sp_node *node, struct sp_arena *arena,
				  const struct sp_extent *extent, uint64_t page, uint64_t count);

/* Discard at most *n shared pages of a run, from `page` on; *n becomes how many. -ENOMEM. */
int sp_mover_discard_shared(struct sp_node *node, struct sp_arena *arena,
			    const struct sp_extent *extent, uint64_t page, uint64_t *n);

/* Something else than its slots is at `foreign` shared pages from `page` on. Wait for what may
 * explain it, else strike them out of the books. Returns how many pages were looked at. */
uint64_t sp_mover_strike_out(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			     uint64_t foreign);

/* Drop [page, page + count) of the arena: absent, to read as zeros. -ENOMEM: some keep their bytes. */
int sp_mover_discard(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count);

/* What the application allows itself stays as it was, where another mapping was put. */
void sp_mover_keep_protection(uint8_t *address, uint64_t count, int protection);

/* Pages of a stretch that are neither away nor lost are ordinary private memory again. */
void sp_mover_release(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count);

/* Release what needs no stretch any more, after pages of the range have come back. */
void sp_mover_settle(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint64_t count);

/* The same for what lies in front of a range and behind it, after it was taken out of a stretch. */
void sp_mover_settle_around(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			    uint64_t count);

/* How many of `count` pages of a stretch, from `page` on, are in one mapping that is still waited
 * for, with its protection. 0: the first is not, and what the application put there is its own. */
uint64_t sp_mover_check_away(struct sp_node *node, struct sp_arena *arena, uint64_t page,
			     uint64_t count, int *protection);

/* Discard at most *n pages of a stretch, from `page` on; *n becomes how many. -ENOMEM. */
int sp_mover_discard_away(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_extent *extent, uint64_t page, uint64_t *n);

/* The application's own madvise(MADV_DONTNEED) of at most `count` pages of a stretch. */
void sp_mover_follow_removal(struct sp_node *node, struct sp_arena *arena,
			     const struct sp_extent *extent, uint64_t page, uint64_t count);

/* The application's own mremap() of a page of a stretch: what was away is an error there. */
void sp_mover_follow_away(struct sp_node *node, struct sp_arena *arena, uint64_t page, uint8_t *to);

/* A touch of an empty page of a stretch. */
void sp_mover_serve_away(struct sp_node *node, struct sp_arena *arena, uint64_t page);

/* Whatever is away is an error from now on. */
void sp_mover_lose_away(struct sp_node *node, struct sp_arena *arena);

/* A thread waits for an away page: ask for it, and for some behind it. */
void sp_mover_want(struct sp_node *node, struct sp_arena *arena, uint64_t page);

/* Nothing that was asked for is on its way any more. */
void sp_mover_ask_again(struct sp_node *node, struct sp_arena *arena);

/* Send what is wanted; look again at requests that wait for pages, when some have come. */
void sp_mover_send_fetches(struct sp_node *node);

/* Ask for the away pages of a request. -EAGAIN: they are to come. -EIO: some are lost. */
int sp_mover_fetch(struct sp_node *node, const struct sp_request *request);

/* Whether pages of the arena may go away now. */
bool sp_mover_may_let_go(const struct sp_node *node, const struct sp_arena *arena);

/* Keep the reader from reading arenas: what it has found to be there must not go away under its
 * hands. false: it is too busy. */
bool sp_mover_stop_reader(struct sp_node *node);
void sp_mover_resume_reader(struct sp_node *node);

/* The orders AWAY, EVICT, FILL and POISON. */
int sp_mover_order_away(struct sp_node *node, struct sp_arena *arena,
			const struct sp_message *order);
int sp_mover_order_evict(struct sp_node *node, struct sp_arena *arena,
			 const struct sp_message *order);
int sp_mover_order_fill(struct sp_node *node, struct sp_arena *arena,
			const struct sp_message *order);
int sp_mover_order_poison(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_message *order);

/* The orders FREEZE and LEAVE. */
int sp_mover_order_freeze(struct sp_node *node, struct sp_arena *arena,
			  const struct sp_message *order);
int sp_mover_order_leave(struct sp_node *node, struct sp_arena *arena,
			 const struct sp_message *order);

/* End an arena's freeze, if it is frozen. */
void sp_mover_thaw(struct sp_node *node, struct sp_arena *arena);

/* End freezes whose time is over. Returns in how many ms the next one's is; -1: there is none. */
int sp_mover_thaw_due(struct sp_node *node);

/* Whether a fault has to wait for the arena's thaw. */
bool sp_mover_is_kept_aside(struct sp_node *node, struct sp_arena *arena, enum sp_fault_kind kind);

/* Carry out a CLONE request, and take the merger's answers to it. -EPROTO. */
void sp_mover_ask_clone(struct sp_node *node, struct sp_request *request);
int sp_mover_receive_cloning(struct sp_node *node, const struct sp_message *message);

/* Take an arena into the list. */
void sp_mover_enlist(struct sp_mover *mover, struct sp_arena *arena);

/* Replace pages of a stretch that are absent, from its first on, in an arena that nobody knows yet;
 * returns how many have their outcome, 0: the first is not absent. */
uint64_t sp_mover_replace_absent(struct sp_node *node, struct sp_arena *arena,
				 const struct wire_run *stretch, uint8_t *outcomes);

/* Replace pages of a stretch that are away, from its first on; returns how many have their outcome,
 * 0: the first is ordinary private memory now. */
uint64_t sp_mover_replace_away(struct sp_node *node, struct sp_arena *arena,
			       const struct wire_run *stretch, uint8_t *outcomes);

/* Look for mappings of the store that the application has taken away, when it is time to. Returns
 * in how many ms it will be; -1: there are none. */
int sp_mover_audit(struct sp_node *node);

struct sp_arena *sp_mover_find(const struct sp_mover *mover, uint32_t number);

#endif
