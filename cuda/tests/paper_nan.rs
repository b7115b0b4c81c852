//! Where a NaN goes, and where it does not, when METHOD_PAPER runs on a device. Skips itself where there is none.

mod support;

use std::ops::Range;

use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::run::Outcome;
use hyperattn_core::{DType, Mask, Method, Params, Residual};

use support::call::Call;
use support::device::Device;

const D: usize = 64;
const N: usize = 700;
const HEADS_Q: usize = 4;
/// Of both batch items.
const ALL_HEADS: usize = 2 * HEADS_Q;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Two batch items, four query heads on two KV heads.
fn inputs(dtype: DType) -> Inputs {
    let shape =
        Shape { batch: 2, heads_q: HEADS_Q, heads_kv: 2, head_dim: D, value_dim: D, ..Shape::single(N, N) };
    Inputs::normal(shape, 800).rounded(dtype)
}

/// With every residual.
fn estimators(mask: Mask) -> [Params; 3] {
    let params = Params { mask, block_size: 32, sample_size: 40, min_seq_len: 60, ..Params::default() };
    [Residual::Uniform, Residual::RowNorm, Residual::None].map(|residual| Params {
        method: Method::Paper,
        residual,
        ..params
    })
}

/// Row `row` of (batch item, query head) `head`: output and lse.
fn row(outcome: &Outcome, head: usize, row: usize) -> Vec<f32> {
    let at = head * N + row;
    outcome.out[at * D..][..D].iter().chain([&outcome.lse[at]]).copied().collect()
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|x| x.to_bits()).collect()
}

fn run(params: &Params, inputs: &Inputs) -> Outcome {
    Call::new(params, inputs).run()
}

/// Asserts that only the query heads `spoiled` (counted through the batch) differ in any bit.
fn assert_others_are_the_same(params: &Params, before: &Outcome, after: &Outcome, spoiled: Range<usize>) {
    for head in (0..ALL_HEADS).filter(|head| !spoiled.contains(head)) {
        for i in 0..N {
            let (before, after) = (row(before, head, i), row(after, head, i));
            assert_eq!(bits(&before), bits(&after), "{params:?}: row {i} of head {head}");
        }
    }
}

/// The estimator sorts the row elsewhere, which may move others to other blocks of its own head, but not to NaN.
#[test]
fn a_query_of_nan_spoils_its_own_row_only() {
    let Some(_device) = Device::first() else { return };
    let spoiled_head = HEADS_Q + 2;
    for dtype in DTYPES {
        let clean = inputs(dtype);
        for params in [Mask::None, Mask::CausalBottomRight].into_iter().flat_map(estimators) {
            let before = run(&params, &clean);
            for spoiled in [0, 277, N - 1] {
                let mut dirty = clean.clone();
                dirty.q[(spoiled_head * N + spoiled) * D..][..D].fill(f32::NAN);
                let after = run(&params, &dirty);
                assert_others_are_the_same(&params, &before, &after, spoiled_head..spoiled_head + 1);
                for i in 0..N {
                    let nan = row(&after, spoiled_head, i).iter().filter(|x| x.is_nan()).count();
                    let expected = if i == spoiled { D + 1 } else { 0 };
                    assert_eq!(nan, expected, "{params:?}, {dtype:?}: row {i}, NaN in query {spoiled}");
                }
            }
        }
    }
}

/// Rows that do not see the key are as they were: to the bit in other heads; in its own, where rows of one tile may weigh
/// relative to another logit, as near as two roundings are.
#[test]
fn a_key_or_value_of_nan_leaves_earlier_rows_as_they_are() {
    let Some(_device) = Device::first() else { return };
    // KV head 1 of batch item 0.
    let (kv_head, spoiled_heads) = (1, 2..4);
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    for dtype in DTYPES {
        let tolerance = match dtype {
            DType::F32 => 1e-6,
            DType::F16 => 2e-3,
            DType::BF16 => 1.6e-2,
        };
        let clean = inputs(dtype);
        for params in estimators(Mask::CausalBottomRight) {
            let before = run(&params, &clean);
            for spoiled in [0, 5, 349, 350, 401, N - 1] {
                for in_value in [false, true] {
                    let mut dirty = clean.clone();
                    let tensor = if in_value { &mut dirty.v } else { &mut dirty.k };
                    tensor[(kv_head * N + spoiled) * D + 3] = f32::NAN;
                    let after = run(&params, &dirty);
                    assert_others_are_the_same(&params, &before, &after, spoiled_heads.clone());
                    for (head, i) in
                        spoiled_heads.clone().flat_map(|head| (0..spoiled).map(move |i| (head, i)))
                    {
                        let (before, after) = (row(&before, head, i), row(&after, head, i));
                        let difference = norm(&mut after.iter().zip(&before).map(|(a, b)| a - b));
                        let near = difference <= tolerance * norm(&mut before.iter().copied());
                        assert!(near, "{params:?}, {dtype:?}: row {i} of head {head} is {difference:e} off");
                    }
                }
            }
        }
    }
}

/// Without a mask every row of the two query heads may meet the key, and no other row does.
#[test]
fn a_key_of_nan_stays_in_its_own_heads() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        let clean = inputs(dtype);
        let mut dirty = clean.clone();
        dirty.k[(N + 400) * D + 3] = f32::NAN;
        for params in estimators(Mask::None) {
            let (before, after) = (run(&params, &clean), run(&params, &dirty));
            assert_others_are_the_same(&params, &before, &after, 2..4);
            if params.residual != Residual::None {
                let met = (2..4).any(|head| (0..N).any(|i| row(&after, head, i).iter().any(|x| x.is_nan())));
                assert!(met, "nobody met the key: {params:?}, {dtype:?}");
            }
        }
    }
}
