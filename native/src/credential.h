/*
 * What this process shows to daemons that ask who it is: a token in a file, which may be replaced by
 * a newer one at any time.
 */
#ifndef SP_CREDENTIAL_H
#define SP_CREDENTIAL_H

#include <stddef.h>

#define SP_CREDENTIAL_MAX 16384 /* bytes of a token */

/* The token in the file at `path`, without white space at its end, into `token` of
 * SP_CREDENTIAL_MAX bytes. Returns its length; 0: there is none (no path, no regular file that can
 * be read, or a longer one), and the daemon says what it wants. */
size_t sp_credential_read(const char *path, char *token);

#endif
