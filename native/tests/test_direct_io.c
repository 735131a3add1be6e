/*
 * O_DIRECT reads land in pages that are replaced and restored all the time: every read's bytes
 * arrive, pages under a read in flight are refused as pinned, and merge when it is over.
 *
 * This is the race that replace_page() was about in 2008: a device writes by physical address, so
 * a page that is compared and shared under it would change for everybody.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"
#include "faults.h"
#include "mailbox.h"

#define PAGES 256
#define BYTES (PAGES * SP_PAGE_SIZE)
#define READS 60
#define MOST_READS 20000 /* a read in flight is met by chance */
#define RUN 32

static struct sp_mailbox mailbox;
static struct sp_faults faults;
static struct sp_pager pager;
static uint8_t *data;
static uint64_t slot_of[PAGES]; /* 0: private */
static int store, file;
static atomic_bool stop;
static atomic_size_t reads, pinned;

/* The file holds two images, one after the other; a read brings one of them. */
static void fill_image(uint8_t *image, int which)
{
	for (size_t i = 0; i < PAGES; i++) {
		memset(image + i * SP_PAGE_SIZE, which ? 0xA5 : 0x5A, SP_PAGE_SIZE);
		image[i * SP_PAGE_SIZE] = (uint8_t)i;
	}
}

static void *read_on(void *argument)
{
	uint8_t *images = argument;

	while (!atomic_load(&stop)) {
		size_t which = atomic_fetch_add(&reads, 1) % 2;

		CHECK(pread(file, data, BYTES, (off_t)(which * BYTES)) == BYTES);
		CHECK(memcmp(data, images + which * BYTES, BYTES) == 0);
	}
	return NULL;
}

static void serve_faults(void)
{
	struct sp_fault fault;
	bool overflow;

	while (sp_faults_next(&faults, &fault, &overflow)) {
		size_t page = (fault.address - (uintptr_t)data) / SP_PAGE_SIZE;
		uint8_t *address = data + page * SP_PAGE_SIZE;

		if (slot_of[page] && !fault.missing) {
			CHECK(sp_pager_restore(&pager, address, 1, store, slot_of[page]) == 0);
			slot_of[page] = 0;
		} else {
			sp_pager_wake(&pager, address, 1);
		}
	}
}

/* Slots 1 to PAGES hold one image, the next PAGES the other. */
static size_t replace_run(size_t first, size_t which)
{
	uint8_t outcomes[RUN];
	uint64_t slot = 1 + which * PAGES + first;
	size_t merged = 0;

	for (size_t i = 0; i < RUN; i++)
		if (slot_of[first + i])
			return 0;
	sp_pager_replace(&pager, data + first * SP_PAGE_SIZE, RUN, store, slot, outcomes);
	for (size_t i = 0; i < RUN; i++) {
		CHECK(outcomes[i] != WIRE_UNSUPPORTED && outcomes[i] != WIRE_NO_MAPPING);
		atomic_fetch_add(&pinned, outcomes[i] == WIRE_PINNED);
		if (outcomes[i] != WIRE_MERGED)
			continue;
		slot_of[first + i] = slot + i;
		merged++;
	}
	return merged;
}

static int make_file(const uint8_t *images)
{
	char path[] = "direct-io-XXXXXX";
	int fd = mkostemp(path, O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(write(fd, images, 2 * BYTES) == 2 * BYTES && fsync(fd) == 0);
	close(fd);
	fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	CHECK(unlink(path) == 0);
	if (fd < 0)
		skip("the file system of this directory has no O_DIRECT");
	return fd;
}

static void join_serving(pthread_t thread)
{
	struct timespec soon;

	do {
		serve_faults();
		clock_gettime(CLOCK_REALTIME, &soon);
		soon.tv_nsec += 1000000;
		soon.tv_sec += soon.tv_nsec / 1000000000;
		soon.tv_nsec %= 1000000000;
	} while (pthread_timedjoin_np(thread, NULL, &soon));
}

int main(void)
{
	size_t merged = 0, after = 0;
	uint8_t *images = map_pages(2 * PAGES);
	pthread_t reader;
	int uffd = open_uffd_or_skip();

	fill_image(images, 0);
	fill_image(images + BYTES, 1);
	file = make_file(images);
	store = make_store(2 * PAGES + 1);
	CHECK(pwrite(store, images, 2 * BYTES, SP_PAGE_SIZE) == 2 * BYTES);
	data = map_pages(PAGES);
	CHECK(sp_mailbox_init(&mailbox) == 0);
	CHECK(sp_faults_start(&faults, uffd, &mailbox) == 0);
	CHECK(sp_pager_init(&pager, uffd) == 0);
	srandom(5);
	CHECK(pthread_create(&reader, NULL, read_on, images) == 0);
	while ((reads < READS || !pinned || !merged) && reads < MOST_READS) {
		merged += replace_run((size_t)random() % (PAGES / RUN) * RUN, (size_t)random() % 2);
		serve_faults();
	}
	atomic_store(&stop, true);
	join_serving(reader);
	printf("%zu reads, %zu pages refused as pinned, %zu replaced meanwhile\n", (size_t)reads,
	       (size_t)pinned, merged);
	CHECK(pinned > 0 && merged > 0);

	CHECK(memcmp(data, images + (reads - 1) % 2 * BYTES, BYTES) == 0);
	for (size_t first = 0; first < PAGES; first += RUN)
		after += replace_run(first, (reads - 1) % 2);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(slot_of[i] != 0);
	CHECK(memcmp(data, images + (reads - 1) % 2 * BYTES, BYTES) == 0);
	sp_faults_stop(&faults);
	sp_pager_destroy(&pager);
	return after > 0 ? 0 : 1;
}
