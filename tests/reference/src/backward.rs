//! Gradients of the rows' quotients, with what they are sums of held fixed.

use crate::partial::Output;
use crate::problem::Problem;
use crate::terms::Terms;

/// The gradients of a loss with respect to one head's inputs, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// n_q x d.
    pub dq: Vec<f64>,
    /// n_k x d.
    pub dk: Vec<f64>,
    /// n_k x d_v.
    pub dv: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, row: &[f64]) {
    to.iter_mut().zip(row).for_each(|(to, x)| *to += factor * x);
}

/// The gradients of a loss whose gradients with respect to `output` are `dout` (n_q x d_v) and `dlse` (n_q).
///
/// With u = weight exp(logit), row i is out = sum of u v / D, where lse = ln D and D is the sum of u and the constant.
/// Then d out / du = v / D where u is in the numerator, less out / D where it is in the denominator, and
/// d lse / du = 1 / D there; du = u times the logit's differential. `output` may be that of more terms than `rows` has:
/// what is added is these terms' share.
pub fn backward(problem: &Problem, rows: &[Terms], output: &Output, dout: &[f64], dlse: &[f64]) -> Gradients {
    let (head_dim, value_dim) = (problem.head_dim(), problem.value_dim());
    let zeros = |rows: usize, columns: usize| vec![0.0; rows * columns];
    let mut gradients = Gradients {
        dq: zeros(problem.num_queries(), head_dim),
        dk: zeros(problem.num_keys(), head_dim),
        dv: zeros(problem.num_keys(), value_dim),
    };
    for (i, row) in rows.iter().enumerate().filter(|&(i, _)| output.lse[i] != f64::NEG_INFINITY) {
        let (out, dout) = (&output.out[i * value_dim..][..value_dim], &dout[i * value_dim..][..value_dim]);
        let by_sum = dlse[i] - dot(dout, out);
        for term in &row.terms {
            let share = term.weight * (problem.logit(i, term.key) - output.lse[i]).exp();
            let mut by_logit = 0.0;
            if term.in_product {
                add(&mut gradients.dv[term.key * value_dim..][..value_dim], share, dout);
                by_logit += share * dot(dout, problem.value_row(term.key));
            }
            if term.in_sum {
                by_logit += share * by_sum;
            }
            let factor = problem.scale() * by_logit;
            add(&mut gradients.dq[i * head_dim..][..head_dim], factor, problem.key_row(term.key));
            add(&mut gradients.dk[term.key * head_dim..][..head_dim], factor, problem.query_row(i));
        }
    }
    gradients
}
