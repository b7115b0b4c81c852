//! Numbers of whole heads: the error estimate and the keys per query.

use hyperattn_core::Result;

use crate::call::{Call, DeviceTensor};
use crate::launch::{Queue, args};

/// Writes `value` for every query head of every batch item to `to`, f32 `[batch, heads_q, 1, 1]`.
///
/// # Safety
/// The tensor is in the device's memory and the call's to write.
pub(crate) unsafe fn fill_heads(
    queue: &Queue<'_>,
    call: &Call<'_>,
    to: &DeviceTensor,
    value: f32,
) -> Result<()> {
    const BLOCK: u32 = 128;
    let (batch, heads) = (call.problem.batch as u32, call.problem.heads_q as u32);
    // Batch items in a loop: a grid has room for few.
    let grid = [heads.div_ceil(BLOCK), 1, 1];
    // SAFETY: these are the parameters of fill_heads.
    unsafe { queue.launch(c"fill_heads", grid, BLOCK, 0, args![to.view(), batch, heads, value]) }
}
