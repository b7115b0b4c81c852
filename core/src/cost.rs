//! The cost model behind METHOD_AUTO: multiply-add pairs of exact attention against those of the
//! published estimator plus its selection.

use crate::causal::Decomposition;
use crate::hyper;
use crate::params::{BlockMask, Params, Residual};
use crate::problem::Problem;

/// What hashing, sorting and gathering one row costs, in (query, key) pairs. Measured at head_dim 64 and 128: 20 to
/// 60 pairs with AVX2, 60 to 150 with AVX-512, whose pairs are cheaper. Chosen so that near the crossing the
/// faster method is taken, or exact attention.
const SELECTION_PAIRS: f64 = 60.0;

/// The estimator must promise at least this gain: the model is not better than that.
const MARGIN: f64 = 0.9;

/// Whether exact attention is the faster choice.
pub(crate) fn exact_is_faster(
    params: &Params,
    mask: Option<&BlockMask<'_>>,
    problem: &Problem,
    parts: &Decomposition,
) -> bool {
    paper_pairs(params, mask, problem, parts) >= MARGIN * exact_pairs(parts)
}

/// What METHOD_REFINED costs before any query is computed, against exact attention; in (query, key) pairs of one head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Screening {
    /// Summarising, gathering and scoring one key.
    pub of_a_key: f64,
    /// Finding what represents one query.
    pub of_a_query: f64,
    /// A probe row over its exact attention, for its estimate comes on top.
    pub of_a_probe_row: f64,
    /// What takes as long for one head as for all of a call.
    pub latency: f64,
    /// The same, for each key.
    pub latency_of_a_key: f64,
    /// Part of exact attention's time that all this may take. With a target, every head may need exact attention after
    /// all.
    pub most: f64,
    /// Part of exact attention's time without a target.
    pub most_without_target: f64,
    /// Queries must see more than this many times the budget on average, for the keys of the budget cost more than
    /// exact attention's do.
    pub least_visible_per_budget: f64,
}

impl Screening {
    /// Measured with AVX-512 on heads that need exact attention after all, n = 16 and 32 thousand. METHOD_AUTO must not
    /// lose 3 %, and measured losses are up to twice this count.
    pub const CPU: Self = Screening {
        of_a_key: 100.0,
        of_a_query: 0.0,
        of_a_probe_row: 2.0,
        latency: 0.0,
        latency_of_a_key: 0.0,
        most: 0.0125,
        most_without_target: 0.25,
        least_visible_per_budget: 4.0,
    };

    /// Whether METHOD_REFINED is the faster choice, or hardly slower where it finds nothing to gain; `probe_rows` of
    /// each head are computed exactly to find out, none without a target.
    pub fn pays(&self, params: &Params, problem: &Problem, probe_rows: usize) -> bool {
        let visible = problem.mean_visible_keys();
        let (queries, keys) = (problem.n_q as f64, problem.n_k as f64 / problem.group as f64);
        let heads = (problem.batch * problem.heads_q).max(1) as f64;
        let cost = self.of_a_probe_row * probe_rows as f64 * visible
            + self.of_a_key * keys
            + self.of_a_query * queries
            + (self.latency + self.latency_of_a_key * problem.n_k as f64) / heads;
        let most = if probe_rows > 0 { self.most } else { self.most_without_target };
        visible > self.least_visible_per_budget * f64::from(params.budget) && cost <= most * queries * visible
    }
}

/// (query, key) pairs of one head.
pub(crate) fn exact_pairs(parts: &Decomposition) -> f64 {
    let dense =
        parts.dense.as_ref().map_or(0.0, |dense| dense.queries.len() as f64 * dense.keys.len() as f64);
    let square = parts.square.map_or(0.0, |square| square.len as f64 * (square.len as f64 + 1.0) / 2.0);
    dense + square
}

/// Pairs of one head under the estimator, selection included.
fn paper_pairs(
    params: &Params,
    mask: Option<&BlockMask<'_>>,
    problem: &Problem,
    parts: &Decomposition,
) -> f64 {
    // The tau rows of Algorithm 2 meet all keys: about another m columns for as many queries as keys.
    let tau = match hyper::effective_residual(params) {
        Residual::RowNorm => f64::from(params.sample_size),
        _ => 0.0,
    };
    let rows = problem.n_q as f64 + problem.n_k as f64 / problem.group as f64;
    estimated_pairs(parts, budget(params, mask) + tau) + SELECTION_PAIRS * rows
}

/// Keys in the blocks of a query, and samples, one by one.
pub(crate) fn budget(params: &Params, mask: Option<&BlockMask<'_>>) -> f64 {
    let samples = match hyper::effective_residual(params) {
        Residual::None => 0.0,
        Residual::Uniform => 1.0,
        // One sample for the row sums and one for the product with V.
        Residual::RowNorm => 2.0,
    };
    mask.map_or(f64::from(params.block_size), BlockMask::keys_per_query)
        + samples * f64::from(params.sample_size)
}

/// Pairs of one head when every sub-problem costs its queries at most `budget` keys.
pub(crate) fn estimated_pairs(parts: &Decomposition, budget: f64) -> f64 {
    let dense = parts
        .dense
        .as_ref()
        .map_or(0.0, |dense| dense.queries.len() as f64 * budget.min(dense.keys.len() as f64));
    let square = parts.square.map_or(0.0, |square| {
        let len = square.len as f64;
        // Level by level half of the queries meet a rectangle; what is left on the diagonal is exact.
        let interval = |level: u32| len / (1u64 << level) as f64;
        let levels = (1..=square.levels()).map(|level| len / 2.0 * budget.min(interval(level)));
        levels.sum::<f64>() + len * (interval(square.levels()) + 1.0) / 2.0
    });
    dense + square
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Mask;
    use crate::problem::one_head;

    fn choose(mask: Mask, n_q: usize, n_k: usize) -> bool {
        let params = Params { mask, min_seq_len: 512, ..Params::default() };
        let problem = one_head(mask, n_q, n_k);
        exact_is_faster(&params, None, &problem, &Decomposition::new(&problem, params.min_seq_len))
    }

    #[test]
    fn short_problems_are_exact_and_long_ones_are_not() {
        for mask in [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft] {
            assert!(choose(mask, 600, 600), "{mask:?}");
            assert!(!choose(mask, 65_536, 65_536), "{mask:?}");
        }
        // Sorting a long cache for a few queries costs more than attending to it.
        assert!(choose(Mask::CausalBottomRight, 8, 65_536));
        assert!(!choose(Mask::CausalBottomRight, 4096, 65_536));
    }

    #[test]
    fn the_caller_s_blocks_are_what_costs() {
        let (n, block) = (16_384, 256);
        let mut columns = [0; 64 * 64];
        columns.iter_mut().enumerate().for_each(|(i, column)| *column = i as i32 % 64);
        for (per_row, exact) in [(64, true), (2, false)] {
            let row_offsets: [i64; 65] = core::array::from_fn(|row| row as i64 * per_row);
            let mask = BlockMask {
                query_block: block,
                key_block: block,
                num_query_blocks: 64,
                num_key_blocks: 64,
                row_offsets: &row_offsets,
                columns: &columns,
                head_stride: 0,
            };
            assert_eq!(mask.keys_per_query(), per_row as f64 * block as f64);
            let problem = one_head(Mask::None, n, n);
            let parts = Decomposition::new(&problem, 4096);
            assert_eq!(exact_is_faster(&Params::default(), Some(&mask), &problem, &parts), exact);
        }
    }

    #[test]
    fn exact_pairs_count_what_is_visible() {
        for (mask, n_q, n_k) in [
            (Mask::None, 5, 9),
            (Mask::CausalBottomRight, 5, 9),
            (Mask::CausalTopLeft, 9, 5),
            (Mask::CausalTopLeft, 5, 9),
        ] {
            let problem = one_head(mask, n_q, n_k);
            let visible: usize = (0..n_q).map(|i| problem.visible_keys(i)).sum();
            assert_eq!(exact_pairs(&Decomposition::new(&problem, 2)), visible as f64, "{mask:?}");
        }
    }

    #[test]
    fn refining_pays_when_finding_out_costs_little() {
        let choose = |mask, n_q, n_k, probe_rows| {
            Screening::CPU.pays(&Params::default(), &one_head(mask, n_q, n_k), probe_rows)
        };
        for (mask, shortest) in [(Mask::None, 20_000), (Mask::CausalBottomRight, 40_000)] {
            let rows = if mask == Mask::None { 64 } else { 128 };
            assert!(choose(mask, shortest, shortest, rows), "{mask:?}");
            assert!(!choose(mask, shortest / 2, shortest / 2, rows), "{mask:?}");
        }
        // A chunk of queries against a long cache: its probe rows are too large a part of it.
        assert!(!choose(Mask::CausalBottomRight, 8, 131_072, 8));
        assert!(!choose(Mask::CausalBottomRight, 2048, 131_072, 64));
        assert!(choose(Mask::CausalBottomRight, 32_768, 131_072, 64));
        assert!(choose(Mask::CausalBottomRight, 8192, 8192 + 4096, 0));
        assert!(!choose(Mask::CausalBottomRight, 64, 131_072, 0));
    }
}
