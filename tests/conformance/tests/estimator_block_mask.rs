//! Exact blocks of the caller in place of sorted ones, against the oracle.

use hyperattn_conformance::compare::{F32_TOLERANCE, check_setup};
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::Setup;
use hyperattn_core::{Mask, Method, Params, Residual};

const RESIDUALS: [Residual; 3] = [Residual::Uniform, Residual::RowNorm, Residual::None];
const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

fn paper(mask: Mask, residual: Residual, min_seq_len: usize) -> Params {
    Params {
        method: Method::Paper,
        mask,
        residual,
        block_size: 64,
        sample_size: 24,
        min_seq_len,
        seed: 4,
        ..Params::default()
    }
}

fn run(params: &Params, shape: Shape, blocks: [usize; 2], patterns: usize, density: f64) {
    let seed = 400;
    let inputs = Inputs::clustered(shape, seed);
    let mask = OwnedMask::random([shape.n_q, shape.n_k], blocks, patterns, density, seed);
    let block_mask = Some(mask.view());
    check_setup(params, &inputs, F32_TOLERANCE, |setup| Setup { block_mask, ..setup });
}

#[test]
fn shared_pattern() {
    for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual))) {
        for (n_q, n_k, blocks) in [(257, 263, [16, 32]), (263, 257, [32, 16]), (101, 401, [7, 11])] {
            for min_seq_len in [0, 60] {
                run(&paper(mask, residual, min_seq_len), Shape::single(n_q, n_k), blocks, 1, 0.2);
            }
        }
    }
}

#[test]
fn a_pattern_per_head_and_batch_item() {
    for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual))) {
        let shape = Shape { batch: 2, heads_q: 6, heads_kv: 2, ..Shape::single(131, 149) };
        run(&paper(mask, residual, 30), shape, [16, 16], 12, 0.3);
        run(&paper(mask, residual, 30), shape, [16, 16], 1, 0.3);
    }
}

#[test]
fn empty_full_and_oversized_patterns() {
    for (mask, residual) in MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual))) {
        for (blocks, density) in [([16, 16], 0.0), ([16, 16], 1.0), ([1000, 1000], 1.0), ([600, 1], 0.5)] {
            run(&paper(mask, residual, 40), Shape::single(701, 199), blocks, 1, density);
        }
    }
}

/// `block_size` has no part in it, nor have the hyperplanes.
#[test]
fn block_size_and_hyperplanes_do_not_matter() {
    for (block_size, lsh_num_projs) in [(0, 0), (0, 7), (1 << 20, 24)] {
        let params =
            Params { block_size, lsh_num_projs, ..paper(Mask::CausalBottomRight, Residual::Uniform, 40) };
        run(&params, Shape::single(199, 199), [16, 16], 1, 0.2);
    }
}
