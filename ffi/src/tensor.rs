//! hyperattn_tensor: helpers that fill one, and the checks that turn it into the core's layout.

use std::ffi::c_void;

use hyperattn_core::{DType, TensorLayout, TensorMut, TensorRef};

use crate::error::{Failure, Result};
use crate::types::*;

/// A view of packed [batch, heads, sequence, head_dim] memory: each head's rows are together. Checks
/// nothing; the call that uses the view does.
///
///     hyperattn_tensor q = hyperattn_tensor_bhsd(data, HYPERATTN_DTYPE_F32, 1, 8, n, 64);
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_tensor_bhsd(
    data: *const c_void,
    dtype: hyperattn_dtype,
    batch: i64,
    heads: i64,
    sequence: i64,
    head_dim: i64,
) -> hyperattn_tensor {
    let head = head_dim.saturating_mul(sequence);
    let stride = [head.saturating_mul(heads), head, head_dim, 1];
    view(data, dtype, [batch, heads, sequence, head_dim], stride)
}

/// A view of packed (batch, token, head, head_dim) memory: each token's heads are together. The view's
/// dimensions are still [batch, heads, sequence, head_dim]. Checks nothing; the call that uses it does.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_tensor_bshd(
    data: *const c_void,
    dtype: hyperattn_dtype,
    batch: i64,
    heads: i64,
    sequence: i64,
    head_dim: i64,
) -> hyperattn_tensor {
    let token = head_dim.saturating_mul(heads);
    let stride = [token.saturating_mul(sequence), head_dim, token, 1];
    view(data, dtype, [batch, heads, sequence, head_dim], stride)
}

fn view(data: *const c_void, dtype: hyperattn_dtype, shape: [i64; 4], stride: [i64; 4]) -> hyperattn_tensor {
    hyperattn_tensor { data: data.cast_mut(), dtype, reserved: 0, shape, stride }
}

/// A view with nothing in it, as a missing field reads.
pub(crate) const EMPTY: hyperattn_tensor =
    hyperattn_tensor { data: std::ptr::null_mut(), dtype: 0, reserved: 0, shape: [0; 4], stride: [0; 4] };

/// Element type, extents and strides of `tensor`, checked by themselves.
pub(crate) fn layout(name: &str, tensor: &hyperattn_tensor) -> Result<TensorLayout> {
    let layout = unchecked_layout(name, tensor)?;
    layout.check(name)?;
    Ok(layout)
}

/// [`layout`] of the mask tensor, whose last dimension is the keys.
pub(crate) fn mask_layout(tensor: &hyperattn_tensor) -> Result<TensorLayout> {
    let layout = unchecked_layout("tensors.mask", tensor)?;
    layout.check_mask("tensors.mask")?;
    Ok(layout)
}

fn unchecked_layout(name: &str, tensor: &hyperattn_tensor) -> Result<TensorLayout> {
    let dtype = match tensor.dtype {
        HYPERATTN_DTYPE_F32 => DType::F32,
        HYPERATTN_DTYPE_F16 => DType::F16,
        HYPERATTN_DTYPE_BF16 => DType::BF16,
        other => {
            return Err(Failure::invalid(format_args!("{name}.dtype = {other} is not a HYPERATTN_DTYPE_*")));
        }
    };
    if tensor.reserved != 0 {
        return Err(Failure::invalid(format_args!("{name}.reserved = {} must be 0", tensor.reserved)));
    }
    Ok(TensorLayout { dtype, shape: tensor.shape, stride: tensor.stride })
}

/// A tensor with elements is somewhere.
pub(crate) fn check_data(name: &str, tensor: &hyperattn_tensor, layout: &TensorLayout) -> Result<()> {
    if tensor.data.is_null() && !layout.is_empty() {
        return Err(Failure::invalid(format_args!("{name}.data is NULL")));
    }
    Ok(())
}

/// `tensor` for reading.
///
/// # Safety
/// What it describes is readable for `'a` and not written meanwhile.
pub(crate) unsafe fn input<'a>(name: &str, tensor: &hyperattn_tensor) -> Result<TensorRef<'a>> {
    let layout = layout(name, tensor)?;
    check_data(name, tensor, &layout)?;
    // SAFETY: the caller's contract.
    Ok(unsafe { TensorRef::from_raw(tensor.data.cast(), layout) })
}

/// The mask tensor for reading, if there is one.
///
/// # Safety
/// As for [`input`].
pub(crate) unsafe fn mask<'a>(tensor: &hyperattn_tensor) -> Result<Option<TensorRef<'a>>> {
    if tensor.data.is_null() {
        return Ok(None);
    }
    let layout = mask_layout(tensor)?;
    // SAFETY: the caller's contract.
    Ok(Some(unsafe { TensorRef::from_raw(tensor.data.cast(), layout) }))
}

/// `tensor` for writing.
///
/// # Safety
/// What it describes is writable for `'a` and not used by anyone else meanwhile.
pub(crate) unsafe fn output<'a>(name: &str, tensor: &hyperattn_tensor) -> Result<TensorMut<'a>> {
    let layout = layout(name, tensor)?;
    check_data(name, tensor, &layout)?;
    // SAFETY: the caller's contract.
    Ok(unsafe { TensorMut::from_raw(tensor.data.cast(), layout) })
}
