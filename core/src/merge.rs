//! Merging partial results over disjoint keys. (0, -inf) is the neutral element.

use crate::error::{Result, invalid};
use crate::math;
use crate::problem::{check_output, check_scalars};
use crate::simd::Kernels;
use crate::view::{TensorLayout, TensorMut, TensorRef};

/// Factors that bring two partial results with base-2 maxima `a` and `b` to a common maximum. A
/// maximum of -inf on both sides leaves both as they are; a NaN reaches both factors.
pub(crate) fn merge_factors(a: f32, b: f32) -> [f32; 2] {
    let max = a.max(b);
    if max == f32::NEG_INFINITY {
        return [1.0; 2];
    }
    [math::exp2(a - max), math::exp2(b - max)]
}

/// Joins two partial attention results over disjoint keys; `a` becomes the result over the union:
/// `out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b)`, `lse = ln(e^lse_a + e^lse_b)`.
///
/// `out_*` have one shape and any element type, `lse_*` are f32 `[batch, heads, sequence, 1]`.
/// A row whose lse is -inf is neutral: the other side comes back unchanged, whatever the empty
/// side's output holds. Cost: one pass over the tensors. Nothing is allocated.
pub fn merge(
    kernels: &Kernels,
    out_a: &mut TensorMut<'_>,
    lse_a: &mut TensorMut<'_>,
    out_b: &TensorRef<'_>,
    lse_b: &TensorRef<'_>,
) -> Result<()> {
    check(out_a.layout(), lse_a.layout(), out_b.layout(), lse_b.layout())?;
    check_overlap(out_a, lse_a, out_b, lse_b)?;
    let [batch, heads, sequence, head_dim] = out_a.layout().extents();
    let (mut mine, mut other) = ([0.0; crate::MAX_HEAD_DIM as usize], [0.0; crate::MAX_HEAD_DIM as usize]);
    let (mine, other) = (&mut mine[..head_dim], &mut other[..head_dim]);
    for (b, h, row) in indices(batch, heads, sequence) {
        let (mut a_lse, mut b_lse) = ([0.0], [0.0]);
        lse_a.reborrow().read_row(kernels, b, h, row, &mut a_lse);
        lse_b.read_row(kernels, b, h, row, &mut b_lse);
        let ([a_lse], [b_lse]) = (a_lse, b_lse);
        if b_lse == f32::NEG_INFINITY {
            continue;
        }
        out_b.read_row(kernels, b, h, row, other);
        let mut joined = b_lse;
        if a_lse != f32::NEG_INFINITY {
            out_a.reborrow().read_row(kernels, b, h, row, mine);
            let max = if a_lse > b_lse { a_lse } else { b_lse };
            let [weight_a, weight_b] = [libm::expf(a_lse - max), libm::expf(b_lse - max)];
            let sum = weight_a + weight_b;
            for (y, x) in other.iter_mut().zip(mine.iter()) {
                *y = (weight_a * x + weight_b * *y) / sum;
            }
            joined = max + libm::logf(sum);
        }
        // SAFETY: out_a and lse_a are borrowed exclusively, and this is the only thread.
        unsafe {
            out_a.write_row(b, h, row, other);
            lse_a.write_row(b, h, row, &[joined]);
        }
    }
    Ok(())
}

fn indices(batch: usize, heads: usize, sequence: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..sequence).map(move |row| (b, h, row))))
}

fn check(
    out_a: &TensorLayout,
    lse_a: &TensorLayout,
    out_b: &TensorLayout,
    lse_b: &TensorLayout,
) -> Result<()> {
    out_a.check("out_a")?;
    out_b.check("out_b")?;
    check_output("out_a", out_a)?;
    check_scalars("lse_a", lse_a)?;
    lse_b.check("lse_b")?;
    if lse_b.dtype != crate::DType::F32 {
        invalid!("lse_b.dtype = {:?} must be F32", lse_b.dtype);
    }
    if out_a.shape[3] > crate::MAX_HEAD_DIM {
        invalid!(
            "out_a.shape[3] (head_dim) = {} is beyond the supported maximum {}",
            out_a.shape[3],
            crate::MAX_HEAD_DIM
        );
    }
    for (name, layout, dims) in [("out_b", out_b, 4), ("lse_a", lse_a, 3), ("lse_b", lse_b, 3)] {
        for dim in 0..dims {
            if layout.shape[dim] != out_a.shape[dim] {
                invalid!(
                    "{name}.shape[{dim}] = {} but out_a.shape[{dim}] = {}",
                    layout.shape[dim],
                    out_a.shape[dim]
                );
            }
        }
    }
    if lse_b.shape[3] != 1 {
        invalid!("lse_b.shape[3] = {} must be 1", lse_b.shape[3]);
    }
    Ok(())
}

fn check_overlap(
    out_a: &TensorMut<'_>,
    lse_a: &TensorMut<'_>,
    out_b: &TensorRef<'_>,
    lse_b: &TensorRef<'_>,
) -> Result<()> {
    let (a, lse) = (out_a.reborrow(), lse_a.reborrow());
    for (x_name, x, y_name, y) in [
        ("out_a", &a, "lse_a", &lse),
        ("out_a", &a, "out_b", out_b),
        ("out_a", &a, "lse_b", lse_b),
        ("lse_a", &lse, "out_b", out_b),
        ("lse_a", &lse, "lse_b", lse_b),
    ] {
        if crate::overlap::overlap((x.address(), x.layout()), (y.address(), y.layout())) {
            invalid!("{x_name} and {y_name} overlap in memory");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(a: &mut ([f32; 2], f32), b: ([f32; 2], f32)) {
        let (shape, lse_shape) = ([1, 1, 1, 2], [1, 1, 1, 1]);
        merge(
            Kernels::scalar(),
            &mut TensorMut::contiguous(&mut a.0, shape).unwrap(),
            &mut TensorMut::contiguous(core::slice::from_mut(&mut a.1), lse_shape).unwrap(),
            &TensorRef::contiguous(&b.0, shape).unwrap(),
            &TensorRef::contiguous(&[b.1], lse_shape).unwrap(),
        )
        .unwrap();
    }

    #[test]
    fn empty_rows_are_neutral() {
        let (some, empty) = (([1.5, -2.0], 3.25), ([0.0, 0.0], f32::NEG_INFINITY));
        let mut a = some;
        run(&mut a, empty);
        assert_eq!(a, some);
        let mut a = empty;
        run(&mut a, some);
        assert_eq!(a, some);
        let mut a = empty;
        run(&mut a, empty);
        assert_eq!(a, empty);
    }

    #[test]
    fn equal_weights_average() {
        let mut a = ([1.0, 2.0], 700.0);
        run(&mut a, ([3.0, 6.0], 700.0));
        assert_eq!(a.0, [2.0, 4.0]);
        assert!((a.1 - 700.0 - core::f32::consts::LN_2).abs() < 1e-4);
    }

    #[test]
    fn nan_stays() {
        let mut a = ([1.0, 2.0], f32::NAN);
        run(&mut a, ([3.0, 6.0], 0.0));
        assert!(a.0.iter().all(|x| x.is_nan()) && a.1.is_nan());
    }
}
