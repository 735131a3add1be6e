#include "fingerprint.h"

#include "samepage.h"

void sp_fingerprint(const void *data, size_t pages, uint64_t seed, uint8_t *fingerprints)
{
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
		sp_fingerprint_avx512(data, pages, seed, fingerprints);
		return;
	}
	if (__builtin_cpu_supports("avx2")) {
		sp_fingerprint_avx2(data, pages, seed, fingerprints);
		return;
	}
#endif
	sp_fingerprint_baseline(data, pages, seed, fingerprints);
}
