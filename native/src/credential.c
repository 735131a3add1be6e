#include "credential.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static size_t read_all(int fd, char *token)
{
	size_t length = 0;
	ssize_t n;

	while (length < SP_CREDENTIAL_MAX &&
	       (n = read(fd, token + length, SP_CREDENTIAL_MAX - length)) > 0)
		length += (size_t)n;
	return length < SP_CREDENTIAL_MAX ? length : 0;
}

size_t sp_credential_read(const char *path, char *token)
{
	struct stat file;
	size_t length = 0;
	int fd;

	if (!*path)
		return 0;
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not stop the thread */
	if (fd < 0)
		return 0;
	if (!fstat(fd, &file) && S_ISREG(file.st_mode))
		length = read_all(fd, token);
	close(fd);
	while (length > 0 && strchr(" \t\r\n", token[length - 1]))
		length--;
	return length;
}
