/*
 * What the library's parts know of each other: a node, its arenas, its threads.
 *
 * Threads. The application's threads hand requests to two workers and wait for the results; they
 * never touch what a worker owns.
 *   mover    owns the pager, the link to the merger and every arena's extents and store; alone
 *            changes mappings.
 *   watcher  reads the userfaultfd's events and passes faults to the mover.
 *   reader   owns the link to the scanner; reads arena memory to fingerprint it. It may sleep on a
 *            page that the mover holds, so nothing waits for it but requests of its own.
 * An arena is in the mover's list and in the reader's, and belongs to the application's handle;
 * each holds a reference. No worker allocates from the heap, whose lock an application's thread
 * may hold while it waits for a page.
 */
#ifndef SP_NODE_H
#define SP_NODE_H

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "away.h"
#include "changes.h"
#include "extents.h"
#include "faults.h"
#include "link.h"
#include "mailbox.h"
#include "memory.h"
#include "pager.h"
#include "samepage.h"

#define SP_MERGER_WINDOW ((size_t)WIRE_READ_PAGES_MIN * SP_PAGE_SIZE)
#define SP_SCANNER_WINDOW ((size_t)WIRE_FINGERPRINT_PAGES_MAX * (SP_FINGERPRINT_SIZE + 1))
#define SP_NOTICES 2048
#define SP_FETCHES 512
#define SP_DEFAULT_DOMAIN "default" /* where the merger does not say it */

struct sp_arena {
	struct sp_node *node;
	uint32_t number;
	char name[SP_NAME_MAX + 1];
	char domain[SP_DOMAIN_MAX + 1]; /* empty until the merger has told what it is */
	uint8_t *data;
	uint8_t *shadow; /* memory.h */
	size_t pages;
	bool tracked; /* writes are followed; set before the reader knows the arena */
	atomic_uint references;
	atomic_bool closed;
	atomic_bool sealed; /* read-only for good; set by the mover */
	atomic_bool gone;   /* it was left to another host; likewise */
	atomic_bool keep;   /* nothing more goes away: all is being brought back */

	/* The mover's. */
	struct sp_arena *mover_next;
	struct sp_extents extents;
	int store; /* the domain's store, -1 before the merger answered */
	uint64_t lock;
	bool announced;	       /* on the present connection */
	bool opened;	       /* and the merger has answered: away pages can be asked for */
	bool cloning;	       /* the application does not know it yet */
	uint32_t clone_seq;    /* of the message that asked for it */
	uint64_t frozen_until; /* ns; 0: it is not */
	struct sp_frozen frozen;
	uint8_t left[WIRE_SNAPSHOT_SIZE]; /* with what it was left to another host, or zeros */
	struct sp_away away;
	uint64_t restore_next; /* page after the last one restored for a write */
	uint32_t restore_run;  /* pages restored then */

	/* The reader's. */
	struct sp_arena *reader_next;
	uint64_t seed;
	bool seeded;
};

/* A range of which the merger is not told yet. */
struct sp_notice {
	uint32_t arena;
	struct wire_range range;
};

/* Faults served since the merger was told last, by how long a thread waited. */
struct sp_stalls {
	uint64_t waits[WIRE_STALL_BUCKETS];
	bool any;
	int64_t sent; /* ms */
};

struct sp_mover {
	pthread_t thread;
	struct sp_mailbox mailbox;
	struct sp_link link;
	struct sp_pager pager;
	bool can_share; /* the pager works */
	struct sp_arena *arenas;
	size_t extents_budget; /* runs an arena, should the merger ask for too many */
	struct sp_notice notices[SP_NOTICES];
	size_t notice_count;
	bool notices_lost; /* more than fit: only announcing everything anew helps */
	struct sp_notice fetches[SP_FETCHES]; /* away pages to ask for */
	size_t fetch_count;
	bool came_back; /* pages did, or might be asked for anew: somebody may wait for them */
	bool leaving;	/* the node is being disconnected: nothing more goes away */
	struct sp_stalls stalls;
	int64_t audit_next; /* when to look for mappings that the application took away, ms */
	int reconnect_ms;  /* pause before the next attempt */
	uint8_t outcomes[WIRE_REPLACE_PAGES_MAX];
};

struct sp_reader {
	pthread_t thread;
	struct sp_mailbox mailbox;
	struct sp_link link;
	int pagemap;
	int maps;
	struct sp_arena *arenas;
	int reconnect_ms;
	union {
		uint64_t page_states[WIRE_FINGERPRINT_PAGES_MAX];
		struct sp_regions regions;
	};
};

struct sp_node {
	struct wire_hello hello;
	char token_file[PATH_MAX]; /* credential.h; empty: none */
	struct sp_faults faults;
	struct sp_mover mover;
	struct sp_reader reader;
	pthread_mutex_t reading; /* held by the reader while it reads arena memory */
	atomic_uint references; /* the application's handle, and each arena */
	atomic_uint last_arena;
	atomic_bool closed;
	atomic_bool forked; /* this is a child's copy: no threads, no arenas */
	struct sp_node *next; /* of all nodes, for fork */
};

/* Whether it can be a domain's name. */
bool sp_is_domain(const char *domain);

/* Drop a reference; the last one frees. */
void sp_arena_put(struct sp_arena *arena);
void sp_node_put(struct sp_node *node);

#endif
