/*
 * The token in a file: without white space at its end, and nothing from what is no file with a token.
 */
#include <sys/stat.h>

#include "check.h"
#include "credential.h"

static char path[64], token[SP_CREDENTIAL_MAX];

static size_t read_after_writing(const char *text, size_t length)
{
	FILE *file = fopen(path, "w");

	CHECK(file && fwrite(text, 1, length, file) == length && !fclose(file));
	memset(token, 'x', sizeof(token));
	return sp_credential_read(path, token);
}

int main(void)
{
	static char folder[] = "/tmp/samepage-credential-XXXXXX", large[SP_CREDENTIAL_MAX];

	CHECK(mkdtemp(folder));
	snprintf(path, sizeof(path), "%s/token", folder);
	CHECK(sp_credential_read("", token) == 0);
	CHECK(sp_credential_read(path, token) == 0);
	CHECK(sp_credential_read(folder, token) == 0);
	CHECK(read_after_writing("abc.def", 7) == 7 && !memcmp(token, "abc.def", 7));
	CHECK(read_after_writing("abc \r\n\n", 7) == 3 && !memcmp(token, "abc", 3));
	CHECK(read_after_writing(" \n", 2) == 0);
	CHECK(read_after_writing("", 0) == 0);
	memset(large, 'a', sizeof(large));
	CHECK(read_after_writing(large, sizeof(large) - 1) == sizeof(large) - 1);
	CHECK(read_after_writing(large, sizeof(large)) == 0);
	CHECK(!unlink(path) && !mkfifo(path, 0600));
	CHECK(sp_credential_read(path, token) == 0); /* does not wait for a writer */
	CHECK(!unlink(path) && !rmdir(folder));
	return 0;
}
