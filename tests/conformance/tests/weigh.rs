//! The kernel of every table that weighs keys, against f64.

use hyperattn_conformance::for_each_packing;
use hyperattn_conformance::packing::weigh;
use hyperattn_core::bf16;
use hyperattn_core::simd::{KEY_TILE, Packing, WEIGHING_QUERIES};
use hyperattn_reference::Generator;

const HEAD_DIMS: [usize; 6] = [1, 2, 3, 64, 80, 128];

/// 2^60, the largest weight that one query gives.
const MOST: f32 = (1u64 << 60) as f32;

/// Normal numbers that `packing` can hold.
fn normals(generator: &mut Generator, packing: Packing, len: usize) -> Vec<f32> {
    let number = |x: f64| match packing {
        Packing::F32 => x as f32,
        Packing::Bf16Pairs => bf16::from_f64(x).to_f32(),
    };
    (0..len).map(|_| number(generator.normal())).collect()
}

/// A logit is a chain of up to 128 sums, within some 40 in magnitude: off by about 2^-24 * 40 * sqrt(128) = 3e-5, and
/// the weight by that relative error.
#[test]
fn weights_agree_with_f64() {
    let seed = 120;
    println!("seed {seed}");
    for_each_packing(|kernels, packing| {
        let mut generator = Generator::new(seed);
        let rows = WEIGHING_QUERIES;
        for head_dim in HEAD_DIMS {
            for count in 1..=KEY_TILE {
                let query = normals(&mut generator, packing, rows * head_dim);
                let keys = normals(&mut generator, packing, count * head_dim);
                let start: Vec<f32> = (0..rows).map(|_| 3.0 * generator.normal() as f32).collect();
                let weights = weigh(kernels, packing, (&query, &keys), head_dim, &start);
                assert_eq!(weights.len(), count);
                for (key, weight) in keys.chunks(head_dim).zip(weights) {
                    let of_row = |(query, &start): (&[f32], &f32)| {
                        let products = query.iter().zip(key).map(|(&x, &y)| f64::from(x) * f64::from(y));
                        (products.sum::<f64>() - f64::from(start)).exp2().min(f64::from(MOST))
                    };
                    let expected: f64 = query.chunks(head_dim).zip(&start).map(of_row).sum();
                    let error = (f64::from(weight) / expected - 1.0).abs();
                    assert!(error < 4e-5, "{head_dim}, {count}: {weight} should be {expected}");
                }
            }
        }
    });
}

/// Queries of 1 in every element, so that the first element of a key of zeros is its logit.
fn weights_of(logits: &[f32], start_of: impl Fn(usize) -> f32, head_dim: usize) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    for_each_packing(|kernels, packing| {
        let rows = WEIGHING_QUERIES;
        let query = vec![1.0; rows * head_dim];
        let mut keys = vec![0.0; logits.len() * head_dim];
        keys.chunks_mut(head_dim).zip(logits).for_each(|(key, &logit)| key[0] = logit);
        let start: Vec<f32> = (0..rows).map(&start_of).collect();
        let weights = weigh(kernels, packing, (&query, &keys), head_dim, &start);
        all.push(weights.into_iter().map(|weight| weight / rows as f32).collect());
    });
    all
}

/// A NaN weighs most, and so does what is beyond: such a key is not overlooked, and sums stay finite.
#[test]
fn nan_and_large_logits_have_the_largest_weight() {
    for head_dim in HEAD_DIMS {
        let large = bf16::from_f32(1e30).to_f32();
        let logits = [1.0, f32::NAN, 60.0, 61.0, large, f32::INFINITY, f32::NEG_INFINITY, -large];
        for weights in weights_of(&logits, |_| 0.0, head_dim) {
            assert_eq!(weights, [2.0, MOST, MOST, MOST, MOST, MOST, 0.0, 0.0], "{head_dim}");
        }
    }
}

#[test]
fn a_start_of_infinity_gives_no_weight() {
    for head_dim in HEAD_DIMS {
        let logits = [1.0, -3.0, 200.0, f32::NEG_INFINITY];
        for weights in weights_of(&logits, |_| f32::INFINITY, head_dim) {
            assert_eq!(weights, [0.0; 4], "{head_dim}");
        }
        // The other queries weigh as they do without it.
        for_each_packing(|kernels, packing| {
            let rows = WEIGHING_QUERIES;
            let (query, keys) = (vec![1.0; rows * head_dim], vec![0.0; 3 * head_dim]);
            let start: Vec<f32> = (0..rows).map(|row| if row == 1 { 2.0 } else { f32::INFINITY }).collect();
            assert_eq!(weigh(kernels, packing, (&query, &keys), head_dim, &start), [0.25; 3]);
        });
    }
}
