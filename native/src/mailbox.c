#include "mailbox.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "error.h"

#define CLOSED "the connection is closed"
#define LOOK_MS 50

int sp_mailbox_init(struct sp_mailbox *mailbox)
{
	pthread_condattr_t attributes;

	mailbox->first = NULL;
	mailbox->closed = 0;
	mailbox->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (mailbox->wake < 0)
		return -errno;
	pthread_mutex_init(&mailbox->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&mailbox->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	return 0;
}

void sp_mailbox_destroy(struct sp_mailbox *mailbox)
{
	close(mailbox->wake);
	pthread_cond_destroy(&mailbox->changed);
	pthread_mutex_destroy(&mailbox->lock);
}

void sp_mailbox_ring(struct sp_mailbox *mailbox)
{
	uint64_t one = 1;
	ssize_t written = write(mailbox->wake, &one, sizeof(one));

	(void)written; /* EAGAIN: it rings already */
}

void sp_mailbox_hear(struct sp_mailbox *mailbox)
{
	uint64_t rings;
	ssize_t length = read(mailbox->wake, &rings, sizeof(rings));

	(void)length; /* EAGAIN: it did not ring */
}

static void unlink_request(struct sp_mailbox *mailbox, const struct sp_request *request)
{
	struct sp_request **at = &mailbox->first;

	while (*at && *at != request)
		at = &(*at)->next;
	if (*at)
		*at = request->next;
}

static struct timespec deadline_after(int timeout_ms)
{
	struct timespec deadline;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += timeout_ms / 1000;
	deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	return deadline;
}

/* With the lock held, which is let go meanwhile. */
static void tell_caller(struct sp_mailbox *mailbox, struct sp_request *request)
{
	struct sp_clone_progress progress = request->progress;

	request->news = false;
	pthread_mutex_unlock(&mailbox->lock);
	request->told(request, &progress);
	pthread_mutex_lock(&mailbox->lock);
}

static bool is_before(const struct timespec *one, const struct timespec *other)
{
	return one->tv_sec != other->tv_sec ? one->tv_sec < other->tv_sec
					    : one->tv_nsec < other->tv_nsec;
}

/* Wait for a change, until the deadline (NULL: for ever), or until it is time to see again whether
 * the request is given up. */
static void wait_for_change(struct sp_mailbox *mailbox, const struct sp_request *request,
			    const struct timespec *deadline)
{
	struct timespec until = deadline_after(LOOK_MS);

	if (deadline && (!request->give_up || is_before(deadline, &until)))
		until = *deadline;
	if (deadline || request->give_up)
		pthread_cond_timedwait(&mailbox->changed, &mailbox->lock, &until);
	else
		pthread_cond_wait(&mailbox->changed, &mailbox->lock);
}

int sp_mailbox_call(struct sp_mailbox *mailbox, struct sp_request *request, int timeout_ms)
{
	struct timespec deadline = deadline_after(timeout_ms < 0 ? 0 : timeout_ms), now;
	struct sp_request **end = &mailbox->first;
	bool late = false, given_up = false;

	request->state = SP_NEW;
	request->news = false;
	request->next = NULL;
	request->text[0] = '\0';
	pthread_mutex_lock(&mailbox->lock);
	if (mailbox->closed) {
		pthread_mutex_unlock(&mailbox->lock);
		return sp_fail(mailbox->closed, CLOSED);
	}
	while (*end)
		end = &(*end)->next;
	*end = request;
	sp_mailbox_ring(mailbox);
	while (request->state != SP_DONE || request->news) {
		if (request->news) {
			tell_caller(mailbox, request);
			continue;
		}
		wait_for_change(mailbox, request,
				timeout_ms < 0 || late || request->firm ? NULL : &deadline);
		now = deadline_after(0);
		late = timeout_ms >= 0 && !is_before(&now, &deadline);
		given_up = request->give_up && *request->give_up;
		if ((late || given_up) && !request->firm &&
		    (request->state == SP_NEW || request->state == SP_WAITING))
			break;
	}
	unlink_request(mailbox, request);
	pthread_mutex_unlock(&mailbox->lock);
	if (request->state != SP_DONE && given_up)
		return sp_fail(-ECANCELED, "it was given up");
	if (request->state != SP_DONE)
		return sp_fail(-ETIMEDOUT, "no answer within %d ms; ask again, or wait longer",
			       timeout_ms);
	if (request->result < 0)
		return sp_fail(request->result, "%s", request->text);
	return request->result;
}

struct sp_request *sp_mailbox_take(struct sp_mailbox *mailbox)
{
	struct sp_request *request;

	pthread_mutex_lock(&mailbox->lock);
	request = mailbox->first;
	while (request && request->state != SP_NEW)
		request = request->next;
	if (request)
		request->state = SP_RUNNING;
	pthread_mutex_unlock(&mailbox->lock);
	return request;
}

struct sp_request *sp_mailbox_awaited(struct sp_mailbox *mailbox, uint32_t seq)
{
	struct sp_request *request;

	pthread_mutex_lock(&mailbox->lock);
	request = mailbox->first;
	while (request && !(seq && request->state == SP_WAITING && request->seq == seq))
		request = request->next;
	if (request)
		request->state = SP_RUNNING;
	pthread_mutex_unlock(&mailbox->lock);
	return request;
}

void sp_mailbox_await(struct sp_mailbox *mailbox, struct sp_request *request, uint32_t seq)
{
	pthread_mutex_lock(&mailbox->lock);
	request->seq = seq;
	request->state = SP_WAITING;
	pthread_cond_broadcast(&mailbox->changed);
	pthread_mutex_unlock(&mailbox->lock);
}

static void settle(struct sp_request *request, int result, const char *text)
{
	request->result = result;
	if (text)
		snprintf(request->text, sizeof(request->text), "%s", text);
	request->state = SP_DONE;
}

void sp_mailbox_tell(struct sp_mailbox *mailbox, struct sp_request *request,
		     const struct sp_clone_progress *progress)
{
	pthread_mutex_lock(&mailbox->lock);
	request->progress = *progress;
	request->news = request->told;
	pthread_cond_broadcast(&mailbox->changed);
	pthread_mutex_unlock(&mailbox->lock);
}

void sp_mailbox_done(struct sp_mailbox *mailbox, struct sp_request *request, int result,
		     const char *text)
{
	pthread_mutex_lock(&mailbox->lock);
	settle(request, result, text);
	pthread_cond_broadcast(&mailbox->changed);
	pthread_mutex_unlock(&mailbox->lock);
}

void sp_mailbox_renew(struct sp_mailbox *mailbox, enum sp_request_kind kind)
{
	struct sp_request *request;
	bool any = false;

	pthread_mutex_lock(&mailbox->lock);
	for (request = mailbox->first; request; request = request->next) {
		if (request->state != SP_WAITING || request->seq || request->kind != kind)
			continue;
		request->state = SP_NEW;
		any = true;
	}
	pthread_mutex_unlock(&mailbox->lock);
	if (any)
		sp_mailbox_ring(mailbox);
}

void sp_mailbox_fail_awaited(struct sp_mailbox *mailbox, int result, const char *text)
{
	struct sp_request *request;

	pthread_mutex_lock(&mailbox->lock);
	for (request = mailbox->first; request; request = request->next)
		if (request->state == SP_WAITING && request->seq)
			settle(request, result, text);
	pthread_cond_broadcast(&mailbox->changed);
	pthread_mutex_unlock(&mailbox->lock);
}

void sp_mailbox_close(struct sp_mailbox *mailbox, int result)
{
	struct sp_request *request;

	pthread_mutex_lock(&mailbox->lock);
	mailbox->closed = result;
	for (request = mailbox->first; request; request = request->next)
		if (request->state != SP_DONE)
			settle(request, result, CLOSED);
	pthread_cond_broadcast(&mailbox->changed);
	pthread_mutex_unlock(&mailbox->lock);
}
