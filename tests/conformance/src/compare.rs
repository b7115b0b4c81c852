//! How near a call must come to the oracle.

use hyperattn_core::simd::Packing;
use hyperattn_core::{Kernels, Params};
use hyperattn_reference::{Output, relative_frobenius_error};

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

/// Largest relative Frobenius error of one head's output where the weights are multiplied as bf16.
///
/// A weight is rounded to 8 bits, which moves it by at most 2^-9 of itself; twice where it is rescaled before it
/// is multiplied. The errors are independent between keys, like the terms that they are relative to.
pub const BF16_PAIRS_TOLERANCE: f64 = 1.0 / 256.0;

/// Asserts that every head is within `tolerance` of the oracle (see [`F32_TOLERANCE`]).
pub fn assert_near(outcome: &Outcome, expected: &Output, shape: &Shape, tolerance: f64, what: &str) {
    assert_within(outcome, expected, shape, [tolerance; 2], what);
}

/// [`assert_near`] with one tolerance for the output and one for the log-sum-exp.
fn assert_within(
    outcome: &Outcome,
    expected: &Output,
    shape: &Shape,
    [tolerance, lse_tolerance]: [f64; 2],
    what: &str,
) {
    assert_eq!((outcome.out.len(), outcome.lse.len()), (expected.out.len(), expected.lse.len()));
    let mut worst: f64 = 0.0;
    let len = (shape.n_q * shape.value_dim).max(1);
    for (head, (out, reference)) in outcome.out.chunks(len).zip(expected.out.chunks(len)).enumerate() {
        let error = relative_frobenius_error(out, reference);
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

/// Runs every table, each against the oracle, with an f32 output; inputs of 16 bits also with an output
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
    let block_mask = adjust(Setup::new(Kernels::scalar(), params, inputs)).block_mask;
    let expected = expected::expected(params, inputs, block_mask.as_ref());
    for_each_table(|kernels| {
        let setup = adjust(Setup::new(kernels, params, inputs));
        let wide = setup.run();
        let of_output = match kernels.packing(inputs.dtype) {
            Packing::F32 => tolerance,
            Packing::Bf16Pairs => tolerance.max(BF16_PAIRS_TOLERANCE),
        };
        assert_within(&wide, &expected, &inputs.shape, [of_output, tolerance], &format!("{params:?}"));
        let narrow = Setup { out: inputs.dtype, ..setup }.run();
        let rounded = Storage::new(&wide.out, inputs.dtype).widened();
        assert_eq!(
            narrow.bits(),
            Outcome { out: rounded, lse: wide.lse }.bits(),
            "{:?} output is not the rounded f32 output",
            inputs.dtype
        );
    });
}
