/* CUDA calls that are wrong, and correct ones of a program that has no CUDA context: no driver, no device, or none made
 * current. */
#include "bad_calls.h"

#include <string.h>

/* A correct call of EXACT; its tensors would have to be in device memory, but it does not come to that. */
static void fresh(bad_call *c, hyperattn_cuda_exec *exec)
{
    bad_call_fresh(c);
    c->params.method = HYPERATTN_METHOD_EXACT;
    memset(exec, 0, sizeof *exec);
    exec->struct_size = sizeof *exec;
}

static void expect(const char *name, const bad_call *c, const hyperattn_cuda_exec *exec, hyperattn_status status,
                   int count, const char *const *parts, int line)
{
    bad_call_forget_error();
    problem_poison_outputs(&bad_call_problem);
    hyperattn_status actual = hyperattn_cuda_forward(c->params_argument, c->tensors_argument, exec);
    bad_call_expect_error(name, actual, status, count, parts, line);
    CHECK(array_untouched(&bad_call_problem.out));
    CHECK(array_untouched(&bad_call_problem.lse));
    CHECK(array_untouched(&bad_call_problem.error));
}

/* `change` is an expression on `c` and `exec`. */
#define BAD_CUDA(change, status, ...) \
    do { \
        bad_call c; \
        hyperattn_cuda_exec exec; \
        fresh(&c, &exec); \
        change; \
        expect(#change, &c, &exec, status, PARTS(__VA_ARGS__)); \
    } while (0)

static void no_context(void)
{
    const hyperattn_status unavailable = HYPERATTN_STATUS_DEVICE_UNAVAILABLE;
    BAD_CUDA((void)0, unavailable, "CUDA");
    BAD_CUDA(c.params.method = HYPERATTN_METHOD_AUTO, unavailable, "CUDA");
    BAD_CUDA(c.tensors.lse.data = NULL, unavailable, "CUDA");
    hyperattn_layout need = {0, 0};
    bad_call call;
    hyperattn_cuda_exec unused;
    fresh(&call, &unused);
    expect("without exec", &call, NULL, unavailable, PARTS("CUDA"));
    CHECK_OK(hyperattn_cuda_forward_workspace(&call.params, &call.tensors, &need));
    CHECK(need.size > 0 && need.align > 0 && (need.align & (need.align - 1)) == 0);
    /* As much as is needed, where memory could be. */
    BAD_CUDA((exec.workspace.data = (void *)(need.align << 8), exec.workspace.size = need.size), unavailable, "CUDA");
    BAD_CUDA((exec.workspace.data = (void *)(need.align << 8), exec.workspace.size = need.size - 1),
             HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, "workspace.size");
    BAD_CUDA((exec.workspace.data = (void *)(need.align + 1), exec.workspace.size = need.size),
             HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, "workspace.data");
    BAD_CUDA(c.params.flags = HYPERATTN_FLAG_NO_ALLOC, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, "NO_ALLOC");
}

static void wrong_arguments(void)
{
    BAD_CUDA(c.tensors.mask = c.tensors.q, HYPERATTN_STATUS_UNSUPPORTED, "tensors.mask", "CUDA");
    BAD_CUDA(c.params_argument = NULL, INVALID, "params is NULL");
    BAD_CUDA(c.tensors_argument = NULL, INVALID, "tensors is NULL");
    BAD_CUDA(c.tensors.q.dtype = 9, INVALID, "q.dtype = 9");
    BAD_CUDA(c.tensors.k.data = NULL, INVALID, "k.data is NULL");
    BAD_CUDA(c.tensors.v.shape[2] = 6, INVALID, "v.shape[2] = 6");
    BAD_CUDA(c.tensors.out.data = c.tensors.q.data, INVALID, "overlap");
    BAD_CUDA(c.tensors.q.data = (char *)c.tensors.q.data + 1, INVALID, "q.data");
    BAD_CUDA(c.tensors.block_mask = &c.block_mask, INVALID, "block_mask");
    BAD_CUDA((c.params.method = HYPERATTN_METHOD_PAPER, c.tensors.block_mask = &c.block_mask,
              c.block_mask.num_key_blocks = 3),
             INVALID, "num_key_blocks = 3");
    BAD_CUDA((c.params.method = HYPERATTN_METHOD_PAPER, c.tensors.block_mask = &c.block_mask,
              c.block_mask.row_offsets = NULL),
             INVALID, "row_offsets is NULL");
    BAD_CUDA(exec.struct_size = 9, HYPERATTN_STATUS_ABI_MISMATCH, "exec.struct_size = 9");
    BAD_CUDA(exec.workspace.size = 1, INVALID, "exec.workspace.data is NULL");
}

static void wrong_workspace_queries(void)
{
    bad_call c;
    hyperattn_cuda_exec exec;
    fresh(&c, &exec);
    hyperattn_layout layout = {77, 88};
    bad_call_forget_error();
    hyperattn_status status = hyperattn_cuda_forward_workspace(&c.params, &c.tensors, NULL);
    bad_call_expect_error("workspace to nowhere", status, INVALID, PARTS("out is NULL"));
    c.tensors.k.shape[3] = 17;
    bad_call_forget_error();
    status = hyperattn_cuda_forward_workspace(&c.params, &c.tensors, &layout);
    bad_call_expect_error("workspace of nonsense", status, INVALID, PARTS("k.shape[3] = 17"));
    fresh(&c, &exec);
    c.tensors.mask = c.tensors.q;
    bad_call_forget_error();
    status = hyperattn_cuda_forward_workspace(&c.params, &c.tensors, &layout);
    bad_call_expect_error("workspace with a mask", status, HYPERATTN_STATUS_UNSUPPORTED, PARTS("tensors.mask"));
    CHECK(layout.size == 77 && layout.align == 88);
    /* Data are not looked at. */
    fresh(&c, &exec);
    c.tensors.q.data = c.tensors.k.data = c.tensors.v.data = c.tensors.out.data = NULL;
    CHECK_OK(hyperattn_cuda_forward_workspace(&c.params, &c.tensors, &layout));
}

void bad_cuda_calls(void)
{
    CHECK(hyperattn_has_feature(HYPERATTN_FEATURE_CUDA));
    no_context();
    wrong_arguments();
    wrong_workspace_queries();
}
