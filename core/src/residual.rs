//! The residual: sampled key columns and the weights with which they stand for all keys outside the
//! exact blocks. This is where the residual weight is applied.

use core::ops::Range;

use crate::math;
use crate::rng::{Purpose, Stream, below, unit};

/// A column of the estimator: the key at a position of the key order, and the base-2 log weight that
/// is added to its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Column {
    /// Position in the key order.
    pub position: usize,
    /// Base-2 log of the weight.
    pub log_weight: f32,
}

/// `sample_size` keys of the interval `keys`, uniform and independent, each with weight n_k / m.
/// Columns that a query already meets exactly count as zero, so the weighted sum over the others is
/// an unbiased estimate of the unmasked sum (Algorithm 2, line 3, and the practical residual of section 4).
pub fn uniform_columns(
    stream: Stream,
    keys: Range<usize>,
    sample_size: usize,
) -> impl Iterator<Item = Column> {
    let log_weight = math::log2(keys.len() as f32 / sample_size as f32);
    (0..sample_size).map(move |i| {
        let draw = stream.uniform(keys.start, keys.len(), i);
        Column { position: keys.start + below(draw, keys.len()), log_weight }
    })
}

/// Fills `prefix` with the running sums of |v|^2 over the keys of one interval, in key order. A norm that is
/// not finite counts as 0: such a key cannot be drawn.
pub fn accumulate_norms(squared_norms: impl Iterator<Item = f32>, prefix: &mut [f64]) {
    let mut sum = 0.0;
    for (slot, norm) in prefix.iter_mut().zip(squared_norms) {
        if norm.is_finite() {
            sum += f64::from(norm);
        }
        *slot = sum;
    }
}

/// `sample_size` keys drawn with probability p = |v|^2 / |V|_F^2, each with weight 1 / (m p)
/// (Lemma 2 and Algorithm 3, line 2). `prefix` holds the running sums of |v|^2 over `keys`. Without
/// any mass in V the product with V is zero and no column is needed.
pub fn row_norm_columns<'a>(
    stream: Stream,
    keys: Range<usize>,
    sample_size: usize,
    prefix: &'a [f64],
) -> impl Iterator<Item = Column> + 'a {
    let total = prefix.last().copied().unwrap_or(0.0);
    let draws = if total > 0.0 { sample_size } else { 0 };
    // The last key with a norm: rounding may lift a target to the total itself.
    let last = prefix.partition_point(|&sum| sum < total);
    (0..draws).map(move |i| {
        let target = unit(stream.uniform(keys.start, keys.len(), i)) * total;
        // The first key whose running sum exceeds the target; a key of norm 0 never does so first.
        let found = prefix.partition_point(|&sum| sum <= target).min(last);
        let norm = prefix[found] - if found > 0 { prefix[found - 1] } else { 0.0 };
        let weight = total / (norm * sample_size as f64);
        Column { position: keys.start + found, log_weight: math::log2(weight as f32) }
    })
}

/// The stream that [`uniform_columns`] draws from.
pub fn uniform_stream(seed: u64, offset: u64, kv_head: usize) -> Stream {
    Stream::new(seed, offset, kv_head, Purpose::UniformKey)
}

/// The stream that [`row_norm_columns`] draws from.
pub fn row_norm_stream(seed: u64, offset: u64, kv_head: usize) -> Stream {
    Stream::new(seed, offset, kv_head, Purpose::RowNormKey)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts against expected counts, 64,000 draws; each bound is 5 standard deviations.
    #[test]
    fn row_norm_frequencies_follow_the_norms() {
        let norms = [1.0f32, 0.0, 3.0, f32::NAN, 4.0];
        let mut prefix = [0.0; 5];
        accumulate_norms(norms.into_iter(), &mut prefix);
        let m = 64_000;
        let mut counts = [0usize; 5];
        let seed = 11;
        for column in row_norm_columns(row_norm_stream(seed, 0, 0), 10..15, m, &prefix) {
            counts[column.position - 10] += 1;
            let p = norms[column.position - 10] / 8.0;
            assert!((column.log_weight - libm::log2f(1.0 / (m as f32 * p))).abs() < 1e-5);
        }
        for (count, norm) in counts.into_iter().zip(norms) {
            let p = if norm.is_nan() { 0.0 } else { f64::from(norm) / 8.0 };
            let deviation = libm::sqrt(m as f64 * p * (1.0 - p));
            assert!((count as f64 - m as f64 * p).abs() <= 5.0 * deviation, "seed {seed}: {counts:?}");
        }
    }

    #[test]
    fn values_of_zero_need_no_columns() {
        let prefix = [0.0; 3];
        assert_eq!(row_norm_columns(row_norm_stream(1, 2, 3), 0..3, 8, &prefix).count(), 0);
    }

    #[test]
    fn uniform_weight_is_keys_over_samples() {
        let columns = uniform_columns(uniform_stream(1, 2, 3), 100..1124, 256);
        assert!(columns.into_iter().all(|c| (100..1124).contains(&c.position) && c.log_weight == 2.0));
    }
}
