/* Inputs on which hashing can succeed: queries, keys and values in clusters, a query's weight mostly in its own. */
#ifndef CLUSTERS_H
#define CLUSTERS_H

#include "problem.h"

/* Overwrites Q, K and V: row i belongs to a random one of `clusters`; centres are N(0, 1), rows are off by N(0, noise). */
void clusters_fill(const problem *p, int clusters, double noise, random_source *source);

#endif
