//! NaN stays with the rows and keys that see it.

use hyperattn_conformance::backward::{Backward, Loss, Slopes};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_core::{DType, Kernels, Mask, Method, Params, Residual};

const D: usize = 16;
const N: usize = 203;

/// Two batch items, four query heads on two KV heads.
const SHAPE: Shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, n_q: N, n_k: N, head_dim: D, value_dim: D };

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

fn all_params(mask: Mask) -> Vec<Params> {
    let paper =
        Params { method: Method::Paper, block_size: 16, sample_size: 20, min_seq_len: 30, ..exact(mask) };
    let residuals = [Residual::Uniform, Residual::RowNorm, Residual::None];
    let papers = residuals.map(|residual| Params { residual, ..paper });
    [exact(mask)].into_iter().chain(papers).collect()
}

/// Runs the forward call, and the backward call with its results.
fn run(kernels: &Kernels, params: &Params, inputs: &Inputs, loss: &Loss) -> (Outcome, Slopes) {
    let call = Backward::new(Setup::new(kernels, params, inputs), loss);
    let outcome = call.of.run();
    let slopes = call.run_from(&outcome);
    (outcome, slopes)
}

/// Asserts that rows of a gradient are the same bits but for those that `may` differ.
fn assert_same(before: &[f32], after: &[f32], what: &str, may: impl Fn(usize) -> bool) {
    for (row, (before, after)) in before.chunks(D).zip(after.chunks(D)).enumerate() {
        let same = before.iter().zip(after).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same || may(row), "{what}: row {row} differs");
    }
}

/// Row 77 of query head 2 of batch item 1: its own dq and the keys that it sees are NaN, and nothing else.
#[test]
fn a_row_of_nan_spoils_itself_and_what_it_sees() {
    let (clean, loss) = (Inputs::normal(SHAPE, 2600), Loss::normal(&SHAPE, DType::F32, 2601));
    let row = (4 + 2) * N + 77;
    let (mut dirty_query, mut dirty_loss) = (clean.clone(), loss.clone());
    dirty_query.q[row * D + 5] = f32::NAN;
    dirty_loss.dout[row * D + 3] = f32::NAN;
    let kv_head = 2 + 1;
    for mask in [Mask::None, Mask::CausalBottomRight] {
        let seen = if mask == Mask::None { N } else { 78 };
        let of_keys = |key: usize| (kv_head * N..kv_head * N + seen).contains(&key);
        for_each_table(|kernels| {
            let (_, before) = run(kernels, &exact(mask), &clean, &loss);
            for (inputs, loss) in [(&dirty_query, &loss), (&clean, &dirty_loss)] {
                let (_, after) = run(kernels, &exact(mask), inputs, loss);
                assert_same(&before.dq, &after.dq, "dq", |at| at == row);
                assert_same(&before.dk, &after.dk, "dk", of_keys);
                assert_same(&before.dv, &after.dv, "dv", of_keys);
                assert!(after.dq[row * D..][..D].iter().all(|x| x.is_nan()));
                let keys = &after.dk[kv_head * N * D..][..seen * D];
                assert!(keys.iter().all(|x| x.is_nan()), "a key that the row sees is not NaN");
            }
        });
    }
}

/// Key or value `j` of KV head 1 of batch item 0 leaves the rows that do not see it as they are, and the keys that only such
/// rows see.
#[test]
fn a_key_or_value_of_nan_leaves_earlier_rows_as_they_are() {
    let (clean, loss) = (Inputs::normal(SHAPE, 2610), Loss::normal(&SHAPE, DType::F32, 2611));
    for params in all_params(Mask::CausalBottomRight) {
        for (j, key) in [(5, true), (101, true), (101, false), (202, false)] {
            let mut dirty = clean.clone();
            let at = (N + j) * D;
            let spoiled = if key { &mut dirty.k } else { &mut dirty.v };
            spoiled[at..at + D].fill(f32::NAN);
            for_each_table(|kernels| {
                let (before_outcome, before) = run(kernels, &params, &clean, &loss);
                let (after_outcome, after) = run(kernels, &params, &dirty, &loss);
                assert_same(&before.dq, &after.dq, &format!("dq, {j}, {params:?}"), |row| {
                    [2, 3].iter().any(|head| (head * N + j..(head + 1) * N).contains(&row))
                });
                // Keys are spoiled by the rows that see the NaN: those of the other KV heads are by none.
                let of_head = |at: usize| (N..2 * N).contains(&at);
                assert_same(&before.dk, &after.dk, &format!("dk, {j}, {params:?}"), of_head);
                assert_same(&before.dv, &after.dv, &format!("dv, {j}, {params:?}"), of_head);
                let changed = before_outcome.bits() != after_outcome.bits();
                assert!(changed || params.method == Method::Paper, "nobody met the key");
            });
        }
    }
}

/// Keys behind every row's limit may hold anything, and their gradient is 0.
#[test]
fn unseen_keys_of_nan() {
    let shape = Shape { n_q: 60, ..SHAPE };
    let (clean, loss) = (Inputs::normal(shape, 2620), Loss::normal(&shape, DType::F32, 2621));
    let mut dirty = clean.clone();
    for values in [&mut dirty.k, &mut dirty.v] {
        values.chunks_mut(N * D).for_each(|head| head[60 * D..].fill(f32::NAN));
    }
    for params in all_params(Mask::CausalTopLeft) {
        for_each_table(|kernels| {
            let (_, before) = run(kernels, &params, &clean, &loss);
            let (_, after) = run(kernels, &params, &dirty, &loss);
            assert_eq!(before.bits(), after.bits(), "{params:?}");
            let unseen = after.dk.chunks(N * D).chain(after.dv.chunks(N * D));
            assert!(unseen.flat_map(|head| &head[60 * D..]).all(|&x| x == 0.0), "{params:?}");
        });
    }
}
