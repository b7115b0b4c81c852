//! What a row of METHOD_REFINED must not feel on a device: NaN that it does not see, hidden keys, large values. Skips
//! itself where there is no device.

mod support;

use hyperattn_conformance::compare::head_errors;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::isolation::{
    assert_a_key_or_value_stays_with_the_rows_that_see_it, assert_a_query_spoils_its_own_row_only,
    assert_later_keys_are_not_felt,
};
use hyperattn_conformance::patterns::{hide, topics};
use hyperattn_conformance::run::Outcome;
use hyperattn_core::{DType, Mask, Params};

use support::call::Call;
use support::device::Device;
use support::refined::{TARGETS, most, oracle, refined};

const CAUSAL: [Mask; 2] = [Mask::CausalBottomRight, Mask::CausalTopLeft];
/// Elements of a row.
const D: usize = 64;
/// Queries and keys.
const N: usize = 700;
/// The types: one for each way to weigh keys.
const WEIGHED: [DType; 2] = [DType::F32, DType::BF16];

fn small(mask: Mask, target_error: f32) -> Params {
    Params { band: 32, ..refined(mask, 128, target_error) }
}

/// Two batch items, four query heads on two KV heads.
fn shape(n_q: usize, n_k: usize) -> Shape {
    Shape { batch: 2, heads_q: 4, heads_kv: 2, head_dim: D, value_dim: D, ..Shape::single(n_q, n_k) }
}

fn run(params: &Params, inputs: &Inputs) -> Outcome {
    Call::new(params, inputs).run()
}

/// Every element type, mask and target.
fn kinds(masks: &[Mask]) -> Vec<(DType, Mask, f32)> {
    let of_type = |dtype| masks.iter().flat_map(move |&mask| TARGETS.map(|target| (dtype, mask, target)));
    WEIGHED.into_iter().flat_map(of_type).collect()
}

#[test]
fn rows_do_not_feel_later_keys() {
    let Some(_device) = Device::first() else { return };
    for (dtype, mask) in WEIGHED.into_iter().flat_map(|dtype| CAUSAL.map(|mask| (dtype, mask))) {
        for (n_q, n_k) in [(N, N), (400, N), (N, 400)] {
            let clean = Inputs::normal(Shape { batch: 1, ..shape(n_q, n_k) }, 2200).rounded(dtype);
            println!("{dtype:?}");
            assert_later_keys_are_not_felt(&small(mask, 0.0), &small(mask, 0.05), &clean, run);
        }
    }
}

#[test]
fn a_query_of_nan_spoils_its_own_row_only() {
    let Some(_device) = Device::first() else { return };
    for (dtype, mask, target_error) in kinds(&[Mask::None, Mask::CausalBottomRight]) {
        let clean = Inputs::normal(shape(N, N), 2210).rounded(dtype);
        println!("{dtype:?}");
        assert_a_query_spoils_its_own_row_only(&small(mask, target_error), &clean, run);
    }
}

#[test]
fn a_key_or_value_that_is_not_finite_stays_with_the_rows_that_see_it() {
    let Some(_device) = Device::first() else { return };
    for (dtype, mask, target_error) in kinds(&[Mask::None, Mask::CausalBottomRight]) {
        let clean = Inputs::normal(shape(N, N), 2220).rounded(dtype);
        println!("{dtype:?}");
        assert_a_key_or_value_stays_with_the_rows_that_see_it(&small(mask, target_error), &clean, run);
    }
}

/// Keys that nobody may weigh give no NaN, and cost no more accuracy than keys that nobody weighs.
fn assert_hidden_keys_do_not_matter(what: &str, hidden: impl Fn(usize) -> bool) {
    let topics = topics(shape(N, N), 2230);
    let mut diffuse = Inputs::normal(shape(N, N), 2231);
    // Values of mean 1: what counts too many keys shows.
    diffuse.v.iter_mut().for_each(|x| *x += 1.0);
    for (dtype, mask) in
        WEIGHED.into_iter().flat_map(|dtype| [Mask::None, Mask::CausalBottomRight].map(|mask| (dtype, mask)))
    {
        for clean in [&topics, &diffuse] {
            let params = small(mask, 0.0);
            let worst_error = |by: f32| {
                let mut inputs = clean.clone().rounded(dtype);
                hide(&mut inputs, &hidden, by);
                let outcome = Call::new(&params, &inputs).run();
                assert!(outcome.out.iter().chain(&outcome.lse).all(|x| !x.is_nan()), "{what}, {params:?}");
                most(head_errors(&outcome.out, &oracle(&params, &inputs), &inputs.shape).into_iter())
            };
            let (unwanted, hidden) = (worst_error(400.0), worst_error(f32::INFINITY));
            println!("{what}, {mask:?}, {dtype:?}: worst error {hidden:.3}, of unwanted keys {unwanted:.3}");
            assert!(hidden <= 1.1 * unwanted + 2e-3, "{what}, {mask:?}, {dtype:?}: {hidden}, not {unwanted}");
        }
    }
}

#[test]
fn scattered_hidden_keys_do_not_matter() {
    let Some(_device) = Device::first() else { return };
    assert_hidden_keys_do_not_matter("every third hidden", |key| key % 3 == 0);
}

/// As a padded prompt has them.
#[test]
fn long_runs_of_hidden_keys_do_not_matter() {
    let Some(_device) = Device::first() else { return };
    assert_hidden_keys_do_not_matter("a run hidden", |key| (100..400).contains(&key));
}

/// Nothing to weigh is nothing: output 0 and lse -inf, as in exact attention.
#[test]
fn rows_that_may_weigh_no_key_are_empty() {
    let Some(_device) = Device::first() else { return };
    for (dtype, mask, target_error) in kinds(&[Mask::None, Mask::CausalBottomRight]) {
        let mut inputs = Inputs::normal(shape(N, N), 2240).rounded(dtype);
        hide(&mut inputs, |_| true, f32::INFINITY);
        let params = small(mask, target_error);
        let outcome = Call::new(&params, &inputs).run();
        assert!(outcome.out.iter().all(|&x| x == 0.0), "{dtype:?}, {params:?}");
        assert!(outcome.lse.iter().all(|&lse| lse == f32::NEG_INFINITY), "{dtype:?}, {params:?}");
    }
}

/// Values near the end of the range of f32, which sums of a block or of a tile must not leave.
#[test]
fn large_values_stay_finite() {
    let Some(_device) = Device::first() else { return };
    for (dtype, mask, target_error) in kinds(&[Mask::None, Mask::CausalBottomRight]) {
        let mut inputs = Inputs::normal(shape(N, N), 2250);
        inputs.v.iter_mut().for_each(|x| *x *= 1e30);
        let inputs = inputs.rounded(dtype);
        let params = small(mask, target_error);
        let outcome = Call::new(&params, &inputs).run();
        assert!(outcome.out.iter().chain(&outcome.lse).all(|x| x.is_finite()), "{dtype:?}, {params:?}");
        assert!(outcome.error.iter().all(|x| x.is_finite()), "{dtype:?}, {params:?}");
    }
}
