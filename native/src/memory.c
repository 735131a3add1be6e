#include "memory.h"

#include "kernel.h"
#include "samepage.h"

/* Grown from the page in front of the arena, which was touched to give the mapping its reverse map;
 * mremap() clones that for what it moves. */
static uint8_t *grow_shadow(uint8_t *front, size_t n)
{
	size_t length = (n + 1) * SP_PAGE_SIZE;
	uint8_t *grown;

	*(volatile uint8_t *)front = 1;
	grown = mremap(front, SP_PAGE_SIZE, length, MREMAP_MAYMOVE);
	if (grown == MAP_FAILED)
		return NULL;
	munmap(grown, SP_PAGE_SIZE);
	return grown + SP_PAGE_SIZE;
}

uint8_t *sp_memory_map(size_t n, uint8_t **shadow)
{
	size_t length = (n + 1) * SP_PAGE_SIZE;
	uint8_t *front =
		mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (front == MAP_FAILED)
		return NULL;
	if (madvise(front, length, MADV_DONTFORK) == 0) {
		*shadow = grow_shadow(front, n);
		if (*shadow)
			return front + SP_PAGE_SIZE;
	}
	munmap(front, length);
	return NULL;
}

void sp_memory_unmap(uint8_t *memory, size_t n)
{
	munmap(memory, n * SP_PAGE_SIZE);
}
