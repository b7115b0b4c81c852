/* The tensors of one attention problem. */
#ifndef PROBLEM_H
#define PROBLEM_H

#include "array.h"

typedef struct problem_shape {
    int64_t batch, heads_q, heads_kv, n_q, n_k, d, d_v;
} problem_shape;

/* Element types of q, of k and v, and of out. */
typedef struct problem_dtypes {
    hyperattn_dtype q, kv, out;
} problem_dtypes;

/* Every combination that is legal. */
enum { LEGAL_DTYPES = 7 };
extern const problem_dtypes legal_dtypes[LEGAL_DTYPES];

typedef struct problem {
    array q, k, v, out, lse, error;
    hyperattn_tensors tensors; /* views of all but error, which is not asked for */
} problem;

/* Q, K and V are standard normal, out, lse and error poisoned. ARRAY_BROADCAST_BATCH applies to K and V only. */
problem problem_create_mixed(const problem_shape *shape, problem_dtypes dtypes, array_layout layout,
                             random_source *source);
/* The same with one dtype for q, k and v. */
problem problem_create(const problem_shape *shape, hyperattn_dtype dtype, hyperattn_dtype out_dtype,
                       array_layout layout, random_source *source);
void problem_destroy(problem *p);
/* Asks for the error tensor from the next call on. */
void problem_want_error(problem *p);
/* Poisons out, lse and error, for the next call. */
void problem_poison_outputs(problem *p);
/* A shorter way to default parameters with one method and mask. */
hyperattn_params problem_params(hyperattn_method method, hyperattn_mask mask);
/* Parameters with which problems of a few hundred keys are estimated, in sub-problems of more than min_seq_len keys. */
hyperattn_params problem_small_params(hyperattn_method method, hyperattn_mask mask, int64_t min_seq_len);
hyperattn_cpu_exec problem_exec(uint32_t num_threads);

const char *mask_name(hyperattn_mask mask);
const char *dtype_name(hyperattn_dtype dtype);

#endif
