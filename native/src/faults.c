#include "faults.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"
#include "mailbox.h"
#include "samepage.h"
#include "thread.h"

#define EVENTS 16
#define FULL_MS 1
#define FULL_TIMES 100 /* then it reads all the same: the mover may wait for just that */

uint64_t sp_faults_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void queue(struct sp_faults *faults, const struct sp_fault *fault)
{
	bool is_range = fault->kind == SP_FAULT_REMOVED || fault->kind == SP_FAULT_MOVED;

	pthread_mutex_lock(&faults->lock);
	if (faults->count < (is_range ? SP_FAULT_RING : SP_FAULTS_MOST))
		faults->ring[(faults->first + faults->count++) % SP_FAULT_RING] = *fault;
	else
		faults->overflow = true;
	pthread_mutex_unlock(&faults->lock);
}

/* Whether so many ranges wait that the next might not fit. */
static bool is_full(struct sp_faults *faults)
{
	bool full;

	pthread_mutex_lock(&faults->lock);
	full = faults->count > SP_FAULT_RING - EVENTS;
	pthread_mutex_unlock(&faults->lock);
	return full;
}

static bool read_fault(struct sp_faults *faults, const struct uffd_msg *event,
		       struct sp_fault *fault)
{
	uint64_t flags = event->arg.pagefault.flags;

	fault->address = event->arg.pagefault.address & ~(uint64_t)(SP_PAGE_SIZE - 1);
	if (!(flags & UFFD_PAGEFAULT_FLAG_MINOR)) {
		fault->kind = flags & UFFD_PAGEFAULT_FLAG_WP ? SP_FAULT_WRITE : SP_FAULT_MISSING;
		return true;
	}
	fault->kind = SP_FAULT_UNMAPPED;
	/* the mover itself reads shared pages, and can't serve itself */
	if ((int)event->arg.pagefault.feat.ptid != atomic_load(&faults->pager->thread))
		return true;
	sp_pager_map_again(faults->pager, (uint8_t *)(uintptr_t)fault->address, 1);
	return false;
}

static bool read_event(struct sp_faults *faults, const struct uffd_msg *event,
		       struct sp_fault *fault)
{
	struct sp_pager *pager = faults->pager;

	switch (event->event) {
	case UFFD_EVENT_PAGEFAULT:
		return read_fault(faults, event, fault);
	case UFFD_EVENT_REMOVE:
		fault->kind = SP_FAULT_REMOVED;
		fault->address = event->arg.remove.start;
		fault->length = event->arg.remove.end - event->arg.remove.start;
		return true;
	case UFFD_EVENT_REMAP:
		fault->kind = SP_FAULT_MOVED;
		fault->address = event->arg.remap.from;
		fault->length = event->arg.remap.len;
		fault->to = event->arg.remap.to;
		/* most of the mover's own; it knows the others by their addresses */
		return fault->address != atomic_load(&pager->moved_from) ||
		       fault->to != atomic_load(&pager->moved_to);
	default:
		return false;
	}
}

static void read_events(struct sp_faults *faults, int uffd)
{
	struct uffd_msg events[EVENTS];
	ssize_t length;
	bool found = false;

	atomic_store(&faults->reading, true);
	length = read(uffd, events, sizeof(events));
	for (size_t i = 0; length > 0 && i < (size_t)length / sizeof(*events); i++) {
		struct sp_fault fault = {.when = sp_faults_now()};

		if (!read_event(faults, &events[i], &fault))
			continue;
		queue(faults, &fault);
		found = true;
	}
	atomic_store(&faults->reading, false);
	if (found)
		sp_mailbox_ring(faults->mailbox);
}

static void *watch(void *argument)
{
	struct sp_faults *faults = argument;
	struct pollfd polled[] = {{.fd = faults->pager->uffds.memory, .events = POLLIN},
				  {.fd = faults->pager->uffds.store, .events = POLLIN},
				  {.fd = faults->stop, .events = POLLIN}};

	int held = 0;

	while (!(polled[2].revents & POLLIN)) {
		/* a mover that changes a mapping waits for its event, however full it is here */
		bool hold = is_full(faults) && !atomic_load(&faults->pager->moving) &&
			    held < FULL_TIMES;

		if (poll(hold ? polled + 2 : polled, hold ? 1 : 3, hold ? FULL_MS : -1) < 0 &&
		    errno != EINTR)
			break;
		held = hold ? held + 1 : 0;
		for (int i = 0; i < 2 && !hold; i++)
			if (polled[i].revents & POLLIN)
				read_events(faults, polled[i].fd);
	}
	return NULL;
}

int sp_faults_start(struct sp_faults *faults, struct sp_pager *pager, struct sp_mailbox *mailbox)
{
	int error;

	*faults = (struct sp_faults){.pager = pager, .mailbox = mailbox};
	faults->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (faults->stop < 0)
		return -errno;
	pthread_mutex_init(&faults->lock, NULL);
	error = sp_thread_start(&faults->thread, "samepage-watch", watch, faults);
	if (error) {
		close(faults->stop);
		pthread_mutex_destroy(&faults->lock);
	}
	return error;
}

void sp_faults_stop(struct sp_faults *faults)
{
	uint64_t one = 1;
	ssize_t written = write(faults->stop, &one, sizeof(one));

	(void)written;
	pthread_join(faults->thread, NULL);
	close(faults->stop);
	pthread_mutex_destroy(&faults->lock);
}

void sp_faults_settle(struct sp_faults *faults)
{
	while (atomic_load(&faults->reading))
		sched_yield();
}

bool sp_faults_next(struct sp_faults *faults, struct sp_fault *fault, bool *overflow)
{
	bool found;

	pthread_mutex_lock(&faults->lock);
	*overflow = faults->overflow;
	faults->overflow = false;
	found = faults->count > 0;
	if (found) {
		*fault = faults->ring[faults->first];
		faults->first = (faults->first + 1) % SP_FAULT_RING;
		faults->count--;
	}
	pthread_mutex_unlock(&faults->lock);
	return found;
}
