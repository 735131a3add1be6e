/*
 * Mover: telling the merger which pages map no slot any more.
 */
#include "mover.h"

void sp_mover_add_notice(struct sp_mover *mover, const struct sp_arena *arena, uint64_t page,
			 uint64_t count)
{
	struct sp_notice *last =
		mover->notice_count > 0 ? &mover->notices[mover->notice_count - 1] : NULL;

	if (!arena->announced)
		return;
	if (last && last->arena == arena->number && last->range.page + last->range.count == page) {
		last->range.count += count;
	} else if (mover->notice_count < SP_NOTICES) {
		mover->notices[mover->notice_count++] = (struct sp_notice){
			.arena = arena->number, .range = {.page = page, .count = count}};
	} else {
		mover->notices_lost = true;
	}
}

bool sp_mover_was_restored(const struct sp_mover *mover, uint32_t arena, uint64_t page,
			   uint64_t count)
{
	for (size_t i = 0; i < mover->notice_count; i++) {
		const struct sp_notice *notice = &mover->notices[i];

		if (notice->arena == arena && notice->range.page < page + count &&
		    page < notice->range.page + notice->range.count)
			return true;
	}
	return mover->notices_lost;
}

void sp_mover_send_notices(struct sp_node *node)
{
	struct sp_mover *mover = &node->mover;
	struct wire_range ranges[256];
	size_t first = 0;

	if (mover->notices_lost) {
		sp_link_close(&mover->link);
		return;
	}
	while (first < mover->notice_count) {
		uint32_t arena = mover->notices[first].arena;
		struct iovec part = {.iov_base = ranges};
		size_t n = 0;

		while (n < 256 && first + n < mover->notice_count &&
		       mover->notices[first + n].arena == arena) {
			ranges[n] = mover->notices[first + n].range;
			n++;
		}
		part.iov_len = n * sizeof(*ranges);
		if (sp_mover_send(node, WIRE_RESTORED, 0, arena, &part, 1, -1))
			return;
		first += n;
	}
	mover->notice_count = 0;
}
