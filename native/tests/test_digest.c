/*
 * Every variant of the digest that this processor can run gives the same, and the right, digests:
 * other hosts may use another one, and any other implementation of BLAKE3. The key and the second
 * page are those of BLAKE3's own test vectors.
 */
#include "check.h"
#include "digest.h"

#define PAGES 21

typedef void variant(const void *, size_t, const uint8_t *, uint8_t *);

static const char key[] = "whats the Elvish word for friend";
static const uint8_t right[SP_DIGEST_SIZE] = {
	0xbe, 0xfc, 0x66, 0x0a, 0xea, 0x2f, 0x17, 0x18, 0x88, 0x4c, 0xd8,
	0xde, 0xb9, 0x90, 0x28, 0x11, 0xd3, 0x32, 0xf4, 0xfc, 0x4a, 0x38,
	0xcf, 0x7c, 0x73, 0x00, 0xd5, 0x97, 0xa0, 0x81, 0xbf, 0xc0,
};
static uint8_t pages[PAGES * SP_PAGE_SIZE];

static void fill(void)
{
	uint32_t state = 1;

	for (size_t i = 2 * SP_PAGE_SIZE; i < sizeof(pages); i++) {
		state = state * 1664525 + 1013904223;
		pages[i] = (uint8_t)(state >> 24);
	}
	for (size_t i = 0; i < SP_PAGE_SIZE; i++)
		pages[SP_PAGE_SIZE + i] = (uint8_t)(i % 251);
}

/* Whether a page's digest depends on nothing but the page is seen by hashing it alone. */
static void check_variant(variant *hash)
{
	uint8_t digests[PAGES * SP_DIGEST_SIZE], alone[SP_DIGEST_SIZE];

	for (size_t count = 1; count <= PAGES; count++) {
		memset(digests, 0xff, sizeof(digests));
		hash(pages, count, (const uint8_t *)key, digests);
		for (size_t i = 0; i < count; i++) {
			sp_digest_baseline(pages + i * SP_PAGE_SIZE, 1, (const uint8_t *)key, alone);
			CHECK(i == 0 || !memcmp(digests + i * SP_DIGEST_SIZE, alone, sizeof(alone)));
		}
		for (size_t i = count * SP_DIGEST_SIZE; i < sizeof(digests); i++)
			CHECK(digests[i] == 0xff);
	}
	CHECK(!memcmp(digests + SP_DIGEST_SIZE, right, sizeof(right)));
}

/* A page of zeros has no digest of its own; one whose only byte is the last has. */
static void check_zeros(void)
{
	static const uint8_t none[SP_DIGEST_SIZE];
	uint8_t digests[2 * SP_DIGEST_SIZE], page[SP_PAGE_SIZE] = {0};

	sp_digest(pages, 2, (const uint8_t *)key, digests);
	CHECK(!memcmp(digests, none, sizeof(none)));
	page[SP_PAGE_SIZE - 1] = 1;
	sp_digest(page, 1, (const uint8_t *)key, digests);
	CHECK(memcmp(digests, none, sizeof(none)));
}

int main(void)
{
	fill();
	check_variant(sp_digest_baseline);
	check_variant(sp_digest);
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx2"))
		check_variant(sp_digest_avx2);
#endif
	check_zeros();
	return 0;
}
