//! How near a call must come to the oracle.

use hyperattn_core::simd::Packing;
use hyperattn_core::{BlockMask, Kernels, Params};
use hyperattn_reference::{Output, relative_frobenius_error};

use crate::additive_mask::AdditiveMask;
use crate::inputs::{Inputs, Shape};
use crate::run::{Outcome, Setup};
use crate::storage::Storage;
use crate::{expected, for_each_table};

/// Largest relative Frobenius error of one head's f32 output, and largest error of an lse relative to
/// max(1, |lse|).
///
/// A logit is a sum of d products in f32. On inputs whose logits are within about +-10 its rounding error is
/// some 2^-24 sqrt(d) times that, so below 2e-6 up to d = 256, and a weight inherits it as a relative error.
/// 2^x adds at most 2 ulp (2.4e-7), a sum over n weights in tiles of 64 some 2^-24 sqrt(n). All of it
/// is independent between keys, so that the output has less of it than a weight.
pub const F32_TOLERANCE: f64 = 5e-6;

/// Largest error of one head's output where the weights are multiplied as bf16, relative to the output that the
/// absolute values would have (Frobenius norms), on top of [`F32_TOLERANCE`].
///
/// A weight is rounded to 8 bits, which moves it by at most 2^-8 of itself and mostly by less than half of that;
/// the few that are rescaled before they are multiplied are rounded again. The errors are independent, so that
/// over a head the norm stays below 2^-8 of that of sum w |v| / sum w.
pub const BF16_PAIRS_TOLERANCE: f64 = 1.0 / 256.0;

/// Asserts that every head is within `tolerance` of the oracle (see [`F32_TOLERANCE`]).
pub fn assert_near(outcome: &Outcome, expected: &Output, shape: &Shape, tolerance: f64, what: &str) {
    assert_within(outcome, expected, shape, &|_| tolerance, tolerance, what);
}

/// [`assert_near`] with a tolerance for the output of each head, and one for the log-sum-exp.
fn assert_within(
    outcome: &Outcome,
    expected: &Output,
    shape: &Shape,
    tolerance_of: &dyn Fn(usize) -> f64,
    lse_tolerance: f64,
    what: &str,
) {
    assert_eq!((outcome.out.len(), outcome.lse.len()), (expected.out.len(), expected.lse.len()));
    let mut worst: f64 = 0.0;
    let len = head_len(shape);
    for (head, (out, reference)) in outcome.out.chunks(len).zip(expected.out.chunks(len)).enumerate() {
        let (error, tolerance) = (relative_frobenius_error(out, reference), tolerance_of(head));
        assert!(error <= tolerance, "{what}: error {error:e} of head {head} is above {tolerance:e}");
        worst = worst.max(error);
    }
    for (row, (&lse, &reference)) in outcome.lse.iter().zip(&expected.lse).enumerate() {
        if f64::from(lse) == reference {
            continue;
        }
        let error = (f64::from(lse) - reference).abs() / reference.abs().max(1.0);
        assert!(error <= lse_tolerance, "{what}: lse {lse} of row {row} should be {reference}");
    }
    println!("{what}: error {worst:.1e}");
}

/// The relative Frobenius error of every head's output.
pub fn head_errors(out: &[f32], truth: &[f64], shape: &Shape) -> Vec<f64> {
    let heads = out.chunks(head_len(shape)).zip(truth.chunks(head_len(shape)));
    heads.map(|(out, truth)| relative_frobenius_error(out, truth)).collect()
}

/// Numbers of one head's output.
fn head_len(shape: &Shape) -> usize {
    (shape.n_q * shape.value_dim).max(1)
}

/// Of every head, how much larger (in Frobenius norm) the output is when all values are positive.
fn cancellation(
    params: &Params,
    inputs: &Inputs,
    (block_mask, additive_mask): (Option<&BlockMask<'_>>, Option<&AdditiveMask>),
    expected: &Output,
) -> Vec<f64> {
    let mut positive = inputs.clone();
    positive.v.iter_mut().for_each(|x| *x = x.abs());
    let largest = expected::expected_masked(params, &positive, block_mask, additive_mask);
    let norm = |out: &[f64]| out.iter().map(|x| x * x).sum::<f64>().sqrt();
    let len = head_len(&inputs.shape);
    let heads = largest.out.chunks(len).zip(expected.out.chunks(len));
    heads.map(|(positive, out)| if norm(out) > 0.0 { norm(positive) / norm(out) } else { 0.0 }).collect()
}

/// Runs every table, each against the oracle, with an f32 output; queries of 16 bits also with an output
/// of their own type, which must be the f32 output rounded to nearest: half an ulp more.
pub fn check(params: &Params, inputs: &Inputs, tolerance: f64) {
    check_setup(params, inputs, tolerance, |setup| setup);
}

/// [`check`] of the call that `adjust` makes.
pub fn check_setup<'a>(
    params: &'a Params,
    inputs: &'a Inputs,
    tolerance: f64,
    adjust: impl Fn(Setup<'a>) -> Setup<'a>,
) {
    let Setup { block_mask, mask, .. } = adjust(Setup::new(Kernels::scalar(), params, inputs));
    let expected = expected::expected_masked(params, inputs, block_mask.as_ref(), mask);
    for_each_table(|kernels| {
        let setup = adjust(Setup::new(kernels, params, inputs));
        let wide = setup.run();
        // With f32 queries products stay in f32, whatever the type of the keys.
        let cancellation = match kernels.packing(inputs.dtypes.q) {
            Packing::F32 => Vec::new(),
            Packing::Bf16Pairs => cancellation(params, inputs, (block_mask.as_ref(), mask), &expected),
        };
        let of_head = |head: usize| {
            cancellation.get(head).map_or(tolerance, |factor| tolerance + BF16_PAIRS_TOLERANCE * factor)
        };
        assert_within(&wide, &expected, &inputs.shape, &of_head, tolerance, &format!("{params:?}"));
        let narrow = Setup { out: inputs.dtypes.q, ..setup }.run();
        let rounded = Storage::new(&wide.out, inputs.dtypes.q).widened();
        assert_eq!(
            narrow.bits(),
            Outcome { out: rounded, ..wide }.bits(),
            "{:?} output is not the rounded f32 output",
            inputs.dtypes.q
        );
    });
}
