//! Unfinished rows: numerator and denominator of the softmax, relative to a reference logit.

use crate::Problem;

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

/// A key that takes part in a row, with the factor in front of its exp(logit).
pub(crate) struct Column {
    pub key: usize,
    pub logit: f64,
    pub weight: f64,
}

impl Partial {
    /// The row without keys: the neutral element of [`Partial::merge`].
    pub fn empty(value_dim: usize) -> Self {
        Partial { max: f64::NEG_INFINITY, sum: 0.0, weighted_values: vec![0.0; value_dim] }
    }

    /// The sums over `columns`, relative to their largest logit.
    pub(crate) fn from_columns(problem: &Problem, columns: &[Column]) -> Self {
        let max = columns.iter().map(|column| column.logit).fold(f64::NEG_INFINITY, maximum);
        Self::relative_to(max, problem, columns)
    }

    /// The sums over `columns`, relative to `max`.
    pub(crate) fn relative_to(max: f64, problem: &Problem, columns: &[Column]) -> Self {
        let mut partial = Partial { max, ..Self::empty(problem.value_dim()) };
        if max == f64::NEG_INFINITY {
            return partial;
        }
        for column in columns {
            let term = column.weight * (column.logit - max).exp();
            partial.sum += term;
            for (total, value) in partial.weighted_values.iter_mut().zip(problem.value_row(column.key)) {
                *total += term * value;
            }
        }
        partial
    }

    /// Adds the sums of `other`, whose keys must be disjoint from these: the addition of Algorithm 4.
    pub fn merge(&mut self, other: &Partial) {
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
