//! The workspace: what is asked for suffices, less is refused, nothing beyond it is touched. That bytes
//! around it stay as they are is checked by every call of these tests.

use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::{Setup, Workspace};
use hyperattn_core::{
    DType, ErrorKind, Layout, Layouts, Mask, Method, Params, Residual, Serial, TensorLayout, TensorMut,
    TensorRef, Tensors, forward, forward_workspace,
};

fn all_params() -> Vec<Params> {
    let exact = Params { method: Method::Exact, ..Params::default() };
    let mut all = Vec::new();
    for mask in [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft] {
        all.push(Params { mask, ..exact });
        for (residual, block_size, lsh_num_projs) in [
            (Residual::Uniform, 16, 7),
            (Residual::RowNorm, 16, 24),
            (Residual::None, 16, 1),
            (Residual::Uniform, 0, 7),
            (Residual::RowNorm, 16, 0),
        ] {
            let paper = Params { method: Method::Paper, mask, residual, block_size, ..exact };
            all.push(Params { lsh_num_projs, sample_size: 20, min_seq_len: 30, ..paper });
        }
        for target_error in [0.0, 0.2] {
            let refined = Params { method: Method::Refined, mask, min_seq_len: 30, ..exact };
            all.push(Params { budget: 64, band: 10, target_error, ..refined });
        }
    }
    all
}

fn all_inputs() -> Vec<Inputs> {
    let shape =
        Shape { batch: 2, heads_q: 6, heads_kv: 2, head_dim: 7, value_dim: 13, ..Shape::single(131, 149) };
    let wide = Shape { head_dim: 256, value_dim: 1, ..Shape::single(61, 300) };
    let single = Shape { head_dim: 1, value_dim: 256, ..Shape::single(1, 90) };
    vec![
        Inputs::normal(shape, 1100),
        Inputs::normal(wide, 1101).rounded(DType::BF16),
        Inputs::normal(single, 1102),
        Inputs::normal(shape, 1105).rounded(DTypes { q: DType::F32, kv: DType::F16 }),
    ]
}

#[test]
fn exactly_what_is_asked_for_suffices_and_one_byte_less_is_refused() {
    for inputs in all_inputs() {
        for params in all_params() {
            for_each_table(|kernels| {
                for lanes in [1, 4] {
                    let executor = Threads { lanes, threads: 1, order: Order::Forward };
                    let setup = Setup {
                        executor: &executor,
                        estimates: true,
                        ..Setup::new(kernels, &params, &inputs)
                    };
                    setup.run();
                    let refused = setup.attempt(|Layout { size, align }| Layout { size: size - 1, align });
                    assert_eq!(refused.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
                }
            });
        }
    }
}

#[test]
fn given_blocks_have_their_own_needs() {
    for inputs in all_inputs() {
        let Shape { n_q, n_k, .. } = inputs.shape;
        let mask = OwnedMask::random([n_q, n_k], [16, 16], 1, 0.5, 1103);
        for params in all_params().into_iter().filter(|params| params.method == Method::Paper) {
            for_each_table(|kernels| {
                let block_mask = Some(mask.view());
                let setup = Setup { block_mask, ..Setup::new(kernels, &params, &inputs) };
                setup.run();
                let refused = setup.attempt(|Layout { size, align }| Layout { size: size - 1, align });
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
            });
        }
    }
}

#[test]
fn a_misaligned_workspace_is_refused_and_a_larger_one_is_used_up_to_the_size_asked_for() {
    let inputs = Inputs::normal(Shape::single(131, 149), 1104);
    for params in all_params() {
        for_each_table(|kernels| {
            let shape = &inputs.shape;
            let (mut out, mut lse) = (vec![-7.0f32; 131 * 16], vec![-7.0f32; 131]);
            let mut run = |lead: usize| {
                let mut tensors = Tensors {
                    q: TensorRef::contiguous(&inputs.q, shape.q()).unwrap(),
                    k: TensorRef::contiguous(&inputs.k, shape.k()).unwrap(),
                    v: TensorRef::contiguous(&inputs.v, shape.v()).unwrap(),
                    out: TensorMut::contiguous(&mut out, shape.out()).unwrap(),
                    lse: Some(TensorMut::contiguous(&mut lse, shape.lse()).unwrap()),
                    block_mask: None,
                    error: None,
                    keys_per_query: None,
                    mask: None,
                };
                let layout = forward_workspace(&params, &tensors.layouts(), kernels, &Serial).unwrap();
                assert!(layout.align.is_power_of_two());
                let mut workspace = Workspace::new(layout, |_| 0);
                let granted = &mut workspace.with_tail()[lead..];
                let result = forward(&params, &mut tensors, kernels, &Serial, granted);
                (result, workspace.guards_are_intact())
            };
            assert_eq!(run(4).0.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
            let (result, intact) = run(0);
            assert!(result.is_ok() && intact);
            assert!(out.iter().chain(&lse).all(|&x| x != -7.0));
        });
    }
}

/// Memory is linear in the sequence: twice the rows need at most twice the bytes.
#[test]
fn the_size_grows_linearly() {
    for params in all_params() {
        for_each_table(|kernels| {
            let size = |n: usize| {
                let shape = Shape::single(n, n);
                let (data, mut out) = (vec![0.0f32; n * 16], vec![0.0f32; n * 16]);
                let tensors = Tensors {
                    q: TensorRef::contiguous(&data, shape.q()).unwrap(),
                    k: TensorRef::contiguous(&data, shape.k()).unwrap(),
                    v: TensorRef::contiguous(&data, shape.v()).unwrap(),
                    out: TensorMut::contiguous(&mut out, shape.out()).unwrap(),
                    lse: None,
                    block_mask: None,
                    error: None,
                    keys_per_query: None,
                    mask: None,
                };
                forward_workspace(&params, &tensors.layouts(), kernels, &Serial).unwrap().size
            };
            for n in [1000, 10_000, 100_000] {
                assert!(size(2 * n) <= 2 * size(n), "{} {}", size(2 * n), size(n));
            }
        });
    }
}

/// Twice the bytes of k and v, some bytes per row, and what the tiles take, whatever the lengths. METHOD_REFINED has
/// the means of blocks of 64 keys, weights of keys, and the outputs of probe rows besides.
#[test]
fn the_workspace_is_bounded_by_keys_values_and_rows() {
    let shapes = [
        Shape { heads_q: 8, heads_kv: 8, head_dim: 64, value_dim: 64, ..Shape::single(1, 1) },
        Shape { heads_q: 14, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(1, 1) },
        Shape { heads_q: 8, heads_kv: 1, head_dim: 128, value_dim: 128, ..Shape::single(1, 1) },
    ];
    let most_per_row = 24;
    let tiles_of_a_lane = 2 << 20;
    for shape in shapes {
        for (n_q, n_k) in [(5000, 5000), (40_000, 40_000), (1000, 300_000)] {
            let Shape { heads_q, heads_kv, head_dim, value_dim, .. } = shape;
            for (dtype, bytes) in [(DType::F32, 4), (DType::F16, 2), (DType::BF16, 2)] {
                let layout = |heads: usize, n: usize, width: usize| {
                    TensorLayout::contiguous(dtype, [1, heads as i64, n as i64, width as i64])
                };
                let layouts = Layouts {
                    q: layout(heads_q, n_q, head_dim),
                    k: layout(heads_kv, n_k, head_dim),
                    v: layout(heads_kv, n_k, value_dim),
                    out: layout(heads_q, n_q, value_dim),
                    lse: None,
                    block_mask: None,
                    error: None,
                    keys_per_query: None,
                    mask: None,
                };
                let keys_and_values = bytes * heads_kv * n_k * (head_dim + value_dim);
                let rows = heads_q * n_q + heads_kv * n_k;
                let bound = 2 * keys_and_values + most_per_row * rows + tiles_of_a_lane;
                let refined = keys_and_values / 20 + 13 * n_k + 1024 * heads_q * value_dim;
                for params in all_params()
                    .into_iter()
                    .flat_map(|params| [30, 1024, 4096].map(|min_seq_len| Params { min_seq_len, ..params }))
                {
                    for_each_table(|kernels| {
                        let need = forward_workspace(&params, &layouts, kernels, &Serial).unwrap().size;
                        let bound = bound + if params.method == Method::Refined { refined } else { 0 };
                        assert!(
                            need <= bound,
                            "{need} > {bound} for {shape:?} {n_q} {n_k} {dtype:?} {params:?}"
                        );
                    });
                }
            }
        }
    }
}
