//! One test for each decision on what the published code leaves open or gets wrong. Many of them use queries of
//! zero: every entry of A is then 1 and exp(lse) counts what the estimator counted.

use std::collections::HashSet;

use hyperattn_conformance::compare::{F32_TOLERANCE, check};
use hyperattn_conformance::expected::{self, projections};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_conformance::statistics::Mean;
use hyperattn_core::{
    BlockMask, Kernels, Mask, Method, Params, Residual, Serial, TensorMut, TensorRef, Tensors,
    forward_workspace, merge, stages,
};
use hyperattn_reference::sorted_order;

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

fn paper(residual: Residual) -> Params {
    Params {
        method: Method::Paper,
        residual,
        block_size: 16,
        sample_size: 24,
        min_seq_len: 0,
        seed: 12,
        ..Params::default()
    }
}

/// Normal inputs whose queries are zero.
fn counting(shape: Shape) -> Inputs {
    let mut inputs = Inputs::normal(shape, 1200);
    inputs.q.fill(0.0);
    inputs
}

/// exp(lse) of every row.
fn counts(outcome: &Outcome) -> Vec<f64> {
    outcome.lse.iter().map(|&lse| f64::from(lse).exp()).collect()
}

fn assert_counts(actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len());
    for (row, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= 1e-5 * e, "row {row} counts {a}, not {e}");
    }
}

/// Row i counts its own block once and every sample outside it with weight n_k / m; counting covered samples
/// too would give something else in most rows.
#[test]
fn sampled_key_in_own_block_is_never_counted_twice() {
    let n = 96;
    let inputs = counting(Shape::single(n, n));
    let given = OwnedMask::random([n, n], [16, 16], 1, 0.3, 1201);
    for (residual, given) in [
        (Residual::Uniform, None),
        (Residual::Uniform, Some(given.view())),
        (Residual::RowNorm, None),
        (Residual::RowNorm, Some(given.view())),
    ] {
        // Without cap and floor Algorithm 2 counts the same samples.
        let params =
            Params { lsh_num_projs: 0, approx_d_epsilon: 1e25, approx_d_kappa: 1e30, ..paper(residual) };
        let samples: Vec<usize> = {
            let stream = stages::uniform_stream(params.seed, params.offset, 0);
            stages::uniform_columns(stream, 0..n, 24).map(|column| column.position).collect()
        };
        let own = |i: usize, j: usize| match &given {
            Some(mask) => hyperattn_conformance::random_mask::names(mask, 0, i, j),
            None => i / 16 == j / 16,
        };
        let weight = n as f64 / 24.0;
        let block = |i: usize| (0..n).filter(|&j| own(i, j)).count() as f64;
        let once: Vec<f64> = (0..n)
            .map(|i| block(i) + weight * samples.iter().filter(|&&j| !own(i, j)).count() as f64)
            .collect();
        let twice: Vec<f64> = (0..n).map(|i| block(i) + n as f64).collect();
        assert!((0..n).filter(|&i| once[i] != twice[i]).count() > n / 2);
        for_each_table(|kernels| {
            let setup = Setup { block_mask: given, ..Setup::new(kernels, &params, &inputs) };
            assert_counts(&counts(&setup.run()), &once);
        });
    }
}

/// A row without blocks counts exactly n_k, whatever is drawn; a row with a block counts n_k on average over 2,000
/// offsets (|z| below 4.5 in each of 6 blocks: confidence 0.99996).
#[test]
fn residual_weight_is_keys_over_samples_and_unbiased() {
    let (n, m) = (97, 24);
    let inputs = counting(Shape::single(n, n));
    for_each_table(|kernels| {
        let params = Params { block_size: 0, ..paper(Residual::Uniform) };
        assert_counts(&counts(&Setup::new(kernels, &params, &inputs).run()), &[n as f64; 97]);
        let column = stages::uniform_columns(stages::uniform_stream(0, 0, 0), 0..n, m).next().unwrap();
        assert!((f64::from(column.log_weight) - (n as f64 / m as f64).log2()).abs() < 1e-6);

        let params = Params { lsh_num_projs: 0, ..paper(Residual::Uniform) };
        let mut means = [Mean::default(); 6];
        for offset in 0..2000 {
            let params = Params { offset, ..params };
            let counts = counts(&Setup::new(kernels, &params, &inputs).run());
            means.iter_mut().enumerate().for_each(|(block, mean)| mean.add(counts[16 * block]));
        }
        let z = means.map(|mean| mean.z(n as f64, 1e-4));
        println!("|z| {z:.2?}");
        assert!(z.iter().all(|&z| z < 4.5));
    });
}

/// 101 keys in blocks of 16: the rows of the last block count its 5 keys, not 16.
#[test]
fn ragged_last_block_has_no_padding_mass() {
    for n in [101, 97, 112, 17] {
        let inputs = counting(Shape::single(n, n));
        let params = Params { lsh_num_projs: 0, ..paper(Residual::None) };
        let expected: Vec<f64> = (0..n).map(|i| (n - i / 16 * 16).min(16) as f64).collect();
        for_each_table(|kernels| {
            assert_counts(&counts(&Setup::new(kernels, &params, &inputs).run()), &expected);
        });
    }
}

/// Every row counts the keys that its mask shows, in exact attention and in an estimator whose given
/// blocks cover everything.
#[test]
fn unequal_lengths_follow_the_mask() {
    for (n_q, n_k) in [(50, 50), (30, 77), (77, 30), (1, 40), (40, 1)] {
        let inputs = counting(Shape::single(n_q, n_k));
        let everything = OwnedMask::random([n_q, n_k], [8, 8], 1, 1.0, 0);
        for mask in MASKS {
            let visible = |i: usize| match mask {
                Mask::None => n_k,
                Mask::CausalBottomRight => (i + 1 + n_k).saturating_sub(n_q),
                Mask::CausalTopLeft => (i + 1).min(n_k),
            };
            let expected: Vec<f64> = (0..n_q).map(|i| visible(i) as f64).collect();
            let exact = Params { method: Method::Exact, mask, ..Params::default() };
            let covered = Params { mask, ..paper(Residual::Uniform) };
            for_each_table(|kernels| {
                assert_counts(&counts(&Setup::new(kernels, &exact, &inputs).run()), &expected);
                let block_mask = Some(everything.view());
                let setup = Setup { block_mask, ..Setup::new(kernels, &covered, &inputs) };
                assert_counts(&counts(&setup.run()), &expected);
            });
        }
    }
}

/// Up to min_seq_len keys (or a block of them) the estimator gives the bits of exact attention, however many
/// queries there are; one key more, and it does not.
#[test]
fn threshold_counts_keys_of_the_sub_problem() {
    let differs = |kernels: &Kernels, params: &Params, n_q: usize, n_k: usize| {
        let inputs = Inputs::normal(Shape::single(n_q, n_k), 1210);
        let exact = Params { method: Method::Exact, ..*params };
        let run = |params: &Params| Setup::new(kernels, params, &inputs).run().bits();
        run(params) != run(&exact)
    };
    for_each_table(|kernels| {
        for (min_seq_len, block_size, leaf) in [(60, 16, 60), (60, 0, 60), (10, 40, 40), (0, 33, 33)] {
            let params = Params { min_seq_len, block_size, ..paper(Residual::Uniform) };
            for n_q in [1, leaf, 10 * leaf] {
                assert!(!differs(kernels, &params, n_q, leaf), "{n_q} queries, {leaf} keys");
                assert!(differs(kernels, &params, n_q, leaf + 1), "{n_q} queries, {} keys", leaf + 1);
            }
            for mask in [Mask::CausalBottomRight, Mask::CausalTopLeft] {
                let causal = Params { mask, ..params };
                assert!(!differs(kernels, &causal, leaf, leaf));
                assert!(differs(kernels, &causal, leaf + 1, leaf + 1));
            }
            // The past has its own count, and so have the later queries over all keys.
            let past = Params { mask: Mask::CausalBottomRight, ..params };
            assert!(differs(kernels, &past, 5, 5 + leaf + 1));
            let later = Params { mask: Mask::CausalTopLeft, ..params };
            assert!(!differs(kernels, &later, 10 * leaf, leaf));
            assert!(differs(kernels, &later, 10 * leaf, leaf + 1));
        }
    });
    // A past at the threshold, before a square that is divided.
    for past in [59, 60, 61] {
        let params = Params { mask: Mask::CausalBottomRight, min_seq_len: 60, ..paper(Residual::Uniform) };
        check(&params, &Inputs::normal(Shape::single(100, 100 + past), 1211), F32_TOLERANCE);
    }
}

/// The oracle sorts every interval of the recursion anew; the core divides one sorted order. Six levels deep,
/// with buckets that all intervals share.
#[test]
fn one_sort_serves_all_levels() {
    let inputs = Inputs::clustered(Shape { heads_q: 2, ..Shape::single(811, 811) }, 1220);
    for lsh_num_projs in [3, 7, 14] {
        let params = Params { lsh_num_projs, mask: Mask::CausalBottomRight, ..paper(Residual::Uniform) };
        check(&params, &inputs, F32_TOLERANCE);
        let ranks = expected::ranks(&params, inputs.key_head(0, 0), 16, 0);
        let whole = sorted_order(&ranks);
        let restricted: Vec<usize> = whole.iter().copied().filter(|&key| (406..609).contains(&key)).collect();
        let anew: Vec<usize> = sorted_order(&ranks[406..609]).into_iter().map(|key| key + 406).collect();
        assert_eq!(restricted, anew);
    }
}

#[test]
fn projections_are_keyed_by_seed_offset_and_head() {
    let (head_dim, base) = (64, Params { seed: 1, offset: 1, ..paper(Residual::None) });
    let bits = |params: Params, head: usize| -> Vec<u32> {
        projections(&params, head_dim, head).iter().map(|x| x.to_bits()).collect()
    };
    assert_eq!(bits(base, 0), bits(base, 0));
    let variants = [
        (base, 0),
        (base, 1),
        (Params { seed: 2, ..base }, 0),
        (Params { seed: 1 | 1 << 32, ..base }, 0),
        (Params { offset: 2, ..base }, 0),
        (Params { offset: 1 | 1 << 32, ..base }, 0),
        (Params { seed: 1 << 32, offset: 1 << 32, ..base }, 0),
    ];
    let distinct: HashSet<Vec<u32>> = variants.iter().map(|&(params, head)| bits(params, head)).collect();
    assert_eq!(distinct.len(), variants.len());

    // Two KV heads with the same contents hash differently, two batch items alike.
    let mut inputs = Inputs::clustered(Shape::single(300, 300), 1230);
    inputs.shape = Shape { batch: 2, heads_q: 2, heads_kv: 2, ..inputs.shape };
    (inputs.q, inputs.k, inputs.v) = (inputs.q.repeat(4), inputs.k.repeat(4), inputs.v.repeat(4));
    for_each_table(|kernels| {
        let outcome = Setup::new(kernels, &base, &inputs).run();
        let heads: Vec<&[f32]> = outcome.out.chunks(300 * 16).collect();
        assert_ne!(heads[0], heads[1]);
        assert_eq!((heads[0], heads[1]), (heads[2], heads[3]));
    });
}

/// Samples for keys have the key of the projections; the rows for tau have that of the query head.
#[test]
fn samples_are_keyed_by_seed_offset_and_head() {
    let base = Params { seed: 1, offset: 1, ..paper(Residual::RowNorm) };
    let variants = [
        (base, 0),
        (base, 1),
        (Params { seed: 2, ..base }, 0),
        (Params { offset: 2, ..base }, 0),
        (Params { seed: 1 | 1 << 32, ..base }, 0),
        (Params { offset: 1 | 1 << 32, ..base }, 0),
    ];
    let mut distinct: HashSet<Vec<usize>> = HashSet::new();
    let prefix: Vec<f64> = (1..=1000).map(f64::from).collect();
    for (Params { seed, offset, .. }, head) in variants {
        let uniform = stages::uniform_columns(stages::uniform_stream(seed, offset, head), 0..1000, 24);
        distinct.insert(uniform.map(|column| column.position).collect());
        let stream = stages::row_norm_stream(seed, offset, head);
        let by_norm = stages::row_norm_columns(stream, 0..1000, 24, &prefix);
        distinct.insert(by_norm.map(|column| column.position).collect());
        let params = Params { seed, offset, ..base };
        distinct.insert((0..24).map(|i| stages::tau_position(&params, head, &(0..1000), i)).collect());
    }
    // And by the sub-problem.
    let elsewhere = stages::uniform_columns(stages::uniform_stream(1, 1, 0), 1000..2000, 24);
    distinct.insert(elsewhere.map(|column| column.position - 1000).collect());
    assert_eq!(distinct.len(), 3 * variants.len() + 1);
}

/// Query heads of one group share projections, order and samples: equal queries give equal bits. The workspace
/// has room for the keys of the KV heads, not of the query heads.
#[test]
fn keys_are_hashed_once_per_kv_head() {
    let mut inputs = Inputs::clustered(Shape::single(300, 300), 1240);
    inputs.shape.heads_q = 5;
    inputs.q = inputs.q.repeat(5);
    for residual in [Residual::Uniform, Residual::None] {
        let params = paper(residual);
        for_each_table(|kernels| {
            let outcome = Setup::new(kernels, &params, &inputs).run();
            let mut heads = outcome.out.chunks(300 * 16);
            let first = heads.next().unwrap();
            assert!(heads.all(|head| head == first));
        });
    }
    for_each_table(|kernels| {
        let size = |heads_kv: usize| {
            let shape = Shape { heads_q: 8, heads_kv, ..Shape::single(300, 10_000) };
            let q = vec![0.0f32; 8 * 300 * 16];
            let k = vec![0.0f32; heads_kv * 10_000 * 16];
            let mut out = q.clone();
            let tensors = Tensors {
                q: TensorRef::contiguous(&q, shape.q()).unwrap(),
                k: TensorRef::contiguous(&k, shape.k()).unwrap(),
                v: TensorRef::contiguous(&k, shape.v()).unwrap(),
                out: TensorMut::contiguous(&mut out, shape.out()).unwrap(),
                lse: None,
                block_mask: None,
                error: None,
                keys_per_query: None,
                mask: None,
            };
            let layout = forward_workspace(&paper(Residual::None), &tensors.layouts(), kernels, &Serial);
            layout.unwrap().size as i64
        };
        let per_head = (size(8) - size(4)) / 4;
        assert!(per_head >= 2 * 4 * 10_000, "{per_head} bytes for the order of a KV head");
        assert!((size(4) - size(1) - 3 * per_head).abs() < 1024);
    });
}

/// Every table gives every row the code of the oracle, and so the same permutation, although every row is almost
/// orthogonal to a hyperplane: the sign of that product is the sign of its rounding errors.
#[test]
fn codes_are_equal_on_every_instruction_set() {
    let mut inputs = Inputs::normal(Shape { head_dim: 64, ..Shape::single(1, 2003) }, 1250);
    let params = Params { lsh_num_projs: 24, ..paper(Residual::None) };
    let normals = projections(&params, 64, 0);
    for (index, row) in inputs.k.chunks_mut(64).enumerate() {
        let normal = |i: usize| f64::from(normals[i * 24 + index % 24]);
        let rest: f64 = (0..63).map(|i| f64::from(row[i]) * normal(i)).sum();
        row[63] = (-rest / normal(63)) as f32;
    }
    let mut all: Vec<Vec<u32>> = Vec::new();
    for_each_table(|kernels| {
        let width = stages::projection_width(kernels, 24);
        let mut projections = vec![0.0; 64 * width];
        stages::fill_projections((params.seed, params.offset, 0), 64, 24, width, &mut projections);
        let mut codes = vec![0; 2003];
        let words: Vec<u32> = inputs.k.iter().map(|x| x.to_bits()).collect();
        kernels.hash(&words.chunks(64).collect::<Vec<_>>(), &projections, width, &mut codes);
        all.push(codes.into_iter().map(stages::gray_rank).collect());
    });
    all.push(expected::ranks(&params, &inputs.k, 64, 0));
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}

/// The first rows of a bottom-right mask with more queries than keys see nothing, and merging them changes
/// nothing on either side.
#[test]
fn empty_row_is_zero_and_minus_infinity_and_neutral() {
    let (n_q, n_k) = (90, 50);
    let empty = n_q - n_k;
    let inputs = Inputs::normal(Shape::single(n_q, n_k), 1260);
    for method in [Method::Exact, Method::Paper] {
        let params = Params { method, mask: Mask::CausalBottomRight, ..paper(Residual::Uniform) };
        for_each_table(|kernels| {
            let outcome = Setup::new(kernels, &params, &inputs).run();
            assert!(outcome.out[..empty * 16].iter().all(|x| x.to_bits() == 0));
            assert!(outcome.lse[..empty].iter().all(|&lse| lse == f32::NEG_INFINITY));
            assert!(outcome.lse[empty..].iter().all(|lse| lse.is_finite()));
            let unmasked = Params { mask: Mask::None, ..params };
            let other = Setup::new(kernels, &unmasked, &inputs).run();
            let merged = |mut into: Outcome, from: &Outcome| {
                let (shape, lse_shape) = (inputs.shape.out(), inputs.shape.lse());
                merge(
                    kernels,
                    &mut TensorMut::contiguous(&mut into.out, shape).unwrap(),
                    &mut TensorMut::contiguous(&mut into.lse, lse_shape).unwrap(),
                    &TensorRef::contiguous(&from.out, shape).unwrap(),
                    &TensorRef::contiguous(&from.lse, lse_shape).unwrap(),
                )
                .unwrap();
                into
            };
            let (left, right) = (merged(outcome.clone(), &other), merged(other.clone(), &outcome));
            for result in [left, right] {
                assert_eq!(result.out[..empty * 16], other.out[..empty * 16]);
                assert_eq!(result.lse[..empty], other.lse[..empty]);
                assert!((empty..n_q).all(|i| result.lse[i] > other.lse[i]));
            }
            let both = merged(outcome.clone(), &outcome);
            assert_eq!(both.out[..empty * 16], outcome.out[..empty * 16]);
            assert_eq!(both.lse[..empty], outcome.lse[..empty]);
        });
    }
}

/// A query of NaN: its row is NaN, no other is, in exact attention and in every estimator. Keys and values are
/// in `nan.rs`.
#[test]
fn nan_stays_in_its_own_row() {
    let mut inputs = Inputs::normal(Shape { heads_q: 2, ..Shape::single(150, 150) }, 1270);
    inputs.q[(150 + 40) * 16] = f32::NAN;
    for mask in MASKS {
        let exact = Params { method: Method::Exact, mask, ..Params::default() };
        let estimators = [Residual::Uniform, Residual::RowNorm, Residual::None];
        for params in estimators.map(|residual| Params { mask, ..paper(residual) }).into_iter().chain([exact])
        {
            for_each_table(|kernels| {
                let outcome = Setup::new(kernels, &params, &inputs).run();
                for (i, out) in outcome.out.chunks(16).enumerate() {
                    let nan = out.iter().chain([&outcome.lse[i]]).filter(|x| x.is_nan()).count();
                    assert_eq!(nan, if i == 190 { 17 } else { 0 }, "row {i}, {params:?}");
                }
            });
        }
    }
}

/// Logits in the hundreds and thousands, whose exponentials no f32 holds: Algorithm 2 agrees with the oracle, which
/// is in logs too. A logit relative to its row's largest is a chain of d = 16 sums that starts at that: with
/// independent roundings it is off by some 2^-24 sqrt(d) / 2 times the product of the norms. That is a relative
/// error of the numerator, and that of another logit, in the cap or in tau, one of the denominator.
#[test]
fn large_logits_do_not_overflow_the_cap() {
    // One coordinate adds the same to all logits, up or down; a factor spreads them.
    for (shift, factor) in [(20.0, 1.0), (60.0, 1.0), (100.0, 1.0), (-100.0, 1.0), (0.0, 30.0), (0.0, 100.0)]
    {
        let mut inputs = Inputs::clustered(Shape::single(200, 200), 1280);
        inputs.q.iter_mut().for_each(|x| *x *= factor);
        let sides = [(&mut inputs.q, f32::abs(shift)), (&mut inputs.k, shift)];
        for (rows, coordinate) in sides.into_iter().filter(|(_, coordinate)| *coordinate != 0.0) {
            rows.chunks_mut(16).for_each(|row| row[7] = coordinate);
        }
        for mask in [Mask::None, Mask::CausalBottomRight] {
            let params = Params { mask, sample_size: 200, ..paper(Residual::RowNorm) };
            let output = expected::expected(&params, &inputs, None);
            assert!(output.lse.iter().any(|lse| lse.abs() > 88.0), "small logits");
            let norm = |rows: &[f32]| {
                let square = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                rows.chunks(16).map(square).fold(0.0, f64::max).sqrt()
            };
            let largest = 0.25 * norm(&inputs.q) * norm(&inputs.k);
            check(&params, &inputs, F32_TOLERANCE + 2.0 * (16f64.sqrt() / 2.0) * largest * 2.0f64.powi(-24));
        }
    }
}

/// Algorithms 2 and 3 estimate numerator and denominator apart, so a key that only the product with V samples may
/// exceed the row sum by any factor. The row sum, and with it the lse, does not suffer from that.
#[test]
fn a_numerator_far_above_the_row_sum_leaves_the_lse_alone() {
    let n = 64;
    for large in [20.0, 100.0, 120.0, 140.0, 150.0, 200.0, 1000.0] {
        // Query 0 meets key 1 with a base-2 logit of `large`; all other logits are 0. Row 0 is no tau row, and
        // the values make key 1 likely to be drawn by row norm. The second column of the values is 0.
        let mut inputs = counting(Shape { head_dim: 2, value_dim: 2, ..Shape::single(n, n) });
        inputs.k.fill(0.0);
        inputs.v.chunks_mut(2).for_each(|row| row.copy_from_slice(&[1e-3, 0.0]));
        (inputs.q[0], inputs.k[2], inputs.v[2]) = (1.0, large, 1.0);
        let params = Params {
            block_size: 1,
            sample_size: 4,
            lsh_num_projs: 0,
            scale: std::f32::consts::LN_2,
            ..paper(Residual::RowNorm)
        };
        let output = expected::expected(&params, &inputs, None);
        assert!(output.out[0] > 1e4 && output.lse[0] < 10.0, "the case is not what it should be");
        for_each_table(|kernels| {
            let outcome = Setup::new(kernels, &params, &inputs).run();
            let (out, lse) = (f64::from(outcome.out[0]), f64::from(outcome.lse[0]));
            assert!((lse - output.lse[0]).abs() < 1e-5, "2^{large}: lse {lse} should be {}", output.lse[0]);
            assert_eq!(outcome.out[1], 0.0, "2^{large}: a column without values");
            let nearest = if output.out[0] > f64::from(f32::MAX) { f64::INFINITY } else { output.out[0] };
            assert!(
                out == nearest || (out / nearest - 1.0).abs() < 1e-4,
                "2^{large}: {out:e}, not {nearest:e}"
            );
        });
    }
}

/// Not a decision of the table, but what the block mask's documentation promises: patterns by (batch, head).
#[test]
fn given_blocks_replace_the_sort() {
    let n = 64;
    let inputs = counting(Shape { batch: 2, heads_q: 2, ..Shape::single(n, n) });
    // Pattern p of 4 has p + 1 blocks of 16 in every row.
    let columns: Vec<i32> = (0..4).flat_map(|p| (0..4).flat_map(move |_| 0..=p)).collect();
    let mut row_offsets = Vec::new();
    let mut start = 0;
    for p in 0..4 {
        row_offsets.extend((0..=4).map(|row| start + row * (p + 1)));
        start += 4 * (p + 1);
    }
    let mask = BlockMask {
        query_block: 16,
        key_block: 16,
        num_query_blocks: 4,
        num_key_blocks: 4,
        row_offsets: &row_offsets,
        columns: &columns,
        head_stride: 5,
    };
    let params = paper(Residual::None);
    let expected: Vec<f64> = (0..4).flat_map(|p| vec![16.0 * (p + 1) as f64; n]).collect();
    for_each_table(|kernels| {
        let setup = Setup { block_mask: Some(mask), ..Setup::new(kernels, &params, &inputs) };
        assert_counts(&counts(&setup.run()), &expected);
    });
}

/// Keys that nobody may weigh (logit -inf) take part in hashing, sampling and row sums like all others.
#[test]
fn logits_of_minus_infinity_are_legal_in_the_estimator() {
    let mut inputs = Inputs::normal(Shape::single(150, 150), 1290);
    inputs.q.chunks_mut(16).for_each(|row| row[3] = 1.5);
    let hidden = |key: usize| key.is_multiple_of(3) || (40..90).contains(&key);
    let keys = inputs.k.chunks_mut(16).enumerate().filter(|(key, _)| hidden(*key));
    keys.for_each(|(_, row)| row[3] = f32::NEG_INFINITY);
    for mask in MASKS {
        for residual in [Residual::Uniform, Residual::RowNorm, Residual::None] {
            check(&Params { mask, ..paper(residual) }, &inputs, F32_TOLERANCE);
        }
    }
}

/// The default method is exact where there is nothing to estimate or little to gain, METHOD_REFINED where queries see
/// many times its budget, and METHOD_PAPER where that gains and the caller gives blocks.
#[test]
fn auto_is_one_of_the_others() {
    for_each_table(|kernels| {
        let run = |params: &Params, method: Method, n: usize| {
            let inputs = Inputs::normal(Shape::single(n, n), 1295);
            Setup::new(kernels, &Params { method, ..*params }, &inputs).run().bits()
        };
        let small = Params { min_seq_len: 2000, budget: 64, ..Params::default() };
        assert!(run(&small, Method::Auto, 2000) == run(&small, Method::Exact, 2000));
        let little_to_gain = Params { min_seq_len: 0, budget: 600, target_error: 0.0, ..Params::default() };
        assert!(run(&little_to_gain, Method::Auto, 2000) == run(&little_to_gain, Method::Exact, 2000));
        assert!(run(&little_to_gain, Method::Auto, 2000) != run(&little_to_gain, Method::Refined, 2000));
        let much_to_gain = Params { min_seq_len: 0, budget: 64, target_error: 0.0, ..Params::default() };
        assert!(run(&much_to_gain, Method::Auto, 2000) == run(&much_to_gain, Method::Refined, 2000));
        assert!(run(&much_to_gain, Method::Auto, 2000) != run(&much_to_gain, Method::Exact, 2000));
    });
}
