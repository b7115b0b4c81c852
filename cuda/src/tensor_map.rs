//! Descriptors that the copy engine of sm_90 reads tiles of keys and values by.

use cudarc::driver::sys;
use hyperattn_core::Result;

use crate::abi::View;
use crate::driver::{Driver, TensorElement};

/// Bytes of a row of a box: one period of the swizzle.
const BOX_BYTES: u32 = 128;

/// A map of `[batch][head][row][element]`, passed to kernels by value.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Whether there is no tensor that the copy engine can follow.
    pub(crate) fn is_none(&self) -> bool {
        self.0.opaque[0] == 0
    }
}

/// The part of a tensor that a map describes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) rows: usize,
    pub(crate) dim: usize,
}

/// Bytes from one row, head and batch item to the next, where the copy engine can follow them: not backwards, not standing
/// still, in steps of 16 bytes, from an address of such a step. Those of a single row, head or item do not matter.
fn strides(element: TensorElement, view: &View, shape: &Shape) -> Option<[u64; 3]> {
    const STEP: u64 = 16;
    const LONGEST: u64 = 1 << 40;
    let row = shape.dim as u64 * u64::from(element.size());
    let usable = |stride: i64, extent: usize| {
        // Any legal stride will do for an extent of 1.
        let stride = if extent == 1 { row } else { u64::try_from(stride).ok()? };
        (stride > 0 && stride.is_multiple_of(STEP) && stride < LONGEST).then_some(stride)
    };
    if !view.data.is_multiple_of(STEP) || !row.is_multiple_of(STEP) || shape.rows == 0 {
        return None;
    }
    Some([
        usable(view.row_stride, shape.rows)?,
        usable(view.head_stride, shape.heads)?,
        usable(view.batch_stride, shape.batch)?,
    ])
}

/// A map of boxes of `rows` rows of 128 bytes, swizzled in 128 bytes; what is outside the tensor reads as 0. All 0, which
/// kernels take for none, where the copy engine cannot follow the tensor.
pub(crate) fn encode(
    driver: &Driver,
    element: TensorElement,
    view: &View,
    shape: &Shape,
    rows: u32,
) -> Result<TensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    if let Some(strides) = strides(element, view, shape) {
        let extents = [shape.dim, shape.rows, shape.heads, shape.batch].map(|extent| extent as u64);
        let box_extents = [BOX_BYTES / element.size(), rows, 1, 1];
        driver.encode_tiled(&mut map, element, view.data, &extents, &strides, &box_extents)?;
    }
    Ok(TensorMap(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { batch: 2, heads: 4, rows: 100, dim: 64 };

    fn view(data: u64, [batch_stride, head_stride, row_stride]: [i64; 3]) -> View {
        View { data, batch_stride, head_stride, row_stride }
    }

    fn qualifies(view: &View, shape: &Shape) -> bool {
        strides(TensorElement::Bf16, view, shape).is_some()
    }

    #[test]
    fn what_the_copy_engine_cannot_follow_is_seen() {
        let packed = [51_200, 12_800, 128];
        assert!(qualifies(&view(4096, packed), &SHAPE));
        // Rows of several heads together, and padded ones.
        assert!(qualifies(&view(4096, [51_200, 128, 512]), &SHAPE));
        assert!(qualifies(&view(4096, [51_200, 12_800, 144]), &SHAPE));
        assert!(!qualifies(&view(4096 + 2, packed), &SHAPE));
        assert!(!qualifies(&view(4096, [51_200, 12_800, 130]), &SHAPE));
        assert!(!qualifies(&view(4096, [51_200, 12_800, -128]), &SHAPE));
        assert!(!qualifies(&view(4096, [0, 12_800, 128]), &SHAPE));
        assert!(!qualifies(&view(4096, [1 << 40, 12_800, 128]), &SHAPE));
        assert!(!qualifies(&view(4096, packed), &Shape { dim: 60, ..SHAPE }));
        assert!(!qualifies(&view(4096, packed), &Shape { rows: 0, ..SHAPE }));
        // Strides that are never walked.
        assert!(qualifies(&view(4096, [-7, 12_800, 128]), &Shape { batch: 1, ..SHAPE }));
        assert!(qualifies(&view(4096, [51_200, 12_800, 3]), &Shape { rows: 1, ..SHAPE }));
    }

    #[test]
    fn maps_are_laid_out_as_kernels_expect() {
        assert_eq!((size_of::<TensorMap>(), align_of::<TensorMap>() % 64), (128, 0));
    }
}
