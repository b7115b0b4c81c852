//! Unfinished rows: numerator and denominator of the softmax, relative to a reference logit.

use crate::problem::Problem;
use crate::terms::{Row, Terms};

/// One row of D^-1 A V before the division, over some of the keys. Rows over disjoint keys add up.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// The logit that both sums are relative to; -inf when no key contributes.
    pub max: f64,
    /// The denominator (a row of D) times exp(-max).
    pub sum: f64,
    /// The numerator (a row of A V) times exp(-max).
    pub weighted_values: Vec<f64>,
}

impl Row for Partial {
    fn empty(value_dim: usize) -> Self {
        Partial { max: f64::NEG_INFINITY, sum: 0.0, weighted_values: vec![0.0; value_dim] }
    }

    /// The sums, relative to the largest logit of the denominator.
    fn from_terms(problem: &Problem, i: usize, Terms { terms, log_constant }: Terms) -> Self {
        let logits: Vec<f64> = terms.iter().map(|term| problem.logit(i, term.key)).collect();
        let of_sum = terms.iter().zip(&logits).filter(|(term, _)| term.in_sum);
        let max = of_sum.fold(log_constant, |max, (_, &logit)| maximum(max, logit));
        let mut partial = Self::empty(problem.value_dim());
        if max == f64::NEG_INFINITY {
            return partial;
        }
        (partial.max, partial.sum) = (max, (log_constant - max).exp());
        for (term, logit) in terms.iter().zip(logits) {
            let factor = term.weight * (logit - max).exp();
            if term.in_sum {
                partial.sum += factor;
            }
            if term.in_product {
                for (total, value) in partial.weighted_values.iter_mut().zip(problem.value_row(term.key)) {
                    *total += factor * value;
                }
            }
        }
        partial
    }

    fn merge(&mut self, other: &Partial) {
        if other.max == f64::NEG_INFINITY {
            return;
        }
        let max = maximum(self.max, other.max);
        let (own, others) = ((self.max - max).exp(), (other.max - max).exp());
        self.max = max;
        self.sum = own * self.sum + others * other.sum;
        for (total, value) in self.weighted_values.iter_mut().zip(&other.weighted_values) {
            *total = own * *total + others * value;
        }
    }
}

impl Partial {
    /// The output row D^-1 A V and ln D; zeros and -inf for the row without keys.
    pub fn finish(&self) -> (Vec<f64>, f64) {
        if self.max == f64::NEG_INFINITY {
            return (vec![0.0; self.weighted_values.len()], f64::NEG_INFINITY);
        }
        (self.weighted_values.iter().map(|value| value / self.sum).collect(), self.max + self.sum.ln())
    }
}

/// A finished head.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// n_q x d_v, row-major.
    pub out: Vec<f64>,
    /// The natural logarithm of each row's denominator, n_q values.
    pub lse: Vec<f64>,
}

impl Output {
    /// The output of rows whose terms are `rows`, of the whole problem.
    pub fn from_terms(problem: &Problem, rows: &[Terms]) -> Self {
        let partial = |(i, terms): (usize, &Terms)| Partial::from_terms(problem, i, terms.clone());
        Self::from_partials(&rows.iter().enumerate().map(partial).collect::<Vec<_>>())
    }

    /// Finishes every row.
    pub fn from_partials(partials: &[Partial]) -> Self {
        let (rows, lse): (Vec<_>, Vec<_>) = partials.iter().map(Partial::finish).unzip();
        Output { out: rows.concat(), lse }
    }
}

/// The larger of the two; unlike `f64::max`, NaN when either is.
pub(crate) fn maximum(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

/// ln sum exp; -inf for an empty sum.
pub(crate) fn log_sum_exp(logits: impl IntoIterator<Item = f64>) -> f64 {
    let logits: Vec<f64> = logits.into_iter().collect();
    match logits.iter().copied().fold(f64::NEG_INFINITY, maximum) {
        f64::NEG_INFINITY => f64::NEG_INFINITY,
        max => max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln(),
    }
}
