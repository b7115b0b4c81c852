/* Small seeded generator for test inputs (SplitMix64). */
#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>

typedef struct random_source {
    uint64_t state;
} random_source;

uint64_t random_bits(random_source *source);
/* Uniform in [0, 1). */
double random_uniform(random_source *source);
/* Standard normal. */
double random_gaussian(random_source *source);

#endif
