/*
 * Pager: pages whose bytes are not on this host, from going away to coming back.
 *
 * They are registered with the userfaultfd of the store's mappings, for missing faults. That
 * one tells of what the application does to them: a registration of the other one would be lost
 * with mremap(), and who then touched the page would read zeros.
 */
#include <string.h>

#include "kernel.h"
#include "pagemap.h"
#include "pager.h"
#include "wire.h"

/* Nothing is protected among them, unless they are frozen. */
#define EXPECTED (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)

static size_t bytes_of(size_t pages)
{
	return pages * SP_PAGE_SIZE;
}

int sp_pager_expect(struct sp_pager *pager, uint8_t *address, size_t n)
{
	int error;

	uffd_unregister(pager->uffds.memory, address, bytes_of(n));
	error = uffd_register(pager->uffds.store, address, bytes_of(n), EXPECTED);
	if (error) {
		uffd_unregister(pager->uffds.store, address, bytes_of(n));
		sp_pager_follow(pager, address, n);
	}
	return error;
}

void sp_pager_end_away(struct sp_pager *pager, uint8_t *address, size_t n)
{
	uffd_unregister(pager->uffds.store, address, bytes_of(n));
	sp_pager_follow(pager, address, n);
}

bool sp_pager_is_expected(struct sp_pager *pager, uint8_t *address, size_t n)
{
	struct uffdio_continue nothing = {
		.range = {.start = (uintptr_t)address, .len = bytes_of(n)}};
	int error;

	/* what is registered is asked first, and only then whether there is a file to go on with */
	while ((error = sys_result(ioctl(pager->uffds.store, UFFDIO_CONTINUE, &nothing))) == -EAGAIN)
		sp_pager_back_off();
	return error == -EINVAL;
}

/* Have the shadow's pages trap, and hold nothing: mlockall() may have filled them. */
static int prepare_shadow(struct sp_pager *pager, uint8_t *shadow, size_t n)
{
	int error;

	uffd_unregister(pager->uffds.memory, shadow, bytes_of(n));
	error = uffd_register(pager->uffds.store, shadow, bytes_of(n), EXPECTED);
	for (size_t i = 0, some; i < n && !error; i += some) {
		some = n - i < SP_TAKE_PAGES ? n - i : SP_TAKE_PAGES;
		error = sp_pagemap_read(pager->pagemap, shadow + bytes_of(i), some,
					pager->page_states);
		for (size_t k = 0; k < some && !error; k++)
			if (sp_pagemap_has_page(pager->page_states[k]))
				error = sp_pager_drop(pager, shadow + bytes_of(i + k), 1);
	}
	return error;
}

static void release_shadow(struct sp_pager *pager, uint8_t *shadow, size_t n)
{
	uffd_unregister(pager->uffds.store, shadow, bytes_of(n));
	uffd_register(pager->uffds.memory, shadow, bytes_of(n), UFFDIO_REGISTER_MODE_MISSING);
}

int sp_pager_let_go(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n)
{
	int error = sp_pager_may_map() ? 0 : -ENOMEM;

	if (error)
		return error;
	error = prepare_shadow(pager, shadow, n);
	if (!error)
		error = sp_pager_remap(pager, shadow, n, MREMAP_DONTUNMAP, address);
	release_shadow(pager, shadow, n);
	return error;
}

int sp_pager_ruin(struct sp_pager *pager, uint8_t *data, uint8_t *shadow, size_t n)
{
	int error = sp_pager_may_map() ? 0 : -ENOMEM;

	if (error)
		return error;
	error = prepare_shadow(pager, shadow, n);
	for (size_t i = 0, some; i < n && !error; i += some) {
		some = n - i < SP_TAKE_PAGES ? n - i : SP_TAKE_PAGES;
		error = sp_pager_poison(pager, shadow + bytes_of(i), some);
	}
	if (!error)
		error = sp_pager_remap(pager, shadow, n, MREMAP_DONTUNMAP, data);
	release_shadow(pager, shadow, n);
	if (error) /* the errors that were made there */
		memory_drop(shadow, bytes_of(n));
	return error;
}

void sp_pager_evict(struct sp_pager *pager, uint8_t *address, uint8_t *shadow, size_t n,
		    const uint8_t *bytes, uint8_t *outcomes)
{
	int error = sp_pager_take(pager, address, n, outcomes);
	size_t end;

	if (error) {
		memset(outcomes, sp_pager_failure(error), n);
		return;
	}
	for (size_t i = 0; i < n; i++)
		if (outcomes[i] == WIRE_MERGED &&
		    memcmp(pager->staging + bytes_of(i), bytes + bytes_of(i), SP_PAGE_SIZE) != 0)
			outcomes[i] = WIRE_DIFFERS;
	for (size_t i = 0; i < n; i = end) {
		for (end = i + 1; end < n && outcomes[end] == outcomes[i];)
			end++;
		if (outcomes[i] == WIRE_MERGED && sp_pager_let_go(pager, address + bytes_of(i),
								  shadow + bytes_of(i), end - i))
			memset(outcomes + i, WIRE_NO_MAPPING, end - i);
	}
	sp_pager_finish(pager, address, n, outcomes, true);
}

int sp_pager_bring(struct sp_pager *pager, uint8_t *address, const uint8_t *bytes)
{
	size_t copied;
	int error;

	while ((error = uffd_copy(pager->uffds.store, address, bytes, SP_PAGE_SIZE, &copied)) ==
	       -EAGAIN)
		sp_pager_back_off();
	return error;
}

int sp_pager_poison(struct sp_pager *pager, uint8_t *address, size_t n)
{
	int error;

	while ((error = uffd_poison(pager->uffds.store, address, bytes_of(n))) == -EAGAIN)
		sp_pager_back_off();
	return error;
}
