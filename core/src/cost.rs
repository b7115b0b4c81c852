//! The cost model behind METHOD_AUTO: multiply-add pairs of exact attention against those of the
//! published estimator plus its selection.

use crate::causal::Decomposition;
use crate::params::Params;
use crate::problem::Problem;
use crate::select::Rectangle;

/// What hashing, sorting and gathering one row costs, in (query, key) pairs. Measured on AVX2 at
/// head_dim 64 and 128: between 20 and 60 pairs.
const SELECTION_PAIRS: f64 = 60.0;

/// The estimator must promise at least this gain: the model is not better than that.
const MARGIN: f64 = 0.9;

/// Whether exact attention is the faster choice.
pub(crate) fn exact_is_faster(params: &Params, problem: &Problem, parts: &Decomposition) -> bool {
    paper_pairs(params, problem, parts) >= MARGIN * exact_pairs(problem)
}

/// (query, key) pairs of one head.
fn exact_pairs(problem: &Problem) -> f64 {
    let (n_q, n_k) = (problem.n_q as f64, problem.n_k as f64);
    let visible = |i: usize| problem.visible_keys(i) as f64;
    match problem.n_q {
        0 => 0.0,
        // The visible keys grow by one from some row on, up to some row: two corners of a trapezoid.
        rows => {
            let (first, last) = (visible(0), visible(rows - 1));
            let rising = last - first;
            let flat_before = (0.0f64).max(if first > 0.0 { 0.0 } else { n_q - n_k });
            let flat_after = (n_q - flat_before - rising - 1.0).max(0.0);
            (n_q - flat_after - flat_before) * (first + last) / 2.0 + flat_after * last
        }
    }
}

/// Pairs of one head under the estimator, selection included.
fn paper_pairs(params: &Params, problem: &Problem, parts: &Decomposition) -> f64 {
    let budget = f64::from(params.block_size) + f64::from(params.sample_size);
    let columns = |rectangle: &Rectangle| budget.min(rectangle.keys.len() as f64);
    let mut pairs = 0.0;
    if let Some(dense) = &parts.dense {
        pairs += dense.queries.len() as f64 * columns(dense);
    }
    if let Some(square) = &parts.square {
        let mut interval = square.len as f64;
        for _ in 0..square.levels() {
            interval /= 2.0;
            pairs += square.len as f64 / 2.0 * budget.min(interval);
        }
        pairs += square.len as f64 * interval / 2.0;
    }
    pairs + SELECTION_PAIRS * (problem.n_q as f64 + problem.n_k as f64 / problem.group as f64)
}
