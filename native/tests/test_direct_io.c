/*
 * O_DIRECT reads land in pages that are replaced and restored all the time: every read's bytes
 * arrive, pages under a read in flight are refused as pinned, and merge when it is over.
 *
 * This is the race that replace_page() was about in 2008: a device writes by physical address, so
 * a page that is compared and shared under it would change for everybody.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>

#include "racing.h"

#define PAGES 256
#define BYTES (PAGES * SP_PAGE_SIZE)
#define READS 60
#define MOST_READS 20000 /* a read in flight is met by chance */
#define RUN 32

static uint64_t slot_of[PAGES];
static struct racing racing = {.slot_of = slot_of};
static int file;
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

		CHECK(pread(file, racing.data, BYTES, (off_t)(which * BYTES)) == BYTES);
		CHECK(memcmp(racing.data, images + which * BYTES, BYTES) == 0);
	}
	return NULL;
}

/* Slots 1 to PAGES hold one image, the next PAGES the other. */
static size_t replace_run(size_t first, size_t which)
{
	uint8_t outcomes[RUN];
	uint64_t slot = 1 + which * PAGES + first;
	size_t merged;

	if (!racing_is_private(&racing, first, RUN))
		return 0;
	merged = racing_replace(&racing, first, RUN, slot, outcomes);
	for (size_t i = 0; i < RUN; i++) {
		CHECK(outcomes[i] != WIRE_UNSUPPORTED && outcomes[i] != WIRE_NO_MAPPING);
		atomic_fetch_add(&pinned, outcomes[i] == WIRE_PINNED);
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

int main(void)
{
	size_t merged = 0, after = 0;
	uint8_t *images = map_pages(2 * PAGES);
	pthread_t reader;

	fill_image(images, 0);
	fill_image(images + BYTES, 1);
	file = make_file(images);
	racing.store = make_store(2 * PAGES + 1);
	CHECK(pwrite(racing.store, images, 2 * BYTES, SP_PAGE_SIZE) == 2 * BYTES);
	racing_start(&racing, PAGES);
	srandom(5);
	CHECK(pthread_create(&reader, NULL, read_on, images) == 0);
	while ((reads < READS || !pinned || !merged) && reads < MOST_READS) {
		merged += replace_run((size_t)random() % (PAGES / RUN) * RUN, (size_t)random() % 2);
		racing_serve(&racing);
	}
	atomic_store(&stop, true);
	racing_join(&racing, reader);
	printf("%zu reads, %zu pages refused as pinned, %zu replaced meanwhile\n", (size_t)reads,
	       (size_t)pinned, merged);
	CHECK(pinned > 0 && merged > 0);

	CHECK(memcmp(racing.data, images + (reads - 1) % 2 * BYTES, BYTES) == 0);
	for (size_t first = 0; first < PAGES; first += RUN)
		after += replace_run(first, (reads - 1) % 2);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(slot_of[i] != 0);
	CHECK(memcmp(racing.data, images + (reads - 1) % 2 * BYTES, BYTES) == 0);
	racing_stop(&racing);
	return after > 0 ? 0 : 1;
}
