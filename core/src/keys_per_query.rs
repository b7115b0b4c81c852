//! How many keys a query meets.

use crate::causal::Decomposition;
use crate::cost;
use crate::error::Result;
use crate::params::{BlockMask, Params};
use crate::plan::{Plan, Run};
use crate::problem::Layouts;
use crate::refine;
use crate::simd::Kernels;

/// Keys and samples that a query meets, on average over the queries, under the method that the call takes, whose
/// budget is not raised. A sample counts also where it lies in the query's own block; halves of odd lengths count as
/// equal.
pub fn keys_per_query(params: &Params, layouts: &Layouts<'_>) -> Result<f64> {
    // Which keys are met does not depend on the kernels.
    let plan = Plan::new(params, layouts, Kernels::scalar())?;
    Ok(planned_keys_per_query(params, layouts.block_mask.as_ref(), &plan))
}

/// [`keys_per_query`] of a plan.
pub(crate) fn planned_keys_per_query(params: &Params, mask: Option<&BlockMask<'_>>, plan: &Plan) -> f64 {
    let Plan { problem, parts, run, leaf, .. } = plan;
    let dense_is_exact = parts.dense.as_ref().is_some_and(|dense| dense.keys.len() <= *leaf);
    let pairs = match run {
        Run::Refined => return refine::keys_per_query(params, problem, params.budget as usize),
        Run::Exact => cost::exact_pairs(parts),
        Run::Paper if dense_is_exact => {
            let square = Decomposition { dense: None, ..parts.clone() };
            cost::exact_pairs(&Decomposition { square: None, ..parts.clone() })
                + cost::estimated_pairs(&square, cost::budget(params, mask))
        }
        Run::Paper => cost::estimated_pairs(parts, cost::budget(params, mask)),
    };
    if problem.n_q == 0 { 0.0 } else { pairs / problem.n_q as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::DType;
    use crate::params::{Mask, Method};
    use crate::view::TensorLayout;

    fn count(method: Method, mask: Mask, [n_q, n_k]: [i64; 2], min_seq_len: usize) -> f64 {
        let layout = |rows| TensorLayout::contiguous(DType::F32, [1, 1, rows, 64]);
        let layouts = Layouts {
            q: layout(n_q),
            k: layout(n_k),
            v: layout(n_k),
            out: layout(n_q),
            lse: None,
            block_mask: None,
            error: None,
            keys_per_query: None,
            mask: None,
        };
        keys_per_query(&Params { method, mask, min_seq_len, ..Params::default() }, &layouts).unwrap()
    }

    #[test]
    fn exact_attention_meets_what_is_visible() {
        assert_eq!(count(Method::Exact, Mask::None, [10, 30], 1), 30.0);
        assert_eq!(count(Method::Exact, Mask::CausalBottomRight, [10, 10], 1), 5.5);
        assert_eq!(count(Method::Exact, Mask::CausalBottomRight, [10, 30], 1), 25.5);
        // The first 20 queries see nothing.
        assert_eq!(count(Method::Exact, Mask::CausalBottomRight, [30, 10], 1), 55.0 / 30.0);
    }

    #[test]
    fn the_estimator_meets_a_block_and_a_sample() {
        assert_eq!(count(Method::Paper, Mask::None, [8192, 8192], 4096), 512.0);
        assert_eq!(count(Method::Paper, Mask::None, [4096, 4096], 4096), 4096.0);
        // Both halves are exact, and the second meets 512 keys of the first.
        assert_eq!(count(Method::Paper, Mask::CausalBottomRight, [8192, 8192], 4096), 2048.5 + 256.0);
    }

    #[test]
    fn auto_counts_the_method_it_takes() {
        assert_eq!(count(Method::Auto, Mask::None, [64, 65_536], 512), 65_536.0);
        assert_eq!(count(Method::Auto, Mask::None, [600, 600], 512), 600.0);
        assert_eq!(count(Method::Auto, Mask::None, [65_536, 65_536], 512), 1024.0);
    }
}
