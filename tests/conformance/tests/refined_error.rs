//! The estimate of a head's error, and what METHOD_REFINED makes of a target for it. The probe rows are random: all
//! seeds are fixed, and what depends on them says how often it would fail for others.

use hyperattn_conformance::compare::{F32_TOLERANCE, assert_near, head_errors};
use hyperattn_conformance::expected::{exact_output, mean_visible_keys};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::patterns::{needle, sinks_and_neighbours, square, together, topics};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_core::{Kernels, Mask, Method, Params};

const MASKS: [Mask; 2] = [Mask::None, Mask::CausalBottomRight];

fn refined(mask: Mask, target_error: f32) -> Params {
    let base = Params { method: Method::Refined, mask, target_error, ..Params::default() };
    Params { min_seq_len: 0, budget: 256, ..base }
}

/// A diffuse head, one with a needle, one with topics and one that looks at first keys and neighbours.
fn mixed(n: usize, seed: u64) -> Inputs {
    let shape = square(n, 32);
    together(&[
        Inputs::normal(shape, seed),
        needle(shape, n / 5, seed + 10),
        topics(shape, seed + 20),
        sinks_and_neighbours(shape, seed + 30),
    ])
}

#[test]
fn a_tiny_target_is_exact_attention() {
    let inputs = mixed(1200, 2300);
    for mask in MASKS {
        let params = refined(mask, 1e-6);
        let truth = exact_output(&params, &inputs);
        let visible = mean_visible_keys(mask, &inputs.shape) as f32;
        for_each_table(|kernels| {
            let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
            assert_near(&outcome, &truth, &inputs.shape, F32_TOLERANCE, "exact");
            for (keys, error) in outcome.keys_per_query.iter().zip(&outcome.error) {
                assert!((keys / visible - 1.0).abs() < 1e-6 && *error == 0.0, "{keys} keys, error {error}");
            }
        });
    }
}

/// The true error of a head is within twice the target, and the estimate within a factor 2 of the truth where that is
/// more than .01. A tile of queries that is not probed can hide an error: of 320 heads of other seeds 318 were within
/// twice the target, and of the 192 with an error above .01 the estimates of 173 within the factor (.90). With these
/// shares all but one of 96 heads hold the first with confidence .88, and three quarters of some 55 the second with
/// confidence .999; the seeds are fixed.
#[test]
fn a_target_bounds_the_true_error() {
    let kernels = Kernels::detect(None);
    println!("table {}", kernels.isa().name());
    let (mut beyond, mut estimated, mut near) = (0, 0, 0);
    for mask in MASKS {
        for seed in 0..12 {
            let inputs = mixed(2048, 2310 + seed);
            let params = Params { seed, ..refined(mask, 0.05) };
            let truth = exact_output(&params, &inputs);
            let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
            let errors = head_errors(&outcome.out, &truth.out, &inputs.shape);
            println!("{mask:?}, seed {seed}: errors {errors:.4?}, estimated {:.4?}", outcome.error);
            println!("keys per query {:?}", outcome.keys_per_query);
            for (&error, &estimate) in errors.iter().zip(&outcome.error) {
                beyond += usize::from(error > 0.1);
                if error > 0.01 {
                    estimated += 1;
                    near += usize::from((0.5..=2.0).contains(&(f64::from(estimate) / error)));
                }
            }
        }
    }
    println!("{beyond} of 96 heads beyond twice the target, {near} of {estimated} estimates near the truth");
    assert!(beyond <= 1 && estimated >= 20 && 4 * near >= 3 * estimated);
}

/// Without a target the estimate is one of the budget's error: the same, to a factor 2 for nine heads of ten, on inputs
/// whose error is spread over all queries. METHOD_PAPER has one too.
#[test]
fn estimates_are_near_the_truth() {
    let counts = std::sync::Mutex::new([0; 2]);
    for mask in MASKS {
        for method in [Method::Refined, Method::Paper] {
            for seed in 0..4 {
                let shape = Shape { heads_q: 4, heads_kv: 2, ..square(1500, 32) };
                let inputs = Inputs::clustered(shape, 2330 + seed);
                let params = Params { method, seed, block_size: 128, sample_size: 128, ..refined(mask, 0.0) };
                let truth = exact_output(&params, &inputs);
                for_each_table(|kernels| {
                    let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
                    let errors = head_errors(&outcome.out, &truth.out, &inputs.shape);
                    println!("{method:?} {mask:?}: errors {errors:.3?}, estimated {:.3?}", outcome.error);
                    for (&error, &estimate) in errors.iter().zip(&outcome.error) {
                        let ratio = f64::from(estimate) / error;
                        let mut counts = counts.lock().unwrap();
                        counts[0] += usize::from((0.5..=2.0).contains(&ratio));
                        counts[1] += 1;
                        assert!((0.25..=4.0).contains(&ratio), "estimated {estimate}, true {error}");
                    }
                });
            }
        }
    }
    let [near, all] = counts.into_inner().unwrap();
    println!("{near} of {all} within a factor of 2");
    assert!(10 * near >= 9 * all);
}

/// Only the probe rows are random: without a target another seed or offset gives the same output.
#[test]
fn seeds_choose_probes_only() {
    let inputs = mixed(700, 2340);
    for mask in MASKS {
        let params = refined(mask, 0.0);
        for_each_table(|kernels| {
            let run = |params: &Params| {
                let outcome = Setup { estimates: true, ..Setup::new(kernels, params, &inputs) }.run();
                let error = outcome.error.clone();
                (Outcome { error: Vec::new(), ..outcome }.bits(), error)
            };
            let (bits, error) = run(&params);
            let mut others = Vec::new();
            for (seed, offset) in [(1, 0), (0, 1), (u64::MAX, 7)] {
                let (other_bits, other_error) = run(&Params { seed, offset, ..params });
                assert_eq!(bits, other_bits, "seed {seed}, offset {offset}");
                others.push(other_error);
            }
            assert!(others.iter().all(|other| *other != error), "the probe rows are the same");
        });
    }
}
