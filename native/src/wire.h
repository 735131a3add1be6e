/*
 * Messages between the agent and the daemons: docs/protocol.md, in C. Little-endian hosts only.
 */
#ifndef SP_WIRE_H
#define SP_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "samepage.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the agent protocol is little-endian, and so must be the host"
#endif

#define WIRE_MAGIC 0x5053
#define WIRE_VERSION 3
#define WIRE_VERSION_OLDEST 2 /* that a daemon may still speak */
#define WIRE_MESSAGE_MAX 65536
#define WIRE_FINGERPRINT_PAGES_MAX 16384
#define WIRE_READ_PAGES_MAX 512
#define WIRE_READ_PAGES_MIN 256 /* that every merger's window holds */
#define WIRE_REPLACE_PAGES_MAX 4096
#define WIRE_ZERO_SLOT 0
#define WIRE_AWAY_PAGES_MAX 1600
#define WIRE_DIGEST_SIZE 32
#define WIRE_SNAPSHOT_SIZE 16
#define WIRE_STALL_BUCKETS 16 /* the first is for less than 8 us, each next for twice as long */

enum wire_type {
	WIRE_HELLO = 1,
	WIRE_WELCOME = 2,
	WIRE_REFUSED = 3,
	WIRE_ARENA_OPEN = 4,
	WIRE_ARENA_OPENED = 5,
	WIRE_ARENA_CLOSE = 6,
	WIRE_EXTENTS = 8,
	WIRE_AWAY_PAGES = 9,
	WIRE_FINGERPRINT = 16,
	WIRE_READ = 17,
	WIRE_REPLACE = 18,
	WIRE_RESTORE = 19,
	WIRE_DONE = 20,
	WIRE_RESTORED = 21,
	WIRE_CHANGED = 22,
	WIRE_STALLS = 23,
	WIRE_COUNT = 24,
	WIRE_AWAY = 25,
	WIRE_EVICT = 26,
	WIRE_FILL = 27,
	WIRE_POISON = 28,
	WIRE_FREEZE = 29,
	WIRE_LEAVE = 30,
	WIRE_SHARE = 32,
	WIRE_SHARED = 33,
	WIRE_ACCOUNT = 34,
	WIRE_ACCOUNTED = 35,
	WIRE_CREDENTIAL = 36,
	WIRE_CLONE = 37,
	WIRE_CLONING = 38,
	WIRE_CLONED = 39,
	WIRE_FETCH = 40,
	WIRE_EVICT_ARENA = 41,
	WIRE_EVICTED = 42,
	WIRE_SEALED = 43
};

enum wire_outcome {
	WIRE_MERGED = 0,
	WIRE_DIFFERS = 1,
	WIRE_PINNED = 2,
	WIRE_ABSENT = 3,
	WIRE_BUSY = 4,
	WIRE_NO_MAPPING = 5,
	WIRE_UNSUPPORTED = 6
};

enum wire_page_state {
	WIRE_PAGE_ABSENT = 0,
	WIRE_PAGE_PRIVATE = 1,
	WIRE_PAGE_SHARED = 2,
	WIRE_PAGE_ZERO = 3
};

struct wire_header {
	uint16_t magic;
	uint8_t version;
	uint8_t type;
	uint32_t length;
	uint32_t seq;
	uint32_t arena;
};

struct wire_hello {
	uint8_t agent[16];
	uint32_t pid;
	uint32_t features;
};

struct wire_welcome {
	uint64_t window_bytes;
	uint32_t descriptors; /* bit 0: one follows the window's */
	uint32_t zero;
};

struct wire_arena_open { /* name and domain follow */
	uint64_t pages;
	uint64_t lock;
	uint32_t extents;
	uint16_t name_bytes;
	uint16_t domain_bytes;
	uint64_t away; /* from here on not in version 2 */
	uint8_t left[WIRE_SNAPSHOT_SIZE];
} __attribute__((packed));

#define WIRE_ARENA_OPEN_V2 offsetof(struct wire_arena_open, away)

struct wire_away {
	uint64_t page;
	uint8_t digest[WIRE_DIGEST_SIZE];
};

struct wire_arena_opened {
	uint64_t lock_or_seed;
};

struct wire_range {
	uint64_t page;
	uint64_t count;
};

struct wire_changed { /* in the window; ranges follow */
	uint64_t told;
	uint64_t ranges;
};

struct wire_counted { /* in the window */
	uint64_t absent;
};

struct wire_run {
	uint64_t page;
	uint64_t count;
	uint64_t slot;
};

struct wire_clone { /* host, source arena, name and domain follow */
	uint32_t flags;
	uint32_t freeze_ms;
	uint16_t host_bytes;
	uint16_t source_bytes;
	uint16_t name_bytes;
	uint16_t domain_bytes;
};

struct wire_cloned { /* CLONING ends before the last two fields */
	uint64_t pages, local, fetched, missing;
	uint64_t freeze_us;
	uint64_t sealed;
};

struct wire_evicted {
	uint64_t held, spilled, kept, no_room;
};

/* What is absent in an arena that the application does not know yet maps its slots, with nothing to
 * compare; those that do not know this call it ABSENT. */
#define WIRE_REPLACE_ABSENT 1

struct wire_replace { /* runs follow */
	uint32_t runs;
	uint32_t flags;
};

struct wire_done { /* outcomes follow, a byte each */
	int32_t error;
	uint32_t outcomes;
};

struct wire_shared {
	uint64_t merged, differs, pinned, absent, busy, no_mapping, unsupported, unique, shared,
		pages;
	uint64_t no_headroom;
};

struct wire_accounted {
	uint64_t shared_pages;
	uint64_t saved_bytes;
};

/* The pages that ranges hold together. 0: they are not ascending and disjoint, not in an arena of so
 * many pages, or more than `most`. */
static inline uint64_t wire_count_pages(const struct wire_range *ranges, size_t n,
					uint64_t arena_pages, uint64_t most)
{
	uint64_t pages = 0, end = 0;

	for (size_t i = 0; i < n; i++) {
		if (ranges[i].count == 0 || ranges[i].page < end || ranges[i].page >= arena_pages ||
		    ranges[i].count > arena_pages - ranges[i].page ||
		    ranges[i].count > most - pages)
			return 0;
		end = ranges[i].page + ranges[i].count;
		pages += ranges[i].count;
	}
	return pages;
}

_Static_assert(sizeof(struct wire_header) == 16, "header");
_Static_assert(sizeof(struct wire_hello) == 24, "HELLO");
_Static_assert(sizeof(struct wire_welcome) == 16, "WELCOME");
_Static_assert(sizeof(struct wire_arena_open) == 48, "ARENA_OPEN");
_Static_assert(sizeof(struct wire_away) == 40, "AWAY");
_Static_assert(sizeof(struct wire_run) == 24, "run");
_Static_assert(sizeof(struct wire_shared) == 88, "SHARED");

#endif
