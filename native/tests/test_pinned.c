/*
 * A page that the kernel pins for I/O (an io_uring registered buffer) is refused as pinned, its
 * neighbours are replaced; after release it is replaced too. The same for a page that a forked
 * child still shares.
 */
#include <linux/io_uring.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "check.h"

#define N 8

static struct sp_mailbox mailbox;
static struct sp_faults faults;
static struct sp_pager pager;
static uint8_t *shadow;

static void expect(uint8_t *data, int store, uint8_t third)
{
	uint8_t outcomes[N];

	sp_pager_replace(&pager, data, N, store, 1, outcomes);
	for (size_t i = 0; i < N; i++)
		CHECK(outcomes[i] == (i == 3 ? third : WIRE_MERGED));
	CHECK(data[3 * SP_PAGE_SIZE + 9] == 'q');
}

static uint8_t *make_pages(int store)
{
	uint8_t *data = map_arena(&pager, N, &shadow);

	memset(data, 'q', N * SP_PAGE_SIZE);
	for (uint64_t slot = 1; slot <= N; slot++)
		write_slot(store, slot, data);
	return data;
}

static void restore(uint8_t *data, int store)
{
	CHECK(sp_pager_restore(&pager, data, shadow, 3, store, 1) == 0);
	CHECK(sp_pager_restore(&pager, data + 4 * SP_PAGE_SIZE, shadow + 4 * SP_PAGE_SIZE, N - 4,
			       store, 5) == 0);
}

static void registered_buffer(int store)
{
	struct io_uring_params parameters = {0};
	uint8_t *data = make_pages(store);
	struct iovec buffer = {.iov_base = data + 3 * SP_PAGE_SIZE, .iov_len = SP_PAGE_SIZE};
	int ring = (int)syscall(SYS_io_uring_setup, 4, &parameters);

	if (ring < 0)
		skip("io_uring is not permitted here");
	CHECK(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) == 0);
	expect(data, store, WIRE_PINNED);
	restore(data, store);
	CHECK(sp_pager_is_pinned(&pager, data, N)); /* what seal() asks */
	CHECK(syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
	close(ring);
	CHECK(!sp_pager_is_pinned(&pager, data, N));
	expect(data, store, WIRE_MERGED);
	unmap_arena(data, shadow, N);
}

static void shared_with_child(int store)
{
	uint8_t *data = make_pages(store);
	int pipes[2], status;
	char byte;
	pid_t child;

	CHECK(pipe(pipes) == 0);
	CHECK(madvise(data + 3 * SP_PAGE_SIZE, SP_PAGE_SIZE, MADV_DOFORK) == 0);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		close(pipes[1]);
		_exit(read(pipes[0], &byte, 1) == 0 ? 0 : 1);
	}
	CHECK(madvise(data + 3 * SP_PAGE_SIZE, SP_PAGE_SIZE, MADV_DONTFORK) == 0);
	expect(data, store, WIRE_PINNED);
	restore(data, store);
	close(pipes[1]);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	data[3 * SP_PAGE_SIZE] = 'q'; /* writing makes it this process's alone again */
	expect(data, store, WIRE_MERGED);
	close(pipes[0]);
	unmap_arena(data, shadow, N);
}

int main(void)
{
	int store = make_store(N + 1);

	start_pager(&pager, &faults, &mailbox);
	registered_buffer(store);
	shared_with_child(store);
	stop_pager(&pager, &faults, &mailbox);
	return 0;
}
