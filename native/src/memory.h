/*
 * An arena's memory and its shadow.
 *
 * A mapping of anonymous memory can only grow together with its neighbour when both count their
 * pages from the same origin and belong to the same reverse map (anon_vma) of the kernel. Memory
 * that is filled at some side address and then moved never does: each restored run would stay a
 * mapping of its own for ever. So every arena has a shadow: as many addresses, empty, cut from the
 * same mapping, so that its page i carries the number of the arena's page i. What is filled there
 * and moved over joins what lies beside it.
 */
#ifndef SP_MEMORY_H
#define SP_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* n pages of zeros that no child inherits, and their shadow, which holds no memory. NULL: the
 * system has none. */
uint8_t *sp_memory_map(size_t n, uint8_t **shadow);

/* Unmap n pages of either. */
void sp_memory_unmap(uint8_t *memory, size_t n);

#endif
