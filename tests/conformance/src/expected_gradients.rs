//! What the oracle says a backward call must give, and how near it must come.

use hyperattn_core::{DType, Params};
use hyperattn_reference::{Gradients, Output, Problem, Terms};

use crate::backward::{Backward, Loss, Slopes};
use crate::expected::with_rows;
use crate::for_each_table;
use crate::inputs::{Inputs, Shape};
use crate::run::{Outcome, Setup};
use crate::storage::Storage;

/// Largest relative Frobenius error of the gradients of one head, with all gradients and `out` in f32.
///
/// Weights inherit the rounding errors of logits and of lse, up to some 2e-6 where these are within +-10 (see
/// [`crate::compare::F32_TOLERANCE`]); their errors are independent between pairs of a query and a key.
pub const RELATIVE_TOLERANCE: f64 = 1e-5;

/// The same, of what the gradient would be if nothing cancelled: 8 ulp.
///
/// The gradient of a logit is a weight times the difference of two products (dO v and dO out), which has their rounding
/// errors; where a row has one heavy key it has little else.
pub const UNCANCELLED_TOLERANCE: f64 = 5e-7;

/// [`RELATIVE_TOLERANCE`] where `out` or the gradients are in f16 or bf16: some units of bf16's 2^-9.
pub const NARROW_TOLERANCE: f64 = 2e-2;

/// The gradients of a call, packed like those that the core writes.
#[derive(Clone, Debug)]
pub struct Expected {
    /// What the forward call should have left.
    pub outcome: Outcome,
    /// The gradients: dq, dk and dv.
    pub gradients: [Vec<f64>; 3],
    /// About how large they would be if nothing cancelled.
    pub uncancelled: [Vec<f64>; 3],
}

impl Expected {
    /// The oracle's answer for the call that `setup` would make.
    pub fn new(setup: &Setup<'_>, loss: &Loss) -> Self {
        let Setup { inputs, block_mask, mask, .. } = *setup;
        let shape = &inputs.shape;
        let zeros = || [&inputs.q, &inputs.k, &inputs.v].map(|values| vec![0.0; values.len()]);
        let (mut gradients, mut uncancelled) = (zeros(), zeros());
        let mut outcome =
            Outcome { out: Vec::new(), lse: Vec::new(), error: Vec::new(), keys_per_query: Vec::new() };
        let heads = (0..shape.batch).flat_map(|batch| (0..shape.heads_q).map(move |head| (batch, head)));
        for (batch, head) in heads {
            let method = setup.division.head_methods.map_or(setup.params.method, |methods| methods[head]);
            let params = Params { method, ..*setup.params };
            let number = batch * shape.heads_q + head;
            let rows = number * shape.n_q..(number + 1) * shape.n_q;
            let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| x.into()).collect() };
            let dout = wide(&loss.dout[rows.start * shape.value_dim..rows.end * shape.value_dim]);
            let dlse = loss.dlse.as_ref().map_or(vec![0.0; rows.len()], |dlse| wide(&dlse[rows]));
            let masks = (block_mask.as_ref(), mask);
            with_rows(&params, inputs, masks, (batch, head), |problem, rows: Vec<Terms>| {
                let output = Output::from_terms(problem, &rows);
                let of_head = hyperattn_reference::backward(problem, &rows, &output, &dout, &dlse);
                let sizes = without_cancellation(problem, &rows, &output, &dout, &dlse);
                add_head(&mut gradients, of_head, shape, (batch, head));
                add_head(&mut uncancelled, sizes, shape, (batch, head));
                outcome.out.extend(output.out.iter().map(|&x| x as f32));
                outcome.lse.extend(output.lse.iter().map(|&x| x as f32));
            });
        }
        Expected { outcome, gradients, uncancelled }
    }

    /// Asserts that every head is within the tolerances, `relative` being [`RELATIVE_TOLERANCE`] or a larger one.
    pub fn assert_near(&self, actual: &Slopes, shape: &Shape, relative: f64, what: &str) {
        let heads = [shape.batch * shape.heads_q, shape.batch * shape.heads_kv, shape.batch * shape.heads_kv];
        let mut worst: f64 = 0.0;
        for (which, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
            let (actual, expected) = (actual.all()[which], &self.gradients[which]);
            assert_eq!(actual.len(), expected.len());
            let len = (actual.len() / heads[which]).max(1);
            let of_heads =
                actual.chunks(len).zip(expected.chunks(len)).zip(self.uncancelled[which].chunks(len));
            for (head, ((actual, expected), uncancelled)) in of_heads.enumerate() {
                let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
                let errors: Vec<f64> = actual.iter().zip(expected).map(|(&a, &e)| f64::from(a) - e).collect();
                let bound = relative * norm(expected) + UNCANCELLED_TOLERANCE * norm(uncancelled);
                let error = norm(&errors);
                assert!(
                    error <= bound,
                    "{what}: error {error:e} of {name}, head {head}, is above {bound:e}; norm {:e}",
                    norm(expected)
                );
                worst = worst.max(if error > 0.0 { error / norm(expected) } else { 0.0 });
            }
        }
        println!("{what}: error {worst:.1e}");
    }
}

/// Adds what belongs to a query head to the heads that it belongs to.
fn add_head(whole: &mut [Vec<f64>; 3], head: Gradients, shape: &Shape, (batch, number): (usize, usize)) {
    let query_head = batch * shape.heads_q + number;
    let kv_head = batch * shape.heads_kv + number / shape.group();
    let parts = [(head.dq, query_head), (head.dk, kv_head), (head.dv, kv_head)];
    for (whole, (part, at)) in whole.iter_mut().zip(parts) {
        let to = &mut whole[at * part.len()..][..part.len()];
        to.iter_mut().zip(part).for_each(|(to, x)| *to += x);
    }
}

/// The sums of the absolute values of everything that the gradients are sums of.
fn without_cancellation(
    problem: &Problem<'_>,
    rows: &[Terms],
    output: &Output,
    dout: &[f64],
    dlse: &[f64],
) -> Gradients {
    let (head_dim, value_dim) = (problem.head_dim(), problem.value_dim());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
    let add = |to: &mut [f64], factor: f64, row: &[f64]| {
        to.iter_mut().zip(row).for_each(|(to, x)| *to += (factor * x).abs());
    };
    let mut sums = Gradients {
        dq: vec![0.0; rows.len() * head_dim],
        dk: vec![0.0; problem.num_keys() * head_dim],
        dv: vec![0.0; problem.num_keys() * value_dim],
    };
    for (i, row) in rows.iter().enumerate().filter(|&(i, _)| output.lse[i] != f64::NEG_INFINITY) {
        let dout = &dout[i * value_dim..][..value_dim];
        let delta = dot(dout, &output.out[i * value_dim..][..value_dim]) + dlse[i].abs();
        for term in &row.terms {
            let share = term.weight * (problem.logit(i, term.key) - output.lse[i]).exp();
            let factor = problem.scale() * share * (dot(dout, problem.value_row(term.key)) + delta);
            add(&mut sums.dq[i * head_dim..][..head_dim], factor, problem.key_row(term.key));
            add(&mut sums.dk[term.key * head_dim..][..head_dim], factor, problem.query_row(i));
            add(&mut sums.dv[term.key * value_dim..][..value_dim], share, dout);
        }
    }
    sums
}

/// Runs every table, each against the oracle, beginning with the oracle's out and lse: what the forward call is off by
/// is not this call's. Then with gradients of the inputs' own types, which must be those of f32 rounded to nearest.
pub fn check(params: &Params, inputs: &Inputs, seed: u64) {
    check_setup(params, inputs, seed, |setup| setup);
}

/// [`check`] of the call that `adjust` makes.
pub fn check_setup<'a>(
    params: &'a Params,
    inputs: &'a Inputs,
    seed: u64,
    adjust: impl Fn(Setup<'a>) -> Setup<'a>,
) {
    let loss = Loss::normal(&inputs.shape, inputs.dtypes.q, seed);
    let expected =
        Expected::new(&adjust(Setup::new(hyperattn_core::Kernels::scalar(), params, inputs)), &loss);
    for_each_table(|kernels| {
        let call = Backward::new(adjust(Setup::new(kernels, params, inputs)), &loss);
        let wide = call.run_from(&expected.outcome);
        expected.assert_near(&wide, &inputs.shape, RELATIVE_TOLERANCE, &format!("{params:?}"));
        if inputs.dtypes == DType::F32.into() {
            return;
        }
        let [q, kv] = [inputs.dtypes.q, inputs.dtypes.kv];
        let narrow = Backward { dtypes: [q, q, kv, kv], ..call }.run_from(&expected.outcome);
        let rounded = |values: &[f32], dtype| Storage::new(values, dtype).widened();
        let rounded =
            Slopes { dq: rounded(&wide.dq, q), dk: rounded(&wide.dk, kv), dv: rounded(&wide.dv, kv) };
        assert!(narrow.bits() == rounded.bits(), "{params:?}: not the rounded f32 gradients");
        // As a program calls it: with an out of the queries' type, which is rounded, from the forward itself.
        let whole = Backward { of: Setup { out: q, ..call.of }, ..call }.run();
        expected.assert_near(&whole, &inputs.shape, NARROW_TOLERANCE, "from the forward");
    });
}
