#include "maps.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "kernel.h"
#include "samepage.h"

int sp_maps_open(void)
{
	return sys_result(open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
}

/* The mapping at an address or the next one behind it. -ENOENT: there is none. */
static int query(int maps, const uint8_t *address, struct procmap_query *vma)
{
	*vma = (struct procmap_query){.size = sizeof(*vma),
				      .query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
				      .query_addr = (uintptr_t)address};
	return sys_result(ioctl(maps, PROCMAP_QUERY, vma));
}

static size_t pages_until(const uint8_t *address, uint64_t end, size_t n)
{
	size_t pages = (end - (uintptr_t)address) / SP_PAGE_SIZE;

	return pages < n ? pages : n;
}

static bool is_store(const struct procmap_query *vma, int store)
{
	struct stat file;

	return !fstat(store, &file) && vma->inode == file.st_ino &&
	       makedev(vma->dev_major, vma->dev_minor) == file.st_dev;
}

static int protection_of(const struct procmap_query *vma)
{
	return (vma->vma_flags & PROCMAP_QUERY_VMA_READABLE ? PROT_READ : 0) |
	       (vma->vma_flags & PROCMAP_QUERY_VMA_WRITABLE ? PROT_WRITE : 0) |
	       (vma->vma_flags & PROCMAP_QUERY_VMA_EXECUTABLE ? PROT_EXEC : 0);
}

static bool is_expected(const struct procmap_query *vma, uint64_t at, int store, uint64_t slot)
{
	if (store < 0)
		return vma->inode == 0;
	return is_store(vma, store) && vma->vma_offset + (at - vma->vma_start) == slot * SP_PAGE_SIZE;
}

/* How far there is what is expected: the store's slots from `slot` on, or anonymous memory (store
 * -1). Where the kernel does not say, all is. */
static struct sp_slots look(int maps, const uint8_t *address, size_t n, int store, uint64_t slot)
{
	struct procmap_query vma;
	uint64_t at = (uintptr_t)address;
	int error = query(maps, address, &vma);

	if (error == -ENOENT)
		return (struct sp_slots){.foreign = n};
	if (error)
		return (struct sp_slots){.pages = n, .protection = PROT_READ | PROT_WRITE};
	if (vma.vma_start > at)
		return (struct sp_slots){.foreign = pages_until(address, vma.vma_start, n)};
	if (!is_expected(&vma, at, store, slot))
		return (struct sp_slots){.foreign = pages_until(address, vma.vma_end, n)};
	return (struct sp_slots){.pages = pages_until(address, vma.vma_end, n),
				 .protection = protection_of(&vma)};
}

struct sp_slots sp_maps_slots(int maps, const uint8_t *address, size_t n, int store, uint64_t slot)
{
	return look(maps, address, n, store, slot);
}

struct sp_slots sp_maps_anonymous(int maps, const uint8_t *address, size_t n)
{
	return look(maps, address, n, -1, 0);
}

size_t sp_maps_readable(int maps, const uint8_t *address, size_t n)
{
	struct procmap_query vma;
	int error = query(maps, address, &vma);

	if (error)
		return error == -ENOENT ? 0 : n;
	if (vma.vma_start > (uintptr_t)address || !(vma.vma_flags & PROCMAP_QUERY_VMA_READABLE))
		return 0;
	return pages_until(address, vma.vma_end, n);
}
