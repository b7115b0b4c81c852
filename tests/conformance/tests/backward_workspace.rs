//! The workspace of the backward pass. That bytes around it stay as they are, and gradients on an error, is checked by
//! every call of these tests.

use hyperattn_conformance::backward::{Backward, Loss};
use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{
    DType, Division, ErrorKind, Layout, Layouts, Mask, Method, Params, Residual, Serial, TensorLayout,
    backward_workspace,
};

fn all_params() -> Vec<Params> {
    let exact = Params { method: Method::Exact, ..Params::default() };
    let mut all = Vec::new();
    for mask in [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft] {
        all.push(Params { mask, ..exact });
        for (residual, block_size, lsh_num_projs) in
            [(Residual::Uniform, 16, 7), (Residual::RowNorm, 16, 24), (Residual::None, 16, 1)]
        {
            let paper = Params { method: Method::Paper, mask, residual, block_size, ..exact };
            all.push(Params { lsh_num_projs, sample_size: 20, min_seq_len: 30, ..paper });
        }
        let refined = Params { method: Method::Refined, mask, min_seq_len: 30, ..exact };
        all.push(Params { budget: 64, band: 10, target_error: 0.2, ..refined });
    }
    all
}

#[test]
fn exactly_what_is_asked_for_suffices_and_one_byte_less_is_refused() {
    let shape =
        Shape { batch: 2, heads_q: 6, heads_kv: 2, head_dim: 7, value_dim: 13, ..Shape::single(91, 109) };
    let wide = Shape { head_dim: 256, value_dim: 1, ..Shape::single(61, 150) };
    for (shape, dtypes) in [(shape, DType::F32.into()), (wide, DTypes { q: DType::F32, kv: DType::F16 })] {
        let inputs = Inputs::normal(shape, 2700).rounded(dtypes);
        let loss = Loss::normal(&shape, dtypes.q, 2701);
        for params in all_params() {
            for_each_table(|kernels| {
                for lanes in [1, 4] {
                    let executor = Threads { lanes, threads: 1, order: Order::Forward };
                    let setup = Setup { executor: &executor, ..Setup::new(kernels, &params, &inputs) };
                    let (call, outcome) = (Backward::new(setup, &loss), setup.run());
                    call.run_from(&outcome);
                    let less = |Layout { size, align }| Layout { size: size - 1, align };
                    let refused = call.attempt(&outcome, less);
                    assert_eq!(refused.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
                }
            });
        }
    }
}

fn layouts(shape: &Shape) -> Layouts<'static> {
    let layout = |extents| TensorLayout::contiguous(DType::F32, extents);
    Layouts {
        q: layout(shape.q()),
        k: layout(shape.k()),
        v: layout(shape.v()),
        out: layout(shape.out()),
        lse: Some(layout(shape.lse())),
        block_mask: None,
        error: None,
        keys_per_query: None,
        mask: None,
    }
}

/// Memory is linear in the sequence: twice the rows need at most twice the bytes.
#[test]
fn the_size_grows_linearly() {
    for params in all_params() {
        for_each_table(|kernels| {
            let size = |n: usize| {
                let layouts = layouts(&Shape { heads_q: 4, heads_kv: 2, ..Shape::single(n, n) });
                backward_workspace(&params, &Division::default(), &layouts, kernels, &Serial).unwrap().size
            };
            for n in [1000, 10_000, 100_000] {
                assert!(size(2 * n) <= 2 * size(n), "{} {} {params:?}", size(2 * n), size(n));
            }
        });
    }
}

#[test]
fn a_misaligned_workspace_is_refused_and_a_larger_one_is_used_up_to_the_size_asked_for() {
    let shape = Shape::single(70, 90);
    let (inputs, loss) = (Inputs::normal(shape, 2720), Loss::normal(&shape, DType::F32, 2721));
    for params in all_params() {
        for_each_table(|kernels| {
            let call = Backward::new(Setup::new(kernels, &params, &inputs), &loss);
            let outcome = call.of.run();
            let attempt = |lead: usize| {
                call.attempt_in(&outcome, |layout| layout, |workspace| &mut workspace.with_tail()[lead..])
            };
            assert_eq!(attempt(4).unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
            assert!(attempt(0).is_ok());
        });
    }
}
