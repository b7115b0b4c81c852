//! Tensors that are not packed: same bits as packed ones, and nothing read or written between their elements.

use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::run::Setup;
use hyperattn_conformance::storage::{Arrangement, Tensor};
use hyperattn_core::{DType, Mask, Method, Params, Residual};

const OUTPUTS: [Arrangement; 4] =
    [Arrangement::Packed, Arrangement::TokensFirst, Arrangement::Padded, Arrangement::Reversed];

fn shape() -> Shape {
    Shape { batch: 2, heads_q: 6, heads_kv: 2, head_dim: 20, value_dim: 13, ..Shape::single(73, 91) }
}

fn all_params() -> impl Iterator<Item = Params> {
    let exact = Params { method: Method::Exact, mask: Mask::CausalBottomRight, ..Params::default() };
    let paper = Params { method: Method::Paper, block_size: 16, sample_size: 10, min_seq_len: 20, ..exact };
    let residuals = [Residual::Uniform, Residual::RowNorm];
    [exact].into_iter().chain(residuals.map(|residual| Params { residual, ..paper }))
}

/// Gaps of the inputs are NaN and gaps of the outputs are checked by [`Setup::run`].
#[test]
fn arrangements_do_not_change_a_bit() {
    for dtypes in DTypes::ALL {
        let inputs = Inputs::normal(shape(), 700).rounded(dtypes);
        for params in all_params() {
            for_each_table(|kernels| {
                let packed = Setup::new(kernels, &params, &inputs).run().bits();
                for arrangement in OUTPUTS {
                    for out in OUTPUTS {
                        let arrangements = [arrangement, arrangement, arrangement, out];
                        let strided = Setup { arrangements, ..Setup::new(kernels, &params, &inputs) };
                        assert_eq!(strided.run().bits(), packed, "{arrangements:?} {dtypes:?} {params:?}");
                    }
                }
            });
        }
    }
}

#[test]
fn arrangements_may_differ_between_tensors() {
    for dtypes in DTypes::ALL {
        let inputs = Inputs::normal(shape(), 710).rounded(dtypes);
        for params in all_params() {
            for_each_table(|kernels| {
                let packed = Setup::new(kernels, &params, &inputs).run().bits();
                for first in 0..OUTPUTS.len() {
                    let arrangements = [0, 1, 2, 3].map(|i| OUTPUTS[(first + i) % OUTPUTS.len()]);
                    let strided = Setup { arrangements, ..Setup::new(kernels, &params, &inputs) };
                    assert_eq!(strided.run().bits(), packed, "{arrangements:?} {dtypes:?}");
                }
            });
        }
    }
}

/// A stride of 0 gives what the same rows give when they are there as often as the extent says.
#[test]
fn broadcast_inputs() {
    for broadcast in [Arrangement::OneRow, Arrangement::OneHead] {
        let mut inputs = Inputs::normal(shape(), 720);
        let spread = |values: &[f32], shape| Tensor::new(values, shape, DType::F32, broadcast, 0.0).values();
        inputs.q = spread(&inputs.q, inputs.shape.q());
        inputs.k = spread(&inputs.k, inputs.shape.k());
        inputs.v = spread(&inputs.v, inputs.shape.v());
        for params in all_params() {
            for_each_table(|kernels| {
                let packed = Setup::new(kernels, &params, &inputs).run().bits();
                for place in 0..3 {
                    let mut arrangements = [Arrangement::Packed; 4];
                    arrangements[place] = broadcast;
                    let strided = Setup { arrangements, ..Setup::new(kernels, &params, &inputs) };
                    assert_eq!(strided.run().bits(), packed, "{broadcast:?} of tensor {place}");
                }
            });
        }
    }
}
