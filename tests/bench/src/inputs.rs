//! What a call reads.

use crate::model::Model;
use crate::problem::{Shape, Source};
use crate::tensor::Tensor;

/// The inputs of a call.
pub struct Inputs {
    /// Queries, keys and values.
    pub tensors: [Tensor; 3],
    /// What they were made for.
    pub shape: Shape,
}

impl Inputs {
    /// The numbers that the shape asks for.
    ///
    /// # Errors
    /// Why a model's cannot be had.
    pub fn new(shape: Shape) -> Result<Self, String> {
        let Shape { source, dtypes, layout, batch, heads_q, heads_kv, n_q, n_k, head_dim } = shape;
        let of_keys = [batch, heads_kv, n_k, head_dim];
        let extents = [[batch, heads_q, n_q, head_dim], of_keys, of_keys];
        let tensors = match source {
            Source::Normal => [0, 1, 2].map(|at| Tensor::normal(dtypes[at], extents[at], layout, at as u64)),
            Source::Model => {
                Model::check(n_q.max(n_k), head_dim)?;
                let model = Model::read()?;
                [0, 1, 2].map(|at| {
                    let number = |[_, head, row, column]: [usize; 4]| model.number(at, head, row, column);
                    Tensor::of(dtypes[at], extents[at], layout, number)
                })
            }
        };
        Ok(Inputs { tensors, shape })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{MemoryOrder, Problem};

    /// Query heads 0 and 2 are the stored head 0, and all KV heads are the one there is.
    #[test]
    fn a_model_s_heads_repeat() {
        let mut problem = Problem::default();
        for (name, value) in
            [("inputs", "model"), ("heads_q", "3"), ("heads_kv", "3"), ("n", "70"), ("layout", "bshd")]
        {
            problem.set(name, value).unwrap();
        }
        let Inputs { tensors: [q, k, v], .. } = Inputs::new(problem.shape).unwrap();
        assert_eq!(q.head(0, 0), q.head(0, 2));
        assert_ne!(q.head(0, 0), q.head(0, 1));
        for tensor in [&k, &v] {
            assert_eq!(tensor.head(0, 0), tensor.head(0, 1));
        }
        assert_ne!(k.head(0, 0), v.head(0, 0));
        problem.shape.layout = MemoryOrder::Bhsd;
        assert_eq!(Inputs::new(problem.shape).unwrap().tensors[0].head(0, 1), q.head(0, 1));
    }

    #[test]
    fn a_model_has_its_own_sizes() {
        for (name, value) in [("n", "8193"), ("head_dim", "128")] {
            let mut problem = Problem::default();
            problem.set("inputs", "model").unwrap();
            problem.set(name, value).unwrap();
            assert!(
                Inputs::new(problem.shape)
                    .is_err_and(|error| error.starts_with("inputs=model has head_dim=64"))
            );
        }
    }
}
