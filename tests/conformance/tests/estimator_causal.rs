//! The published estimator under causal masks (Algorithm 4) against the oracle's recursion.

use hyperattn_conformance::compare::{F32_TOLERANCE, check};
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_core::{Mask, Method, Params, Residual};

const RESIDUALS: [Residual; 3] = [Residual::Uniform, Residual::RowNorm, Residual::None];
const MASKS: [Mask; 2] = [Mask::CausalBottomRight, Mask::CausalTopLeft];

fn paper(mask: Mask, residual: Residual, min_seq_len: usize) -> Params {
    Params {
        method: Method::Paper,
        mask,
        residual,
        block_size: 16,
        sample_size: 24,
        min_seq_len,
        seed: 8,
        offset: 2,
        ..Params::default()
    }
}

/// From one level to six, with intervals of odd length.
#[test]
fn levels_of_the_recursion() {
    for (n, min_seq_len) in [(64, 63), (65, 64), (251, 64), (509, 20), (1009, 64), (1009, 0), (1009, 600)] {
        for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual)))
        {
            let inputs = Inputs::clustered(Shape::single(n, n), 300);
            check(&paper(mask, residual, min_seq_len), &inputs, F32_TOLERANCE);
        }
    }
}

/// A dense part and a square, and every combination of exact and estimated of the two.
#[test]
fn unequal_lengths() {
    for (n_q, n_k) in
        [(101, 401), (401, 101), (30, 401), (401, 30), (300, 331), (331, 300), (1, 200), (200, 1)]
    {
        for min_seq_len in [0, 50, 250] {
            for (mask, residual) in
                MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual)))
            {
                let inputs = Inputs::clustered(Shape::single(n_q, n_k), 310);
                check(&paper(mask, residual, min_seq_len), &inputs, F32_TOLERANCE);
            }
        }
    }
}

#[test]
fn without_blocks_the_recursion_goes_down_to_single_keys() {
    for (mask, residual) in
        MASKS.into_iter().flat_map(|mask| [Residual::Uniform, Residual::RowNorm].map(|r| (mask, r)))
    {
        for (n_q, n_k) in [(67, 67), (40, 67), (67, 40), (40, 1), (1, 40), (39, 40), (2, 1), (1, 2)] {
            let params = Params { block_size: 0, ..paper(mask, residual, 0) };
            check(&params, &Inputs::clustered(Shape::single(n_q, n_k), 320), F32_TOLERANCE);
        }
    }
}

/// Blocks longer than a tile, and off-diagonal parts that one block covers.
#[test]
fn large_blocks() {
    for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual))) {
        for (n_q, n_k, block_size) in [(1009, 1009, 300), (601, 601, 256), (500, 1200, 280)] {
            let params = Params { block_size, ..paper(mask, residual, 100) };
            check(&params, &Inputs::clustered(Shape::single(n_q, n_k), 325), F32_TOLERANCE);
        }
    }
}

#[test]
fn without_samples() {
    for mask in MASKS {
        for residual in RESIDUALS {
            let params = Params { sample_size: 0, ..paper(mask, residual, 40) };
            check(&params, &Inputs::clustered(Shape::single(401, 401), 330), F32_TOLERANCE);
        }
    }
}

#[test]
fn hyperplanes() {
    for lsh_num_projs in [0, 1, 13, 24] {
        for residual in RESIDUALS {
            let params = Params { lsh_num_projs, ..paper(Mask::CausalBottomRight, residual, 40) };
            check(&params, &Inputs::clustered(Shape::single(389, 397), 340), F32_TOLERANCE);
        }
    }
}

#[test]
fn heads_batch_and_dimensions() {
    for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual))) {
        let shape = Shape {
            batch: 2,
            heads_q: 6,
            heads_kv: 2,
            head_dim: 24,
            value_dim: 35,
            ..Shape::single(163, 173)
        };
        check(&paper(mask, residual, 30), &Inputs::clustered(shape, 350), F32_TOLERANCE);
        let shape = Shape { heads_q: 40, value_dim: 3, ..Shape::single(97, 97) };
        check(&paper(mask, residual, 30), &Inputs::normal(shape, 351), F32_TOLERANCE);
    }
}

#[test]
fn element_types() {
    for dtypes in DTypes::ALL {
        for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual)))
        {
            let shape =
                Shape { heads_q: 4, heads_kv: 2, head_dim: 40, value_dim: 24, ..Shape::single(257, 263) };
            let inputs = Inputs::clustered(shape, 360).rounded(dtypes);
            check(&paper(mask, residual, 50), &inputs, F32_TOLERANCE);
        }
    }
}
