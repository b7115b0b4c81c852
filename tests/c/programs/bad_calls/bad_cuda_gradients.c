/* Wrong calls of hyperattn_cuda_backward and its workspace query. All are refused before a device is asked for. */
#include "bad_calls.h"

/* Gradients in memory of their own that nobody may touch; a call that is refused looks at layouts only. */
static hyperattn_grads fresh_gradients(const bad_call *call, float *memory)
{
    hyperattn_grads grads = {sizeof grads, call->tensors.out, call->tensors.q, call->tensors.k, call->tensors.v,
                             call->tensors.lse};
    grads.dq.data = memory;
    grads.dk.data = memory + 1024;
    grads.dv.data = memory + 2048;
    return grads;
}

/* `change` is an expression on `c` and `g`, of a call that `fresh` makes. */
#define BAD_CUDA_GRADIENTS(fresh, change, status, ...) \
    do { \
        bad_call c; \
        fresh(&c); \
        static float memory[3072]; \
        hyperattn_grads g = fresh_gradients(&c, memory), *grads = &g; \
        change; \
        bad_call_forget_error(); \
        hyperattn_status actual = hyperattn_cuda_backward(c.params_argument, c.tensors_argument, grads, NULL); \
        bad_call_expect_error(#change, actual, status, PARTS(__VA_ARGS__)); \
        for (int i = 0; i < 3072; i += 1) \
            CHECK(memory[i] == 0.0f); \
    } while (0)

static void arguments(void)
{
    BAD_CUDA_GRADIENTS(bad_call_fresh, c.params_argument = NULL, INVALID, "params", "NULL");
    BAD_CUDA_GRADIENTS(bad_call_fresh, c.tensors_argument = NULL, INVALID, "tensors", "NULL");
    BAD_CUDA_GRADIENTS(bad_call_fresh, grads = NULL, INVALID, "grads", "NULL");
    BAD_CUDA_GRADIENTS(bad_call_fresh, g.struct_size = 100, HYPERATTN_STATUS_ABI_MISMATCH, "grads.struct_size", "100");
    BAD_CUDA_GRADIENTS(bad_call_fresh, c.tensors.lse.data = NULL, INVALID, "lse");
    BAD_CUDA_GRADIENTS(bad_call_fresh, g.dk.data = NULL, INVALID, "dk.data", "NULL");
    BAD_CUDA_GRADIENTS(bad_call_fresh, g.dq.dtype = HYPERATTN_DTYPE_F16, INVALID, "dq.dtype", "q.dtype");
    BAD_CUDA_GRADIENTS(bad_call_fresh, g.dv.shape[0] = 1, INVALID, "dv.shape[0]", "1", "v.shape[0]", "2");
    BAD_CUDA_GRADIENTS(bad_call_fresh, g.dq.data = c.tensors.q.data, INVALID, "dq", "q", "overlap");
}

static void workspace_query(void)
{
    bad_call c;
    bad_call_fresh_estimator(&c);
    hyperattn_layout layout = {77, 88};
    bad_call_forget_error();
    bad_call_expect_error("out is NULL", hyperattn_cuda_backward_workspace(&c.params, &c.tensors, NULL), INVALID,
                          PARTS("out", "NULL"));
    c.tensors.lse.dtype = HYPERATTN_DTYPE_F16;
    bad_call_forget_error();
    bad_call_expect_error("lse.dtype", hyperattn_cuda_backward_workspace(&c.params, &c.tensors, &layout), INVALID,
                          PARTS("lse.dtype"));
    CHECK(layout.size == 77 && layout.align == 88);
    c.tensors.lse.dtype = HYPERATTN_DTYPE_F32;
    const hyperattn_residual residuals[] = {HYPERATTN_RESIDUAL_UNIFORM, HYPERATTN_RESIDUAL_ROW_NORM};
    for (int i = 0; i < 2; i += 1) {
        c.params.residual = residuals[i];
        layout.size = 0;
        CHECK(hyperattn_cuda_backward_workspace(&c.params, &c.tensors, &layout) == HYPERATTN_STATUS_OK);
        CHECK(layout.size > 77);
    }
    bad_call_fresh_block_mask(&c);
    layout.size = 0;
    CHECK(hyperattn_cuda_backward_workspace(&c.params, &c.tensors, &layout) == HYPERATTN_STATUS_OK);
    CHECK(layout.size > 77);
}

void bad_cuda_gradients(void)
{
    problem_poison_outputs(&bad_call_problem);
    arguments();
    workspace_query();
    CHECK(array_untouched(&bad_call_problem.out));
}
