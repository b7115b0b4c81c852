//! Exact attention against the oracle: masks, sizes, dimensions, heads, element types.

use hyperattn_conformance::compare::{F32_TOLERANCE, check};
use hyperattn_conformance::expected::scale;
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{DType, Mask, Method, Params};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

#[test]
fn lengths() {
    let lengths = [1, 2, 3, 5, 7, 31, 63, 64, 65, 127, 257, 521];
    for (i, n) in lengths.into_iter().enumerate() {
        for mask in MASKS {
            check(&exact(mask), &Inputs::normal(Shape::single(n, n), 500 + i as u64), F32_TOLERANCE);
        }
    }
    for (n_q, n_k) in [(1, 997), (997, 1), (13, 499), (499, 13), (257, 300), (300, 257), (2, 65)] {
        for mask in MASKS {
            check(&exact(mask), &Inputs::normal(Shape::single(n_q, n_k), 520), F32_TOLERANCE);
        }
    }
}

/// Without queries nothing is written; without keys every row is (0, -inf).
#[test]
fn empty_sequences() {
    for method in [Method::Exact, Method::Paper, Method::Auto] {
        for mask in MASKS {
            let params = Params { method, ..exact(mask) };
            for (n_q, n_k) in [(0, 5), (5, 0), (0, 0), (300, 0)] {
                let shape = Shape { batch: 2, heads_q: 2, ..Shape::single(n_q, n_k) };
                let inputs = Inputs::normal(shape, 530);
                for_each_table(|kernels| {
                    let outcome = Setup::new(kernels, &params, &inputs).run();
                    assert_eq!((outcome.out.len(), outcome.lse.len()), (4 * n_q * 16, 4 * n_q));
                    assert!(outcome.out.iter().all(|x| x.to_bits() == 0));
                    assert!(outcome.lse.iter().all(|&x| x == f32::NEG_INFINITY));
                });
            }
        }
    }
}

#[test]
fn dimensions() {
    let head_dims = [1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 33, 64, 80, 96, 127, 128, 192, 255, 256];
    for (i, head_dim) in head_dims.into_iter().enumerate() {
        // Value dimensions run the other way, so that the two differ.
        for value_dim in [head_dim, head_dims[head_dims.len() - 1 - i]] {
            let shape = Shape { head_dim, value_dim, ..Shape::single(67, 131) };
            check(&exact(Mask::CausalBottomRight), &Inputs::normal(shape, 540 + i as u64), F32_TOLERANCE);
        }
    }
}

#[test]
fn groups() {
    for (batch, heads_q, heads_kv) in [(1, 7, 1), (2, 14, 2), (1, 40, 1), (1, 80, 2), (3, 4, 4), (1, 33, 1)] {
        for mask in MASKS {
            let shape = Shape { batch, heads_q, heads_kv, ..Shape::single(97, 89) };
            check(&exact(mask), &Inputs::normal(shape, 570), F32_TOLERANCE);
        }
    }
}

#[test]
fn element_types() {
    for dtypes in DTypes::ALL {
        for mask in MASKS {
            for (head_dim, value_dim) in [(64, 64), (5, 35), (80, 7)] {
                let shape = Shape {
                    batch: 2,
                    heads_q: 4,
                    heads_kv: 2,
                    head_dim,
                    value_dim,
                    ..Shape::single(113, 131)
                };
                check(&exact(mask), &Inputs::normal(shape, 580).rounded(dtypes), F32_TOLERANCE);
            }
        }
    }
}

/// Values at the end of the range of binary16, and bfloat16 values that stay in range when a row's weights, up
/// to one per key, have multiplied them.
#[test]
fn large_values() {
    for (dtype, value) in [(DType::F16, 65504.0), (DType::F16, -65504.0), (DType::BF16, 4e37)] {
        let mut inputs = Inputs::normal(Shape::single(5, 7), 585);
        inputs.v.fill(value);
        check(&exact(Mask::None), &inputs.rounded(dtype), F32_TOLERANCE);
    }
}

#[test]
fn scales_of_either_sign() {
    for scale in [0.0, 1.0, -1.0, 1e-6, 0.125] {
        let params = Params { scale, ..exact(Mask::CausalTopLeft) };
        check(&params, &Inputs::normal(Shape::single(101, 103), 590), F32_TOLERANCE);
    }
}

/// Logits up to thousands, where softmax picks one key or the nearest two. A logit is off by some 2^-24 times the
/// product of the norms, and its weight by that relative error, which is added to the tolerance.
#[test]
fn large_logits() {
    for (head_dim, factor) in [(16, 10.0), (64, 100.0), (64, 1000.0), (128, 1000.0)] {
        for mask in MASKS {
            let mut inputs = Inputs::normal(Shape { head_dim, ..Shape::single(131, 137) }, 600);
            inputs.q.iter_mut().for_each(|x| *x *= factor);
            let params = exact(mask);
            let norm = |rows: &[f32]| {
                let square = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                rows.chunks(head_dim).map(square).fold(0.0, f64::max).sqrt()
            };
            let largest = scale(&params, head_dim) * norm(&inputs.q) * norm(&inputs.k);
            check(&params, &inputs, F32_TOLERANCE + largest * 2.0f64.powi(-24));
        }
    }
}

/// Keys with an infinite coordinate that every query multiplies by a positive number with the right sign:
/// logits of -inf, down to rows that see nothing else.
#[test]
fn logits_of_minus_infinity() {
    for (mask, dtypes) in MASKS.into_iter().flat_map(|mask| DTypes::ALL.map(|dtypes| (mask, dtypes))) {
        let mut inputs = Inputs::normal(Shape::single(101, 97), 610).rounded(dtypes);
        inputs.q.chunks_mut(16).for_each(|row| row[3] = 1.5);
        let hidden = |key: usize| key < 5 || key.is_multiple_of(7) || (64..96).contains(&key);
        for (key, row) in inputs.k.chunks_mut(16).enumerate().filter(|(key, _)| hidden(*key)) {
            row[3] = f32::NEG_INFINITY;
            // The value of a key without weight does not matter while it is finite.
            assert!(inputs.v[key * 16].is_finite());
        }
        check(&exact(mask), &inputs, F32_TOLERANCE);
        inputs.k.chunks_mut(16).for_each(|row| row[3] = f32::NEG_INFINITY);
        check(&exact(mask), &inputs, F32_TOLERANCE);
    }
}
