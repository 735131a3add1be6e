/*
 * Load a file into an arena, share it, and tell what that saved.
 *
 *     share FILE [NAME]
 *
 * Run it beside a Python program (or a second copy of itself, under another name) that loads the
 * same file: the pages are stored once. It prints a line of JSON, then waits for the end of its
 * standard input, so that somebody can look at it.
 */
#include <errno.h>
#include <fcntl.h>
#include <samepage.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHARE_MS 30000

static int fail(const char *what)
{
	fprintf(stderr, "share: %s: %s\n", what, sp_error());
	return 1;
}

/* read(2) writes straight into the arena, as any program would. */
static int load(int file, uint8_t *data, size_t size)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = read(file, data + done, size - done);

		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		done += (size_t)n;
	}
	return 0;
}

static int share(struct sp_node *node, int file, const char *name, size_t size)
{
	struct sp_share_report report;
	struct sp_arena_stats stats;
	struct sp_arena *arena;
	char byte;

	if (sp_arena_create(node, name, NULL, size, &arena) < 0)
		return fail("cannot make the arena");
	if (load(file, sp_arena_data(arena), size) < 0) {
		perror("share: cannot read the file");
		sp_arena_free(arena);
		return 1;
	}
	if (sp_arena_share(arena, SHARE_MS, &report) < 0 || sp_arena_stats(arena, &stats) < 0) {
		sp_arena_free(arena);
		return fail("cannot share");
	}
	printf("{\"pages\": %llu, \"merged\": %llu, \"shared\": %llu, \"saved_bytes\": %llu}\n",
	       (unsigned long long)stats.pages, (unsigned long long)report.merged,
	       (unsigned long long)stats.shared_pages, (unsigned long long)stats.saved_bytes);
	fflush(stdout);
	while (read(STDIN_FILENO, &byte, 1) > 0)
		continue;
	sp_arena_free(arena);
	return 0;
}

int main(int argc, char **argv)
{
	struct sp_node *node;
	struct stat status;
	int file, result;

	if (argc < 2 || argc > 3) {
		fprintf(stderr, "usage: share FILE [NAME]\n");
		return 2;
	}
	file = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (file < 0 || fstat(file, &status) < 0) {
		perror(argv[1]);
		return 1;
	}
	if (sp_connect(NULL, &node) < 0)
		return fail("cannot connect");
	result = share(node, file, argc > 2 ? argv[2] : "share.c", (size_t)status.st_size);
	sp_disconnect(node);
	close(file);
	return result;
}
