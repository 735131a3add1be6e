/*
 * What the application asks a clone to be, between its thread, which owns it, and the mover.
 */
#ifndef SP_CLONE_H
#define SP_CLONE_H

#include <stdint.h>

#include "node.h"

struct sp_clone {
	const char *host, *source;
	uint32_t flags, freeze_ms;
	void (*tell)(const struct sp_clone_progress *progress, void *context);
	void *context;
};

/* A handle without memory. -errno as sp_arena_create(). */
int sp_arena_make(struct sp_node *node, const char *name, const char *domain,
		  struct sp_arena **arena);

/* Give it memory. -ENOMEM. */
int sp_arena_map(struct sp_arena *arena, uint64_t pages);

#endif
