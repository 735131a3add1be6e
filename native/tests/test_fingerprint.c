/*
 * Every variant of the fingerprint that this processor can run gives the same, and the right,
 * fingerprints: a host's processes and other hosts may use another one.
 */
#include "check.h"
#include "fingerprint.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#define PAGES 33

static uint8_t pages[PAGES * SP_PAGE_SIZE];

static void fill(void)
{
	uint32_t state = 1;

	for (size_t i = SP_PAGE_SIZE; i < sizeof(pages); i++) { /* the first page stays zero */
		state = state * 1664525 + 1013904223;
		pages[i] = (uint8_t)(state >> 24);
	}
}

static void check_variant(void (*variant)(const void *, size_t, uint64_t, uint8_t *), uint64_t seed)
{
	uint8_t fingerprints[PAGES * SP_FINGERPRINT_SIZE];

	variant(pages, PAGES, seed, fingerprints);
	for (size_t i = 0; i < PAGES; i++) {
		XXH128_canonical_t right;

		XXH128_canonicalFromHash(
			&right, XXH3_128bits_withSeed(pages + i * SP_PAGE_SIZE, SP_PAGE_SIZE, seed));
		CHECK(!memcmp(fingerprints + i * SP_FINGERPRINT_SIZE, right.digest,
			      SP_FINGERPRINT_SIZE));
	}
}

int main(void)
{
	static const uint64_t seeds[] = {0, 1, UINT64_MAX, 0x0123456789abcdef};

	fill();
	for (size_t i = 0; i < sizeof(seeds) / sizeof(*seeds); i++) {
		check_variant(sp_fingerprint_baseline, seeds[i]);
		check_variant(sp_fingerprint, seeds[i]);
#ifdef __x86_64__
		if (__builtin_cpu_supports("avx2"))
			check_variant(sp_fingerprint_avx2, seeds[i]);
		if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
			check_variant(sp_fingerprint_avx512, seeds[i]);
#endif
	}
	return 0;
}
