//! Algorithm 4 of arXiv 2310.05869: causal masks by recursion over an unmasked algorithm.

use crate::exact::{Mask, exact_rows};
use crate::problem::Problem;
use crate::terms::Row;
use std::ops::Range;

/// All rows under `mask`, when `unmasked(queries, keys)` gives the rows of an unmasked sub-problem, exact or
/// estimated, in terms of `problem`'s indices. `unmasked` is called for non-empty ranges only.
///
/// - No mask: one unmasked problem.
/// - Bottom-right: the keys before the last n_q for all queries by `unmasked`, and a causal square of the
///   rest; with n_q > n_k the first n_q - n_k rows are empty.
/// - Top-left: a causal square of the first min(n_q, n_k); later queries see all keys by `unmasked`, later
///   keys are seen by nobody.
///
/// A causal square of at most `leaf` keys (at least 1) is exact. A larger one of n keys is two squares, of
/// the first ceil(n / 2) and of the others, and the later queries over the earlier keys by `unmasked`,
/// whatever their number: an exact threshold for these is the business of `unmasked`.
pub fn masked_rows<R: Row>(
    problem: &Problem,
    mask: Mask,
    leaf: usize,
    unmasked: impl FnMut(Range<usize>, Range<usize>) -> Vec<R>,
) -> Vec<R> {
    let (num_queries, num_keys) = (problem.num_queries(), problem.num_keys());
    let square = num_queries.min(num_keys);
    let rows = vec![R::empty(problem.value_dim()); num_queries];
    let mut recursion = Recursion { problem, leaf: leaf.max(1), unmasked, rows };
    match mask {
        Mask::None => recursion.add_unmasked(0..num_queries, 0..num_keys),
        Mask::CausalBottomRight => {
            recursion.add_unmasked(0..num_queries, 0..num_keys - square);
            recursion.add_square(num_queries - square, num_keys - square, square);
        }
        Mask::CausalTopLeft => {
            recursion.add_square(0, 0, square);
            recursion.add_unmasked(square..num_queries, 0..num_keys);
        }
    }
    recursion.rows
}

struct Recursion<'a, R, F> {
    problem: &'a Problem<'a>,
    leaf: usize,
    unmasked: F,
    rows: Vec<R>,
}

impl<R: Row, F: FnMut(Range<usize>, Range<usize>) -> Vec<R>> Recursion<'_, R, F> {
    fn add_square(&mut self, first_query: usize, first_key: usize, size: usize) {
        if size <= self.leaf {
            let problem = self.problem.slice(first_query..first_query + size, first_key..first_key + size);
            self.merge_rows(first_query, &exact_rows(&problem, |i, j| j <= i));
            return;
        }
        let middle = size.div_ceil(2);
        self.add_square(first_query, first_key, middle);
        self.add_square(first_query + middle, first_key + middle, size - middle);
        self.add_unmasked(first_query + middle..first_query + size, first_key..first_key + middle);
    }

    fn add_unmasked(&mut self, queries: Range<usize>, keys: Range<usize>) {
        if queries.is_empty() || keys.is_empty() {
            return;
        }
        let added = (self.unmasked)(queries.clone(), keys);
        assert_eq!(added.len(), queries.len(), "unmasked returned not one row per query");
        self.merge_rows(queries.start, &added);
    }

    fn merge_rows(&mut self, first_query: usize, added: &[R]) {
        for (row, added) in self.rows[first_query..].iter_mut().zip(added) {
            row.merge(added);
        }
    }
}
