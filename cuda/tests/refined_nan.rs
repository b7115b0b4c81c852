//! What a row of METHOD_REFINED must not feel on a device: NaN that it does not see, hidden keys, large values. Skips
//! itself where there is no device.

mod support;

use std::ops::Range;

use hyperattn_conformance::compare::head_errors;
use hyperattn_conformance::expected::visible_keys;
use hyperattn_conformance::inputs::{Inputs, Shape};
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

/// Queries that may share what they meet: no tile is longer.
const MOST_TILE_ROWS: usize = 256;

fn small(mask: Mask, target_error: f32) -> Params {
    Params { band: 32, ..refined(mask, 128, target_error) }
}

/// Two batch items, four query heads on two KV heads.
fn shape(n_q: usize, n_k: usize) -> Shape {
    Shape { batch: 2, heads_q: 4, heads_kv: 2, head_dim: D, value_dim: D, ..Shape::single(n_q, n_k) }
}

/// The bits of one row: output and lse.
fn row(outcome: &Outcome, index: usize) -> Vec<u32> {
    let out = &outcome.out[index * D..][..D];
    out.iter().chain([&outcome.lse[index]]).map(|x| x.to_bits()).collect()
}

fn has_nan(outcome: &Outcome, index: usize) -> bool {
    outcome.lse[index].is_nan() || outcome.out[index * D..][..D].iter().any(|x| x.is_nan())
}

/// Every element type, mask and target.
fn kinds(masks: &[Mask]) -> Vec<(DType, Mask, f32)> {
    let of_type = |dtype| masks.iter().flat_map(move |&mask| TARGETS.map(|target| (dtype, mask, target)));
    WEIGHED.into_iter().flat_map(of_type).collect()
}

/// Fills keys, values or both at `positions` of every KV head.
fn fill(inputs: &Inputs, positions: Range<usize>, key: Option<f32>, value: Option<f32>) -> Inputs {
    let mut changed = inputs.clone();
    let n_k = inputs.shape.n_k;
    for (values, with) in [(&mut changed.k, key), (&mut changed.v, value)] {
        let Some(with) = with else { continue };
        for head in values.chunks_mut(n_k * D) {
            head[positions.start * D..positions.end * D].fill(with);
        }
    }
    changed
}

/// Rows that see no key from `position` on, nor do those that may share a tile with them, keep their bits, whatever
/// the later keys and values are; and no row gets a NaN that it does not see.
#[test]
fn rows_do_not_feel_later_keys() {
    let Some(_device) = Device::first() else { return };
    let nan = Some(f32::NAN);
    let fills = [(Some(3.0), Some(100.0)), (nan, None), (None, nan)];
    for (dtype, mask) in WEIGHED.into_iter().flat_map(|dtype| CAUSAL.map(|mask| (dtype, mask))) {
        for (n_q, n_k) in [(N, N), (400, N), (N, 400)] {
            let clean = Inputs::normal(Shape { batch: 1, ..shape(n_q, n_k) }, 2200).rounded(dtype);
            let visible = visible_keys(mask, &clean.shape);
            let (params, with_target) = (small(mask, 0.0), small(mask, 0.05));
            let before = Call::new(&params, &clean).run();
            for (position, (key, value)) in
                [130, 300, n_k - 1].into_iter().flat_map(|position| fills.map(|fill| (position, fill)))
            {
                let changed = fill(&clean, position..n_k, key, value);
                let after = Call::new(&params, &changed).run();
                let targeted = Call::new(&with_target, &changed).run();
                for index in 0..before.lse.len() {
                    let i = index % n_q;
                    if visible[(i + MOST_TILE_ROWS).min(n_q - 1)] <= position {
                        assert_eq!(row(&before, index), row(&after, index), "row {index}, {params:?}");
                    }
                    if visible[i] <= position {
                        assert!(!has_nan(&after, index), "row {index}, {position}, {dtype:?}, {params:?}");
                        assert!(!has_nan(&targeted, index), "row {index}, {dtype:?}, {with_target:?}");
                    }
                }
            }
        }
    }
}

/// Its queries may lead those of its tile elsewhere, but not to NaN, and other heads not at all.
#[test]
fn a_query_of_nan_spoils_its_own_row_only() {
    let Some(_device) = Device::first() else { return };
    for (dtype, mask, target_error) in kinds(&[Mask::None, Mask::CausalBottomRight]) {
        let clean = Inputs::normal(shape(N, N), 2210).rounded(dtype);
        let params = small(mask, target_error);
        let before = Call::new(&params, &clean).run();
        for (with, spoiled_row) in [(f32::NAN, 77), (f32::NAN, N - 1), (f32::INFINITY, 500)] {
            // Row of batch item 1, query head 2.
            let head = 6 * N..7 * N;
            let spoiled = head.start + spoiled_row;
            let mut dirty = clean.clone();
            dirty.q[spoiled * D..][..D].fill(with);
            let after = Call::new(&params, &dirty).run();
            assert!(has_nan(&after, spoiled), "{dtype:?}, {params:?}");
            for index in (0..before.lse.len()).filter(|&index| index != spoiled) {
                if head.contains(&index) {
                    assert!(!has_nan(&after, index), "row {index}, {dtype:?}, {params:?}");
                } else {
                    assert_eq!(row(&before, index), row(&after, index), "row {index}, {params:?}");
                }
            }
        }
    }
}

/// A key or value of KV head 1 of batch item 0 reaches no query head but 2 and 3, and there no row that does not see
/// it. With a target the heads whose probe rows meet it are exact.
#[test]
fn a_key_or_value_that_is_not_finite_stays_with_the_rows_that_see_it() {
    let Some(_device) = Device::first() else { return };
    let spoils = [(true, f32::NAN), (false, f32::NAN), (true, f32::INFINITY)];
    for (dtype, mask, target_error) in kinds(&[Mask::None, Mask::CausalBottomRight]) {
        let clean = Inputs::normal(shape(N, N), 2220).rounded(dtype);
        let params = small(mask, target_error);
        let before = Call::new(&params, &clean).run();
        for (position, (is_key, with)) in
            [3, 400, N - 1].into_iter().flat_map(|position| spoils.map(|spoil| (position, spoil)))
        {
            let mut dirty = clean.clone();
            let values = if is_key { &mut dirty.k } else { &mut dirty.v };
            values[(N + position) * D..][..D].fill(with);
            let after = Call::new(&params, &dirty).run();
            for index in 0..before.lse.len() {
                let sees = mask == Mask::None || index % N >= position;
                if !(2 * N..4 * N).contains(&index) {
                    assert_eq!(row(&before, index), row(&after, index), "row {index}, {params:?}");
                } else if !sees {
                    assert!(!has_nan(&after, index), "row {index}, {position}, {dtype:?}, {params:?}");
                }
            }
        }
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
