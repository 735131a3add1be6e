/*
 * Mover: how long threads have waited for it, told to the merger.
 */
#include "kernel.h"
#include "mover.h"

#define FIRST_NS 8000 /* below it is the first bucket */
#define INTERVAL_MS 1000

void sp_mover_count_stall(struct sp_mover *mover, uint64_t since)
{
	uint64_t waited = sp_faults_now() - since;
	size_t bucket = 0;

	while (waited >= (uint64_t)FIRST_NS << bucket && bucket < WIRE_STALL_BUCKETS - 1)
		bucket++;
	mover->stalls.waits[bucket]++;
	mover->stalls.any = true;
}

int sp_mover_send_stalls(struct sp_node *node)
{
	struct sp_stalls *stalls = &node->mover.stalls;
	struct iovec part = {.iov_base = stalls->waits, .iov_len = sizeof(stalls->waits)};
	int64_t now = (int64_t)(sp_faults_now() / 1000000);

	if (!stalls->any || !node->mover.link.welcomed)
		return -1;
	if (now < stalls->sent + INTERVAL_MS)
		return (int)(stalls->sent + INTERVAL_MS - now);
	if (!sp_mover_send(node, WIRE_STALLS, 0, 0, &part, 1, -1))
		*stalls = (struct sp_stalls){.sent = now};
	return -1;
}
