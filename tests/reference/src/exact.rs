//! Softmax attention without approximation.

use crate::partial::Output;
use crate::problem::Problem;
use crate::terms::{Row, Term, Terms};

/// Which keys a query may see, by position: none masked as in section 2 of arXiv 2310.05869, or the causal
/// mask of its Algorithm 4 aligned at one of two corners when n_q differs from n_k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Every key.
    None,
    /// Key j when j <= i + (n_k - n_q): the last query sees all keys.
    CausalBottomRight,
    /// Key j when j <= i: the first query sees one key.
    CausalTopLeft,
}

impl Mask {
    /// Whether query i of `num_queries` sees key j of `num_keys`.
    pub fn visible(self, num_queries: usize, num_keys: usize, i: usize, j: usize) -> bool {
        match self {
            Mask::None => true,
            Mask::CausalBottomRight => j + num_queries <= i + num_keys,
            Mask::CausalTopLeft => j <= i,
        }
    }
}

/// D^-1 A V and ln D over the visible keys (arXiv 2310.05869, section 2); one that the problem's mask hides is not. A
/// row that sees no key, or only keys with logit -inf, is 0 with lse -inf.
pub fn exact(problem: &Problem, visible: impl Fn(usize, usize) -> bool) -> Output {
    Output::from_partials(&exact_rows(problem, visible))
}

/// The rows of [`exact`] before the division.
pub fn exact_rows<R: Row>(problem: &Problem, visible: impl Fn(usize, usize) -> bool) -> Vec<R> {
    let row = |i| R::from_terms(problem, i, computed(problem, i, &visible));
    (0..problem.num_queries()).map(row).collect()
}

/// The keys of row i that are computed exactly, each with weight 1.
pub(crate) fn computed(problem: &Problem, i: usize, computed: impl Fn(usize, usize) -> bool) -> Terms {
    let terms = (0..problem.num_keys()).filter(|&j| computed(i, j) && !problem.hides(i, j));
    Terms { terms: terms.map(|j| Term::both(j, 1.0)).collect(), ..Terms::empty(0) }
}
