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
    CHECK(layout.size == 77 && layout.align == 88);
    /* Data are not looked at. */
    fresh(&c, &exec);
    c.tensors.q.data = c.tensors.k.data = c.tensors.v.data = c.tensors.out.data = NULL;
    CHECK_OK(hyperattn_cuda_forward_workspace(&c.params, &c.tensors, &layout));
}

/* Sequences, methods of heads and plans: what is wrong with them is told before a device is looked for. */
static void divisions_and_plans(void)
{
    static const int32_t starts_q[] = {0, 2, 5}, starts_k[] = {0, 3, 7}, wrong[] = {0, 3, 6};
    static const hyperattn_method methods[] = {HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_AUTO, 77};
    BAD_CUDA((c.params.head_methods = methods), INVALID, "head_methods[3] = 77");
    BAD_CUDA((c.tensors.num_sequences = 2, c.tensors.cu_seqlens_q = starts_q, c.tensors.cu_seqlens_k = starts_k), INVALID,
             "q.shape[0] (batch) = 2");

    bad_call c;
    hyperattn_cuda_exec exec;
    hyperattn_layout layout = {77, 88}, need = {0, 0};
    hyperattn_cuda_plan *plan = NULL;
    fresh(&c, &exec);
    c.tensors.q.shape[0] = c.tensors.k.shape[0] = c.tensors.v.shape[0] = 1;
    c.tensors.out.shape[0] = c.tensors.lse.shape[0] = 1;
    memset(&c.tensors.error, 0, sizeof c.tensors.error);
    c.tensors.num_sequences = 2;
    c.tensors.cu_seqlens_q = starts_q;
    c.tensors.cu_seqlens_k = wrong;
    bad_call_forget_error();
    hyperattn_status status = hyperattn_cuda_forward_workspace(&c.params, &c.tensors, &layout);
    bad_call_expect_error("sequences", status, INVALID, PARTS("cu_seqlens_k[2] = 6", "7"));
    bad_call_forget_error();
    status = hyperattn_cuda_plan_create(&c.params, &c.tensors, &plan);
    bad_call_expect_error("plan of sequences", status, INVALID, PARTS("cu_seqlens_k[2] = 6", "7"));
    c.tensors.cu_seqlens_k = starts_k;
    CHECK_OK(hyperattn_cuda_forward_workspace(&c.params, &c.tensors, &need));
    bad_call_forget_error();
    status = hyperattn_cuda_plan_create(&c.params, &c.tensors, &plan);
    bad_call_expect_error("plan without a context", status, HYPERATTN_STATUS_DEVICE_UNAVAILABLE, PARTS("CUDA"));
    CHECK(plan == NULL);
    bad_call_forget_error();
    bad_call_expect_error("plan to nowhere", hyperattn_cuda_plan_create(&c.params, &c.tensors, NULL), INVALID,
                          PARTS("out is NULL"));
    bad_call_forget_error();
    bad_call_expect_error("run of nothing", hyperattn_cuda_plan_run(NULL, &c.tensors, &exec), INVALID,
                          PARTS("plan is NULL"));
    bad_call_forget_error();
    bad_call_expect_error("workspace of nothing", hyperattn_cuda_plan_workspace(NULL, &layout), INVALID,
                          PARTS("plan is NULL"));
    hyperattn_cuda_plan_destroy(NULL);
    CHECK(layout.size == 77 && layout.align == 88);
}

void bad_cuda_calls(void)
{
    CHECK(hyperattn_has_feature(HYPERATTN_FEATURE_CUDA));
    no_context();
    wrong_arguments();
    wrong_workspace_queries();
    divisions_and_plans();
}
