/*
 * What the kernel offers to this process, found out by trying.
 */
#ifndef SP_PROBE_H
#define SP_PROBE_H

#include <stdint.h>

/* Everything that sharing of writable arenas needs. */
#define SP_FEATURES_NEEDED                                                                         \
	(SP_FEATURE_USERFAULTFD | SP_FEATURE_MOVE | SP_FEATURE_WP_TMPFS | SP_FEATURE_REMAP)

/* And what pages need to be away. */
#define SP_FEATURES_AWAY (SP_FEATURES_NEEDED | SP_FEATURE_POISON | SP_FEATURE_DISCARD)

/* The two userfaultfds of a process. Write faults on shared pages must wait for the agent, those
 * on private ones must not: which of the two is a property of the descriptor. */
struct sp_uffds {
	int memory; /* for private memory: missing faults, writes told of afterwards */
	int store;  /* for mappings of the store: write faults, and what is done to the mapping; and for
		    * private memory that is away or frozen */
};

/* Userfaultfds with all that the library uses enabled, made from an open /dev/userfaultfd
 * (`device`, may be -1) or by this process's own rights. *features gets bits of enum sp_feature.
 * 0, or -errno: none can be had, or SAMEPAGE_DISABLE names it. */
int sp_probe_open(int device, uint32_t *features, struct sp_uffds *uffds);

void sp_uffds_close(struct sp_uffds *uffds);

#endif
