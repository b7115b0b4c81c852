//! Memory of the library's own, whose lack is a status and not an abort.

use crate::error::{Failure, Result};
use crate::types::*;

/// Room for `len` values.
fn reserved<T>(len: usize) -> Result<Vec<T>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).map_err(|_| {
        Failure::new(
            HYPERATTN_STATUS_OUT_OF_MEMORY,
            format_args!("{} bytes could not be allocated", len as u128 * size_of::<T>() as u128),
        )
    })?;
    Ok(memory)
}

/// `len` values.
pub(crate) fn filled<T>(len: usize, value: impl FnMut() -> T) -> Result<Vec<T>> {
    let mut memory = reserved(len)?;
    memory.resize_with(len, value);
    Ok(memory)
}

/// The values of `slice`.
pub(crate) fn copied<T: Copy>(slice: &[T]) -> Result<Vec<T>> {
    let mut memory = reserved(slice.len())?;
    memory.extend_from_slice(slice);
    Ok(memory)
}

/// `value`, in memory of its own.
pub(crate) fn boxed<T>(value: T) -> Result<Box<[T]>> {
    let mut memory = reserved(1)?;
    memory.push(value);
    Ok(memory.into_boxed_slice())
}
