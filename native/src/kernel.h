/*
 * The kernel interfaces that the library uses, and nothing else: raw calls, and what the
 * distribution's headers do not know yet (Debian 12's end at Linux 6.1).
 *
 * Functions return 0 or a positive result, or -errno.
 */
#ifndef SP_KERNEL_H
#define SP_KERNEL_H

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
#endif
#ifndef UFFDIO_MOVE
struct uffdio_move {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFDIO_MOVE_MODE_DONTWAKE ((uint64_t)1 << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((uint64_t)1 << 1)
#endif
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif
#ifndef UFFDIO_CONTINUE_MODE_WP
#define UFFDIO_CONTINUE_MODE_WP ((uint64_t)1 << 1)
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef PAGEMAP_SCAN
struct pm_scan_arg {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
struct page_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};
#define PAGE_IS_WPALLOWED ((uint64_t)1 << 0)
#define PAGE_IS_WRITTEN ((uint64_t)1 << 1)
#define PAGE_IS_FILE ((uint64_t)1 << 2)
#define PAGE_IS_PRESENT ((uint64_t)1 << 3)
#define PAGE_IS_SWAPPED ((uint64_t)1 << 4)
#define PAGE_IS_PFNZERO ((uint64_t)1 << 5)
#define PM_SCAN_WP_MATCHING ((uint64_t)1 << 0)
#endif
#ifndef PROCMAP_QUERY
struct procmap_query {
	uint64_t size;
	uint64_t query_flags;
	uint64_t query_addr;
	uint64_t vma_start;
	uint64_t vma_end;
	uint64_t vma_flags;
	uint64_t vma_page_size;
	uint64_t vma_offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint32_t vma_name_size;
	uint32_t build_id_size;
	uint64_t vma_name_addr;
	uint64_t build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
#define PROCMAP_QUERY_VMA_READABLE 0x01
#define PROCMAP_QUERY_VMA_WRITABLE 0x02
#define PROCMAP_QUERY_VMA_EXECUTABLE 0x04
#define PROCMAP_QUERY_COVERING_OR_NEXT_VMA 0x10
#endif

/* Bits of a /proc/self/pagemap entry. */
#define PAGEMAP_PRESENT ((uint64_t)1 << 63)
#define PAGEMAP_SWAPPED ((uint64_t)1 << 62)
#define PAGEMAP_FILE ((uint64_t)1 << 61)
#define PAGEMAP_GUARD ((uint64_t)1 << 58)
#define PAGEMAP_UFFD_WP ((uint64_t)1 << 57)
#define PAGEMAP_EXCLUSIVE ((uint64_t)1 << 56)

static inline int sys_result(long result)
{
	return result < 0 ? -errno : (int)result;
}

/* Give pages back, also where the application has locked all memory. */
static inline int memory_drop(void *start, size_t length)
{
	return sys_result(madvise(start, length, MADV_DONTNEED_LOCKED));
}

static inline int uffd_open_syscall(void)
{
	return sys_result(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
}

/* A userfaultfd of this process's own, from an open /dev/userfaultfd. */
static inline int uffd_open_device(int device)
{
	return sys_result(ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK));
}

/* Enables `features`; on return they are all that the kernel has. */
static inline int uffd_api(int uffd, uint64_t *features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = *features};
	int result = sys_result(ioctl(uffd, UFFDIO_API, &api));

	*features = api.features;
	return result;
}

static inline int uffd_register(int uffd, const void *start, size_t length, uint64_t mode)
{
	struct uffdio_register request = {
		.range = {.start = (uintptr_t)start, .len = length}, .mode = mode};

	return sys_result(ioctl(uffd, UFFDIO_REGISTER, &request));
}

static inline int uffd_unregister(int uffd, const void *start, size_t length)
{
	struct uffdio_range range = {.start = (uintptr_t)start, .len = length};

	return sys_result(ioctl(uffd, UFFDIO_UNREGISTER, &range));
}

static inline int uffd_wake(int uffd, const void *start, size_t length)
{
	struct uffdio_range range = {.start = (uintptr_t)start, .len = length};

	return sys_result(ioctl(uffd, UFFDIO_WAKE, &range));
}

/* mode 0 lifts the protection and wakes, UFFDIO_WRITEPROTECT_MODE_WP sets it. */
static inline int uffd_writeprotect(int uffd, const void *start, size_t length, uint64_t mode)
{
	struct uffdio_writeprotect request = {
		.range = {.start = (uintptr_t)start, .len = length}, .mode = mode};

	return sys_result(ioctl(uffd, UFFDIO_WRITEPROTECT, &request));
}

/* Copies without waking; *copied tells how many bytes went over, also on failure. */
static inline int uffd_copy(int uffd, void *to, const void *from, size_t length, size_t *copied)
{
	struct uffdio_copy request = {.dst = (uintptr_t)to,
				      .src = (uintptr_t)from,
				      .len = length,
				      .mode = UFFDIO_COPY_MODE_DONTWAKE};
	int result = sys_result(ioctl(uffd, UFFDIO_COPY, &request));

	*copied = request.copy > 0 ? (size_t)request.copy : 0;
	return result;
}

/* Maps a page of a file that is in memory, protected against writes, and wakes. */
static inline int uffd_continue(int uffd, const void *start, size_t length)
{
	struct uffdio_continue request = {.range = {.start = (uintptr_t)start, .len = length},
					  .mode = UFFDIO_CONTINUE_MODE_WP};

	return sys_result(ioctl(uffd, UFFDIO_CONTINUE, &request));
}

/* Makes every touch of empty pages an error (SIGBUS), and wakes. */
static inline int uffd_poison(int uffd, const void *start, size_t length)
{
	struct uffdio_poison request = {.range = {.start = (uintptr_t)start, .len = length}};

	return sys_result(ioctl(uffd, UFFDIO_POISON, &request));
}

/* Moves pages without waking, holes included; *moved tells how many bytes are through. */
static inline int uffd_move(int uffd, void *to, void *from, size_t length, size_t *moved)
{
	struct uffdio_move request = {.dst = (uintptr_t)to,
				      .src = (uintptr_t)from,
				      .len = length,
				      .mode = UFFDIO_MOVE_MODE_DONTWAKE |
					      UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
	int result = sys_result(ioctl(uffd, UFFDIO_MOVE, &request));

	*moved = request.move > 0 ? (size_t)request.move : 0;
	return result;
}

#endif
