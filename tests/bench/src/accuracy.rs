//! The error of an output, or of the gradient with respect to the queries, against the double-precision oracle: on all
//! query rows or on a sample of them.

use hyperattn_core::Mask;
use hyperattn_reference::{Generator, Output, Problem as Head, relative_frobenius_error};
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

/// How far an output is from exact attention, or a gradient from that of exact attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Relative Frobenius error over the rows.
    pub error: f64,
    /// Query rows compared.
    pub rows: usize,
}

/// Compares `out` with exact attention in f64 on the (rounded) inputs.
pub fn of_out(problem: &Problem, inputs: &Inputs, out: &Tensor) -> Accuracy {
    compare(problem, inputs, out, |query| query.attention().out)
}

/// Compares `dq` with the gradient of exact attention in f64 on the (rounded) inputs; `dout` is the gradient with respect to
/// its output.
pub fn of_query_gradient(problem: &Problem, inputs: &Inputs, dout: &Tensor, dq: &Tensor) -> Accuracy {
    compare(problem, inputs, dq, |query| query.gradient(&dout.row(query.batch, query.head, query.row)))
}

/// One query and the keys that it sees.
struct Query<'a> {
    batch: usize,
    head: usize,
    row: usize,
    query: &'a [f64],
    keys: &'a [f64],
    values: &'a [f64],
}

impl Query<'_> {
    fn scale(&self) -> f64 {
        1.0 / (self.query.len() as f64).sqrt()
    }

    fn problem(&self) -> Head<'_> {
        let head_dim = self.query.len();
        Head::new(self.query, self.keys, self.values, head_dim, head_dim, self.scale())
    }

    fn attention(&self) -> Output {
        hyperattn_reference::exact(&self.problem(), |_, _| true)
    }

    /// With respect to the query, where `dout` is that with respect to the output: with s the scale and p the weights,
    /// the sum of s p_j (dout v_j - dout out) k_j.
    fn gradient(&self, dout: &[f64]) -> Vec<f64> {
        let (problem, Output { out, lse }) = (self.problem(), self.attention());
        let dot = |row: &[f64]| -> f64 { dout.iter().zip(row).map(|(a, b)| a * b).sum() };
        let of_out = dot(&out);
        let mut gradient = vec![0.0; self.query.len()];
        for (j, key) in self.keys.chunks_exact(self.query.len()).enumerate() {
            let weight = (problem.logit(0, j) - lse[0]).exp();
            let factor = self.scale() * weight * (dot(problem.value_row(j)) - of_out);
            gradient.iter_mut().zip(key).for_each(|(to, x)| *to += factor * x);
        }
        gradient
    }
}

/// Compares rows of `actual` with what they are to be for each query by itself.
fn compare(
    problem: &Problem,
    inputs: &Inputs,
    actual: &Tensor,
    expected: impl Fn(&Query<'_>) -> Vec<f64> + Sync,
) -> Accuracy {
    let Shape { batch, heads_q, heads_kv, n_q, n_k, head_dim, .. } = inputs.shape;
    let heads = batch * heads_q;
    let rows = sample(heads * n_q, (MOST_PAIRS / n_k).max(1));
    let [q, k, v] = &inputs.tensors;
    let of_head = |rows: &[usize]| -> (Vec<f64>, Vec<f64>) {
        let (batch, head) = (rows[0] / n_q / heads_q, rows[0] / n_q % heads_q);
        let kv_head = head / (heads_q / heads_kv);
        let (keys, values) = (k.head(batch, kv_head), v.head(batch, kv_head));
        let its_expected: Vec<Vec<f64>> = (rows.par_iter())
            .map(|row| {
                let row = row % n_q;
                let seen = visible_keys(problem.params.mask, n_q, n_k, row) * head_dim;
                let (query, keys, values) = (&q.row(batch, head, row), &keys[..seen], &values[..seen]);
                expected(&Query { batch, head, row, query, keys, values })
            })
            .collect();
        let its_actual = rows.iter().flat_map(|row| actual.row(batch, head, row % n_q)).collect();
        (its_actual, its_expected.concat())
    };
    let of_heads: Vec<&[usize]> = rows.chunk_by(|a, b| a / n_q == b / n_q).collect();
    let at_a_time = (MOST_BYTES / (2 * n_k * head_dim * size_of::<f64>())).max(1);
    let (mut all_actual, mut all_expected) = (Vec::new(), Vec::new());
    for some in of_heads.chunks(at_a_time) {
        let rows: Vec<_> = some.par_iter().map(|rows| of_head(rows)).collect();
        for (its_actual, its_expected) in rows {
            all_actual.extend(its_actual);
            all_expected.extend(its_expected);
        }
    }
    Accuracy { error: relative_frobenius_error(&all_actual, &all_expected), rows: rows.len() }
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
        assert!(of_out(&problem, &inputs, &out).error.is_nan(), "what is not written is NaN");
        // Packed [batch][head][row], which for one row is also the token-major order.
        let expected: Vec<f32> = (0..2)
            .flat_map(|batch| (0..4).flat_map(move |head| values.row(batch, head / 2, 0)))
            .map(|x| x as f32)
            .collect();
        out.write(&expected);
        assert_eq!(of_out(&problem, &inputs, &out), Accuracy { error: 0.0, rows: 8 });
        let doubled: Vec<f32> = expected.iter().map(|x| 2.0 * x).collect();
        out.write(&doubled);
        assert_eq!(of_out(&problem, &inputs, &out).error, 1.0);
    }

    /// Differences of the output by a step of h are off by about h^2 third derivatives and 1e-16 / h.
    #[test]
    fn the_expected_gradient_is_that_of_the_oracle_s_output() {
        const HEAD_DIM: usize = 5;
        const STEP: f64 = 1e-5;
        let seed = 31;
        let mut generator = Generator::new(seed);
        let [queries, keys, values, dout] = [1, 8, 8, 1].map(|rows| generator.normal_matrix(rows, HEAD_DIM));
        let loss = |query: &[f64]| -> f64 {
            let query = Query { batch: 0, head: 0, row: 0, query, keys: &keys, values: &values };
            query.attention().out.iter().zip(&dout).map(|(out, dout)| out * dout).sum()
        };
        let query = Query { batch: 0, head: 0, row: 0, query: &queries, keys: &keys, values: &values };
        for (at, gradient) in query.gradient(&dout).into_iter().enumerate() {
            let moved = |step: f64| {
                let mut queries = queries.clone();
                queries[at] += step;
                loss(&queries)
            };
            let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            assert!((gradient - difference).abs() < 1e-8, "seed {seed}: {gradient} is not {difference}");
        }
        let blind = Query { keys: &[], values: &[], ..query };
        assert_eq!(blind.gradient(&dout), [0.0; HEAD_DIM]);
    }
}
