/*
 * Requests from the application's threads to one of the agent's threads (the worker).
 *
 * A request lives on its caller's stack. It is NEW until the worker takes it, RUNNING while the
 * worker works on it, WAITING when a daemon's answer is awaited, and DONE. A caller whose time is
 * up withdraws a request that is NEW or WAITING; one that is RUNNING is never withdrawn, so that
 * the worker may use it without the lock.
 */
#ifndef SP_MAILBOX_H
#define SP_MAILBOX_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "samepage.h"

struct sp_arena;

enum sp_request_kind {
	SP_REQUEST_ADD,	    /* announce an arena */
	SP_REQUEST_UNSHARE, /* every page private again */
	SP_REQUEST_DISCARD, /* a range of pages zero, and given back to the kernel */
	SP_REQUEST_SEAL,    /* read-only from now on */
	SP_REQUEST_FETCH,   /* bring a range of away pages back; without an arena, all pages of all */
	SP_REQUEST_CLOSE,   /* as UNSHARE, and forget the arena */
	SP_REQUEST_DROP,    /* unmap the arena's memory, and forget it */
	SP_REQUEST_ACCOUNT, /* ask the merger what the arena saves */
	SP_REQUEST_EVICT,   /* ask the merger to let a range of pages go */
	SP_REQUEST_CLONE,   /* make an arena that is a copy of one on another host */
	SP_REQUEST_SHARE,   /* ask the scanner to look now */
	SP_REQUEST_STOP	    /* end the worker */
};

enum sp_request_state { SP_NEW, SP_RUNNING, SP_WAITING, SP_DONE };

#define SP_REQUEST_TEXT 256

struct sp_request {
	enum sp_request_kind kind;
	struct sp_arena *arena;
	uint64_t page, count; /* of the range, where the kind has one */
	void *answer; /* where the daemon's answer goes; its type follows from the kind */
	enum sp_request_state state;
	uint32_t seq; /* of the message whose answer is awaited */
	int result;
	bool firm;		    /* not withdrawn, whatever its caller's patience */
	const volatile int *give_up; /* when not NULL: withdrawn when it is not 0 any more */
	bool news;		    /* `progress` is new to its caller */
	struct sp_clone_progress progress;
	/* called in the caller's thread when there are news */
	void (*told)(const struct sp_request *request, const struct sp_clone_progress *progress);
	char text[SP_REQUEST_TEXT]; /* of a failure */
	struct sp_request *next;
};

struct sp_mailbox {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct sp_request *first;
	int closed; /* 0, or the result of every call: the worker has ended */
	int wake;   /* eventfd that the worker polls */
};

/* -errno. */
int sp_mailbox_init(struct sp_mailbox *mailbox);
void sp_mailbox_destroy(struct sp_mailbox *mailbox);

/* Hand in a request and wait for its result, at most timeout_ms (-1: for ever). Sets the error
 * text. -ETIMEDOUT; -ECANCELED: it was given up. */
int sp_mailbox_call(struct sp_mailbox *mailbox, struct sp_request *request, int timeout_ms);

/* Wake the worker. */
void sp_mailbox_ring(struct sp_mailbox *mailbox);

/* For the worker. Hear the rings so far, so that poll() waits for the next one. */
void sp_mailbox_hear(struct sp_mailbox *mailbox);

/* For the worker. The next NEW request, now RUNNING, or NULL. */
struct sp_request *sp_mailbox_take(struct sp_mailbox *mailbox);

/* The WAITING request of that number, now RUNNING, or NULL when it was withdrawn. */
struct sp_request *sp_mailbox_awaited(struct sp_mailbox *mailbox, uint32_t seq);

/* A RUNNING request waits for the answer to message `seq`; 0: for sp_mailbox_renew(). */
void sp_mailbox_await(struct sp_mailbox *mailbox, struct sp_request *request, uint32_t seq);

/* A RUNNING request has come so far. */
void sp_mailbox_tell(struct sp_mailbox *mailbox, struct sp_request *request,
		     const struct sp_clone_progress *progress);

/* A RUNNING request has its result; `text` may be NULL. It must not be used afterwards. */
void sp_mailbox_done(struct sp_mailbox *mailbox, struct sp_request *request, int result,
		     const char *text);

/* WAITING requests of a kind that await no message are NEW again. */
void sp_mailbox_renew(struct sp_mailbox *mailbox, enum sp_request_kind kind);

/* All WAITING requests fail that await a message: the daemon is gone. */
void sp_mailbox_fail_awaited(struct sp_mailbox *mailbox, int result, const char *text);

/* All requests fail, those to come too: the worker ends. */
void sp_mailbox_close(struct sp_mailbox *mailbox, int result);

#endif
