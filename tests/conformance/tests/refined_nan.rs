//! METHOD_REFINED and what a row must not feel: keys and values that it does not see, NaN of others, keys without
//! weight.

use hyperattn_conformance::compare::head_errors;
use hyperattn_conformance::expected::exact_output;
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::isolation::{
    assert_a_key_or_value_stays_with_the_rows_that_see_it, assert_a_query_spoils_its_own_row_only,
    assert_later_keys_are_not_felt,
};
use hyperattn_conformance::patterns::{hide, topics};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{Mask, Method, Params};
use hyperattn_reference::Output;

const N: usize = 700;
const CAUSAL: [Mask; 2] = [Mask::CausalBottomRight, Mask::CausalTopLeft];
const MASKS: [Mask; 2] = [Mask::None, Mask::CausalBottomRight];

fn refined(mask: Mask, target_error: f32) -> Params {
    let base = Params { method: Method::Refined, mask, target_error, ..Params::default() };
    Params { min_seq_len: 0, budget: 128, band: 32, ..base }
}

/// Two batch items, four query heads on two KV heads.
fn shape(n_q: usize, n_k: usize) -> Shape {
    Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(n_q, n_k) }
}

#[test]
fn rows_do_not_feel_later_keys() {
    for mask in CAUSAL {
        for (n_q, n_k) in [(N, N), (400, N), (N, 400)] {
            let clean = Inputs::normal(Shape { batch: 1, ..shape(n_q, n_k) }, 2200);
            let (params, with_target) = (refined(mask, 0.0), refined(mask, 0.05));
            for_each_table(|kernels| {
                assert_later_keys_are_not_felt(&params, &with_target, &clean, |params, inputs| {
                    Setup::new(kernels, params, inputs).run()
                });
            });
        }
    }
}

#[test]
fn a_query_of_nan_spoils_its_own_row_only() {
    let clean = Inputs::normal(shape(N, N), 2210);
    for (mask, target_error) in MASKS.into_iter().flat_map(|mask| [(mask, 0.0), (mask, 0.05)]) {
        for_each_table(|kernels| {
            assert_a_query_spoils_its_own_row_only(&refined(mask, target_error), &clean, |params, inputs| {
                Setup::new(kernels, params, inputs).run()
            });
        });
    }
}

#[test]
fn a_key_or_value_that_is_not_finite_stays_with_the_rows_that_see_it() {
    let clean = Inputs::normal(shape(N, N), 2220);
    for (mask, target_error) in MASKS.into_iter().flat_map(|mask| [(mask, 0.0), (mask, 0.05)]) {
        let params = refined(mask, target_error);
        for_each_table(|kernels| {
            assert_a_key_or_value_stays_with_the_rows_that_see_it(&params, &clean, |params, inputs| {
                Setup::new(kernels, params, inputs).run()
            });
        });
    }
}

/// Keys that nobody may weigh give no NaN, and cost no more accuracy than keys that nobody weighs.
fn assert_hidden_keys_do_not_matter(what: &str, hidden: impl Fn(usize) -> bool) {
    let clean = topics(shape(N, N), 2230);
    let mut diffuse = Inputs::normal(shape(N, N), 2231);
    // Values of mean 1: what counts too many keys shows.
    diffuse.v.iter_mut().for_each(|x| *x += 1.0);
    for (mask, clean) in MASKS.into_iter().flat_map(|mask| [(mask, &clean), (mask, &diffuse)]) {
        let params = refined(mask, 0.0);
        let problems = [200.0, f32::INFINITY].map(|by| {
            let mut inputs = clean.clone();
            hide(&mut inputs, &hidden, by);
            let truth = exact_output(&params, &inputs);
            (inputs, truth)
        });
        let worst_error = |(inputs, truth): &(Inputs, Output), kernels| {
            let outcome = Setup::new(kernels, &params, inputs).run();
            assert!(outcome.out.iter().chain(&outcome.lse).all(|x| !x.is_nan()), "{what}, {params:?}");
            let errors = head_errors(&outcome.out, &truth.out, &inputs.shape);
            errors.into_iter().fold(0.0, f64::max)
        };
        for_each_table(|kernels| {
            let [unwanted, hidden] = [0, 1].map(|index| worst_error(&problems[index], kernels));
            println!("{what}, {mask:?}: worst error {hidden:.3}, of unwanted keys {unwanted:.3}");
            assert!(hidden <= 1.1 * unwanted, "{what}, {mask:?}: error {hidden:.3}, not {unwanted:.3}");
        });
    }
}

#[test]
fn scattered_hidden_keys_do_not_matter() {
    assert_hidden_keys_do_not_matter("every third hidden", |key| key % 3 == 0);
}

/// As a padded prompt has them.
#[test]
fn long_runs_of_hidden_keys_do_not_matter() {
    assert_hidden_keys_do_not_matter("a run hidden", |key| (100..400).contains(&key));
}

/// Nothing to weigh is nothing: output 0 and lse -inf, as in exact attention.
#[test]
fn rows_that_may_weigh_no_key_are_empty() {
    let mut inputs = Inputs::normal(shape(N, N), 2240);
    hide(&mut inputs, |_| true, f32::INFINITY);
    for (mask, target_error) in MASKS.into_iter().flat_map(|mask| [(mask, 0.0), (mask, 0.05)]) {
        let params = refined(mask, target_error);
        for_each_table(|kernels| {
            let outcome = Setup::new(kernels, &params, &inputs).run();
            assert!(outcome.out.iter().all(|&x| x == 0.0), "{params:?}");
            assert!(outcome.lse.iter().all(|&lse| lse == f32::NEG_INFINITY), "{params:?}");
        });
    }
}

/// Values near the end of the range of f32, which sums of a block or of a tile must not leave.
#[test]
fn large_values_stay_finite() {
    let mut inputs = Inputs::normal(shape(N, N), 2250);
    inputs.v.iter_mut().for_each(|x| *x *= 1e30);
    for (mask, target_error) in MASKS.into_iter().flat_map(|mask| [(mask, 0.0), (mask, 0.05)]) {
        let params = refined(mask, target_error);
        for_each_table(|kernels| {
            let setup = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) };
            let outcome = setup.run();
            assert!(outcome.out.iter().chain(&outcome.lse).all(|x| x.is_finite()));
            assert!(outcome.error.iter().all(|x| x.is_finite()));
        });
    }
}
