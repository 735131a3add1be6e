#include "pagemap.h"

#include "samepage.h"

int sp_pagemap_open(void)
{
	return sys_result(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

int sp_pagemap_read(int pagemap, const void *address, size_t n, uint64_t *entries)
{
	size_t length = n * sizeof(*entries), done = 0;
	off_t at = (off_t)((uintptr_t)address / SP_PAGE_SIZE * sizeof(*entries));

	while (done < length) {
		ssize_t got = pread(pagemap, (uint8_t *)entries + done, length - done,
				    at + (off_t)done);

		if (got < 0)
			return -errno;
		if (got == 0)
			return -EFAULT;
		done += (size_t)got;
	}
	return 0;
}
