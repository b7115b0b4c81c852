/* Softmax attention by plain loops in double precision, with rounding-error bounds for a single-precision one. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <hyperattn/hyperattn.h>
#include <stdbool.h>

#include "problem.h"

typedef struct reference {
    hyperattn_tensor shape; /* of out; data is not used */
    double *out;            /* [batch, heads_q, n_q, d_v], contiguous */
    double *lse;            /* [batch, heads_q, n_q] */
    double *lse_bound;      /* per row: the largest error that single precision can cause in lse */
    double *value_limit;    /* per row: the largest |v| among the visible keys */
} reference;

/* Restricts the mask further; NULL where a program needs no more than hyperattn_mask. */
typedef bool (*reference_filter)(const void *context, int64_t batch, int64_t head, int64_t query, int64_t key);

/* Reads q, k, v and the mask of `tensors` through their strides. A scale of 0 means 1 / sqrt(head_dim). */
reference reference_compute(const hyperattn_tensors *tensors, hyperattn_mask mask, double scale,
                            reference_filter filter, const void *context);
void reference_destroy(reference *r);

bool mask_visible(hyperattn_mask mask, int64_t query, int64_t key, int64_t n_q, int64_t n_k);

/* |out - reference|_F / |reference|_F over all heads; 0 when both are 0. */
double reference_error(const reference *r, const hyperattn_tensor *out);
/* The same over one batch item and head. */
double reference_head_error(const reference *r, const hyperattn_tensor *out, int64_t batch, int64_t head);

/* The limit on the relative Frobenius error of exact attention for queries of this dtype. */
double reference_tolerance(hyperattn_dtype dtype);

/* Checks (check.h) out and lse of `tensors` as exact attention: the Frobenius limit over all, an element-wise limit that
 * no single wrong row can hide behind, lse within its bound, and empty rows exactly (0, -inf). */
void reference_check(const reference *r, const hyperattn_tensors *tensors);

/* Runs `params` on freshly poisoned outputs and checks the result as exact attention, with nothing written around it. */
void reference_expect_exact(problem *p, const hyperattn_params *params);

#endif
