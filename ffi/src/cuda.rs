//! Attention on CUDA: always exported.

use crate::boundary::guard;
use crate::types::*;

/// Size and alignment of the device workspace that hyperattn_cuda_forward() needs.
/// HYPERATTN_STATUS_UNSUPPORTED when hyperattn_has_feature(HYPERATTN_FEATURE_CUDA) is false, as in this version.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_forward_workspace(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    let _ = (params, tensors, out);
    not_built("hyperattn_cuda_forward_workspace")
}

/// hyperattn_forward() for tensors in device memory, enqueued on exec.stream. HYPERATTN_STATUS_UNSUPPORTED when
/// hyperattn_has_feature(HYPERATTN_FEATURE_CUDA) is false, as in this version.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_forward(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cuda_exec,
) -> hyperattn_status {
    let _ = (params, tensors, exec);
    not_built("hyperattn_cuda_forward")
}

/// Size and alignment of the device workspace that hyperattn_cuda_backward() needs. Like
/// hyperattn_cuda_forward_workspace().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_backward_workspace(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    let _ = (params, tensors, out);
    not_built("hyperattn_cuda_backward_workspace")
}

/// hyperattn_backward() for tensors in device memory. Like hyperattn_cuda_forward().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_backward(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    grads: *const hyperattn_grads,
    exec: *const hyperattn_cuda_exec,
) -> hyperattn_status {
    let _ = (params, tensors, grads, exec);
    not_built("hyperattn_cuda_backward")
}

fn not_built(entry: &str) -> hyperattn_status {
    guard(|| Err(hyperattn_cuda::not_built(entry).into()))
}
