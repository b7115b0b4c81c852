//! What a row is a sum of: the one form that all methods have.

use crate::partial::log_sum_exp;
use crate::problem::Problem;

/// A key that takes part in a row, with the factor in front of its exp(logit).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// The key, as an index of the whole problem that a sub-problem was sliced from.
    pub key: usize,
    /// The factor.
    pub weight: f64,
    /// Whether it enters the denominator.
    pub in_sum: bool,
    /// Whether its value enters the numerator.
    pub in_product: bool,
}

impl Term {
    /// Key `key` in denominator and numerator.
    pub(crate) fn both(key: usize, weight: f64) -> Self {
        Term { key, weight, in_sum: true, in_product: true }
    }
}

/// The selection of one row: everything that is held fixed where the estimate is differentiated.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// The keys, each as often as it takes part.
    pub terms: Vec<Term>,
    /// The logarithm of what the denominator has besides: capped terms, or the floor of Algorithm 2.
    pub log_constant: f64,
}

/// What is kept of a row: its sums ([`crate::Partial`]) or what they are sums of ([`Terms`]).
pub trait Row: Clone {
    /// The row without keys: the neutral element of [`Row::merge`].
    fn empty(value_dim: usize) -> Self;
    /// Row `i` of `problem`, where `terms` name the problem's own keys, from 0.
    fn from_terms(problem: &Problem, i: usize, terms: Terms) -> Self;
    /// Adds a row over other keys: the addition of Algorithm 4.
    fn merge(&mut self, other: &Self);
}

impl Row for Terms {
    fn empty(_: usize) -> Self {
        Terms { terms: Vec::new(), log_constant: f64::NEG_INFINITY }
    }

    fn from_terms(problem: &Problem, _: usize, mut terms: Terms) -> Self {
        terms.terms.iter_mut().for_each(|term| term.key += problem.first_key());
        terms
    }

    fn merge(&mut self, other: &Self) {
        self.terms.extend_from_slice(&other.terms);
        self.log_constant = log_sum_exp([self.log_constant, other.log_constant]);
    }
}
