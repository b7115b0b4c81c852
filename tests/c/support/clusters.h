/* Inputs on which hashing can succeed: queries, keys and values in clusters, a query's weight mostly in its own. */
#ifndef CLUSTERS_H
#define CLUSTERS_H

#include "problem.h"

/* Overwrites Q, K and V. Every cluster has the same share of the queries and of the keys, in random order: blocks that
 * match sorted queries and keys by rank then match clusters. Centres are N(0, 1), rows are off by noise * N(0, 1). */
void clusters_fill(const problem *p, int clusters, double noise, random_source *source);

#endif
