//! hyperattn_tensors and hyperattn_grads as the core's arguments.

use std::slice;

use hyperattn_core::{Division, Gradients, Layouts, Method, Sequences, TensorLayout, Tensors};

use crate::boundary::check_pointer;
use crate::error::{Failure, Result};
use crate::params::{self, Options};
use crate::types::*;
use crate::{block_mask, tensor};

/// What the views describe; `wanted` says which of the optional ones there are.
///
/// # Safety
/// The block mask is NULL or valid, for as long as the result is used.
pub(crate) unsafe fn layouts<'a>(
    from: &hyperattn_tensors,
    wanted: impl Fn(&hyperattn_tensor) -> bool,
) -> Result<Layouts<'a>> {
    let (q, k) = (tensor::layout("q", &from.q)?, tensor::layout("k", &from.k)?);
    let optional = |name: &str, tensor: &hyperattn_tensor| {
        wanted(tensor).then(|| tensor::layout(name, tensor)).transpose()
    };
    Ok(Layouts {
        q,
        k,
        v: tensor::layout("v", &from.v)?,
        out: tensor::layout("out", &from.out)?,
        lse: optional("lse", &from.lse)?,
        // SAFETY: the caller's contract.
        block_mask: unsafe { block_mask::read(from.block_mask, &q, &k) }?,
        error: optional("error", &from.error)?,
        keys_per_query: None,
        mask: wanted(&from.mask).then(|| tensor::mask_layout(&from.mask)).transpose()?,
    })
}

/// The views.
///
/// # Safety
/// For `'a` what they describe is readable and not written by others, and what the call writes is writable and not
/// used by others, but for the rows of other tasks.
pub(crate) unsafe fn tensors<'a>(from: &hyperattn_tensors) -> Result<Tensors<'a>> {
    // SAFETY: the caller's contract.
    unsafe {
        let (q, k) = (tensor::input("q", &from.q)?, tensor::input("k", &from.k)?);
        let block_mask = block_mask::read(from.block_mask, q.layout(), k.layout())?;
        let optional = |name: &str, from: &hyperattn_tensor| {
            (!from.data.is_null()).then(|| tensor::output(name, from)).transpose()
        };
        Ok(Tensors {
            q,
            k,
            v: tensor::input("v", &from.v)?,
            out: tensor::output("out", &from.out)?,
            lse: optional("lse", &from.lse)?,
            block_mask,
            error: optional("error", &from.error)?,
            keys_per_query: None,
            mask: tensor::mask(&from.mask)?,
        })
    }
}

/// The gradients of a backward call.
///
/// # Safety
/// For `'a` what the inputs describe is readable and not written by others, and what the outputs describe is writable
/// and not used by others.
pub(crate) unsafe fn gradients<'a>(from: &hyperattn_grads) -> Result<Gradients<'a>> {
    // SAFETY: the caller's contract.
    unsafe {
        Ok(Gradients {
            dout: tensor::input("dout", &from.dout)?,
            dlse: (!from.dlse.data.is_null()).then(|| tensor::input("dlse", &from.dlse)).transpose()?,
            dq: tensor::output("dq", &from.dq)?,
            dk: tensor::output("dk", &from.dk)?,
            dv: tensor::output("dv", &from.dv)?,
        })
    }
}

/// The sequences, and the methods of the heads.
///
/// # Safety
/// The arrays hold what the header says, for as long as the result is used.
pub(crate) unsafe fn division<'a>(
    options: &Options,
    from: &hyperattn_tensors,
    q: &TensorLayout,
) -> Result<Division<'a>> {
    // SAFETY: the caller's contract.
    let head_methods = unsafe { head_methods(options.head_methods, q.shape[1] as usize) }?;
    if from.num_sequences == 0 {
        return Ok(Division { sequences: None, head_methods });
    }
    let most = isize::MAX as usize / size_of::<i32>() - 1;
    let count = match usize::try_from(from.num_sequences) {
        Ok(count) if count <= most => count,
        _ => {
            return Err(Failure::invalid(format_args!(
                "num_sequences = {} must be 0 (one in each batch item) or the number of sequences",
                from.num_sequences
            )));
        }
    };
    check_pointer(from.cu_seqlens_q, "cu_seqlens_q")?;
    check_pointer(from.cu_seqlens_k, "cu_seqlens_k")?;
    // SAFETY: the caller has num_sequences + 1 numbers in each.
    let sequences = unsafe {
        Sequences {
            cu_seqlens_q: slice::from_raw_parts(from.cu_seqlens_q, count + 1),
            cu_seqlens_k: slice::from_raw_parts(from.cu_seqlens_k, count + 1),
        }
    };
    Ok(Division { sequences: Some(sequences), head_methods })
}

/// # Safety
/// `pointer` is NULL or points to `heads_q` methods, for as long as the result is used.
unsafe fn head_methods<'a>(pointer: *const hyperattn_method, heads_q: usize) -> Result<Option<&'a [Method]>> {
    if pointer.is_null() {
        return Ok(None);
    }
    check_pointer(pointer, "params.head_methods")?;
    if heads_q > isize::MAX as usize / size_of::<hyperattn_method>() {
        return Err(Failure::invalid(format_args!("params.head_methods of {heads_q} heads overflows")));
    }
    // SAFETY: the caller's contract.
    let methods = unsafe { slice::from_raw_parts(pointer, heads_q) };
    if let Some(head) = methods.iter().position(|&method| params::method(method).is_none()) {
        return Err(Failure::invalid(format_args!(
            "params.head_methods[{head}] = {} is not a HYPERATTN_METHOD_*",
            methods[head]
        )));
    }
    // SAFETY: Method has the layout of a u32, and each of these is the number of one.
    Ok(Some(unsafe { slice::from_raw_parts(pointer.cast::<Method>(), heads_q) }))
}
