#include "pager.h"

#include <stdbool.h>
#include <string.h>
#include <time.h>

#include "kernel.h"
#include "maps.h"
#include "pagemap.h"
#include "wire.h"

#define BUSY_TRIES 8

static const uint8_t zero_page[SP_PAGE_SIZE];

static size_t bytes_of(size_t pages)
{
	return pages * SP_PAGE_SIZE;
}

void sp_pager_back_off(void)
{
	struct timespec pause = {.tv_nsec = 20000};

	clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
}

static void *map_anonymous(size_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	madvise(memory, length, MADV_DONTFORK);
	return memory;
}

int sp_pager_init(struct sp_pager *pager, struct sp_uffds uffds, uint32_t features)
{
	size_t length = bytes_of(SP_TAKE_PAGES);
	int error = -ENOMEM;

	*pager = (struct sp_pager){.uffds = uffds,
				   .tracks = features & SP_FEATURE_TRACKING,
				   .can_away = features & SP_FEATURE_AWAY,
				   .discards = features & SP_FEATURE_DISCARD,
				   .pagemap = sp_pagemap_open(),
				   .maps = sp_maps_open()};
	sp_pager_claim(pager);
	pager->staging = map_anonymous(length);
	pager->bounce = map_anonymous(length);
	pager->page_states = map_anonymous(SP_TAKE_PAGES * sizeof(uint64_t));
	if (pager->pagemap < 0)
		error = pager->pagemap;
	else if (pager->maps < 0)
		error = pager->maps;
	else if (pager->staging && pager->bounce && pager->page_states)
		error = uffds.memory < 0 ? 0 : uffd_register(uffds.memory, pager->staging, length,
				      UFFDIO_REGISTER_MODE_MISSING);
	if (error)
		sp_pager_destroy(pager);
	return error;
}

static void unmap(void *memory, size_t length)
{
	if (memory)
		munmap(memory, length);
}

void sp_pager_destroy(struct sp_pager *pager)
{
	unmap(pager->staging, bytes_of(SP_TAKE_PAGES));
	unmap(pager->bounce, bytes_of(SP_TAKE_PAGES));
	unmap(pager->page_states, SP_TAKE_PAGES * sizeof(uint64_t));
	if (pager->pagemap >= 0)
		close(pager->pagemap);
	if (pager->maps >= 0)
		close(pager->maps);
	sp_uffds_close(&pager->uffds);
	*pager = SP_PAGER_NONE;
}

void sp_pager_claim(struct sp_pager *pager)
{
	atomic_store(&pager->thread, (int)gettid());
}

int sp_pager_adopt(struct sp_pager *pager, uint8_t *data, uint8_t *shadow, size_t n, bool *tracked)
{
	*tracked = pager->tracks && !uffd_register(pager->uffds.memory, data, bytes_of(n),
						   UFFDIO_REGISTER_MODE_WP);
	/* not as the arena is: what mremap() moves would join it at once, and the kernel, which takes
	 * the registration of what was moved away, would take all of the arena's */
	return uffd_register(pager->uffds.memory, shadow, bytes_of(n),
			     UFFDIO_REGISTER_MODE_MISSING);
}

/* Registering alone never takes a mode away, so missing faults end by unregistering. */
void sp_pager_end_missing(struct sp_pager *pager, uint8_t *address, size_t n)
{
	if (!sp_pager_is_frozen(pager, address))
		uffd_unregister(pager->uffds.memory, address, bytes_of(n));
	sp_pager_follow(pager, address, n);
}

void sp_pager_follow(struct sp_pager *pager, uint8_t *address, size_t n)
{
	if (sp_pager_is_frozen(pager, address))
		sp_pager_hold(pager, address, n);
	else if (pager->tracks)
		uffd_register(pager->uffds.memory, address, bytes_of(n), UFFDIO_REGISTER_MODE_WP);
}

/* The userfaultfd that private memory at an address is registered with. */
static int uffd_of(const struct sp_pager *pager, const uint8_t *address)
{
	return sp_pager_is_frozen(pager, address) ? pager->uffds.store : pager->uffds.memory;
}

int sp_pager_remap(struct sp_pager *pager, uint8_t *from, size_t n, int flags, uint8_t *to)
{
	void *moved;
	int error;

	atomic_store(&pager->moved_from, (uintptr_t)from);
	atomic_store(&pager->moved_to, (uintptr_t)to);
	atomic_store(&pager->moving, true);
	moved = mremap(from, bytes_of(n), bytes_of(n), MREMAP_MAYMOVE | MREMAP_FIXED | flags, to);
	error = moved == MAP_FAILED ? -errno : 0;
	atomic_store(&pager->moving, false);
	return error;
}

int sp_pager_drop(struct sp_pager *pager, uint8_t *address, size_t n)
{
	int error;

	atomic_store(&pager->moving, true);
	error = memory_drop(address, bytes_of(n));
	atomic_store(&pager->moving, false);
	return error;
}

void sp_pager_wake(struct sp_pager *pager, const uint8_t *address, size_t n)
{
	uffd_wake(pager->uffds.memory, address, bytes_of(n));
	uffd_wake(pager->uffds.store, address, bytes_of(n));
}

/* What becomes of a page that did not move, from the errno of a single-page attempt. */
static uint8_t refusal(int error)
{
	switch (error) {
	case -EBUSY:
		return WIRE_PINNED;
	case -EAGAIN:
	case -ENOMEM:
		return WIRE_BUSY;
	default:
		return WIRE_UNSUPPORTED;
	}
}

/* A failing stretch is narrowed to its first page, which is then given up and marked: an error other
 * than EBUSY and EAGAIN can mean just that the stretch crosses mappings. */
void sp_pager_move_out(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *staged,
		       uint8_t *outcomes)
{
	size_t done = 0, length = n, moved;
	bool cleared = false;
	int tries = 0, error;

	while (done < n) {
		if (length > n - done)
			length = n - done;
		error = uffd_move(pager->uffds.memory, staged + bytes_of(done),
				  address + bytes_of(done), bytes_of(length), &moved);
		moved /= SP_PAGE_SIZE;
		memset(outcomes + done, WIRE_MERGED, moved);
		done += moved;
		if (!error || moved) {
			length = error ? 1 : n - done;
			tries = 0;
		} else if (error == -EEXIST && !cleared) { /* mlockall() has filled it */
			memory_drop(staged + bytes_of(done), bytes_of(n - done));
			cleared = true;
		} else if (length > 1) {
			length = error == -EBUSY ? 1 : length / 2;
		} else if (error == -EAGAIN && ++tries < BUSY_TRIES) {
			sp_pager_back_off();
		} else {
			outcomes[done++] = refusal(error);
			length = n - done;
			tries = 0;
		}
	}
}

int sp_pager_register_missing(struct sp_pager *pager, uint8_t *address, size_t n)
{
	bool protects = pager->tracks || sp_pager_is_frozen(pager, address);
	uint64_t mode = UFFDIO_REGISTER_MODE_MISSING | (protects ? UFFDIO_REGISTER_MODE_WP : 0);

	return uffd_register(uffd_of(pager, address), address, bytes_of(n), mode);
}

int sp_pager_find_holes(struct sp_pager *pager, size_t n, uint8_t *outcomes)
{
	int error = sp_pagemap_read(pager->pagemap, pager->staging, n, pager->page_states);

	for (size_t i = 0; i < n && !error; i++)
		if (outcomes[i] == WIRE_MERGED && !sp_pagemap_has_page(pager->page_states[i]))
			outcomes[i] = WIRE_ABSENT;
	return error;
}

int sp_pager_take(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	int error = sp_pager_register_missing(pager, address, n);

	if (error)
		return error;
	sp_pager_move_out(pager, address, n, pager->staging, outcomes);
	error = sp_pager_find_holes(pager, n, outcomes);
	if (error) { /* nothing may be read there */
		sp_pager_put_back(pager, address, 0, n);
		sp_pager_end_missing(pager, address, n);
		sp_pager_wake(pager, address, n);
	}
	return error;
}

/* The application changed the address's protection or lock under a take, so that the page itself
 * can't go back: its bytes can. 1: done, or there is nothing (any more) to put where; 0: again. */
static size_t copy_back(struct sp_pager *pager, uint8_t *address, const uint8_t *page)
{
	uint64_t state;
	size_t copied;

	if (sp_pagemap_read(pager->pagemap, page, 1, &state) || !sp_pagemap_has_page(state))
		return 1;
	return uffd_copy(uffd_of(pager, address), address, page, SP_PAGE_SIZE, &copied) != -EAGAIN;
}

void sp_pager_put_back(struct sp_pager *pager, uint8_t *address, size_t first, size_t n)
{
	size_t done = 0, length = n, moved;
	int uffd = uffd_of(pager, address + bytes_of(first)), error;

	while (done < n) {
		size_t at = bytes_of(first + done);

		if (length > n - done)
			length = n - done;
		error = uffd_move(uffd, address + at, pager->staging + at, bytes_of(length), &moved);
		done += moved / SP_PAGE_SIZE;
		if (!error || moved)
			length = n - done;
		else if (length > 1)
			length /= 2;
		else if (error == -ENOENT || error == -EINVAL || error == -EEXIST)
			done += copy_back(pager, address + at, pager->staging + at);
		else
			sp_pager_back_off();
	}
}

uint8_t sp_pager_failure(int error)
{
	return error == -ENOMEM ? WIRE_NO_MAPPING : error == -EAGAIN ? WIRE_BUSY : WIRE_UNSUPPORTED;
}

size_t sp_pager_stretch(const uint8_t *outcomes, size_t first, size_t n)
{
	size_t end = first + 1;

	while (end < n && outcomes[end] == outcomes[first])
		end++;
	return end;
}

void sp_pager_end_take(struct sp_pager *pager, uint8_t *base, size_t first, size_t end,
		       const uint8_t *outcomes, bool mapped)
{
	size_t next, private_from = first;

	for (size_t i = first; i < end; i = next) {
		next = sp_pager_stretch(outcomes, i, end);
		if (outcomes[i] == WIRE_DIFFERS || outcomes[i] == WIRE_NO_MAPPING)
			sp_pager_put_back(pager, base, i, next - i);
		if (outcomes[i] != WIRE_MERGED || !mapped)
			continue;
		/* what mremap() put there is registered for writes, and must stay so */
		if (i > private_from)
			sp_pager_end_missing(pager, base + bytes_of(private_from), i - private_from);
		private_from = next;
	}
	if (end > private_from)
		sp_pager_end_missing(pager, base + bytes_of(private_from), end - private_from);
}

void sp_pager_finish(struct sp_pager *pager, uint8_t *address, size_t n, const uint8_t *outcomes,
		     bool mapped)
{
	sp_pager_end_take(pager, address, 0, n, outcomes, mapped);
	memory_drop(pager->staging, bytes_of(n));
	sp_pager_wake(pager, address, n);
}

bool sp_pager_is_pinned(struct sp_pager *pager, uint8_t *address, size_t n)
{
	uint8_t outcomes[SP_TAKE_PAGES];
	bool pinned = false;

	if (sp_pager_take(pager, address, n, outcomes))
		return false;
	for (size_t i = 0; i < n; i++) {
		pinned = pinned || outcomes[i] == WIRE_PINNED;
		if (outcomes[i] == WIRE_MERGED)
			outcomes[i] = WIRE_DIFFERS; /* goes back */
	}
	sp_pager_finish(pager, address, n, outcomes, false);
	return pinned;
}

void sp_pager_drop_zero(struct sp_pager *pager, uint8_t *address, size_t n, uint8_t *outcomes)
{
	int error = sp_pager_take(pager, address, n, outcomes);

	if (error) {
		memset(outcomes, sp_pager_failure(error), n);
		return;
	}
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED &&
		    memcmp(pager->staging + bytes_of(i), zero_page, SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
	sp_pager_finish(pager, address, n, outcomes, false);
}

int sp_pager_fill(struct sp_pager *pager, uint8_t *address, const uint8_t *bytes, size_t n)
{
	size_t done = 0, length = bytes_of(n), copied;
	int error = 0;

	while (done < length) {
		error = uffd_copy(pager->uffds.memory, address + done, bytes + done, length - done, &copied);
		done += copied;
		if (!error || copied)
			continue;
		if (error == -EEXIST)
			done += SP_PAGE_SIZE;
		else if (error == -EAGAIN)
			sp_pager_back_off();
		else
			break;
	}
	sp_pager_wake(pager, address, n);
	return done < length ? error : 0;
}
