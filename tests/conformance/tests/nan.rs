//! Where NaN and infinities go, and where they do not.

use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_core::{Mask, Method, Params, Residual};

const D: usize = 16;
const N: usize = 203;
const MASKS: [Mask; 2] = [Mask::None, Mask::CausalBottomRight];

/// Two batch items, four query heads on two KV heads.
fn inputs() -> Inputs {
    Inputs::normal(Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(N, N) }, 800)
}

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

fn paper(mask: Mask, residual: Residual) -> Params {
    Params {
        method: Method::Paper,
        residual,
        block_size: 16,
        sample_size: 20,
        min_seq_len: 30,
        ..exact(mask)
    }
}

/// The bits of one row: output and lse.
fn row(outcome: &Outcome, index: usize) -> Vec<u32> {
    let out = &outcome.out[index * D..][..D];
    out.iter().chain([&outcome.lse[index]]).map(|x| x.to_bits()).collect()
}

fn is_nan(outcome: &Outcome, index: usize) -> bool {
    outcome.out[index * D..][..D].iter().all(|x| x.is_nan()) && outcome.lse[index].is_nan()
}

/// Row `i` of `(batch, head)` in the outputs.
fn index(batch: usize, head: usize, i: usize) -> usize {
    (batch * 4 + head) * N + i
}

#[test]
fn a_query_of_nan_spoils_its_own_row_only() {
    let clean = inputs();
    let mut dirty = clean.clone();
    let spoiled = index(1, 2, 77);
    dirty.q[spoiled * D + 5] = f32::NAN;
    for mask in MASKS {
        for_each_table(|kernels| {
            let params = exact(mask);
            let before = Setup::new(kernels, &params, &clean).run();
            let after = Setup::new(kernels, &params, &dirty).run();
            assert!(is_nan(&after, spoiled));
            for i in (0..before.lse.len()).filter(|&i| i != spoiled) {
                assert_eq!(row(&before, i), row(&after, i), "row {i}, {mask:?}");
            }
        });
    }
}

/// The estimator sorts the row elsewhere, which may move others to other blocks of its own head, but not to NaN.
#[test]
fn a_query_of_nan_spoils_its_own_row_of_the_estimate_only() {
    let clean = inputs();
    for (mask, residual) in MASKS.into_iter().flat_map(|mask| {
        [Residual::Uniform, Residual::RowNorm, Residual::None].map(|residual| (mask, residual))
    }) {
        for spoiled_row in [0, 77, 202] {
            let mut dirty = clean.clone();
            let spoiled = index(1, 2, spoiled_row);
            dirty.q[spoiled * D..][..D].fill(f32::NAN);
            for_each_table(|kernels| {
                let params = paper(mask, residual);
                let before = Setup::new(kernels, &params, &clean).run();
                let after = Setup::new(kernels, &params, &dirty).run();
                assert!(is_nan(&after, spoiled));
                for i in (0..before.lse.len()).filter(|&i| i != spoiled) {
                    if i / N == spoiled / N {
                        assert!(row(&after, i).iter().all(|&x| !f32::from_bits(x).is_nan()), "row {i}");
                    } else {
                        assert_eq!(row(&before, i), row(&after, i), "row {i}, {params:?}");
                    }
                }
            });
        }
    }
}

/// Spoils key or value `j` of KV head 1 of batch item 0, whose query heads are 2 and 3.
fn spoil(inputs: &Inputs, key: bool, j: usize, with: f32) -> Inputs {
    let mut dirty = inputs.clone();
    let at = (N + j) * D;
    if key {
        dirty.k[at + 3] = with
    } else {
        dirty.v[at..at + D].fill(with)
    }
    dirty
}

#[test]
fn a_key_or_value_of_nan_leaves_earlier_rows_as_they_are() {
    let clean = inputs();
    let estimators = [Residual::Uniform, Residual::RowNorm, Residual::None];
    let all_params = [exact(Mask::CausalBottomRight)]
        .into_iter()
        .chain(estimators.map(|residual| paper(Mask::CausalBottomRight, residual)));
    for params in all_params {
        for j in [0, 5, 100, 101, 102, 151, 202] {
            for key in [true, false] {
                let dirty = spoil(&clean, key, j, f32::NAN);
                for_each_table(|kernels| {
                    let before = Setup::new(kernels, &params, &clean).run();
                    let after = Setup::new(kernels, &params, &dirty).run();
                    for i in 0..before.lse.len() {
                        let sees =
                            [index(0, 2, 0), index(0, 3, 0)].iter().any(|&h| (h + j..h + N).contains(&i));
                        if !sees {
                            assert_eq!(row(&before, i), row(&after, i), "row {i}, {j}, {params:?}");
                        } else if params.method == Method::Exact {
                            let out = &after.out[i * D..][..D];
                            assert!(out.iter().all(|x| x.is_nan()), "row {i} must show the NaN");
                            let lse = (before.lse[i].to_bits(), after.lse[i].to_bits());
                            assert!(if key { after.lse[i].is_nan() } else { lse.0 == lse.1 });
                        }
                    }
                });
            }
        }
    }
}

/// Without a mask every row of the two query heads sees the key, and no other row does.
#[test]
fn a_key_of_nan_stays_in_its_own_heads() {
    let clean = inputs();
    let dirty = spoil(&clean, true, 100, f32::NAN);
    for params in
        [exact(Mask::None), paper(Mask::None, Residual::Uniform), paper(Mask::None, Residual::RowNorm)]
    {
        for_each_table(|kernels| {
            let before = Setup::new(kernels, &params, &clean).run();
            let after = Setup::new(kernels, &params, &dirty).run();
            for i in 0..before.lse.len() {
                if !(index(0, 2, 0)..index(1, 0, 0)).contains(&i) {
                    assert_eq!(row(&before, i), row(&after, i), "row {i}, {params:?}");
                } else if params.method == Method::Exact {
                    assert!(is_nan(&after, i), "row {i}");
                }
            }
            let spoiled = (0..before.lse.len()).filter(|&i| is_nan(&after, i)).count();
            assert!(spoiled > 0, "nobody met the key: {params:?}");
        });
    }
}

/// An infinite value spoils what has weight on it and nothing else.
#[test]
fn an_infinite_value_stays_with_the_rows_that_see_it() {
    let clean = inputs();
    let dirty = spoil(&clean, false, 150, f32::INFINITY);
    let params = exact(Mask::CausalBottomRight);
    for_each_table(|kernels| {
        let before = Setup::new(kernels, &params, &clean).run();
        let after = Setup::new(kernels, &params, &dirty).run();
        for head in 0..8 {
            for i in 0..N {
                let at = head * N + i;
                if (2..4).contains(&head) && i >= 150 {
                    assert!(after.out[at * D..][..D].iter().all(|&x| x == f32::INFINITY), "row {at}");
                } else {
                    assert_eq!(row(&before, at), row(&after, at), "row {at}");
                }
            }
        }
    });
}
