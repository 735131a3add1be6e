/*
 * Away pages of one arena: pages whose bytes are not on this host (docs/cluster.md).
 *
 * THEORY
 * An away page is empty, and its address is registered for missing faults on the userfaultfd of
 * the store's mappings, whose events tell when the application discards or moves it. Such an address
 * lies in a **stretch**, a run of the arena's table (SP_SLOT_AWAY) and a mapping of the kernel. In a
 * stretch there may be pages that are private again, since they were filled: a stretch shrinks from
 * its ends, and is not split in its middle.
 *
 * Of each page of a stretch the marks say what it is. They and the digests are tables as long as the
 * arena, made when the first page of it goes away; they take memory where pages are away alone, 33
 * bytes a page, and give it back.
 *
 * Used by the mover. The reader looks at marks too: what is lost must not be touched.
 */
#ifndef SP_AWAY_H
#define SP_AWAY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"

#define SP_MARK_AWAY 1	 /* not here, but to be had */
#define SP_MARK_WANTED 2 /* the merger was told that somebody waits for it */
#define SP_MARK_LOST 4	 /* nowhere any more: a touch is an error */

#define SP_STREAMS 4 /* places in an arena at which threads go straight on, that are kept in mind */

/* Where threads touch away pages one after the other. */
struct sp_stream {
	uint64_t next; /* page after those that were asked for */
	uint32_t run;  /* how many that were */
};

struct sp_away {
	_Atomic(atomic_uchar *) marks; /* one a page; NULL: nothing was ever away */
	uint8_t *digests;
	size_t pages; /* of the arena */
	atomic_size_t count, lost;
	struct sp_stream streams[SP_STREAMS];
	unsigned oldest; /* stream */
	bool missed;	 /* a page that somebody waits for was not asked for */
};

/* Make the tables, unless they are there. -ENOMEM. */
int sp_away_prepare(struct sp_away *away, size_t pages);
void sp_away_destroy(struct sp_away *away);

uint8_t sp_away_mark(const struct sp_away *away, uint64_t page);
const uint8_t *sp_away_digest(const struct sp_away *away, uint64_t page);

/* How many pages from `page` on, before `end`, are as it is: away, lost, or neither. */
uint64_t sp_away_run(const struct sp_away *away, uint64_t page, uint64_t end);

/* In the pagemap entries of n pages, those that are lost are absent: nobody may touch them. */
void sp_away_hide_lost(const struct sp_away *away, uint64_t page, size_t n, uint64_t *entries);

/* Pages of a stretch go away. The tables are there. */
void sp_away_begin(struct sp_away *away, uint64_t page, uint64_t count, const uint8_t *digests);

/* Pages are away or lost no more, or, with SP_MARK_LOST, lost from now on. */
void sp_away_end(struct sp_away *away, uint64_t page, uint64_t count, uint8_t mark);

/* A page was asked for, or (set: false) must be asked for again. */
void sp_away_set_wanted(struct sp_away *away, uint64_t page, bool set);

/* Give the memory of the tables back for a range that is in no stretch any more. */
void sp_away_give_back(struct sp_away *away, const struct sp_extents *extents, uint64_t page,
		       uint64_t count);

#endif
