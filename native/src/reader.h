/*
 * The reader thread: answers the scanner's orders for fingerprints, and carries share() to it.
 *
 * It only reads arena memory, and only pages that are there: touching an absent one would bring a
 * zero page. It may sleep on a page that the mover is just replacing, never for long.
 */
#ifndef SP_READER_H
#define SP_READER_H

#include "node.h"

/* Start the thread; it connects by itself, now and whenever the scanner comes back. -errno. */
int sp_reader_start(struct sp_node *node);

/* End the thread and wait for its end. */
void sp_reader_stop(struct sp_node *node);

#endif
