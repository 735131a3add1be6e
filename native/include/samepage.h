/*
 * libsamepage: arenas whose identical pages are stored once on a host.
 *
 * An arena is ordinary anonymous memory of this process. Its pages that are equal to pages of
 * other arenas in the same domain may be mapped, copy-on-write, to one shared page; reads and
 * writes stay what they always were. Two or three threads of the library (the agent) do the work;
 * they block all signals and take no lock that the application's threads hold.
 *
 * Every function that returns int returns 0 or a positive result on success and -errno on
 * failure; sp_error() then tells more. All functions may be called from any thread. After fork()
 * the child has no arenas (the memory is not inherited); its handles answer -ECHILD. An arena that was
 * migrated to another host answers -EREMOTE, and touching it is a SIGBUS.
 */
#ifndef SAMEPAGE_H
#define SAMEPAGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SP_PAGE_SIZE 4096
#define SP_FINGERPRINT_SIZE 16
#define SP_DIGEST_SIZE 32
#define SP_NAME_MAX 127	 /* bytes of an arena's name */
#define SP_DOMAIN_MAX 63 /* bytes of a domain's name */
#define SP_HOST_MAX 253	 /* bytes of a host's name */

struct sp_node;	 /* a connection to the daemons of this host */
struct sp_arena; /* an arena of this process */

/* What the kernel offers to this process; bits of sp_probe(). */
enum sp_feature {
	SP_FEATURE_USERFAULTFD = 1 << 0, /* arenas can be shared at all */
	SP_FEATURE_MOVE = 1 << 1,	 /* UFFDIO_MOVE (6.8): writable arenas can be shared */
	SP_FEATURE_WP_TMPFS = 1 << 2,	 /* write-protect faults on tmpfs (5.19) */
	SP_FEATURE_REMAP = 1 << 3,	 /* remap events */
	SP_FEATURE_POISON = 1 << 4,	 /* UFFDIO_POISON (6.6) */
	SP_FEATURE_PAGEMAP_SCAN = 1 << 5, /* PAGEMAP_SCAN (6.7) */
	SP_FEATURE_TRACKING = 1 << 6,	  /* writes are followed: with WP_ASYNC (6.7) */
	SP_FEATURE_DISCARD = 1 << 7,	  /* discarded shared pages are zero, as private ones (5.14) */
	SP_FEATURE_AWAY = 1 << 8	  /* pages can be on other hosts: all of the above but 5 and 6 */
};

/* Pages by what one sp_arena_share() did to them. */
struct sp_share_report {
	uint64_t merged;      /* newly mapped to a shared page, or to the zero page */
	uint64_t differs;     /* not equal any more at the compare */
	uint64_t pinned;      /* pinned for I/O, or shared with a forked child */
	uint64_t absent;      /* never touched, or discarded */
	uint64_t busy;	      /* a later call may succeed */
	uint64_t no_mapping;  /* the limit of mappings is reached (vm.max_map_count) */
	uint64_t unsupported; /* the kernel lacks what this needs: see sp_probe() */
	uint64_t unique;      /* no equal page on this host */
	uint64_t shared;      /* mapped to a shared page now, earlier ones included */
	uint64_t pages;	      /* all pages of the arena */
	uint64_t no_headroom; /* undoing it might not fit into the host's memory */
};

/* Pages of an arena now, as the kernel shows them; they sum to `pages`. */
struct sp_arena_stats {
	uint64_t pages;
	uint64_t private_pages;
	uint64_t shared_pages;
	uint64_t absent_pages;
	uint64_t evicted_pages; /* their bytes are not on this host */
	uint64_t saved_bytes; /* for each shared page 4096 * (1 - 1/sharers); 0 when the merger is
				 away */
};

/* Pages by what one sp_arena_evict() did to them. */
struct sp_evict_report {
	uint64_t held_elsewhere; /* gone: other hosts hold them */
	uint64_t spilled;	 /* gone: they are on this host's disk */
	uint64_t kept;		 /* here still: written meanwhile, pinned, or absent */
	uint64_t no_room;	 /* here still: no host holds them, and no disk has room */
};

/* How far an sp_arena_clone() is; the first three sum to the bytes that are not just zeros. */
struct sp_clone_progress {
	uint64_t local_bytes;	/* found on this host */
	uint64_t fetched_bytes; /* come from other hosts */
	uint64_t missing_bytes; /* to come */
	uint64_t freeze_us;	/* how long writers had to wait; 0 before the end */
};

enum sp_clone_flag {
	SP_CLONE_LAZY = 1 << 0,	  /* usable at once; pages come when touched, and meanwhile */
	SP_CLONE_MIGRATE = 1 << 1 /* the source's process loses the arena */
};

struct sp_clone_options {
	const char *source_host;  /* by its name in the cluster */
	const char *source_arena; /* its name there */
	const char *name;	  /* the new one's; NULL: the source's */
	const char *domain;	  /* NULL: "default" */
	uint32_t flags;		  /* enum sp_clone_flag */
	uint32_t max_freeze_ms;	  /* SP_CLONE_MIGRATE: for how long writers may have to wait */
	/* NULL, or what another thread or a signal handler may set to something else than 0 to give
	 * the call up; it is looked at every 50 ms */
	const volatile int *give_up;
};

/* Bits of enum sp_feature that this process can use. `dir` is the daemons' socket directory and
 * may be NULL: then only what the process can open by itself counts. SAMEPAGE_DISABLE in the
 * environment, a comma-separated list of userfaultfd, move, wp_tmpfs, remap, poison, pagemap_scan,
 * tracking, discard and away, takes features away. */
uint32_t sp_probe(const char *dir);

/* What went wrong in this thread's last failed call: a sentence, never NULL. */
const char *sp_error(void);

/* Connect to the merger (and, in the background, the scanner) in `dir`; NULL means $SAMEPAGE_DIR,
 * else /run/samepage. Daemons that want to know who the process is get the token in the file that
 * $SAMEPAGE_TOKEN_FILE names; it may be replaced by a newer one. -ENOENT or -ECONNREFUSED: no merger there. -EPROTONOSUPPORT: there is
 * no protocol version that both speak. -ETIMEDOUT: it did not answer. */
int sp_connect(const char *dir, struct sp_node **node);

/* End the connection. Arenas that are still open are closed first, as sp_arena_close() does, but for
 * at most 30 s: pages that are still on other hosts then are an error (SIGBUS) at a touch. Their
 * handles stay valid for sp_arena_data(), sp_arena_size() and sp_arena_free(). */
void sp_disconnect(struct sp_node *node);

/* Make an arena of `size` bytes, rounded up to whole pages, all zero; it takes twice as much address
 * space. `domain` NULL means the process's own: the daemons know it from who the process is, or it is
 * "default".
 *
 * The memory is the application's: it may also be discarded (better with sp_arena_discard()),
 * protected, locked, moved or unmapped in parts, of which what is locked or in a mapping of another
 * kind is not merged. Pages that are on another host when they are moved are lost (SIGBUS): fetch
 * them before. Only reading is a limit: what is unmapped, or protected against reading, in
 * the some 100 us in which a scan reads just there, faults in the library's thread.
 *
 * -EINVAL: size 0 or a bad name or domain. -ENOMEM: more than the address space or
 * the memory of the machine. -EEXIST: the name is taken in this domain. -ENOTCONN: the merger is
 * away. -EACCES: the process may not use the domain, or any. -EAGAIN: who it is cannot be checked now.
 * -ETIMEDOUT. */
int sp_arena_create(struct sp_node *node, const char *name, const char *domain, size_t size,
		    struct sp_arena **arena);

/* Make an arena that is a copy of one on another host; only the bytes that this host lacks are moved.
 * `progress` (may be NULL) is called in this thread while it goes on. One that fails leaves nothing
 * behind. A migration is not given up once its arena is being made: timeout_ms counts until then, and
 * afterwards only the merger's word ends it.
 *
 * -EINVAL, -EEXIST, -ENOMEM: as sp_arena_create(). -ENOENT: no such host or arena. -ENOTCONN,
 * -EAGAIN: the merger, or the other host, is away. -ENOTSUP: the kernel or the merger lacks what it
 * takes. -EBUSY: pages of the source are pinned for I/O. -ETIMEDOUT: it took longer, or its writers
 * would have had to wait for longer than max_freeze_ms. -ECANCELED: it was given up; no more possible
 * when an arena that migrates is being made here. */
int sp_arena_clone(struct sp_node *node, const struct sp_clone_options *options, int timeout_ms,
		   void (*progress)(const struct sp_clone_progress *progress, void *context),
		   void *context, struct sp_arena **arena);

void *sp_arena_data(const struct sp_arena *arena);
size_t sp_arena_size(const struct sp_arena *arena);
const char *sp_arena_domain(const struct sp_arena *arena);

/* 1 when it can only be read, since sp_arena_seal() or as the copy of a sealed arena; else 0. */
int sp_arena_sealed(const struct sp_arena *arena);

/* Look now for equal pages and merge them; waits until done, at most timeout_ms. -ENOTCONN: the
 * scanner or merger is away. -ETIMEDOUT: what was begun goes on. -EBADF: the arena is closed. */
int sp_arena_share(struct sp_arena *arena, int timeout_ms, struct sp_share_report *report);

int sp_arena_stats(struct sp_arena *arena, struct sp_arena_stats *stats);

/* Make the arena read-only for good: a later write to it is a SIGSEGV, an sp_arena_discard() -EPERM.
 * Its pages merge from then on even where the kernel has no userfaultfd. I/O into the arena must
 * have come to its end; and the application must not make the memory writable again. -EBUSY: pages
 * are pinned for I/O (told where the kernel has UFFDIO_MOVE). -ENOMEM: no mapping is left. */
int sp_arena_seal(struct sp_arena *arena);

/* Give the memory of whole pages back: they read as zeros from now on, as fresh ones. `offset` and
 * `length` are in bytes. Unlike madvise(MADV_DONTNEED), it is exact also while the pages are just
 * being merged. -EINVAL: no whole pages, or not inside the arena. -ENOMEM: no mapping is left to do
 * it with. */
int sp_arena_discard(struct sp_arena *arena, size_t offset, size_t length);

/* Bring pages back that are on other hosts, and wait until they are here. Touching one does that
 * too; here a timeout can be given, and bytes that are lost are -EIO instead of SIGBUS. `offset` and
 * `length` as above. -ETIMEDOUT: they go on coming. */
int sp_arena_fetch(struct sp_arena *arena, size_t offset, size_t length, int timeout_ms);

/* Let pages go that other hosts hold, and others to this host's disk; they come back at a touch.
 * `offset` and `length` as above. -ENOTCONN: the merger is away. -ETIMEDOUT: what was begun goes
 * on. */
int sp_arena_evict(struct sp_arena *arena, size_t offset, size_t length, int timeout_ms,
		   struct sp_evict_report *report);

/* Make every page private again. Needs no daemon, unless pages are on other hosts: then it waits for
 * them. -EIO: done, but bytes are lost. -ENOMEM: there is no memory for all the copies;
 * pages that could not be copied stay shared. */
int sp_arena_unshare(struct sp_arena *arena);

/* End the sharing: every page private, the name free. The memory stays valid and keeps its bytes
 * until sp_arena_free(). Closing twice is fine. Waits for pages on other hosts, as
 * sp_arena_unshare() does; -EIO: closed, but bytes are lost. -ENOMEM: as there; the arena stays
 * open. */
int sp_arena_close(struct sp_arena *arena);

/* Close, and unmap the memory. */
void sp_arena_free(struct sp_arena *arena);

/* Fingerprints of `pages` whole pages at `data`: XXH3-128 with `seed`, canonical byte order, 16
 * bytes a page into `fingerprints`. */
void sp_fingerprint(const void *data, size_t pages, uint64_t seed, uint8_t *fingerprints);

/* Digests of `pages` whole pages at `data`: BLAKE3 with a key of 32 bytes, 32 bytes a page into
 * `digests`; zeros for a page that holds only zeros. */
void sp_digest(const void *data, size_t pages, const uint8_t *key, uint8_t *digests);

#ifdef __cplusplus
}
#endif

#endif
