#include "faults.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "kernel.h"
#include "mailbox.h"
#include "samepage.h"
#include "thread.h"

#define EVENTS 16

static void queue(struct sp_faults *faults, const struct sp_fault *fault)
{
	pthread_mutex_lock(&faults->lock);
	if (faults->count < SP_FAULT_RING)
		faults->ring[(faults->first + faults->count++) % SP_FAULT_RING] = *fault;
	else
		faults->overflow = true;
	pthread_mutex_unlock(&faults->lock);
}

static void read_events(struct sp_faults *faults)
{
	struct uffd_msg events[EVENTS];
	ssize_t length = read(faults->uffd, events, sizeof(events));
	bool found = false;

	for (size_t i = 0; length > 0 && i < (size_t)length / sizeof(*events); i++) {
		struct sp_fault fault;

		if (events[i].event != UFFD_EVENT_PAGEFAULT)
			continue; /* a remap: reading it was all */
		fault.address = events[i].arg.pagefault.address & ~(uint64_t)(SP_PAGE_SIZE - 1);
		fault.missing = !(events[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
		queue(faults, &fault);
		found = true;
	}
	if (found)
		sp_mailbox_ring(faults->mailbox);
}

static void *watch(void *argument)
{
	struct sp_faults *faults = argument;
	struct pollfd polled[] = {{.fd = faults->uffd, .events = POLLIN},
				  {.fd = faults->stop, .events = POLLIN}};

	while (!(polled[1].revents & POLLIN)) {
		if (poll(polled, 2, -1) < 0 && errno != EINTR)
			break;
		if (polled[0].revents & POLLIN)
			read_events(faults);
	}
	return NULL;
}

int sp_faults_start(struct sp_faults *faults, int uffd, struct sp_mailbox *mailbox)
{
	int error;

	*faults = (struct sp_faults){.uffd = uffd, .mailbox = mailbox};
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
