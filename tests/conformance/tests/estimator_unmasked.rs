//! The published estimator without a mask against the oracle's, on the same permutation and samples.

use hyperattn_conformance::compare::{F32_TOLERANCE, check};
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape, UNEVEN_LENGTHS};
use hyperattn_core::{Method, Params, Residual};

const RESIDUALS: [Residual; 3] = [Residual::Uniform, Residual::RowNorm, Residual::None];

/// Estimated from the first key on.
fn paper(residual: Residual, block_size: u32, sample_size: u32) -> Params {
    Params {
        method: Method::Paper,
        residual,
        block_size,
        sample_size,
        min_seq_len: 0,
        seed: 3,
        offset: 5,
        ..Params::default()
    }
}

#[test]
fn lengths() {
    for (seed, (n_q, n_k, block_size, sample_size)) in UNEVEN_LENGTHS.into_iter().enumerate() {
        for residual in RESIDUALS {
            let inputs = Inputs::clustered(Shape::single(n_q, n_k), 200 + seed as u64);
            check(&paper(residual, block_size, sample_size), &inputs, F32_TOLERANCE);
        }
    }
}

#[test]
fn hyperplanes() {
    for lsh_num_projs in [0, 1, 7, 13, 24] {
        for residual in RESIDUALS {
            let params = Params { lsh_num_projs, ..paper(residual, 32, 20) };
            check(&params, &Inputs::clustered(Shape::single(307, 331), 220), F32_TOLERANCE);
        }
    }
}

#[test]
fn residual_alone_and_blocks_alone() {
    let inputs = Inputs::clustered(Shape::single(601, 311), 230);
    for residual in [Residual::Uniform, Residual::RowNorm] {
        check(&paper(residual, 0, 50), &inputs, F32_TOLERANCE);
    }
    for residual in RESIDUALS {
        check(&paper(residual, 50, 0), &inputs, F32_TOLERANCE);
    }
}

#[test]
fn dimensions() {
    let dims = [(1, 1), (3, 5), (64, 64), (80, 33), (5, 256), (256, 3), (128, 128)];
    for (seed, (head_dim, value_dim)) in dims.into_iter().enumerate() {
        for residual in RESIDUALS {
            let shape = Shape { head_dim, value_dim, ..Shape::single(211, 223) };
            let inputs = Inputs::normal(shape, 240 + seed as u64);
            check(&paper(residual, 32, 32), &inputs, F32_TOLERANCE);
        }
    }
}

#[test]
fn heads_and_batch() {
    for (seed, (batch, heads_q, heads_kv)) in
        [(2, 1, 1), (1, 4, 4), (2, 6, 2), (1, 7, 1), (1, 40, 1)].into_iter().enumerate()
    {
        for residual in RESIDUALS {
            let shape = Shape { batch, heads_q, heads_kv, ..Shape::single(149, 163) };
            let inputs = Inputs::clustered(shape, 250 + seed as u64);
            check(&paper(residual, 32, 16), &inputs, F32_TOLERANCE);
        }
    }
}

#[test]
fn element_types() {
    for dtypes in DTypes::ALL {
        for residual in RESIDUALS {
            let shape =
                Shape { heads_q: 4, heads_kv: 2, head_dim: 40, value_dim: 24, ..Shape::single(257, 263) };
            let inputs = Inputs::clustered(shape, 260).rounded(dtypes);
            check(&paper(residual, 32, 16), &inputs, F32_TOLERANCE);
        }
    }
}

/// Settings of Algorithm 2 under which the cap always bites, never, and under which the floor does.
#[test]
fn cap_and_floor() {
    for (approx_d_epsilon, approx_d_kappa) in
        [(0.5, 1e4), (0.01, 1e4), (100.0, 1e12), (0.5, 1.0), (0.5, 0.01), (1e-6, 1e30)]
    {
        for (n_q, sample_size) in [(500, 30), (25, 30)] {
            let params =
                Params { approx_d_epsilon, approx_d_kappa, ..paper(Residual::RowNorm, 32, sample_size) };
            check(&params, &Inputs::clustered(Shape::single(n_q, 311), 270), F32_TOLERANCE);
        }
    }
}

#[test]
fn seeds_and_offsets() {
    for (seed, offset) in [(0, 0), (u64::MAX, u64::MAX), (1 << 32, 1 << 32), (7, 1 << 63)] {
        for residual in [Residual::Uniform, Residual::RowNorm] {
            let params = Params { seed, offset, ..paper(residual, 32, 16) };
            check(&params, &Inputs::clustered(Shape::single(151, 157), 280), F32_TOLERANCE);
        }
    }
}

#[test]
fn scales() {
    for scale in [0.0, 1.0, -0.3, 1e-3] {
        for residual in RESIDUALS {
            let params = Params { scale, ..paper(residual, 32, 16) };
            check(&params, &Inputs::clustered(Shape::single(151, 157), 290), F32_TOLERANCE);
        }
    }
}

/// Keys whose values are zero are never drawn by row norm; without any value the output is zero.
#[test]
fn values_of_zero() {
    let mut inputs = Inputs::clustered(Shape::single(151, 157), 295);
    inputs.v[..16 * 100].fill(0.0);
    check(&paper(Residual::RowNorm, 32, 16), &inputs, F32_TOLERANCE);
    inputs.v.fill(0.0);
    check(&paper(Residual::RowNorm, 32, 16), &inputs, F32_TOLERANCE);
}
