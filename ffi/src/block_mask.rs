//! hyperattn_block_mask: from the caller's arrays to the core's slices.

use hyperattn_core::{BlockMask, TensorLayout};

use crate::boundary::check_pointer;
use crate::error::{Failure, Result};
use crate::sized;
use crate::types::*;

/// The numbers of the caller's mask for these queries and keys, with the arrays left out, and the struct; NULL is none.
///
/// # Safety
/// `pointer` is NULL or points to struct_size readable bytes.
pub(crate) unsafe fn read_counts(
    pointer: *const hyperattn_block_mask,
    q: &TensorLayout,
    k: &TensorLayout,
) -> Result<Option<(BlockMask<'static>, hyperattn_block_mask)>> {
    if pointer.is_null() {
        return Ok(None);
    }
    let defaults = hyperattn_block_mask {
        struct_size: 0,
        query_block: 0,
        key_block: 0,
        num_query_blocks: 0,
        num_key_blocks: 0,
        row_offsets: std::ptr::null(),
        columns: std::ptr::null(),
        row_offsets_head_stride: 0,
    };
    // SAFETY: the caller's contract.
    let from = unsafe { sized::read(pointer, "block_mask", defaults) }?;
    let count = |name: &str, value: i64| {
        usize::try_from(value)
            .map_err(|_| Failure::invalid(format_args!("block_mask.{name} = {value} must not be negative")))
    };
    let mask = BlockMask {
        query_block: from.query_block as usize,
        key_block: from.key_block as usize,
        num_query_blocks: count("num_query_blocks", from.num_query_blocks)?,
        num_key_blocks: count("num_key_blocks", from.num_key_blocks)?,
        row_offsets: &[],
        columns: &[],
        head_stride: count("row_offsets_head_stride", from.row_offsets_head_stride)?,
    };
    // The arrays' lengths follow from these numbers, so they are checked before an array is touched.
    mask.check_counts(q.shape[2], k.shape[2])?;
    check_pointer(from.row_offsets, "block_mask.row_offsets")?;
    Ok(Some((mask, from)))
}

/// Reads the caller's mask for these queries and keys; NULL is none.
///
/// # Safety
/// `pointer` is NULL or points to struct_size readable bytes, whose arrays hold what they describe for `'a`.
pub(crate) unsafe fn read<'a>(
    pointer: *const hyperattn_block_mask,
    q: &TensorLayout,
    k: &TensorLayout,
) -> Result<Option<BlockMask<'a>>> {
    // SAFETY: the caller's contract.
    let Some((mut mask, from)): Option<(BlockMask<'a>, _)> = (unsafe { read_counts(pointer, q, k) })? else {
        return Ok(None);
    };
    let heads = q.shape[0] as usize * q.shape[1] as usize;
    let patterns = if mask.head_stride == 0 { 1 } else { heads };
    let entries =
        (patterns - 1).checked_mul(mask.head_stride).and_then(|n| n.checked_add(mask.num_query_blocks + 1));
    let Some(entries) = entries.filter(|&n| n <= isize::MAX as usize / size_of::<i64>()) else {
        return Err(Failure::invalid(format_args!(
            "block_mask.row_offsets_head_stride = {} overflows for {patterns} heads",
            mask.head_stride
        )));
    };
    // SAFETY: the caller has that many offsets there.
    mask.row_offsets = unsafe { std::slice::from_raw_parts(from.row_offsets, entries) };
    let ends = (0..patterns).map(|p| mask.row_offsets[p * mask.head_stride + mask.num_query_blocks]);
    let columns = ends.max().unwrap_or(0).max(0) as usize;
    if columns > 0 {
        check_pointer(from.columns, "block_mask.columns")?;
        if columns > isize::MAX as usize / size_of::<i32>() {
            return Err(Failure::invalid(format_args!(
                "block_mask.row_offsets ends at {columns}, which overflows"
            )));
        }
        // SAFETY: the caller has as many columns as the last offsets say.
        mask.columns = unsafe { std::slice::from_raw_parts(from.columns, columns) };
    }
    Ok(Some(mask))
}
