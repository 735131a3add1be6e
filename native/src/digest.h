/*
 * Keyed BLAKE3 of pages. digest.c is compiled once for every processor and with AVX2; sp_digest()
 * takes what the processor has.
 */
#ifndef SP_DIGEST_H
#define SP_DIGEST_H

#include <stddef.h>
#include <stdint.h>

void sp_digest_baseline(const void *data, size_t pages, const uint8_t *key, uint8_t *digests);
void sp_digest_avx2(const void *data, size_t pages, const uint8_t *key, uint8_t *digests);

#endif
