#include "digest.h"

#include <string.h>

#include "samepage.h"

static int is_zero(const uint8_t *page)
{
	return page[0] == 0 && !memcmp(page, page + 1, SP_PAGE_SIZE - 1);
}

void sp_digest(const void *data, size_t pages, const uint8_t *key, uint8_t *digests)
{
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx2"))
		sp_digest_avx2(data, pages, key, digests);
	else
#endif
		sp_digest_baseline(data, pages, key, digests);
	for (size_t i = 0; i < pages; i++)
		if (is_zero((const uint8_t *)data + i * SP_PAGE_SIZE))
			memset(digests + i * SP_DIGEST_SIZE, 0, SP_DIGEST_SIZE);
}
