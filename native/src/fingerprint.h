/*
 * XXH3-128 of pages. fingerprint.c is compiled once for every processor and with AVX2 and AVX-512;
 * sp_fingerprint() takes what the processor has.
 */
#ifndef SP_FINGERPRINT_H
#define SP_FINGERPRINT_H

#include <stddef.h>
#include <stdint.h>

void sp_fingerprint_baseline(const void *data, size_t pages, uint64_t seed, uint8_t *fingerprints);
void sp_fingerprint_avx2(const void *data, size_t pages, uint64_t seed, uint8_t *fingerprints);
void sp_fingerprint_avx512(const void *data, size_t pages, uint64_t seed, uint8_t *fingerprints);

#endif
