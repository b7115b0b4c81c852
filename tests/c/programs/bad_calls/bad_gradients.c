/* Wrong calls of hyperattn_backward and its workspace query. */
#include <string.h>

#include "bad_calls.h"
#include "workspace.h"

/* Outputs of one call. */
static array dq, dk, dv;

static hyperattn_grads fresh_gradients(void)
{
    hyperattn_grads grads;
    memset(&grads, 0, sizeof grads);
    grads.struct_size = sizeof grads;
    grads.dout = bad_call_problem.q.view;
    grads.dout.shape[3] = bad_call_problem.out.view.shape[3];
    grads.dq = dq.view;
    grads.dk = dk.view;
    grads.dv = dv.view;
    return grads;
}

/* hyperattn_backward must answer `status`, and no byte of a gradient, of out or of lse may change. */
static void expect(const char *name, const bad_call *call, const hyperattn_grads *grads, hyperattn_status status,
                   int count, const char *const *parts, int line)
{
    uint64_t out = array_hash(&bad_call_problem.out), lse = array_hash(&bad_call_problem.lse);
    bad_call_forget_error();
    hyperattn_status actual =
        hyperattn_backward(call->params_argument, call->tensors_argument, grads, call->exec_argument);
    bad_call_expect_error(name, actual, status, count, parts, line);
    CHECK(array_untouched(&dq) && array_untouched(&dk) && array_untouched(&dv));
    CHECK(array_hash(&bad_call_problem.out) == out && array_hash(&bad_call_problem.lse) == lse);
}

/* `change` is an expression on `c` and `g`, a call that is correct without it. */
#define BAD_GRADIENTS(change, status, ...) \
    do { \
        bad_call c; \
        bad_call_fresh(&c); \
        hyperattn_grads g = fresh_gradients(); \
        change; \
        expect(#change, &c, &g, status, PARTS(__VA_ARGS__)); \
    } while (0)

static void no_gradients(void)
{
    bad_call c;
    bad_call_fresh(&c);
    expect("no gradients", &c, NULL, INVALID, PARTS("grads", "NULL"));
}

static void arguments(void)
{
    BAD_GRADIENTS(c.params_argument = NULL, INVALID, "params", "NULL");
    BAD_GRADIENTS(c.tensors_argument = NULL, INVALID, "tensors", "NULL");
    BAD_GRADIENTS(g.struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "grads.struct_size", "0");
    BAD_GRADIENTS(g.struct_size = 100, HYPERATTN_STATUS_ABI_MISMATCH, "grads.struct_size", "100");
    BAD_GRADIENTS(g.struct_size = 8, INVALID, "dout.dtype", "0");
    BAD_GRADIENTS(c.params.method = 9, INVALID, "params.method", "9");
    BAD_GRADIENTS(c.tensors.lse.data = NULL, INVALID, "lse");
    BAD_GRADIENTS(c.tensors.out.data = NULL, INVALID, "out.data", "NULL");
    BAD_GRADIENTS((c.params.flags = HYPERATTN_FLAG_NO_ALLOC, c.exec_argument = NULL),
                  HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, "workspace");
}

static void views(void)
{
    BAD_GRADIENTS(g.dout.data = NULL, INVALID, "dout.data", "NULL");
    BAD_GRADIENTS(g.dq.data = NULL, INVALID, "dq.data", "NULL");
    BAD_GRADIENTS(g.dk.data = NULL, INVALID, "dk.data", "NULL");
    BAD_GRADIENTS(g.dv.data = NULL, INVALID, "dv.data", "NULL");
    BAD_GRADIENTS(g.dout.dtype = HYPERATTN_DTYPE_BF16, INVALID, "dout.dtype", "q.dtype");
    BAD_GRADIENTS(g.dq.dtype = HYPERATTN_DTYPE_F16, INVALID, "dq.dtype", "q.dtype");
    BAD_GRADIENTS(g.dv.dtype = 7, INVALID, "dv.dtype", "7");
    BAD_GRADIENTS(g.dk.reserved = 3, INVALID, "dk.reserved", "3");
    BAD_GRADIENTS(g.dout.shape[3] = 7, INVALID, "dout.shape[3]", "7", "out.shape[3]", "8");
    BAD_GRADIENTS(g.dq.shape[2] = 4, INVALID, "dq.shape[2]", "4", "q.shape[2]", "5");
    BAD_GRADIENTS(g.dk.shape[1] = 1, INVALID, "dk.shape[1]", "1", "k.shape[1]", "2");
    BAD_GRADIENTS(g.dv.shape[0] = 1, INVALID, "dv.shape[0]", "1", "v.shape[0]", "2");
    BAD_GRADIENTS(g.dq.stride[3] = 2, INVALID, "dq.stride[3]", "2");
    BAD_GRADIENTS(g.dk.stride[2] = 0, INVALID, "dk", "overlap");
    BAD_GRADIENTS(g.dlse = c.tensors.out, INVALID, "dlse.shape[3]", "8", "lse.shape[3]", "1");
    BAD_GRADIENTS((g.dlse = c.tensors.lse, g.dlse.dtype = HYPERATTN_DTYPE_F16), INVALID, "dlse.dtype");
    BAD_GRADIENTS(g.dk.data = g.dq.data, INVALID, "dq", "dk", "overlap");
    BAD_GRADIENTS(g.dq.data = c.tensors.q.data, INVALID, "q", "dq", "overlap");
    BAD_GRADIENTS(g.dv.data = c.tensors.out.data, INVALID, "out", "dv", "overlap");
    BAD_GRADIENTS(g.dq.data = g.dout.data, INVALID, "dq", "overlap");
}

static void workspaces(void)
{
    bad_call c;
    bad_call_fresh_estimator(&c);
    hyperattn_grads g = fresh_gradients();
    hyperattn_layout layout = {77, 88};
    check_case("a refused workspace query writes nothing");
    c.tensors.lse.dtype = 0;
    bad_call_forget_error();
    hyperattn_status status = hyperattn_backward_workspace(&c.params, &c.tensors, &c.exec, &layout);
    bad_call_expect_error("no lse for the workspace", status, INVALID, PARTS("lse.dtype", "0"));
    CHECK(layout.size == 77 && layout.align == 88);
    c.tensors.lse = bad_call_problem.lse.view;
    bad_call_forget_error();
    status = hyperattn_backward_workspace(&c.params, &c.tensors, &c.exec, NULL);
    bad_call_expect_error("no place for the layout", status, INVALID, PARTS("out", "NULL"));

    CHECK_OK(hyperattn_backward_workspace(&c.params, &c.tensors, &c.exec, &layout));
    hyperattn_layout larger = {layout.size + 1, layout.align};
    workspace w = workspace_create(larger, 0xff);
    c.exec.workspace = w.buffer;
    c.exec.workspace.size = layout.size - 1;
    expect("one byte short", &c, &g, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace.size"));
    c.exec.workspace.data = (unsigned char *)w.buffer.data + 1;
    c.exec.workspace.size = layout.size;
    expect("misaligned", &c, &g, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace.data"));
    CHECK(workspace_surroundings_unchanged(&w));
    workspace_destroy(&w);
}

void bad_gradients(void)
{
    const hyperattn_tensor *q = &bad_call_problem.q.view, *k = &bad_call_problem.k.view;
    const hyperattn_tensor *v = &bad_call_problem.v.view;
    dq = array_create(q->dtype, ARRAY_BHSD, q->shape[0], q->shape[1], q->shape[2], q->shape[3]);
    dk = array_create(k->dtype, ARRAY_BHSD, k->shape[0], k->shape[1], k->shape[2], k->shape[3]);
    dv = array_create(v->dtype, ARRAY_BHSD, v->shape[0], v->shape[1], v->shape[2], v->shape[3]);
    no_gradients();
    arguments();
    views();
    workspaces();
    check_case("the unchanged call");
    bad_call c;
    bad_call_fresh(&c);
    hyperattn_grads g = fresh_gradients();
    CHECK_OK(hyperattn_forward(&c.params, &c.tensors, &c.exec));
    CHECK_OK(hyperattn_backward(&c.params, &c.tensors, &g, &c.exec));
    CHECK(tensor_all_finite(&dq.view) && tensor_all_finite(&dk.view) && tensor_all_finite(&dv.view));
    problem_poison_outputs(&bad_call_problem);
    array_destroy(&dq);
    array_destroy(&dk);
    array_destroy(&dv);
}
