/*
 * BLAKE3 of pages, keyed, several side by side: LANES of them go through the same steps, each word
 * of a state being a vector that has this word of every page. A page is a tree of four chunks; the
 * libraries that there are hash the chunks of one page side by side, which leaves half of a wide
 * processor idle, and cost a call a page (docs/decisions/0006-digests.md).
 *
 * Compiled with -DVARIANT=baseline and, on x86-64, once more with AVX2.
 */
#include "digest.h"

#include <string.h>

#include "samepage.h"

#define JOIN(a, b) a##b
#define NAME(variant) JOIN(sp_digest_, variant)

#ifdef __AVX2__
#define LANES 8
#else
#define LANES 4
#endif

#define BLOCK 64
#define CHUNK 1024
#define WORDS (BLOCK / 4)

_Static_assert(SP_PAGE_SIZE == 4 * CHUNK, "a page is a tree of four chunks");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they are");

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED = 16 };

/* One word of each of LANES pages. */
typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));

static const uint32_t iv[4] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a};

static inline lanes all(uint32_t word)
{
	return (lanes){0} + word;
}

static inline lanes rotate(lanes word, int bits)
{
#ifdef __AVX2__
	static const bytes by_2 = {2,  3,  0,  1,  6,  7,  4,  5,  10, 11, 8,  9,  14, 15, 12, 13,
				   18, 19, 16, 17, 22, 23, 20, 21, 26, 27, 24, 25, 30, 31, 28, 29};
	static const bytes by_1 = {1,  2,  3,  0,  5,  6,  7,  4,  9,  10, 11, 8,  13, 14, 15, 12,
				   17, 18, 19, 16, 21, 22, 23, 20, 25, 26, 27, 24, 29, 30, 31, 28};

	/* one instruction, where shifting takes three */
	if (bits == 16)
		return (lanes)__builtin_shuffle((bytes)word, by_2);
	if (bits == 8)
		return (lanes)__builtin_shuffle((bytes)word, by_1);
#endif
	return word >> bits | word << (32 - bits);
}

#define MIX(a, b, c, d, x, y)                                                                      \
	do {                                                                                       \
		a += b + x, d = rotate(d ^ a, 16);                                                 \
		c += d, b = rotate(b ^ c, 12);                                                     \
		a += b + y, d = rotate(d ^ a, 8);                                                  \
		c += d, b = rotate(b ^ c, 7);                                                      \
	} while (0)

/* A round, and in which order it takes the message's words. */
#define ROUND(s, m, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7)                \
	do {                                                                                       \
		MIX(s[0], s[4], s[8], s[12], m[a0], m[a1]);                                        \
		MIX(s[1], s[5], s[9], s[13], m[a2], m[a3]);                                        \
		MIX(s[2], s[6], s[10], s[14], m[a4], m[a5]);                                       \
		MIX(s[3], s[7], s[11], s[15], m[a6], m[a7]);                                       \
		MIX(s[0], s[5], s[10], s[15], m[b0], m[b1]);                                       \
		MIX(s[1], s[6], s[11], s[12], m[b2], m[b3]);                                       \
		MIX(s[2], s[7], s[8], s[13], m[b4], m[b5]);                                        \
		MIX(s[3], s[4], s[9], s[14], m[b6], m[b7]);                                        \
	} while (0)

/* Take a block of each page into its chaining value. */
static inline void compress(lanes chain[8], const lanes m[WORDS], uint32_t counter, uint32_t flags)
{
	lanes s[16];

	for (int i = 0; i < 8; i++)
		s[i] = chain[i];
	for (int i = 0; i < 4; i++)
		s[8 + i] = all(iv[i]);
	s[12] = all(counter);
	s[13] = all(0);
	s[14] = all(BLOCK);
	s[15] = all(flags);
	ROUND(s, m, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
	ROUND(s, m, 2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
	ROUND(s, m, 3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
	ROUND(s, m, 10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
	ROUND(s, m, 12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
	ROUND(s, m, 9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
	ROUND(s, m, 11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);
	for (int i = 0; i < 8; i++)
		chain[i] = s[i] ^ s[i + 8];
}

/* Let the rows be columns: each step interleaves the halves, and after as many as the size has
 * bits every word is where it belongs. */
static inline void transpose(lanes rows[LANES])
{
	lanes mixed[LANES];

	for (int size = 1; size < LANES; size *= 2) {
		for (int i = 0; i < LANES / 2; i++) {
			lanes a = rows[i], b = rows[i + LANES / 2];
#if LANES == 8
			mixed[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
			mixed[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
			mixed[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
			mixed[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
		}
		memcpy(rows, mixed, sizeof(mixed));
	}
}

/* Read a block of each page, word by word. */
static inline void load(const uint8_t *const pages[LANES], size_t offset, lanes m[WORDS])
{
	for (int first = 0; first < WORDS; first += LANES) {
		for (int i = 0; i < LANES; i++)
			memcpy(&m[first + i], pages[i] + offset + 4 * first, sizeof(lanes));
		transpose(m + first);
	}
}

/* Set the chaining value that everything begins with. */
static inline void begin(lanes chain[8], const uint32_t key[8])
{
	for (int i = 0; i < 8; i++)
		chain[i] = all(key[i]);
}

/* Join two nodes of each page's tree; the result takes the first one's place. */
static void join(lanes left[8], const lanes right[8], const uint32_t key[8], uint32_t flags)
{
	lanes m[WORDS];

	memcpy(m, left, 8 * sizeof(lanes));
	memcpy(m + 8, right, 8 * sizeof(lanes));
	begin(left, key);
	compress(left, m, 0, KEYED | PARENT | flags);
}

/* Make the chaining value of one chunk of each page. */
static void hash_chunk(const uint8_t *const pages[LANES], uint32_t chunk, const uint32_t key[8],
		       lanes chain[8])
{
	lanes m[WORDS];

	begin(chain, key);
	for (uint32_t at = 0; at < CHUNK; at += BLOCK) {
		uint32_t flags = (at == 0 ? CHUNK_START : 0) |
				 (at == CHUNK - BLOCK ? CHUNK_END : 0);

		load(pages, chunk * CHUNK + at, m);
		compress(chain, m, chunk, KEYED | flags);
	}
}

void NAME(VARIANT)(const void *data, size_t pages, const uint8_t *key, uint8_t *digests)
{
	uint32_t words[8];

	memcpy(words, key, sizeof(words));
	for (size_t low = 0; low < pages; low += LANES) {
		size_t count = pages - low < LANES ? pages - low : LANES;
		const uint8_t *some[LANES];
		lanes chunks[4][8];

		for (size_t i = 0; i < LANES; i++)
			some[i] = (const uint8_t *)data +
				  (low + (i < count ? i : 0)) * SP_PAGE_SIZE;
		for (uint32_t i = 0; i < 4; i++)
			hash_chunk(some, i, words, chunks[i]);
		join(chunks[0], chunks[1], words, 0);
		join(chunks[2], chunks[3], words, 0);
		join(chunks[0], chunks[2], words, ROOT);
		for (size_t i = 0; i < count; i++)
			for (int word = 0; word < 8; word++) {
				uint32_t value = chunks[0][word][i];

				memcpy(digests + (low + i) * SP_DIGEST_SIZE + 4 * word, &value,
				       sizeof(value));
			}
	}
}
