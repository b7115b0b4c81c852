/* The number of words in text; -1 where text is NULL, which panics inside. */

#ifndef NEIGHBOUR_H
#define NEIGHBOUR_H

#include <stdint.h>

int64_t neighbour_count_words(const char *text);

#endif
