//! The gradients of attention on the CPU.

use hyperattn_core::Layouts;

use crate::boundary::{check_pointer, guard};
use crate::cpu::{Arguments, Workspace};
use crate::error::Result;
use crate::executor::{Chosen, kernels};
use crate::types::*;
use crate::{call, sized, tensor};

/// Size and alignment of the workspace that hyperattn_backward() needs for the same params, tensors and exec. The
/// tensors' data are not looked at and may be NULL; *out is written on success only.
///
/// Never quadratic in the sequence. At most the sum of: what hyperattn_forward_workspace() answers; the gradients of one
/// batch item in f32, dq's for every query head, dk's and dv's for every KV head, with rows of whole vectors; for
/// METHOD_PAPER 512 sample_size (head_dim + value_dim) bytes for every KV head; for METHOD_REFINED dk's and dv's once more
/// for up to 8 KV heads; and for every thread some 1024 (head_dim + value_dim) numbers of 4 bytes and 192 KiB.
///
///     hyperattn_layout need;
///     hyperattn_cpu_exec exec = { .struct_size = sizeof exec };
///     if (hyperattn_backward_workspace(&params, &tensors, &exec, &need) == HYPERATTN_STATUS_OK) {
///         exec.workspace.data = aligned_alloc(need.align, need.size);
///         exec.workspace.size = need.size;
///     }
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_backward_workspace(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cpu_exec,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        unsafe {
            check_pointer(out.cast_const(), "out")?;
            let arguments = read_arguments(params, tensors, exec)?;
            // It is an input, and so not optional, although its data may be NULL here.
            let lse = Some(tensor::layout("lse", &arguments.from.lse)?);
            let layouts = Layouts { lse, ..arguments.layouts()? };
            out.write(arguments.workspace(&layouts, hyperattn_core::backward_workspace)?);
        }
        Ok(())
    })
}

/// The gradients of a loss with respect to q, k and v, from grads.dout, its gradient with respect to out, and
/// grads.dlse, that with respect to lse where the loss depends on it. Writes grads.dq, dk and dv whole: it does not add to
/// what they hold.
///
/// params and tensors are those of the forward call, the seed and the offset too, with out and lse as it left them: both
/// are inputs here, and lse must be there (INVALID_ARGUMENT with data NULL). tensors.error is not looked at. Nothing
/// else is kept from the forward call: METHOD_PAPER and METHOD_REFINED find their selection of keys again.
///
/// METHOD_EXACT gives the gradient of softmax attention. The estimators give the gradient of what they computed, with
/// the selection of keys, its weights and METHOD_PAPER's caps held fixed: the gradient of the estimate almost
/// everywhere, and no estimate of the exact gradient with a bound of its own. core/docs/backward.md has the formulas.
///
/// Where keys are in parts joined by hyperattn_merge(), call it once for each part with the merged out and lse: each
/// call gives that part's dk and dv, and dq is the sum over the parts.
///
/// Sums are in f32 and rounded once, when they are written. The same arguments give the same bits for every number of
/// threads; what hyperattn_forward() says of threads, workspaces, allocation and fork() holds here too. Cost: for the
/// keys that a query meets some 2.5 times the multiply-adds of the forward call, and the selection again.
///
/// A query that saw no key (lse -inf) gets dq 0 and adds nothing; a key that no query saw gets dk and dv 0. NaN stays
/// with the rows and keys that see it. tensors.mask has no gradient. On an error dq, dk and dv are untouched, except
/// when exec.pool returned before its tasks had run (INVALID_ARGUMENT) or for INTERNAL.
///
///     /* After hyperattn_forward(&params, &tensors, NULL) with an lse. */
///     if (hyperattn_backward(&params, &tensors, &grads, NULL) != HYPERATTN_STATUS_OK)
///         fprintf(stderr, "%s\n", hyperattn_last_error());
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_backward(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    grads: *const hyperattn_grads,
    exec: *const hyperattn_cpu_exec,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let (arguments, grads) = unsafe { (read_arguments(params, tensors, exec)?, read_grads(grads)?) };
        let Arguments { options, from, exec } = arguments;
        // SAFETY: as above: the views describe the caller's memory, which is the call's until it returns.
        let (tensors, division, mut gradients, chosen) = unsafe {
            let tensors = call::tensors(&from)?;
            let division = call::division(&options, &from, tensors.q.layout())?;
            (tensors, division, call::gradients(&grads)?, Chosen::new(&exec)?)
        };
        let (params, layouts, executor) = (&options.params, tensors.layouts(), chosen.executor());
        let need = hyperattn_core::backward_workspace(params, &division, &layouts, kernels(), executor)?;
        let mut workspace = Workspace::new(exec.workspace, need, options.may_allocate)?;
        let memory = workspace.bytes();
        hyperattn_core::backward(params, &division, &tensors, &mut gradients, kernels(), executor, memory)?;
        Ok(())
    })
}

/// The structs of a backward call but for the gradients.
///
/// # Safety
/// As for [`Arguments::read`].
unsafe fn read_arguments(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cpu_exec,
) -> Result<Arguments> {
    // SAFETY: the caller's contract.
    let mut arguments = unsafe { Arguments::read(params, tensors, exec) }?;
    // The forward call's error may be there still; it is none of backward's tensors.
    arguments.from.error = tensor::EMPTY;
    Ok(arguments)
}

/// # Safety
/// `pointer` is NULL or points to as many readable bytes as its struct_size says.
pub(crate) unsafe fn read_grads(pointer: *const hyperattn_grads) -> Result<hyperattn_grads> {
    let defaults = hyperattn_grads {
        struct_size: 0,
        dout: tensor::EMPTY,
        dq: tensor::EMPTY,
        dk: tensor::EMPTY,
        dv: tensor::EMPTY,
        dlse: tensor::EMPTY,
    };
    // SAFETY: the caller's contract.
    unsafe { sized::read(pointer, "grads", defaults) }
}
