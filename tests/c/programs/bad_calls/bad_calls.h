/* One correct call as a starting point, and the check of a call that one change made wrong. */
#ifndef BAD_CALLS_H
#define BAD_CALLS_H

#include <hyperattn/hyperattn.h>

#include "check.h"
#include "problem.h"

/* Arguments that are correct until a case changes them. q [2, 4, 5, 16], k [2, 2, 7, 16], v [2, 2, 7, 8]. */
typedef struct bad_call {
    hyperattn_params params;
    hyperattn_tensors tensors;
    hyperattn_cpu_exec exec;
    hyperattn_threadpool pool;
    hyperattn_block_mask block_mask;
    int64_t row_offsets[4];
    int32_t columns[4];
    const hyperattn_params *params_argument;
    const hyperattn_tensors *tensors_argument;
    const hyperattn_cpu_exec *exec_argument;
} bad_call;

/* The tensors that every case starts from. */
extern problem bad_call_problem;

void bad_call_fresh(bad_call *call);
/* METHOD_PAPER with its estimator at work on the few keys there are. */
void bad_call_fresh_estimator(bad_call *call);
/* The same with a block mask, 3 query blocks of 2 and 2 key blocks of 4: rows {0}, {0, 1}, {1}. */
void bad_call_fresh_block_mask(bad_call *call);

/* hyperattn_forward must answer `status`, its sentence must contain every one of the `count` parts, and no byte of out,
 * lse and error may change. */
void bad_call_expect_forward(const char *name, const bad_call *call, hyperattn_status status, int count,
                             const char *const *parts, int line);
/* The same, and hyperattn_forward_workspace must answer alike. */
void bad_call_expect(const char *name, const bad_call *call, hyperattn_status status, int count,
                     const char *const *parts, int line);
/* Replaces the last error by one that no case expects, so that a sentence left from before fails a case. */
void bad_call_forget_error(void);
/* For calls other than forward: status and sentence of a call already made. Counts the case. */
void bad_call_expect_error(const char *name, hyperattn_status actual, hyperattn_status status, int count,
                           const char *const *parts, int line);
int bad_call_cases(void);

void bad_params(void);
void bad_tensors(void);
void bad_exec(void);
void bad_masks(void);
void bad_block_masks(void);
void bad_merges(void);
void bad_gradients(void);
void bad_diagnoses(void);
void bad_divisions(void);
void bad_plans(void);
void bad_cuda_calls(void);
void bad_cuda_gradients(void);

/* The last arguments are the parts of the sentence. */
#define PARTS(...) \
    (int)(sizeof((const char *[]){__VA_ARGS__}) / sizeof(const char *)), (const char *[]){__VA_ARGS__}, __LINE__
/* `change` is an expression on `c`, the fresh call. */
#define BAD(change, status, ...) \
    do { \
        bad_call c; \
        bad_call_fresh(&c); \
        change; \
        bad_call_expect(#change, &c, status, PARTS(__VA_ARGS__)); \
    } while (0)

#define INVALID HYPERATTN_STATUS_INVALID_ARGUMENT

#endif
