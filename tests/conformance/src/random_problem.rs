//! Calls of METHOD_PAPER and METHOD_EXACT with everything drawn at random.

use hyperattn_core::{DType, Mask, Method, Params, Residual};
use hyperattn_reference::Generator;

use crate::inputs::{DTypes, Inputs, Shape};
use crate::random_mask::OwnedMask;

/// One call, but for how its tensors lie in memory.
pub struct RandomProblem {
    /// Estimated more often than exact.
    pub params: Params,
    /// Of any types that a call may have.
    pub inputs: Inputs,
    /// For some calls of METHOD_PAPER.
    pub block_mask: Option<OwnedMask>,
}

/// One of `options`.
pub fn pick<T: Copy>(generator: &mut Generator, options: &[T]) -> T {
    options[generator.below(options.len())]
}

/// 1 to `most`, small numbers as likely as large ones.
fn length(generator: &mut Generator, most: f64) -> usize {
    most.powf(generator.uniform()).round() as usize
}

impl RandomProblem {
    /// Prints `seed`, with which `generator` was made.
    pub fn draw(generator: &mut Generator, seed: u64, most_rows: f64, most_dim: f64) -> Self {
        println!("seed {seed}");
        let g = generator;
        let heads_kv = 1 + g.below(3);
        let n_q = length(g, most_rows);
        let shape = Shape {
            batch: 1 + g.below(2),
            heads_q: heads_kv * pick(g, &[1, 1, 2, 3, 7]),
            heads_kv,
            n_q,
            n_k: if g.below(2) == 0 { n_q } else { length(g, most_rows) },
            head_dim: length(g, most_dim),
            value_dim: length(g, most_dim),
        };
        let mixed =
            DTypes { q: DType::F32, kv: if seed.is_multiple_of(2) { DType::F16 } else { DType::BF16 } };
        let dtypes = pick(g, &[DType::F32.into(), mixed, DType::F16.into(), DType::BF16.into()]);
        let mut inputs = match g.below(2) {
            0 => Inputs::normal(shape, seed),
            _ => Inputs::clustered(shape, seed),
        }
        .rounded(dtypes);
        if shape.n_q * shape.value_dim < 64 {
            // So few numbers may all happen to be near 0, sums of larger ones whose rounding errors they keep.
            inputs.v.iter_mut().for_each(|x| *x = x.abs());
        }
        let sample_size = pick(g, &[0, 1, 5, 33, 64, 100, 300]);
        let residual = pick(g, &[Residual::Uniform, Residual::RowNorm, Residual::None]);
        let alone = sample_size > 0 && residual != Residual::None && g.below(4) == 0;
        let params = Params {
            method: pick(g, &[Method::Paper, Method::Paper, Method::Paper, Method::Exact]),
            mask: pick(g, &[Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft]),
            scale: pick(g, &[0.0, 0.0, 0.1, -0.2]),
            residual,
            lsh_num_projs: g.below(25) as u32,
            block_size: if alone { 0 } else { length(g, 300.0) as u32 },
            sample_size,
            min_seq_len: pick(g, &[0, 0, 1, 17, 100]),
            seed: g.next_u64(),
            offset: g.next_u64(),
            approx_d_epsilon: pick(g, &[0.5, 0.05, 10.0]),
            approx_d_kappa: pick(g, &[1e4, 1.0, 50.0]),
            ..Params::default()
        };
        let block_mask = (params.method == Method::Paper && g.below(4) == 0).then(|| {
            let patterns = pick(g, &[1, shape.batch * shape.heads_q]);
            let blocks = [length(g, 100.0), length(g, 100.0)];
            OwnedMask::random([shape.n_q, shape.n_k], blocks, patterns, g.uniform(), seed)
        });
        RandomProblem { params, inputs, block_mask }
    }
}
