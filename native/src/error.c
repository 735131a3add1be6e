#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include "samepage.h"

static _Thread_local char text[512] = "no error";

int sp_fail(int error, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	return error;
}

const char *sp_error(void)
{
	return text;
}
