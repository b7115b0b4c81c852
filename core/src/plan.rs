//! The plan of a call: which method runs, and which parts of it.

use crate::causal::Decomposition;
use crate::cost;
use crate::error::Result;
use crate::exact;
use crate::hyper;
use crate::params::{Method, Params, Residual};
use crate::problem::{Layouts, Problem};

/// What one call will do: everything that follows from the options and shapes alone.
pub(crate) struct Plan {
    pub(crate) problem: Problem,
    pub(crate) parts: Decomposition,
    /// Whether the whole call is exact attention.
    pub(crate) exact: bool,
    /// Sub-problems with at most this many keys are exact.
    pub(crate) leaf: usize,
    /// Whether Algorithm 1 runs; otherwise the order in memory is the order.
    pub(crate) sorted: bool,
    /// Whether rows are visited by more than one pass.
    pub(crate) stateful: bool,
    /// Whether the residual is Algorithms 2 and 3.
    pub(crate) row_norm: bool,
}

impl Plan {
    pub(crate) fn new(params: &Params, layouts: &Layouts<'_>) -> Result<Self> {
        let problem = Problem::new(params, layouts)?;
        let blocks_are_sorted = layouts.block_mask.is_none() && params.block_size > 0;
        // One block holds all keys of such a sub-problem, so dividing it would change nothing.
        let block = if blocks_are_sorted { params.block_size as usize } else { 0 };
        let leaf = params.min_seq_len.max(block).max(1);
        let parts = Decomposition::new(&problem, leaf);
        let nothing_to_estimate = {
            let dense_is_small = parts.dense.as_ref().is_none_or(|dense| dense.keys.len() <= leaf);
            dense_is_small && parts.square.is_none_or(|square| square.levels() == 0)
        };
        let exact = match params.method {
            Method::Exact => true,
            Method::Auto => {
                nothing_to_estimate
                    || cost::exact_is_faster(params, layouts.block_mask.as_ref(), &problem, &parts)
            }
            _ => nothing_to_estimate,
        };
        let divided = parts.square.is_some_and(|square| square.levels() > 0);
        Ok(Plan {
            sorted: blocks_are_sorted && params.lsh_num_projs > 0,
            stateful: divided || parts.dense_precedes_square(),
            row_norm: hyper::effective_residual(params) == Residual::RowNorm,
            problem,
            parts,
            exact,
            leaf,
        })
    }

    /// Tiles of packed keys that the exact passes of one KV head read more than once.
    pub(crate) fn packed_tiles(&self) -> usize {
        let problem = &self.problem;
        if self.exact {
            return exact::packed_tiles(problem, 1, problem.n_q, problem.n_k);
        }
        // The first leaf is the longest.
        self.parts.square.and_then(|square| Some((square, square.leaf_rectangle(0)?))).map_or(
            0,
            |(square, leaf)| {
                exact::packed_tiles(problem, 1 << square.levels(), leaf.queries.len(), leaf.keys.len())
            },
        )
    }
}
