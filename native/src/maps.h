/*
 * What kind of mapping is at an address now, as /proc/self/maps shows it (PROCMAP_QUERY, Linux
 * 6.11). The application may unmap, protect or move parts of its arenas: these questions keep the
 * agent from doing what was right a while ago. Without the call every answer is "as expected".
 */
#ifndef SP_MAPS_H
#define SP_MAPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sp_slots {
	size_t pages;	/* that map what was asked for, from the first one on; 0: none does */
	size_t foreign; /* when 0: pages from there on that map something else, or nothing */
	int protection; /* PROT_ bits */
};

/* A descriptor to ask by, or -errno. */
int sp_maps_open(void);

/* Whether n pages at `address` map the slots of `store` from `slot` on. */
struct sp_slots sp_maps_slots(int maps, const uint8_t *address, size_t n, int store, uint64_t slot);

/* How many of n pages at `address` are one mapping of anonymous memory. */
struct sp_slots sp_maps_anonymous(int maps, const uint8_t *address, size_t n);

/* How many of n pages from `address` on may be read; 0: the first may not. */
size_t sp_maps_readable(int maps, const uint8_t *address, size_t n);

#endif
