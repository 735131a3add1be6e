/*
 * sp_connect() and what belongs to a connection: start and end of the threads, fork.
 */
#include "node.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "error.h"
#include "mover.h"
#include "probe.h"
#include "reader.h"

#define DEFAULT_DIR "/run/samepage"
#define CONNECT_MS 5000
#define FETCH_MS 30000
#define MAP_COUNT_DEFAULT 65530

static pthread_mutex_t nodes_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sp_node *nodes;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
	pthread_mutex_lock(&nodes_lock);
}

static void after_fork_in_parent(void)
{
	pthread_mutex_unlock(&nodes_lock);
}

static void close_inherited(int fd)
{
	if (fd >= 0)
		close(fd);
}

/* The child has neither the threads nor the arenas, but copies of the descriptors: the daemons must
 * see the parent's end when it ends, so they are closed. */
static void after_fork_in_child(void)
{
	for (struct sp_node *node = nodes; node; node = node->next) {
		atomic_store(&node->forked, true);
		close_inherited(node->mover.link.sock);
		close_inherited(node->mover.link.window_fd);
		close_inherited(node->reader.link.sock);
		close_inherited(node->reader.link.window_fd);
		close_inherited(node->reader.pagemap);
		close_inherited(node->reader.maps);
		close_inherited(node->mover.pager.uffds.memory);
		close_inherited(node->mover.pager.uffds.store);
		close_inherited(node->mover.pager.pagemap);
		close_inherited(node->mover.pager.maps);
		for (struct sp_arena *arena = node->mover.arenas; arena; arena = arena->mover_next)
			close_inherited(arena->store);
	}
	pthread_mutex_unlock(&nodes_lock);
}

static void watch_forks(void)
{
	pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void enlist(struct sp_node *node)
{
	pthread_once(&fork_once, watch_forks);
	pthread_mutex_lock(&nodes_lock);
	node->next = nodes;
	nodes = node;
	pthread_mutex_unlock(&nodes_lock);
}

static void delist(const struct sp_node *node)
{
	struct sp_node **at = &nodes;

	pthread_mutex_lock(&nodes_lock);
	while (*at && *at != node)
		at = &(*at)->next;
	if (*at)
		*at = node->next;
	pthread_mutex_unlock(&nodes_lock);
}

void sp_node_put(struct sp_node *node)
{
	if (atomic_fetch_sub(&node->references, 1) != 1)
		return;
	sp_mailbox_destroy(&node->mover.mailbox);
	sp_mailbox_destroy(&node->reader.mailbox);
	pthread_mutex_destroy(&node->reading);
	free(node);
}

static const char *directory(const char *dir)
{
	if (!dir || !*dir)
		dir = getenv("SAMEPAGE_DIR");
	return dir && *dir ? dir : DEFAULT_DIR;
}

/* A daemon that refuses: 0 when it shall be asked once more, in its own version. */
static int answer_refusal(struct sp_link *link, const struct wire_hello *hello,
			  const struct sp_message *message)
{
	char text[SP_REQUEST_TEXT];
	int reason = -sp_link_refusal(message, text, sizeof(text));
	uint8_t theirs = message->header->version;
	int error = sp_link_step_back(link, hello, message);

	if (error == -EPROTONOSUPPORT)
		return sp_fail(error,
			       "the daemon at %s speaks protocol version %d, and this library %d to "
			       "%d: upgrade the %s",
			       link->path, theirs, WIRE_VERSION_OLDEST, WIRE_VERSION,
			       theirs > WIRE_VERSION ? "library" : "daemon");
	if (error == -ECONNREFUSED)
		return sp_fail(reason, "the daemon at %s refuses this process: %s", link->path, text);
	return error ? sp_fail(error, "the daemon at %s went away: %s", link->path, strerror(-error))
		     : 0;
}

/* Wait for WELCOME; the merger's /dev/userfaultfd goes to *device (-1: none came). */
static int await_welcome(struct sp_link *link, const struct wire_hello *hello, size_t window_bytes,
			 int *device)
{
	struct pollfd polled = {.fd = link->sock, .events = POLLIN};
	struct sp_message message;
	int result = poll(&polled, 1, CONNECT_MS);

	if (result == 0)
		return sp_fail(-ETIMEDOUT, "the daemon at %s did not answer within %d s; is it stopped?",
			       link->path, CONNECT_MS / 1000);
	result = sp_link_receive(link, &message);
	if (result <= 0)
		return sp_fail(result < 0 ? result : -EPROTO,
			       "what answers at %s is no samepage daemon", link->path);
	if (message.header->type == WIRE_REFUSED) {
		result = answer_refusal(link, hello, &message);
		sp_message_close(&message);
		/* each time in an older version, so this ends */
		return result ? result : await_welcome(link, hello, window_bytes, device);
	}
	result = sp_link_welcome(link, &message, window_bytes);
	*device = message.descriptors[1];
	message.descriptors[1] = -1;
	if (result)
		sp_fail(result, "what answers at %s is no samepage daemon", link->path);
	sp_message_close(&message);
	return result;
}

static int connect_merger(struct sp_link *link, const char *dir, const struct wire_hello *hello,
			  int *device)
{
	int error = sp_link_init(link, dir, "merger.sock");

	if (error)
		return sp_fail(error, "the socket directory's path is too long: %s", dir);
	error = sp_link_open(link, hello);
	if (error)
		return sp_fail(error,
			       "no merger answers at %s (%s): start samepage-merger, or set "
			       "SAMEPAGE_DIR to its socket directory",
			       link->path, strerror(-error));
	error = await_welcome(link, hello, SP_MERGER_WINDOW, device);
	if (error)
		sp_link_close(link);
	return error;
}

/* Connect to the scanner if it is there, so that the first share() finds it; if not, the reader
 * goes on trying. */
static int connect_scanner(struct sp_link *link, const char *dir, const struct wire_hello *hello)
{
	int none = -1, error = sp_link_init(link, dir, "scanner.sock");

	if (error)
		return sp_fail(error, "the socket directory's path is too long: %s", dir);
	if (!sp_link_open(link, hello) && await_welcome(link, hello, SP_SCANNER_WINDOW, &none))
		sp_link_close(link);
	if (none >= 0)
		close(none);
	return 0;
}

static int make_hello(struct wire_hello *hello)
{
	hello->pid = (uint32_t)getpid();
	if (getrandom(hello->agent, sizeof(hello->agent), 0) != sizeof(hello->agent))
		return sp_fail(-EIO, "the kernel gave no random bytes");
	return 0;
}

uint32_t sp_probe(const char *dir)
{
	struct sp_link *link = calloc(1, sizeof(*link));
	struct wire_hello hello = {0};
	uint32_t features = 0;
	struct sp_uffds uffds;
	int device = -1;

	if (link && dir && !make_hello(&hello) && !connect_merger(link, dir, &hello, &device))
		sp_link_close(link);
	free(link);
	if (!sp_probe_open(device, &features, &uffds))
		sp_uffds_close(&uffds);
	if (device >= 0)
		close(device);
	return features;
}

static size_t map_count_limit(void)
{
	FILE *file = fopen("/proc/sys/vm/max_map_count", "re");
	size_t limit = MAP_COUNT_DEFAULT;

	if (!file)
		return limit;
	if (fscanf(file, "%zu", &limit) != 1)
		limit = MAP_COUNT_DEFAULT;
	fclose(file);
	return limit;
}

/* Set up what sharing needs. Where the kernel lacks a piece, the node works without sharing. */
static int prepare_pager(struct sp_node *node, int device)
{
	struct sp_uffds uffds;
	int error = sp_probe_open(device, &node->hello.features, &uffds);
	bool can_share =
		!error && (node->hello.features & SP_FEATURES_NEEDED) == SP_FEATURES_NEEDED;

	node->mover.extents_budget = map_count_limit() / 2;
	if (!error && !can_share)
		sp_uffds_close(&uffds);
	if (!can_share)
		uffds = (struct sp_uffds){.memory = -1, .store = -1};
	error = sp_pager_init(&node->mover.pager, uffds, node->hello.features);
	if (error)
		return sp_fail(error, "cannot prepare to replace pages: %s", strerror(-error));
	if (!can_share)
		return 0; /* sealed arenas alone */
	error = sp_faults_start(&node->faults, &node->mover.pager, &node->mover.mailbox);
	if (error) {
		sp_pager_destroy(&node->mover.pager);
		return sp_fail(error, "cannot start a thread: %s", strerror(-error));
	}
	node->mover.can_share = true;
	return 0;
}

static void release_pager(struct sp_node *node)
{
	if (node->mover.can_share)
		sp_faults_stop(&node->faults);
	sp_pager_destroy(&node->mover.pager);
	node->mover.can_share = false;
}

static int start_threads(struct sp_node *node)
{
	int error = sp_mover_start(node);

	if (error)
		return sp_fail(error, "cannot start a thread: %s", strerror(-error));
	error = sp_reader_start(node);
	if (error) {
		sp_mover_stop(node);
		return sp_fail(error, "cannot start the fingerprinting thread (it needs "
				      "/proc/self/pagemap): %s",
			       strerror(-error));
	}
	return 0;
}

static struct sp_node *make_node(void)
{
	struct sp_node *node = calloc(1, sizeof(*node));

	if (!node)
		return NULL;
	atomic_init(&node->references, 1);
	pthread_mutex_init(&node->reading, NULL);
	node->mover.link.sock = node->mover.link.window_fd = -1;
	node->reader.link.sock = node->reader.link.window_fd = -1;
	node->reader.pagemap = node->reader.maps = -1;
	node->mover.pager = SP_PAGER_NONE;
	if (sp_mailbox_init(&node->mover.mailbox))
		goto no_mover;
	if (!sp_mailbox_init(&node->reader.mailbox))
		return node;
	sp_mailbox_destroy(&node->mover.mailbox);
no_mover:
	free(node);
	return NULL;
}

static int remember_token_file(struct sp_node *node)
{
	const char *path = getenv("SAMEPAGE_TOKEN_FILE");

	if (path && strlen(path) >= sizeof(node->token_file))
		return sp_fail(-ENAMETOOLONG, "the path in SAMEPAGE_TOKEN_FILE is too long");
	strcpy(node->token_file, path ? path : "");
	return 0;
}

int sp_connect(const char *dir, struct sp_node **out)
{
	struct sp_node *node = make_node();
	int device = -1, error;

	dir = directory(dir);
	if (!node)
		return sp_fail(-ENOMEM, "no memory, or no descriptor, is left");
	error = make_hello(&node->hello);
	if (!error)
		error = remember_token_file(node);
	if (!error)
		error = connect_merger(&node->mover.link, dir, &node->hello, &device);
	if (!error)
		error = prepare_pager(node, device);
	if (!error)
		error = connect_scanner(&node->reader.link, dir, &node->hello);
	if (device >= 0)
		close(device);
	if (!error)
		error = start_threads(node);
	if (error) {
		release_pager(node);
		sp_link_close(&node->reader.link);
		sp_link_close(&node->mover.link);
		sp_node_put(node);
		return error;
	}
	enlist(node);
	*out = node;
	return 0;
}

void sp_disconnect(struct sp_node *node)
{
	struct sp_request fetch = {.kind = SP_REQUEST_FETCH};

	if (atomic_load(&node->forked) || atomic_exchange(&node->closed, true))
		return;
	sp_mailbox_call(&node->mover.mailbox, &fetch, FETCH_MS);
	sp_reader_stop(node);
	sp_mover_stop(node);
	delist(node);
	release_pager(node);
	sp_node_put(node);
}
