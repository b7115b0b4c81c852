/* Entry points that this version declares but does not have. */
#include "bad_calls.h"

static void cuda_backward(void)
{
    bad_call c;
    bad_call_fresh(&c);
    hyperattn_grads grads = {sizeof grads, c.tensors.out, c.tensors.q, c.tensors.k, c.tensors.v, c.tensors.lse};
    hyperattn_cuda_exec exec = {sizeof exec, {NULL, 0}, NULL};
    hyperattn_layout layout = {77, 88};
    for (int null = 0; null < 2; null += 1) {
        const hyperattn_params *params = null ? NULL : &c.params;
        const hyperattn_tensors *tensors = null ? NULL : &c.tensors;
        const hyperattn_cuda_exec *exec_argument = null ? NULL : &exec;
        hyperattn_layout *out = null ? NULL : &layout;

        bad_call_forget_error();
        hyperattn_status status = hyperattn_cuda_backward(params, tensors, null ? NULL : &grads, exec_argument);
        bad_call_expect_error("cuda_backward", status, HYPERATTN_STATUS_UNSUPPORTED, PARTS("backward"));
        bad_call_forget_error();
        status = hyperattn_cuda_backward_workspace(params, tensors, out);
        bad_call_expect_error("cuda_backward_workspace", status, HYPERATTN_STATUS_UNSUPPORTED, PARTS("backward"));
    }
    CHECK(layout.size == 77 && layout.align == 88);
}

void unsupported_calls(void)
{
    problem_poison_outputs(&bad_call_problem);
    cuda_backward();
    CHECK(array_untouched(&bad_call_problem.out));
}
