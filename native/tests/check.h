/*
 * For the C tests: one program a behaviour, exit 77 is a skip.
 */
#ifndef SP_TEST_CHECK_H
#define SP_TEST_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "faults.h"
#include "mailbox.h"
#include "memory.h"
#include "pager.h"
#include "probe.h"
#include "samepage.h"
#include "wire.h"

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);     \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

static inline void skip(const char *reason)
{
	fprintf(stderr, "skipped: %s\n", reason);
	exit(77);
}

/* A pager and its watcher, or the test is skipped. This thread is the mover from now on. */
static inline void start_pager(struct sp_pager *pager, struct sp_faults *faults,
			       struct sp_mailbox *mailbox)
{
	struct sp_uffds uffds;
	uint32_t features;

	if (sp_probe_open(-1, &features, &uffds))
		skip("this kernel, or this user, has no userfaultfd");
	if ((features & SP_FEATURES_NEEDED) != SP_FEATURES_NEEDED)
		skip("this kernel lacks UFFDIO_MOVE or write-protect faults on tmpfs");
	CHECK(sp_mailbox_init(mailbox) == 0);
	CHECK(sp_pager_init(pager, uffds, features) == 0);
	CHECK(sp_faults_start(faults, pager, mailbox) == 0);
}

static inline void stop_pager(struct sp_pager *pager, struct sp_faults *faults,
			      struct sp_mailbox *mailbox)
{
	sp_faults_stop(faults);
	sp_pager_destroy(pager);
	sp_mailbox_destroy(mailbox);
}

/* An arena's memory, as the pager knows it. */
static inline uint8_t *map_arena(struct sp_pager *pager, size_t n, uint8_t **shadow)
{
	uint8_t *data = sp_memory_map(n, shadow);
	bool tracked;

	CHECK(data && sp_pager_adopt(pager, data, *shadow, n, &tracked) == 0);
	return data;
}

static inline void unmap_arena(uint8_t *data, uint8_t *shadow, size_t n)
{
	sp_memory_unmap(data, n);
	sp_memory_unmap(shadow, n);
}

static inline uint8_t *map_pages(size_t n)
{
	uint8_t *data = mmap(NULL, n * SP_PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(data != MAP_FAILED);
	CHECK(madvise(data, n * SP_PAGE_SIZE, MADV_DONTFORK) == 0);
	return data;
}

/* A store of n slots on tmpfs, all zero. */
static inline int make_store(size_t n)
{
	int store = memfd_create("test-store", MFD_CLOEXEC);

	CHECK(store >= 0);
	CHECK(ftruncate(store, (off_t)(n * SP_PAGE_SIZE)) == 0);
	return store;
}

static inline void write_slot(int store, uint64_t slot, const uint8_t *page)
{
	CHECK(pwrite(store, page, SP_PAGE_SIZE, (off_t)(slot * SP_PAGE_SIZE)) == SP_PAGE_SIZE);
}

#endif
