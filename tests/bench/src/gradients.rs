//! What a backward call has besides the tensors of the forward.

use hyperattn_core::{DType, Gradients, Result, TensorMut};

use crate::problem::{MemoryOrder, Problem, Shape};
use crate::tensor::Tensor;

/// The tensors of a backward call beside q, k, v and out.
pub struct GradientTensors {
    /// Log-sum-exps, which the forward writes.
    pub lse: Tensor,
    /// With respect to the output: standard normal numbers, the same for the same shape.
    pub dout: Tensor,
    /// With respect to the queries, of their type.
    pub dq: Tensor,
    /// With respect to the keys, of their type.
    pub dk: Tensor,
    /// With respect to the values, of their type.
    pub dv: Tensor,
}

/// The inputs have the seeds below.
const SEED_OF_DOUT: u64 = 3;

/// The gradient with respect to the output, of its type.
pub fn dout(problem: &Problem) -> Tensor {
    let Shape { layout, batch, heads_q, n_q, head_dim, .. } = problem.shape;
    Tensor::normal(problem.dtype_out, [batch, heads_q, n_q, head_dim], layout, SEED_OF_DOUT)
}

impl GradientTensors {
    /// Of a problem; nothing is written yet but dout.
    pub fn new(problem: &Problem) -> Self {
        let Shape { dtypes, layout, batch, heads_q, heads_kv, n_q, n_k, head_dim, .. } = problem.shape;
        let of_queries = [batch, heads_q, n_q, head_dim];
        let of_keys = [batch, heads_kv, n_k, head_dim];
        GradientTensors {
            lse: Tensor::new(DType::F32, [batch, heads_q, n_q, 1], MemoryOrder::Bhsd),
            dout: dout(problem),
            dq: Tensor::new(dtypes[0], of_queries, layout),
            dk: Tensor::new(dtypes[1], of_keys, layout),
            dv: Tensor::new(dtypes[2], of_keys, layout),
        }
    }

    /// The log-sum-exps, and what a backward call is given.
    pub fn views(&mut self) -> Result<(TensorMut<'_>, Gradients<'_>)> {
        let GradientTensors { lse, dout, dq, dk, dv } = self;
        let gradients = Gradients {
            dout: dout.view()?,
            dlse: None,
            dq: dq.view_mut()?,
            dk: dk.view_mut()?,
            dv: dv.view_mut()?,
        };
        Ok((lse.view_mut()?, gradients))
    }
}
