/* Wrong calls of hyperattn_diagnose: the entries stay as they were. */
#include <math.h>
#include <string.h>

#include "bad_calls.h"

enum { HEADS = 8 };

/* The arguments behind params, tensors and exec. */
typedef struct diagnose_call {
    uint32_t flags;
    hyperattn_diagnosis heads[HEADS];
    hyperattn_diagnosis *heads_argument;
    size_t count;
} diagnose_call;

static void fresh_diagnose(bad_call *c, diagnose_call *d)
{
    bad_call_fresh_estimator(c);
    memset(d, 0, sizeof *d);
    for (int h = 0; h < HEADS; h += 1) {
        d->heads[h].struct_size = sizeof d->heads[h];
        d->heads[h].alpha = -77.0;
    }
    d->heads_argument = d->heads;
    d->count = HEADS;
}

static void expect_diagnose(const char *name, const bad_call *c, const diagnose_call *d, hyperattn_status status,
                            int count, const char *const *parts, int line)
{
    hyperattn_diagnosis before[HEADS];
    memcpy(before, d->heads, sizeof before);
    bad_call_forget_error();
    hyperattn_status actual = hyperattn_diagnose(c->params_argument, c->tensors_argument, c->exec_argument, d->flags,
                                                 d->heads_argument, d->count);
    bad_call_expect_error(name, actual, status, count, parts, line);
    CHECK_BYTES(d->heads, before, sizeof before);
}

/* `change` is an expression on `c` and `d`, the fresh call. */
#define BAD_DIAGNOSE(change, status, ...) \
    do { \
        bad_call c; \
        diagnose_call d; \
        fresh_diagnose(&c, &d); \
        change; \
        expect_diagnose(#change, &c, &d, status, PARTS(__VA_ARGS__)); \
    } while (0)

void bad_diagnoses(void)
{
    BAD_DIAGNOSE(c.params_argument = NULL, INVALID, "params", "NULL");
    BAD_DIAGNOSE(c.tensors_argument = NULL, INVALID, "tensors", "NULL");
    BAD_DIAGNOSE(d.heads_argument = NULL, INVALID, "heads", "NULL");
    BAD_DIAGNOSE(d.heads_argument = (hyperattn_diagnosis *)((char *)d.heads + 4), INVALID, "heads", "misaligned");
    BAD_DIAGNOSE(d.flags = 2, INVALID, "flags", "2");
    BAD_DIAGNOSE(d.flags = 0x80000001u, INVALID, "flags", "80000001");
    BAD_DIAGNOSE(d.count = 0, INVALID, "count", "0", "8");
    BAD_DIAGNOSE(d.count = 7, INVALID, "count", "7", "8");
    BAD_DIAGNOSE(d.count = SIZE_MAX, INVALID, "count", "8");

    BAD_DIAGNOSE(d.heads[0].struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "heads[0].struct_size", "0");
    BAD_DIAGNOSE(d.heads[0].struct_size = 12, HYPERATTN_STATUS_ABI_MISMATCH, "heads[0].struct_size", "12");
    BAD_DIAGNOSE(d.heads[0].struct_size = sizeof d.heads[0] - 1, HYPERATTN_STATUS_ABI_MISMATCH, "struct_size");
    /* A longer entry whose part beyond this version is the next one's struct_size, which is not zero. */
    BAD_DIAGNOSE(d.heads[0].struct_size = sizeof d.heads[0] + 8, HYPERATTN_STATUS_ABI_MISMATCH, "heads[0]", "nonzero");
    BAD_DIAGNOSE((d.heads[0].struct_size += 1, d.heads[1].struct_size = 0), HYPERATTN_STATUS_ABI_MISMATCH, "heads[0]",
                 "misalign");
    BAD_DIAGNOSE(d.heads[5].struct_size = 16, HYPERATTN_STATUS_ABI_MISMATCH, "heads[5].struct_size", "16", "heads[0]");
    BAD_DIAGNOSE(d.heads[7].struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "struct_size", "0");

    BAD_DIAGNOSE(c.params.method = 77, INVALID, "method", "77");
    BAD_DIAGNOSE(c.params.budget = 5, INVALID, "budget", "5");
    BAD_DIAGNOSE(c.params.residual = 77, INVALID, "residual", "77");
    BAD_DIAGNOSE(c.params.target_error = NAN, INVALID, "target_error", "NaN");
    BAD_DIAGNOSE(c.params.flags = HYPERATTN_FLAG_NO_ALLOC, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, "NO_ALLOC");
    BAD_DIAGNOSE(c.tensors.q.data = NULL, INVALID, "q.data", "NULL");
    BAD_DIAGNOSE(c.tensors.v.data = NULL, INVALID, "v.data", "NULL");
    BAD_DIAGNOSE(c.tensors.k.shape[3] = 15, INVALID, "k.shape[3]", "15");
    BAD_DIAGNOSE(c.exec.reserved = 1, INVALID, "exec.reserved", "1");
    BAD_DIAGNOSE((c.exec.pool = &c.pool, c.pool.parallel_for = NULL), INVALID, "parallel_for", "NULL");
    CHECK(array_untouched(&bad_call_problem.out));
}
