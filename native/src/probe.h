/*
 * What the kernel offers to this process, found out by trying.
 */
#ifndef SP_PROBE_H
#define SP_PROBE_H

#include <stdint.h>

/* Everything that sharing of writable arenas needs. */
#define SP_FEATURES_NEEDED                                                                         \
	(SP_FEATURE_USERFAULTFD | SP_FEATURE_MOVE | SP_FEATURE_WP_TMPFS | SP_FEATURE_REMAP)

/* A userfaultfd with all that the library uses enabled, made from an open /dev/userfaultfd
 * (`device`, may be -1) or by this process's own rights. *features gets bits of enum sp_feature.
 * -errno: none can be had, or SAMEPAGE_DISABLE names it. */
int sp_probe_open(int device, uint32_t *features);

#endif
