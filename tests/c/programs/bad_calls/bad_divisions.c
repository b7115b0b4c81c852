/* Wrong sequences and wrong methods of heads. */
#include <string.h>

#include "bad_calls.h"

/* Starts of sequences in the rows of a problem of 5 queries and 7 keys. */
typedef struct division {
    int32_t q[4], k[4];
    hyperattn_method methods[4];
} division;

static void fresh_division(bad_call *c, division *d)
{
    static const division starts = {
        {0, 2, 2, 5}, {0, 3, 6, 7}, {HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_PAPER, 0, HYPERATTN_METHOD_REFINED}};
    bad_call_fresh(c);
    *d = starts;
    c->tensors.q.shape[0] = c->tensors.k.shape[0] = c->tensors.v.shape[0] = 1;
    c->tensors.out.shape[0] = c->tensors.lse.shape[0] = 1;
    memset(&c->tensors.error, 0, sizeof c->tensors.error);
    c->tensors.num_sequences = 3;
    c->tensors.cu_seqlens_q = d->q;
    c->tensors.cu_seqlens_k = d->k;
    c->params.head_methods = d->methods;
}

/* `change` is an expression on `c` and `d`, the fresh call. */
#define BAD_DIVISION(change, status, ...) \
    do { \
        bad_call c; \
        division d; \
        fresh_division(&c, &d); \
        change; \
        bad_call_expect(#change, &c, status, PARTS(__VA_ARGS__)); \
    } while (0)

void bad_divisions(void)
{
    bad_call call;
    division unchanged;
    fresh_division(&call, &unchanged);
    CHECK_OK(hyperattn_forward(&call.params, &call.tensors, &call.exec));

    BAD_DIVISION(c.tensors.num_sequences = -1, INVALID, "num_sequences", "-1");
    BAD_DIVISION(c.tensors.num_sequences = INT64_MAX, INVALID, "num_sequences", "9223372036854775807");
    BAD_DIVISION(c.tensors.cu_seqlens_q = NULL, INVALID, "cu_seqlens_q is NULL");
    BAD_DIVISION(c.tensors.cu_seqlens_k = NULL, INVALID, "cu_seqlens_k is NULL");
    BAD_DIVISION(c.tensors.cu_seqlens_k = (const int32_t *)((const char *)d.k + 1), INVALID, "cu_seqlens_k",
                 "misaligned");
    BAD_DIVISION(c.tensors = bad_call_problem.tensors; c.tensors.num_sequences = 3; c.tensors.cu_seqlens_q = d.q;
                 c.tensors.cu_seqlens_k = d.k, INVALID, "num_sequences = 3", "q.shape[0] (batch) = 2");
    BAD_DIVISION(d.q[0] = 1, INVALID, "cu_seqlens_q[0] = 1", "0");
    BAD_DIVISION(d.k[0] = -1, INVALID, "cu_seqlens_k[0] = -1", "0");
    BAD_DIVISION(d.q[2] = 1, INVALID, "cu_seqlens_q[2] = 1", "cu_seqlens_q[1] = 2");
    BAD_DIVISION(d.k[3] = 8, INVALID, "cu_seqlens_k[3] = 8", "k.shape[2] = 7");
    BAD_DIVISION(c.tensors.num_sequences = 2, INVALID, "cu_seqlens_q[2] = 2", "q.shape[2] = 5");
    BAD_DIVISION(c.tensors.error = bad_call_problem.error.view, INVALID, "error.shape[0] = 2", "num_sequences = 3");
    BAD_DIVISION((c.tensors.block_mask = &c.block_mask, c.block_mask.row_offsets = c.row_offsets,
                  c.block_mask.columns = c.columns),
                 INVALID, "block_mask", "num_sequences = 3");
    BAD_DIVISION(d.methods[2] = 77, INVALID, "head_methods[2] = 77");
    BAD_DIVISION(c.params.head_methods = (const hyperattn_method *)((const char *)d.methods + 2), INVALID,
                 "head_methods", "misaligned");

    hyperattn_diagnosis heads[4];
    memset(heads, 0, sizeof heads);
    bad_call_forget_error();
    hyperattn_status status = hyperattn_diagnose(&call.params, &call.tensors, &call.exec, 0, heads, 4);
    bad_call_expect_error("diagnose", status, HYPERATTN_STATUS_UNSUPPORTED, PARTS("num_sequences = 3", "head_methods"));
}
