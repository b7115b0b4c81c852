//! The gradients of attention on CUDA: always exported.

use hyperattn_cuda::{DeviceGradients, DeviceTensors};

use crate::backward::read_grads;
use crate::boundary::{check_pointer, guard};
use crate::cuda::{Arguments, check_data, device_tensor, device_tensors, read_exec, workspace_of};
use crate::error::Result;
use crate::tensor;
use crate::types::*;

/// Size and alignment of the device workspace that hyperattn_cuda_backward() needs for the same params and tensors. Needs
/// no device. The tensors' data are not looked at and may be NULL; *out is written on success only.
///
/// Linear in the sequence: 8 bytes for every query row, and the lists of tiles. Exact attention of 16-bit tensors of up to 128
/// dimensions takes 4 head_dim + 4 bytes for a query row more. METHOD_PAPER takes what hyperattn_cuda_forward_workspace()
/// answers, with sums of 4 head_dim + 4 bytes for a query row under a causal mask or with RESIDUAL_ROW_NORM, and of
/// 4 (head_dim + value_dim) for a key row; the lists of a block mask twice. METHOD_REFINED takes what that answers, with sums
/// of 4 (head_dim + value_dim) bytes for the key rows of a set of KV heads, 1 GiB or one head, and up to 1 GiB, or what the
/// listed keys of one tile take, of partial sums. Head_methods that differ among the query heads of one
/// KV head take 8 (head_dim + value_dim) bytes for each of its keys more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_backward_workspace(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointers are what the header asks for, and out is neither NULL nor misaligned.
        unsafe {
            let arguments = Arguments::read(params, tensors, |from| read_layouts(from))?;
            out.write(arguments.workspace(hyperattn_cuda::backward_divided_workspace)?);
        }
        Ok(())
    })
}

/// hyperattn_backward() for tensors in device memory, enqueued on exec->stream: it returns before the gradients are
/// complete. What hyperattn_cuda_forward() says of pointers, the workspace, capture and errors holds here too.
///
/// The same arguments give the same bits: no sum depends on the order in which threads run, unless
/// HYPERATTN_FLAG_NONDETERMINISTIC permits it. 16-bit kernels round each pair's share and slope to the type of the
/// tensors.
///
/// The samples of RESIDUAL_ROW_NORM, and dk and dv of the samples with a block mask, are computed in f32 whatever the types,
/// without the tensor cores, and take longer than those of RESIDUAL_UNIFORM.
///
///     /* After hyperattn_cuda_forward(&params, &tensors, &exec) with an lse. */
///     if (hyperattn_cuda_backward(&params, &tensors, &grads, &exec) != HYPERATTN_STATUS_OK)
///         fprintf(stderr, "%s\n", hyperattn_last_error());
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_backward(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    grads: *const hyperattn_grads,
    exec: *const hyperattn_cuda_exec,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let arguments = unsafe { Arguments::read(params, tensors, |from| read_layouts(from)) }?;
        // SAFETY: as above.
        let (exec, grads) = unsafe { (read_exec(exec)?, read_grads(grads)?) };
        let Arguments { options, from, tensors, division } = &arguments;
        let given = [
            ("q", &from.q),
            ("k", &from.k),
            ("v", &from.v),
            ("out", &from.out),
            ("lse", &from.lse),
            ("dout", &grads.dout),
            ("dq", &grads.dq),
            ("dk", &grads.dk),
            ("dv", &grads.dv),
        ];
        given.into_iter().try_for_each(|(name, tensor)| check_data(name, tensor))?;
        let gradients = DeviceGradients {
            dout: device_tensor("dout", &grads.dout)?,
            dlse: (!grads.dlse.data.is_null()).then(|| device_tensor("dlse", &grads.dlse)).transpose()?,
            dq: device_tensor("dq", &grads.dq)?,
            dk: device_tensor("dk", &grads.dk)?,
            dv: device_tensor("dv", &grads.dv)?,
        };
        let params = &options.params;
        let need = || hyperattn_cuda::backward_divided_workspace(params, division, tensors);
        let workspace = workspace_of(&exec, options, need)?;
        let stream = exec.stream.cast();
        // SAFETY: as above: the tensors and the workspace are the call's until the stream has passed it.
        unsafe {
            hyperattn_cuda::backward_divided(params, division, tensors, &gradients, workspace, stream)
        }?;
        Ok(())
    })
}

/// The tensors of a backward call without a look at their data. lse is an input, and so not optional.
///
/// # Safety
/// As for [`device_tensors`].
unsafe fn read_layouts(from: &hyperattn_tensors) -> Result<DeviceTensors> {
    let without_figures = hyperattn_tensors { error: tensor::EMPTY, lse: tensor::EMPTY, ..*from };
    let given = |tensor: &hyperattn_tensor| !tensor.data.is_null();
    // SAFETY: the caller's contract.
    let tensors = unsafe { device_tensors(&without_figures, given, &|_, _| Ok(())) }?;
    Ok(DeviceTensors { lse: Some(device_tensor("lse", &from.lse)?), ..tensors })
}
