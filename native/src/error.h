/*
 * The text of a thread's last error, for sp_error().
 */
#ifndef SP_ERROR_H
#define SP_ERROR_H

/* Sets the text and returns `error` (negative errno), so that a function can end with it. */
int sp_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
