#include "probe.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "pagemap.h"
#include "samepage.h"

static const struct {
	uint64_t memory, store; /* what is enabled on which descriptor */
	uint32_t feature;
	const char *name;
} uffd_features[] = {
	{UFFD_FEATURE_MOVE, 0, SP_FEATURE_MOVE, "move"},
	{0, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, SP_FEATURE_WP_TMPFS, "wp_tmpfs"},
	{0, UFFD_FEATURE_EVENT_REMAP, SP_FEATURE_REMAP, "remap"},
	{UFFD_FEATURE_POISON, 0, SP_FEATURE_POISON, "poison"},
	{UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED, 0, SP_FEATURE_TRACKING, "tracking"},
	{0, UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_THREAD_ID,
	 SP_FEATURE_DISCARD, "discard"},
};

#define UFFD_FEATURES (sizeof(uffd_features) / sizeof(*uffd_features))

/* Whether the comma-separated list in SAMEPAGE_DISABLE has the name. */
static bool is_disabled(const char *name)
{
	const char *list = getenv("SAMEPAGE_DISABLE");
	size_t length = strlen(name);

	while (list && *list) {
		size_t item = strcspn(list, ",");

		if (item == length && !strncmp(list, name, length))
			return true;
		list += item + (list[item] == ',');
	}
	return false;
}

static int open_uffd(int device)
{
	int own, uffd;

	if (is_disabled("userfaultfd"))
		return -ENOSYS;
	if (device >= 0)
		return uffd_open_device(device);
	uffd = uffd_open_syscall();
	if (uffd >= 0)
		return uffd;
	own = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (own < 0)
		return uffd;
	uffd = uffd_open_device(own);
	close(own);
	return uffd;
}

/* Features of the kernel, asked for on a descriptor of its own: UFFDIO_API works only once. */
static int ask_features(int device, uint64_t *available)
{
	int uffd = open_uffd(device);
	int error;

	if (uffd < 0)
		return uffd;
	*available = 0;
	error = uffd_api(uffd, available);
	close(uffd);
	return error;
}

static bool has_pagemap_scan(void)
{
	struct pm_scan_arg argument = {.size = sizeof(argument)};
	int pagemap = sp_pagemap_open();
	int result;

	if (pagemap < 0 || is_disabled("pagemap_scan")) {
		if (pagemap >= 0)
			close(pagemap);
		return false;
	}
	result = sys_result(ioctl(pagemap, PAGEMAP_SCAN, &argument));
	close(pagemap);
	return result >= 0;
}

static int open_enabled(int device, uint64_t wanted)
{
	int uffd = open_uffd(device);
	int error = uffd < 0 ? uffd : uffd_api(uffd, &wanted);

	if (!error)
		return uffd;
	if (uffd >= 0)
		close(uffd);
	return error;
}

int sp_probe_open(int device, uint32_t *features, struct sp_uffds *uffds)
{
	uint64_t available, memory = UFFD_FEATURE_PAGEFAULT_FLAG_WP, store = memory;
	int error;

	*features = has_pagemap_scan() ? SP_FEATURE_PAGEMAP_SCAN : 0;
	error = ask_features(device, &available);
	if (error)
		return error;
	*features |= SP_FEATURE_USERFAULTFD;
	for (size_t i = 0; i < UFFD_FEATURES; i++) {
		uint64_t needed = uffd_features[i].memory | uffd_features[i].store;

		if ((available & needed) != needed || is_disabled(uffd_features[i].name))
			continue;
		/* writes that nobody can ask for are not worth their faults */
		if (uffd_features[i].feature == SP_FEATURE_TRACKING &&
		    !(*features & SP_FEATURE_PAGEMAP_SCAN))
			continue;
		memory |= uffd_features[i].memory;
		store |= uffd_features[i].store;
		*features |= uffd_features[i].feature;
	}
	if ((*features & SP_FEATURES_AWAY) == SP_FEATURES_AWAY && !is_disabled("away"))
		*features |= SP_FEATURE_AWAY;
	uffds->memory = open_enabled(device, memory);
	if (uffds->memory < 0)
		return uffds->memory;
	uffds->store = open_enabled(device, store);
	if (uffds->store >= 0)
		return 0;
	close(uffds->memory);
	return uffds->store;
}

void sp_uffds_close(struct sp_uffds *uffds)
{
	if (uffds->memory >= 0)
		close(uffds->memory);
	if (uffds->store >= 0)
		close(uffds->store);
}
