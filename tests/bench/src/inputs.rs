//! What a call reads.

use crate::problem::Shape;
use crate::tensor::Tensor;

/// The inputs of a call.
pub struct Inputs {
    /// Queries, keys and values.
    pub tensors: [Tensor; 3],
    /// What they were made for.
    pub shape: Shape,
}

impl Inputs {
    /// Standard normal numbers.
    pub fn new(shape: Shape) -> Self {
        let Shape { dtypes, layout, batch, heads_q, heads_kv, n_q, n_k, head_dim } = shape;
        let make = |at: usize, heads, rows| {
            Tensor::normal(dtypes[at], [batch, heads, rows, head_dim], layout, at as u64)
        };
        Inputs { tensors: [make(0, heads_q, n_q), make(1, heads_kv, n_k), make(2, heads_kv, n_k)], shape }
    }
}
