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

/* A userfaultfd with all that the pager needs, or the test is skipped. */
static inline int open_uffd_or_skip(void)
{
	uint32_t features;
	int uffd = sp_probe_open(-1, &features);

	if (uffd < 0)
		skip("this kernel, or this user, has no userfaultfd");
	if ((features & SP_FEATURES_NEEDED) != SP_FEATURES_NEEDED)
		skip("this kernel lacks UFFDIO_MOVE or write-protect faults on tmpfs");
	return uffd;
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
