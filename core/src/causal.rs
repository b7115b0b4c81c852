//! Algorithm 4 (causal): the recursion over halves, flattened into levels. One stable sort serves all
//! levels: splitting its order at an interval's middle keeps both parts sorted.

use crate::params::Mask;
use crate::problem::Problem;
use crate::select::Rectangle;

/// A causal square: query `query_start + i` sees keys `key_start..=key_start + i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Square {
    /// The first query.
    pub query_start: usize,
    /// The first key.
    pub key_start: usize,
    /// Queries and keys.
    pub len: usize,
    /// Intervals of at most this many keys (at least 1) are not divided.
    pub leaf: usize,
}

impl Square {
    /// Number of levels that have something to divide. The first half takes the odd one, so the first
    /// interval of a level is its longest.
    pub fn levels(&self) -> u32 {
        let mut longest = self.len;
        let mut levels = 0;
        while longest > self.leaf {
            longest = longest.div_ceil(2);
            levels += 1;
        }
        levels
    }

    /// Interval `index` of `level`, as (start, length), and the level at which it stopped dividing, if it did.
    fn interval(&self, level: u32, index: usize) -> (usize, usize, Option<u32>) {
        let (mut start, mut len) = (0, self.len);
        for depth in 0..level {
            if len <= self.leaf {
                return (start, len, Some(depth));
            }
            let half = len.div_ceil(2);
            if index >> (level - 1 - depth) & 1 == 0 {
                len = half;
            } else {
                (start, len) = (start + half, len - half);
            }
        }
        (start, len, None)
    }

    /// The position at which interval `index` of `level` divides (counted from the square's start), with
    /// the interval's bounds.
    pub(crate) fn division(&self, level: u32, index: usize) -> Option<[usize; 3]> {
        match self.interval(level, index) {
            (start, len, None) if len > self.leaf => Some([start, start + len.div_ceil(2), start + len]),
            _ => None,
        }
    }

    /// The sub-problem (Q2, K1) of interval `index` of `level`.
    pub fn rectangle(&self, level: u32, index: usize) -> Option<Rectangle> {
        self.division(level, index).map(|[start, middle, end]| Rectangle {
            queries: self.query_start + middle..self.query_start + end,
            keys: self.key_start + start..self.key_start + middle,
        })
    }

    /// The exact sub-problem on the diagonal with number `index` of `2^levels()`.
    pub fn leaf_rectangle(&self, index: usize) -> Option<Rectangle> {
        let levels = self.levels();
        let (start, len, stopped) = self.interval(levels, index);
        // An interval that stopped early is counted once, at its first descendant.
        if stopped.is_some_and(|depth| index & ((1 << (levels - depth)) - 1) != 0) {
            return None;
        }
        Some(Rectangle {
            queries: self.query_start + start..self.query_start + start + len,
            keys: self.key_start + start..self.key_start + start + len,
        })
    }
}

/// A problem as an unmasked part and a causal square.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decomposition {
    /// Queries that see no key.
    pub blind: Option<Rectangle>,
    /// Queries against keys that all of them see.
    pub dense: Option<Rectangle>,
    /// The rest.
    pub square: Option<Square>,
    /// Position at which the queries divide between these parts, 0 or n_q when they do not.
    pub query_boundary: usize,
    /// The same for the keys.
    pub key_boundary: usize,
}

impl Decomposition {
    /// Without a mask all is dense. Bottom-right: a dense past and a square of the last queries; top-left:
    /// a square of the first queries, and the others dense.
    pub fn new(problem: &Problem, leaf: usize) -> Self {
        let (n_q, n_k) = (problem.n_q, problem.n_k);
        let len = n_q.min(n_k);
        let rectangle = |queries: core::ops::Range<usize>, keys: core::ops::Range<usize>| {
            (!queries.is_empty()).then_some(Rectangle { queries, keys })
        };
        let square =
            |query_start, key_start| (len > 0).then_some(Square { query_start, key_start, len, leaf });
        let nothing =
            Decomposition { blind: None, dense: None, square: None, query_boundary: 0, key_boundary: 0 };
        match problem.mask {
            Mask::None => Decomposition { dense: rectangle(0..n_q, 0..n_k), ..nothing },
            Mask::CausalBottomRight => {
                let (blind, past) = (n_q - len, n_k - len);
                Decomposition {
                    blind: rectangle(0..blind, 0..0),
                    dense: if past > 0 { rectangle(0..n_q, 0..past) } else { None },
                    square: square(blind, past),
                    query_boundary: blind,
                    key_boundary: past,
                }
            }
            Mask::CausalTopLeft => Decomposition {
                dense: rectangle(len..n_q, 0..n_k),
                square: square(0, 0),
                query_boundary: len,
                key_boundary: len,
                ..nothing
            },
        }
    }

    /// Whether the square's queries also have a dense part.
    pub fn dense_precedes_square(&self) -> bool {
        match (&self.dense, &self.square) {
            (Some(dense), Some(square)) => dense.queries.start == square.query_start,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::problem::one_head;
    use std::vec;

    /// Every visible pair is in exactly one sub-problem, and no invisible one in any but a leaf.
    #[test]
    fn the_recursion_covers_every_visible_pair_once() {
        let masks = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
        for (n_q, n_k) in [(1, 1), (7, 7), (16, 16), (33, 33), (20, 45), (45, 20), (5, 0), (3, 64)] {
            for (mask, leaf) in masks.into_iter().flat_map(|mask| [1, 3, 8, 100].map(|leaf| (mask, leaf))) {
                let problem = one_head(mask, n_q, n_k);
                let parts = Decomposition::new(&problem, leaf);
                let mut count = vec![0; n_q * n_k];
                let mut add = |r: Rectangle| {
                    for i in r.queries {
                        for j in r.keys.clone() {
                            count[i * n_k + j] += usize::from(j < problem.visible_keys(i));
                        }
                    }
                };
                if let Some(dense) = parts.dense.clone() {
                    assert!(dense.queries.clone().all(|i| problem.visible_keys(i) >= dense.keys.end));
                    add(dense);
                }
                if let Some(square) = parts.square {
                    for level in 0..square.levels() {
                        (0..1 << level).filter_map(|i| square.rectangle(level, i)).for_each(&mut add);
                    }
                    let leaves = (0..1 << square.levels()).filter_map(|i| square.leaf_rectangle(i));
                    leaves.for_each(|r| {
                        assert!(r.keys.len() <= leaf);
                        add(r);
                    });
                }
                for i in 0..n_q {
                    for j in 0..n_k {
                        let expected = usize::from(j < problem.visible_keys(i));
                        assert_eq!(
                            count[i * n_k + j],
                            expected,
                            "{mask:?} {n_q}x{n_k} leaf {leaf} ({i}, {j})"
                        );
                    }
                }
            }
        }
    }
}
