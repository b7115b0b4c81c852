//! The published estimators over one unmasked sub-problem, given the mask M and the samples.
//!
//! `covered(i, j)` is M_ij of arXiv 2310.05869: whether the entry is computed exactly. A sampled entry that
//! is covered contributes zero, so that nothing is counted twice.

use crate::exact::{computed, exact_rows};
use crate::partial::log_sum_exp;
use crate::problem::Problem;
use crate::terms::{Row, Term};

/// The covered entries alone: M . A without a residual.
pub fn blocks_only<R: Row>(problem: &Problem, covered: impl Fn(usize, usize) -> bool) -> Vec<R> {
    exact_rows(problem, covered)
}

/// The practical variant that section 4 of the paper times: one uniform sample of keys (with repetition)
/// serves the row sums and the product with V; each of the m samples has weight n_k / m.
pub fn uniform<R: Row>(
    problem: &Problem,
    covered: impl Fn(usize, usize) -> bool,
    samples: &[usize],
) -> Vec<R> {
    let weight = problem.num_keys() as f64 / samples.len() as f64;
    let row = |i| {
        let mut row = computed(problem, i, &covered);
        row.terms.extend(samples.iter().filter(|&&j| !covered(i, j)).map(|&j| Term::both(j, weight)));
        R::from_terms(problem, i, row)
    };
    (0..problem.num_queries()).map(row).collect()
}

/// What Algorithms 2 and 3 draw, and their parameters.
#[derive(Clone, Copy, Debug)]
pub struct RowNormSamples<'a> {
    /// The queries whose largest unmasked row sum is tau (Algorithm 2).
    pub tau_rows: &'a [usize],
    /// The keys l_1..l_m drawn uniformly for the row sums (Algorithm 2).
    pub row_sum_columns: &'a [usize],
    /// The keys drawn for the product with V, each with its probability (Algorithm 3).
    pub value_columns: &'a [(usize, f64)],
    /// Scales the cap C_i by its square.
    pub epsilon: f64,
    /// Divides tau in the floor of the unmasked row sums.
    pub kappa: f64,
}

/// Algorithm 3 with the row sums of Algorithm 2. With e_i the covered part of row sum i, n = n_k and m the
/// number of `row_sum_columns`:
///
/// - tau = max over `tau_rows` of the unmasked row sum (a row whose sum is NaN is passed over);
/// - C_i = epsilon^2 m / (n max(ln n, 1)) (e_i + tau / kappa);
/// - d_i = (n / m) sum_j (1 - M_i,l_j) min(A_i,l_j, C_i), D_i = e_i + max(d_i, tau / kappa);
/// - row i = \[(M . A)_i V + sum_j (1 - M_i,l_j) A_i,l_j v_l_j / (m' p_l_j)\] / D_i, m' `value_columns`.
///
/// A row with D_i = 0 is empty. All of it is in the log domain.
///
/// With the selection, tau and C_i are held fixed too: a capped term is a constant, and so is the whole of d_i where
/// tau / kappa takes its place.
pub fn row_norm<R: Row>(
    problem: &Problem,
    covered: impl Fn(usize, usize) -> bool,
    samples: &RowNormSamples,
) -> Vec<R> {
    let num_keys = problem.num_keys() as f64;
    let num_columns = samples.row_sum_columns.len() as f64;
    let log_unmasked_sum = |&i: &usize| {
        log_sum_exp((0..problem.num_keys()).filter(|&j| !covered(i, j)).map(|j| problem.logit(i, j)))
    };
    let log_tau = samples.tau_rows.iter().map(log_unmasked_sum).fold(f64::NEG_INFINITY, f64::max);
    let log_floor = log_tau - samples.kappa.ln();
    let log_cap_factor = (samples.epsilon.powi(2) * num_columns / (num_keys * num_keys.ln().max(1.0))).ln();
    let column_weight = num_keys / num_columns;

    let row = |i| {
        let mut row = computed(problem, i, &covered);
        let log_covered = log_sum_exp(row.terms.iter().map(|term| problem.logit(i, term.key)));

        let log_cap = log_cap_factor + log_sum_exp([log_covered, log_floor]);
        let sampled = samples.row_sum_columns.iter().filter(|&&j| !covered(i, j));
        let sampled: Vec<(usize, f64)> = sampled.map(|&j| (j, problem.logit(i, j))).collect();
        // Not f64::min, which would hide a NaN.
        let capped = |logit: f64| if logit > log_cap { log_cap } else { logit };
        // ln of the weight is infinite when there are no columns, but then the sum is 0.
        let log_sampled = match log_sum_exp(sampled.iter().map(|&(_, logit)| capped(logit))) {
            f64::NEG_INFINITY => f64::NEG_INFINITY,
            log_sum => log_sum + column_weight.ln(),
        };
        if log_sampled > log_floor || log_sampled.is_nan() {
            for (key, logit) in sampled {
                if logit > log_cap {
                    row.log_constant = log_sum_exp([row.log_constant, log_cap + column_weight.ln()]);
                } else {
                    row.terms.push(Term { in_product: false, ..Term::both(key, column_weight) });
                }
            }
        } else {
            row.log_constant = log_floor;
        }

        for &(key, probability) in samples.value_columns.iter().filter(|&&(j, _)| !covered(i, j)) {
            let weight = 1.0 / (samples.value_columns.len() as f64 * probability);
            row.terms.push(Term { in_sum: false, ..Term::both(key, weight) });
        }
        R::from_terms(problem, i, row)
    };
    (0..problem.num_queries()).map(row).collect()
}

/// p_l = |v_l|^2 / |V|_F^2 of Algorithm 3; uniform when V is zero.
pub fn row_norm_probabilities(problem: &Problem) -> Vec<f64> {
    let squared_norm = |j| problem.value_row(j).iter().map(|x| x * x).sum::<f64>();
    let norms: Vec<f64> = (0..problem.num_keys()).map(squared_norm).collect();
    let total: f64 = norms.iter().sum();
    let share = |norm: &f64| if total == 0.0 { 1.0 / norms.len() as f64 } else { norm / total };
    norms.iter().map(share).collect()
}
