/*
 * The watcher: reads events of the userfaultfds and queues them for the mover.
 *
 * It must always be ready to read: the mover itself sleeps in mremap() until its remap event was
 * read. So it shares but a short ring with the mover, whose lock is held for a few instructions.
 *
 * Events keep their order: an application's thread goes on from madvise() or mremap() once its event
 * was read, so what it does to the memory next comes behind it.
 */
#ifndef SP_FAULTS_H
#define SP_FAULTS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "pager.h"

struct sp_mailbox;

#define SP_FAULT_RING 2048
#define SP_FAULTS_MOST 1024 /* of threads; the rest of the ring is for what can't be asked again */

enum sp_fault_kind {
	SP_FAULT_WRITE,	  /* to a protected page, of the store or frozen */
	SP_FAULT_MISSING, /* a private page is not there */
	SP_FAULT_UNMAPPED, /* a page of the store is not in the page table */
	SP_FAULT_REMOVED, /* the application discards a range with such pages */
	SP_FAULT_MOVED	  /* the application has moved such a range elsewhere */
};

struct sp_fault {
	enum sp_fault_kind kind;
	uint64_t address; /* of the page, or where the range starts */
	uint64_t length;  /* of the range */
	uint64_t to;	  /* where it was moved to */
	uint64_t when;	  /* it was read, ns */
};

struct sp_faults {
	pthread_t thread;
	pthread_mutex_t lock;
	struct sp_fault ring[SP_FAULT_RING];
	size_t first, count;
	bool overflow; /* faults were dropped: wake everything, who still faults comes back */
	atomic_bool reading; /* what was read may not be queued yet */
	struct sp_pager *pager;
	int stop; /* eventfd */
	struct sp_mailbox *mailbox; /* the mover's: rung for every fault */
};

/* Start the thread. The pager stays the caller's. -errno. */
int sp_faults_start(struct sp_faults *faults, struct sp_pager *pager, struct sp_mailbox *mailbox);

/* End the thread and wait for its end. */
void sp_faults_stop(struct sp_faults *faults);

/* The next fault; false when there is none. Sets *overflow, and clears it in the queue. */
bool sp_faults_next(struct sp_faults *faults, struct sp_fault *fault, bool *overflow);

/* Wait until all that was read is queued: what the application's own calls have told of before they
 * returned can be had by sp_faults_next() then. */
void sp_faults_settle(struct sp_faults *faults);

/* The time that faults carry, ns. */
uint64_t sp_faults_now(void);

#endif
