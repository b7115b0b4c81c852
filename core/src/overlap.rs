//! Whether strided views share memory. Errs on the side of saying yes only for interleavings that no
//! common tensor layout has.

use crate::view::TensorLayout;

/// A view as runs of consecutive bytes: `run` bytes at `start` plus any combination of the strides.
struct Runs {
    start: i128,
    end: i128,
    run: i128,
    /// (extent, stride in bytes, positive), ascending by stride; extents of 1 are gone.
    dims: [(i128, i128); 4],
    count: usize,
    self_overlap: bool,
}

impl Runs {
    fn new(address: usize, layout: &TensorLayout) -> Self {
        let size = layout.dtype.size() as i128;
        let mut runs = Runs {
            start: address as i128,
            end: 0,
            run: size,
            dims: [(0, 0); 4],
            count: 0,
            self_overlap: false,
        };
        for (extent, stride) in layout.shape.into_iter().zip(layout.stride) {
            if extent > 1 {
                let (extent, mut stride) = (i128::from(extent), i128::from(stride) * size);
                if stride < 0 {
                    runs.start += (extent - 1) * stride;
                    stride = -stride;
                }
                runs.dims[runs.count] = (extent, stride);
                runs.count += 1;
            }
        }
        runs.dims[..runs.count].sort_unstable_by_key(|&(_, stride)| stride);
        // Dimensions that continue the run without a gap become part of it.
        let mut reach = size;
        let mut kept = 0;
        for i in 0..runs.count {
            let (extent, stride) = runs.dims[i];
            runs.self_overlap |= stride < reach;
            reach += (extent - 1) * stride;
            if kept == 0 && stride == runs.run {
                runs.run = reach;
            } else {
                runs.dims[kept] = (extent, stride);
                kept += 1;
            }
        }
        runs.count = kept;
        runs.end = runs.start + reach;
        runs
    }

    fn strides(&self) -> impl Iterator<Item = i128> {
        self.dims[..self.count].iter().map(|&(_, stride)| stride)
    }
}

/// Whether two index tuples of one view name the same memory.
pub(crate) fn overlaps_itself(layout: &TensorLayout) -> bool {
    !layout.is_empty() && Runs::new(0, layout).self_overlap
}

/// Whether two views share a byte. Views interleaved with a common period, such as the parts of one
/// packed row per token, are told apart.
pub(crate) fn overlap(a: (usize, &TensorLayout), b: (usize, &TensorLayout)) -> bool {
    if a.1.is_empty() || b.1.is_empty() {
        return false;
    }
    let (a, b) = (Runs::new(a.0, a.1), Runs::new(b.0, b.1));
    if a.end <= b.start || b.end <= a.start {
        return false;
    }
    // Every run starts at its view's start modulo the common divisor of all strides.
    let period = a.strides().chain(b.strides()).fold(0, greatest_common_divisor);
    if period == 0 {
        return true;
    }
    let distance = (b.start - a.start).rem_euclid(period);
    distance < a.run || distance + b.run > period
}

fn greatest_common_divisor(a: i128, b: i128) -> i128 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::DType;

    fn layout(shape: [i64; 4], stride: [i64; 4]) -> TensorLayout {
        TensorLayout { dtype: DType::F32, shape, stride }
    }

    /// How often a small view names each element of a buffer in which it starts at element 50.
    fn touches(layout: &TensorLayout) -> [u8; 300] {
        let mut hits = [0; 300];
        let [b, h, s, d] = layout.shape;
        for i in 0..b * h * s * d {
            let index = [i / (h * s * d), i / (s * d) % h, i / d % s, i % d];
            let offset: i64 = index.iter().zip(layout.stride).map(|(i, stride)| i * stride).sum();
            hits[(50 + offset) as usize] += 1;
        }
        hits
    }

    #[test]
    fn agrees_with_enumeration_on_common_layouts() {
        let views = [
            layout([2, 3, 5, 4], [60, 20, 4, 1]),
            layout([2, 3, 5, 4], [60, 4, 12, 1]),
            layout([1, 3, 5, 4], [0, 4, 36, 1]),
            layout([1, 3, 5, 1], [0, 1, 36, 1]),
            layout([2, 3, 5, 4], [0, 20, 4, 1]),
            layout([1, 1, 5, 4], [0, 0, 3, 1]),
            layout([1, 2, 5, 4], [20, 20, -4, 1]),
        ];
        for a in &views {
            let mine = touches(a);
            assert_eq!(overlaps_itself(a), mine.iter().any(|&hits| hits > 1), "{a:?}");
            for b in &views {
                let theirs = touches(b);
                for shift in 0..250 {
                    let shared = (0..300 - shift).any(|i| mine[i + shift] > 0 && theirs[i] > 0);
                    if shared {
                        assert!(overlap((200, a), (200 + 4 * shift, b)), "{a:?} {b:?} {shift}");
                    }
                }
            }
        }
    }

    #[test]
    fn parts_of_one_row_per_token_are_apart() {
        let q = layout([1, 3, 5, 4], [180, 4, 36, 1]);
        for (part, apart) in [(0, false), (11, false), (12, true), (24, true), (25, false)] {
            assert_eq!(!overlap((0, &q), (part * 4, &q)), apart, "{part}");
        }
    }
}
