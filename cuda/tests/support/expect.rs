//! The oracle's answer, and how near a call must come to it.

use hyperattn_core::{DType, Mask};
use hyperattn_reference::{Mask as ReferenceMask, Output, Problem, exact};

use super::problem::{Inputs, Outcome, Setup};

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// Largest error of the weights, relative to the output that the absolute values would have, and of the output's rounding,
/// relative to the output. f32 is computed in f32: products, sums and exponentials have rounding errors of some 2^-24 each,
/// of which a logit gathers sqrt(head_dim). 16-bit elements have exact products, but weights are rounded to that type.
fn tolerances(setup: &Setup) -> (f64, f64) {
    const F32: f64 = 1e-5;
    let half_step = |dtype| match dtype {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
    };
    let weights = if setup.q == setup.kv { half_step(setup.kv) } else { 0.0 };
    (F32 + weights, F32 + half_step(setup.out))
}

fn reference_mask(mask: Mask) -> ReferenceMask {
    match mask {
        Mask::None => ReferenceMask::None,
        Mask::CausalBottomRight => ReferenceMask::CausalBottomRight,
        Mask::CausalTopLeft => ReferenceMask::CausalTopLeft,
    }
}

/// One head by the oracle, with its values and with their absolute values.
fn head(setup: &Setup, inputs: &Inputs, batch: usize, head: usize) -> (Output, Output) {
    let part = |values: &[f32], heads: usize, head: usize, len: usize| {
        widened(&values[(batch * heads + head) * len..][..len])
    };
    let kv_head = head / (setup.heads_q / setup.heads_kv);
    let q = part(&inputs.q, setup.heads_q, head, setup.n_q * setup.head_dim);
    let k = part(&inputs.k, setup.heads_kv, kv_head, setup.n_k * setup.head_dim);
    let v = part(&inputs.v, setup.heads_kv, kv_head, setup.n_k * setup.value_dim);
    let absolute: Vec<f64> = v.iter().map(|x| x.abs()).collect();
    let scale =
        if setup.scale == 0.0 { 1.0 / (setup.head_dim as f64).sqrt() } else { f64::from(setup.scale) };
    let mask = reference_mask(setup.mask);
    let run = |v: &[f64]| {
        let problem = Problem::new(&q, &k, v, setup.head_dim, setup.value_dim, scale);
        exact(&problem, |i, j| mask.visible(setup.n_q, setup.n_k, i, j))
    };
    std::thread::scope(|scope| {
        let absolute = scope.spawn(|| run(&absolute));
        (run(&v), absolute.join().expect("the oracle runs"))
    })
}

/// Asserts that every head is near the oracle, and that the figures of exact heads are right.
pub fn assert_near(setup: &Setup, inputs: &Inputs, outcome: &Outcome) {
    let (of_weights, of_output) = tolerances(setup);
    let len = setup.n_q * setup.value_dim;
    for index in 0..setup.batch * setup.heads_q {
        let (expected, absolute) = head(setup, inputs, index / setup.heads_q, index % setup.heads_q);
        let out = &outcome.out[index * len..][..len];
        let difference = norm(out.iter().zip(&expected.out).map(|(&a, b)| f64::from(a) - b));
        let allowed =
            of_weights * norm(absolute.out.iter().copied()) + of_output * norm(expected.out.iter().copied());
        // A NaN passes no bound.
        assert!(
            difference <= allowed,
            "{setup:?}: head {index} is {difference:e} off, {allowed:e} is allowed"
        );
        let lse = &outcome.lse[index * setup.n_q..][..setup.n_q];
        for (row, (&lse, &expected)) in lse.iter().zip(&expected.lse).enumerate() {
            let lse = f64::from(lse);
            let near = lse == expected || (lse - expected).abs() <= 3e-5 * expected.abs().max(1.0);
            assert!(near, "{setup:?}: lse {lse} of row {row} of head {index}, expected {expected}");
        }
        assert_eq!(outcome.error[index], 0.0, "{setup:?}: error of head {index}");
    }
    let seen = (0..setup.n_q)
        .map(|i| match setup.mask {
            Mask::None => setup.n_k as f64,
            Mask::CausalTopLeft => (i + 1).min(setup.n_k) as f64,
            Mask::CausalBottomRight => (i + 1 + setup.n_k).saturating_sub(setup.n_q) as f64,
        })
        .sum::<f64>();
    let keys = if setup.n_q == 0 { 0.0 } else { (seen / setup.n_q as f64) as f32 };
    assert!(outcome.keys_per_query.iter().all(|&x| (x - keys).abs() <= 1e-6 * keys), "{setup:?}");
}
