/*
 * The watcher: reads events of the userfaultfd and queues faults for the mover.
 *
 * It must always be ready to read: the mover itself sleeps in mremap() until its remap event was
 * read. So it shares but a short ring with the mover, whose lock is held for a few instructions.
 */
#ifndef SP_FAULTS_H
#define SP_FAULTS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct sp_mailbox;

#define SP_FAULT_RING 1024

struct sp_fault {
	uint64_t address; /* of the page */
	bool missing;	  /* else: a write to a protected page */
};

struct sp_faults {
	pthread_t thread;
	pthread_mutex_t lock;
	struct sp_fault ring[SP_FAULT_RING];
	size_t first, count;
	bool overflow; /* faults were dropped: wake everything, who still faults comes back */
	int uffd;
	int stop; /* eventfd */
	struct sp_mailbox *mailbox; /* the mover's: rung for every fault */
};

/* Start the thread. `uffd` stays the caller's. -errno. */
int sp_faults_start(struct sp_faults *faults, int uffd, struct sp_mailbox *mailbox);

/* End the thread and wait for its end. */
void sp_faults_stop(struct sp_faults *faults);

/* The next fault; false when there is none. Sets *overflow, and clears it in the queue. */
bool sp_faults_next(struct sp_faults *faults, struct sp_fault *fault, bool *overflow);

#endif
