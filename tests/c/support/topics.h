/* Inputs like those of a language model: neighbouring queries look for the same things, and the first keys draw a
 * part of every query's weight. */
#ifndef TOPICS_H
#define TOPICS_H

#include "problem.h"

/* Overwrites Q, K and V. Keys come in runs of 8 on one of `topics` topics, queries in runs of 256. Topics are N(0, 1),
 * rows are off by noise * N(0, 1). With sink > 0 the first four keys have a logit of about `sink` with every query (for
 * the default scale), and small values. */
void topics_fill(const problem *p, int topics, double noise, double sink, random_source *source);

#endif
