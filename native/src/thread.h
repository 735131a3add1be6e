/*
 * The library's threads: all signals blocked, so that the application's handlers never run there.
 */
#ifndef SP_THREAD_H
#define SP_THREAD_H

#include <pthread.h>

/* -errno. `name` is at most 15 characters. */
int sp_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);

#endif
