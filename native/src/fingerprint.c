/* Compiled with -DVARIANT=baseline and, on x86-64, once more for each wider instruction set. */
#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include "fingerprint.h"

#include <string.h>
#include <xxhash.h>

#include "samepage.h"

#define JOIN(a, b) a##b
#define NAME(variant) JOIN(sp_fingerprint_, variant)

void NAME(VARIANT)(const void *data, size_t pages, uint64_t seed, uint8_t *fingerprints)
{
	uint8_t secret[XXH_SECRET_DEFAULT_SIZE];

	/* the same as XXH3_128bits_withSeed, which would derive this secret for every page */
	XXH3_generateSecret_fromSeed(secret, seed);
	for (size_t i = 0; i < pages; i++) {
		XXH128_hash_t hash = XXH3_128bits_withSecretandSeed(
			(const uint8_t *)data + i * SP_PAGE_SIZE, SP_PAGE_SIZE, secret,
			sizeof(secret), seed);
		XXH128_canonical_t canonical;

		XXH128_canonicalFromHash(&canonical, hash);
		memcpy(fingerprints + i * SP_FINGERPRINT_SIZE, canonical.digest,
		       SP_FINGERPRINT_SIZE);
	}
}
