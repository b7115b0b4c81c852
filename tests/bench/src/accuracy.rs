//! The error of an output against the double-precision oracle, on all query rows or on a sample of them.

use hyperattn_core::Mask;
use hyperattn_reference::{Generator, Problem as Head, relative_frobenius_error};
use rayon::prelude::*;

use crate::inputs::Inputs;
use crate::problem::{Problem, Shape};
use crate::tensor::Tensor;

/// The oracle gets at most about this many (query, key) pairs: some seconds.
const MOST_PAIRS: usize = 1 << 23;

/// Bytes of the heads that are computed at a time, in f64.
const MOST_BYTES: usize = 1 << 30;

/// Seed of the sample of rows.
const SEED: u64 = 2024;

/// How far an output is from exact attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Relative Frobenius error over the rows.
    pub error: f64,
    /// Query rows compared.
    pub rows: usize,
}

/// Compares `out` with exact attention in f64 on the (rounded) inputs.
pub fn accuracy(problem: &Problem, inputs: &Inputs, out: &Tensor) -> Accuracy {
    let Shape { batch, heads_q, heads_kv, n_q, n_k, head_dim, .. } = inputs.shape;
    let heads = batch * heads_q;
    let rows = sample(heads * n_q, (MOST_PAIRS / n_k).max(1));
    let [q, k, v] = &inputs.tensors;
    let of_head = |rows: &[usize]| -> (Vec<f64>, Vec<f64>) {
        let (batch, head) = (rows[0] / n_q / heads_q, rows[0] / n_q % heads_q);
        let kv_head = head / (heads_q / heads_kv);
        let (keys, values) = (k.head(batch, kv_head), v.head(batch, kv_head));
        let exact: Vec<Vec<f64>> = (rows.par_iter())
            .map(|row| {
                let row = row % n_q;
                let visible = visible_keys(problem.params.mask, n_q, n_k, row);
                let query = q.row(batch, head, row);
                let scale = 1.0 / (head_dim as f64).sqrt();
                let (keys, values) = (&keys[..visible * head_dim], &values[..visible * head_dim]);
                let problem = Head::new(&query, keys, values, head_dim, head_dim, scale);
                hyperattn_reference::exact(&problem, |_, _| true).out
            })
            .collect();
        (rows.iter().flat_map(|row| out.row(batch, head, row % n_q)).collect(), exact.concat())
    };
    let of_heads: Vec<&[usize]> = rows.chunk_by(|a, b| a / n_q == b / n_q).collect();
    let at_a_time = (MOST_BYTES / (2 * n_k * head_dim * size_of::<f64>())).max(1);
    let (mut actual, mut expected) = (Vec::new(), Vec::new());
    for some in of_heads.chunks(at_a_time) {
        let rows: Vec<_> = some.par_iter().map(|rows| of_head(rows)).collect();
        for (its_actual, its_expected) in rows {
            actual.extend(its_actual);
            expected.extend(its_expected);
        }
    }
    Accuracy { error: relative_frobenius_error(&actual, &expected), rows: rows.len() }
}

/// How many leading keys a query sees.
fn visible_keys(mask: Mask, n_q: usize, n_k: usize, row: usize) -> usize {
    match mask {
        Mask::None => n_k,
        Mask::CausalBottomRight => (row + 1 + n_k).saturating_sub(n_q),
        Mask::CausalTopLeft => (row + 1).min(n_k),
    }
}

/// Ascending positions below `total`: all, or `most` of them, one at a random place of each equal part.
fn sample(total: usize, most: usize) -> Vec<usize> {
    if total <= most {
        return (0..total).collect();
    }
    let mut generator = Generator::new(SEED);
    let bound = |part: usize| (part as u128 * total as u128 / most as u128) as usize;
    (0..most).map(|part| bound(part) + generator.below(bound(part + 1) - bound(part))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::MemoryOrder;
    use hyperattn_core::DType;

    #[test]
    fn samples_are_ascending_and_spread() {
        assert_eq!(sample(5, 5), [0, 1, 2, 3, 4]);
        let rows = sample(1000, 10);
        assert_eq!(rows.len(), 10);
        assert!(rows.iter().enumerate().all(|(part, row)| row / 100 == part), "{rows:?}");
    }

    /// One query head of each batch item and group sees one key only, whose value is then the output.
    #[test]
    fn the_rows_of_every_head_are_compared_with_their_own() {
        let mut problem = Problem::default();
        for (name, value) in [
            ("batch", "2"),
            ("heads_q", "4"),
            ("heads_kv", "2"),
            ("n", "1"),
            ("head_dim", "3"),
            ("layout", "bshd"),
        ] {
            problem.set(name, value).unwrap();
        }
        let inputs = Inputs::new(problem.shape).unwrap();
        let values = &inputs.tensors[2];
        let mut out = Tensor::new(DType::F32, [2, 4, 1, 3], MemoryOrder::Bshd);
        assert!(accuracy(&problem, &inputs, &out).error.is_nan(), "what is not written is NaN");
        // Packed [batch][head][row], which for one row is also the token-major order.
        let expected: Vec<f32> = (0..2)
            .flat_map(|batch| (0..4).flat_map(move |head| values.row(batch, head / 2, 0)))
            .map(|x| x as f32)
            .collect();
        out.write(&expected);
        assert_eq!(accuracy(&problem, &inputs, &out), Accuracy { error: 0.0, rows: 8 });
        let doubled: Vec<f32> = expected.iter().map(|x| 2.0 * x).collect();
        out.write(&doubled);
        assert_eq!(accuracy(&problem, &inputs, &out).error, 1.0);
    }
}
