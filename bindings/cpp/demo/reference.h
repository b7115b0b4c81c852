#ifndef REFERENCE_H
#define REFERENCE_H
#include "inputs.h"

/* Relative Frobenius error |x - expected| / |expected|. */
double relative_error(const float *x, const float *expected, size_t count);

/* Relative Frobenius error of `out` [heads_q, n, head_dim] on a few rows of every head,
 * spread from the first to the last, against softmax attention in double precision. */
double sampled_rows_error(const inputs *in, int64_t n, int causal, const float *out);

#endif
