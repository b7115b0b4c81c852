//! Gradients on a device against the CPU, which selects the same. Skips itself where there is no device.

mod support;

use hyperattn_conformance::inputs::{DTypes, Inputs, Shape, UNEVEN_LENGTHS};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_core::{DType, Division, ErrorKind, Mask, Method, Params, Residual, Sequences};
use hyperattn_cuda::{DeviceGradients, DeviceTensor, DeviceTensors};

use support::call::{Call, DeviceMask};
use support::device::{Device, Stream};
use support::gradients::BackwardCall;
use support::graph::Graph;
use support::tensor::Arrangement;
use support::timed::{Timed, packed_tensor};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

/// One head.
fn shape(n_q: usize, n_k: usize, head_dim: usize, value_dim: usize) -> Shape {
    Shape { head_dim, value_dim, ..Shape::single(n_q, n_k) }
}

/// The gradients of one call with normal inputs.
fn check(params: &Params, shape: Shape, dtypes: impl Into<DTypes>, seed: u64) {
    let inputs = Inputs::normal(shape, seed).rounded(dtypes);
    BackwardCall::new(Call::new(params, &inputs), seed + 1).check();
}

#[test]
fn every_dimension_and_type() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for dim in [64, 96, 128, 256] {
            for mask in MASKS {
                check(&exact(mask), shape(300, 333, dim, dim), dtype, 10);
            }
        }
        for (head_dim, value_dim) in [(1, 7), (8, 24), (57, 100), (40, 256), (64, 128), (192, 64), (250, 3)] {
            check(&exact(Mask::CausalTopLeft), shape(150, 260, head_dim, value_dim), dtype, 11);
        }
    }
}

#[test]
fn lengths_around_tiles() {
    let Some(_device) = Device::first() else { return };
    for (n_q, n_k) in [
        (1, 1),
        (1, 700),
        (2, 1),
        (63, 64),
        (64, 65),
        (127, 128),
        (129, 129),
        (257, 31),
        (500, 1025),
        (1025, 500),
    ] {
        for mask in MASKS {
            for dtype in DTYPES {
                check(&exact(mask), shape(n_q, n_k, 64, 64), dtype, 20);
            }
            check(&exact(mask), shape(n_q, n_k, 128, 128), DType::BF16, 21);
            check(&exact(mask), shape(n_q, n_k, 200, 200), DType::BF16, 22);
        }
    }
    for (n_q, n_k) in [(0, 50), (50, 0), (0, 0)] {
        for dtype in DTYPES {
            check(&exact(Mask::CausalBottomRight), shape(n_q, n_k, 64, 64), dtype, 23);
        }
    }
}

#[test]
fn heads_share_keys() {
    let Some(_device) = Device::first() else { return };
    for (batch, heads_q, heads_kv) in [(1, 4, 4), (2, 4, 2), (3, 6, 1), (1, 7, 7)] {
        for mask in MASKS {
            for dtype in DTYPES {
                let shape = Shape { batch, heads_q, heads_kv, ..shape(290, 290, 64, 64) };
                check(&exact(mask), shape, dtype, 30);
            }
        }
    }
}

#[test]
fn types_and_arrangements() {
    let Some(_device) = Device::first() else { return };
    use Arrangement::*;
    let params = exact(Mask::CausalBottomRight);
    let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..shape(140, 200, 64, 64) };
    for dtypes in DTypes::ALL {
        let inputs = Inputs::normal(shape, 40).rounded(dtypes);
        for (of_inputs, of_outputs) in
            [(TokensFirst, PaddedBy8), (PaddedBy8, TokensFirst), (PaddedBy3, Reversed), (Reversed, PaddedBy3)]
        {
            let forward = Call { arrangements: [of_inputs, of_outputs], ..Call::new(&params, &inputs) };
            BackwardCall { arrangement: of_outputs, ..BackwardCall::new(forward, 41) }.check();
        }
        let forward = Call { out: DType::F32, ..Call::new(&params, &inputs) };
        let call = BackwardCall::new(forward, 42);
        BackwardCall { dout: DType::F32, ..call }.check();
        BackwardCall { gradients: [DType::F32; 2], ..call }.check();
        BackwardCall { of_lse: false, ..call }.check();
    }
    let negative = Params { scale: -0.2, ..params };
    check(&negative, shape, DType::BF16, 43);
    check(&negative, shape, DType::F32, 44);
}

/// What is not finite stays with the queries and keys that see it.
#[test]
fn not_finite_beyond_the_limit() {
    let Some(_device) = Device::first() else { return };
    let n = 300;
    for (dtype, dim, deterministic) in DTYPES
        .into_iter()
        .flat_map(|dtype| [(dtype, 64, true), (dtype, 128, true), (dtype, 64, false), (dtype, 128, false)])
    {
        let params = Params { deterministic, ..exact(Mask::CausalTopLeft) };
        let clean = Inputs::normal(shape(n, n, dim, dim), 50).rounded(dtype);
        let call = BackwardCall::new(Call::new(&params, &clean), 51);
        let expected = call.prepare().run();
        for at in [0, 70, 129, n - 1] {
            for tensor in 0..3 {
                let mut dirty = clean.clone();
                [&mut dirty.q, &mut dirty.k, &mut dirty.v][tensor][at * dim + 3] = f32::NAN;
                let found = BackwardCall { forward: Call::new(&params, &dirty), ..call }.prepare().run();
                for row in 0..n {
                    let same = |of: usize| {
                        let (a, b) = (&found[of][row * dim..][..dim], &expected[of][row * dim..][..dim]);
                        a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 0.02 * b.abs().max(0.1))
                    };
                    let [dq, dk, dv] = [0, 1, 2].map(same);
                    let what = format!(
                        "{dtype:?} {dim} {deterministic}: row {row} and a NaN in tensor {tensor} at {at}"
                    );
                    if tensor == 0 {
                        // A query: its own gradient, and those of the keys it sees.
                        assert!(dq == (row != at) && dk == (row > at) && dv == (row > at), "{what}");
                    } else {
                        // A key or a value: queries from it on, and through these nearly all keys.
                        assert!(dq == (row < at), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_same_bits_each_time_and_in_a_graph() {
    let Some(_device) = Device::alone() else { return };
    for dtype in DTYPES {
        let params = exact(Mask::CausalBottomRight);
        let shape = Shape { heads_q: 4, heads_kv: 2, ..shape(600, 900, 128, 128) };
        let inputs = Inputs::normal(shape, 60).rounded(dtype);
        let prepared = BackwardCall::new(Call::new(&params, &inputs), 61).prepare();
        prepared.check_bits();
    }
}

/// Several tiles of keys for every block of the device add to the same gradients of queries.
#[test]
fn more_tiles_than_blocks() {
    let Some(_device) = Device::alone() else { return };
    for (mask, dim) in [(Mask::CausalBottomRight, 64), (Mask::CausalBottomRight, 128), (Mask::None, 128)] {
        let params = exact(mask);
        let grouped = Shape { batch: 2, heads_q: 16, heads_kv: 8, ..shape(1000, 1100, dim, dim) };
        let inputs = Inputs::normal(grouped, 130).rounded(DType::BF16);
        let call = BackwardCall::new(Call::new(&params, &inputs), 131);
        call.check();
        let prepared = call.prepare();
        let first = prepared.run();
        for _ in 0..10 {
            assert!(first == prepared.run(), "{mask:?}, {dim}");
        }
    }
}

/// `params` with the permission to add in any order: in a graph that is replayed the gradients are the CPU's, and those
/// of keys and values have the bits of the call without it.
fn check_any_order(params: &Params, shape: Shape, dtype: DType, seed: u64) {
    let params = Params { deterministic: false, ..*params };
    let inputs = Inputs::normal(shape, seed).rounded(dtype);
    let call = BackwardCall::new(Call::new(&params, &inputs), seed + 1);
    let (stream, prepared) = (Stream::new(), call.prepare());
    let expected = call.on_cpu(&prepared);
    let graph = Graph::capture(&stream, || prepared.enqueue(&stream).unwrap());
    let in_order = Params { deterministic: true, ..params };
    let in_order = BackwardCall { forward: Call::new(&in_order, &inputs), ..call }.prepare();
    assert_eq!(in_order.needed, prepared.needed, "workspaces differ");
    let [_, dk, dv] = in_order.run();
    for _ in 0..2 {
        graph.launch(&stream);
        let found = prepared.found();
        call.compare(&prepared, &found, &expected);
        assert!(found[1] == dk && found[2] == dv, "{params:?}, {shape:?}, {dtype:?}: dk or dv differ");
    }
}

#[test]
fn exact_in_any_order() {
    let Some(_device) = Device::alone() else { return };
    for mask in MASKS {
        for (dtype, dim) in [(DType::BF16, 64), (DType::BF16, 128), (DType::F16, 64), (DType::F16, 128)] {
            for (batch, heads_q, heads_kv) in [(1, 2, 2), (1, 4, 2)] {
                let shape = Shape { batch, heads_q, heads_kv, ..shape(700, 800, dim, dim) };
                check_any_order(&exact(mask), shape, dtype, 150);
            }
        }
        // More tiles than blocks of the device.
        let many = Shape { batch: 2, heads_q: 8, heads_kv: 8, ..shape(300, 1200, 64, 64) };
        check_any_order(&exact(mask), many, DType::BF16, 151);
        // Blocks that only some of their queries are in, and queries that see nothing.
        check_any_order(&exact(mask), shape(700, 300, 64, 40), DType::BF16, 152);
        check_any_order(&exact(mask), shape(129, 1, 128, 128), DType::BF16, 154);
        check_any_order(&exact(mask), shape(50, 0, 64, 64), DType::BF16, 156);
    }
}

#[test]
fn paper_leaves_in_any_order() {
    let Some(_device) = Device::alone() else { return };
    for mask in [Mask::CausalBottomRight, Mask::CausalTopLeft] {
        for (dtype, dim) in [(DType::BF16, 64), (DType::F16, 128)] {
            for (batch, heads_q, heads_kv) in [(1, 2, 2), (2, 4, 2)] {
                let shape = Shape { batch, heads_q, heads_kv, ..shape(2000, 2300, dim, dim) };
                let params = Params { min_seq_len: 600, ..paper(mask, Residual::Uniform, 128, 100) };
                check_any_order(&params, shape, dtype, 160);
            }
        }
    }
}

/// Kernels whose sums have one order anyway keep it, and so does the one that gains nothing.
#[test]
fn the_same_bits_where_no_order_is_faster() {
    let Some(_device) = Device::alone() else { return };
    let few = Shape { heads_q: 4, heads_kv: 2, ..shape(600, 900, 64, 64) };
    let many = Shape { batch: 2, heads_q: 16, heads_kv: 16, ..shape(300, 900, 64, 64) };
    for (params, shape, dtype) in [
        (exact(Mask::CausalBottomRight), few, DType::F32),
        (paper(Mask::None, Residual::Uniform, 64, 64), few, DType::BF16),
        (exact(Mask::None), many, DType::BF16),
    ] {
        let params = Params { deterministic: false, ..params };
        let inputs = Inputs::normal(shape, 170).rounded(dtype);
        BackwardCall::new(Call::new(&params, &inputs), 171).prepare().check_bits();
    }
}

/// Estimated from the first key on.
fn paper(mask: Mask, residual: Residual, block_size: u32, sample_size: u32) -> Params {
    let sizes = Params { min_seq_len: 0, block_size, sample_size, ..Params::default() };
    Params { method: Method::Paper, mask, residual, seed: 3, offset: 5, ..sizes }
}

const RESIDUALS: [Residual; 3] = [Residual::Uniform, Residual::RowNorm, Residual::None];

#[test]
fn paper_lengths() {
    let Some(_device) = Device::first() else { return };
    for (number, (n_q, n_k, block_size, sample_size)) in UNEVEN_LENGTHS.into_iter().enumerate() {
        for mask in MASKS {
            for residual in RESIDUALS {
                for dtype in DTYPES {
                    let inputs = Inputs::clustered(Shape::single(n_q, n_k), 100).rounded(dtype);
                    let params = paper(mask, residual, block_size, sample_size);
                    BackwardCall::new(Call::new(&params, &inputs), number as u64).check();
                }
            }
        }
    }
}

#[test]
fn paper_shapes() {
    let Some(_device) = Device::first() else { return };
    let base = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..shape(1500, 1500, 64, 64) };
    for mask in MASKS {
        for dtype in DTYPES {
            check(&Params { min_seq_len: 200, ..paper(mask, Residual::Uniform, 128, 100) }, base, dtype, 110);
        }
        let other = Shape { n_k: 2300, head_dim: 128, value_dim: 40, ..base };
        check(
            &Params { min_seq_len: 300, ..paper(mask, Residual::Uniform, 200, 300) },
            other,
            DType::BF16,
            111,
        );
        let fewer = Shape { n_k: 900, heads_kv: 1, ..base };
        check(&paper(mask, Residual::Uniform, 64, 33), fewer, DType::F32, 112);
        // No blocks, and so no order.
        check(&Params { min_seq_len: 100, ..paper(mask, Residual::Uniform, 0, 64) }, base, DType::F16, 113);
        let unsorted = Params { lsh_num_projs: 0, ..paper(mask, Residual::Uniform, 64, 64) };
        check(&unsorted, base, DType::BF16, 114);
        check(&paper(mask, Residual::Uniform, 4, 500), Shape { n_q: 200, n_k: 5, ..base }, DType::F32, 115);
    }
    // Several chunks of queries.
    check(&paper(Mask::None, Residual::Uniform, 256, 256), shape(9000, 3000, 64, 64), DType::BF16, 116);
    check(
        &paper(Mask::CausalTopLeft, Residual::Uniform, 256, 256),
        shape(9000, 3000, 64, 64),
        DType::BF16,
        117,
    );
}

/// Sums of keys go through memory between seven passes, and where gradients are bf16 they are rounded each time.
#[test]
fn paper_many_passes() {
    let Some(_device) = Device::first() else { return };
    for dim in [64, 128] {
        for mask in [Mask::CausalBottomRight, Mask::CausalTopLeft] {
            let params = Params { min_seq_len: 64, ..paper(mask, Residual::Uniform, 64, 48) };
            let shape = Shape { heads_q: 2, heads_kv: 1, ..shape(5000, 5000, dim, dim) };
            let inputs = Inputs::normal(shape, 170).rounded(DType::BF16);
            let call = BackwardCall::new(Call::new(&params, &inputs), 171);
            call.check();
            BackwardCall { gradients: [DType::F32; 2], ..call }.check();
        }
    }
}

#[test]
fn row_norm_shapes() {
    let Some(_device) = Device::first() else { return };
    let row_norm = |mask, block_size, sample_size| paper(mask, Residual::RowNorm, block_size, sample_size);
    let base = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..shape(1100, 1100, 64, 64) };
    for mask in MASKS {
        for dtype in DTYPES {
            check(&Params { min_seq_len: 200, ..row_norm(mask, 128, 100) }, base, dtype, 130);
        }
        let wide = Shape { n_k: 1500, head_dim: 128, value_dim: 40, ..base };
        check(&Params { min_seq_len: 300, ..row_norm(mask, 200, 260) }, wide, DType::BF16, 131);
        let wider = Shape { head_dim: 40, value_dim: 250, heads_kv: 1, ..base };
        check(&row_norm(mask, 64, 33), wider, DType::F32, 132);
        check(&Params { min_seq_len: 100, ..row_norm(mask, 0, 64) }, base, DType::F16, 133);
        check(&Params { lsh_num_projs: 0, ..row_norm(mask, 64, 64) }, base, DType::BF16, 134);
    }
    // Several chunks of queries.
    check(&row_norm(Mask::None, 256, 256), shape(9000, 3000, 64, 64), DType::BF16, 135);
}

/// Sums and states of all heads would take more memory than they may, so sets of heads take turns. One batch item fits.
#[test]
fn more_heads_than_are_worked_on_at_once() {
    let Some(_device) = Device::first() else { return };
    let sizes = Shape { head_dim: 128, value_dim: 128, ..Shape::single(5500, 5500) };
    let shape = Shape { batch: 3, heads_q: 16, heads_kv: 2, ..sizes };
    let params = Params { min_seq_len: 512, ..paper(Mask::CausalBottomRight, Residual::RowNorm, 128, 64) };
    let inputs = Inputs::normal(shape, 136).rounded(DType::F16);
    let call = BackwardCall::new(Call::new(&params, &inputs), 137);
    let ([dout, dlse], prepared) = (call.losses(), call.prepare());
    let columns = shape.head_dim + shape.value_dim;
    let of_all_heads = shape.batch * shape.heads_q * shape.n_q * columns * size_of::<f32>();
    let needed = prepared.needed;
    assert!(needed < of_all_heads, "{needed} bytes hold those of all heads, {of_all_heads}");
    let found = prepared.run();
    for item in 0..shape.batch {
        let part = |values: &[f32]| values.chunks(values.len() / shape.batch).nth(item).unwrap().to_vec();
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|values| part(values));
        let inputs = Inputs { shape: Shape { batch: 1, ..shape }, q, k, v, ..inputs };
        let alone = BackwardCall::new(Call::new(&params, &inputs), 137).prepare();
        alone.write_losses(&part(&dout), &part(&dlse));
        assert!(alone.run() == found.each_ref().map(|values| part(values)), "item {item}");
    }
}

/// Many terms at their caps; rows whose sampled sum is a constant; neither.
#[test]
fn row_norm_bounds() {
    let Some(_device) = Device::first() else { return };
    let shape = Shape { heads_q: 2, heads_kv: 1, ..shape(400, 400, 64, 64) };
    for (approx_d_epsilon, approx_d_kappa) in [(0.05, 1e4), (0.5, 2.0), (0.5, 30.0), (1e3, 1e8)] {
        for mask in MASKS {
            let bounds = Params { approx_d_epsilon, approx_d_kappa, min_seq_len: 80, ..Params::default() };
            let params = Params { sample_size: 60, block_size: 32, method: Method::Paper, mask, ..bounds };
            for dtype in [DType::F32, DType::F16] {
                check(&Params { residual: Residual::RowNorm, ..params }, shape, dtype, 140);
            }
        }
    }
}

/// Values without any mass have no sample.
#[test]
fn row_norms_of_nothing() {
    let Some(_device) = Device::first() else { return };
    let params = paper(Mask::None, Residual::RowNorm, 32, 20);
    for dtype in DTYPES {
        let mut inputs = Inputs::normal(shape(200, 200, 64, 64), 150).rounded(dtype);
        inputs.v.fill(0.0);
        BackwardCall::new(Call::new(&params, &inputs), 151).check();
    }
}

/// A call with this block mask. Samples by norm of clustered keys may weigh so much that f16 does not hold the output.
fn check_masked(params: &Params, shape: Shape, dtype: DType, mask: &OwnedMask, seed: u64) {
    if params.residual == Residual::RowNorm && dtype == DType::F16 {
        return;
    }
    let inputs = Inputs::clustered(shape, seed).rounded(dtype);
    let forward = Call { block_mask: Some(mask.view()), ..Call::new(params, &inputs) };
    BackwardCall::new(forward, seed + 1).check();
}

#[test]
fn block_masks() {
    let Some(_device) = Device::first() else { return };
    for mask in MASKS {
        for residual in RESIDUALS {
            for (n_q, n_k, blocks) in
                [(257, 263, [16, 32]), (263, 257, [32, 16]), (101, 401, [7, 11]), (700, 700, [128, 64])]
            {
                let shape = Shape::single(n_q, n_k);
                let owned = OwnedMask::random([n_q, n_k], blocks, 1, 0.2, 160);
                for min_seq_len in [0, 60] {
                    let params = Params { min_seq_len, ..paper(mask, residual, 64, 24) };
                    for dtype in DTYPES {
                        check_masked(&params, shape, dtype, &owned, 161);
                    }
                }
            }
        }
    }
}

#[test]
fn block_masks_of_heads() {
    let Some(_device) = Device::first() else { return };
    let shape =
        Shape { batch: 2, heads_q: 6, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(331, 349) };
    for mask in MASKS {
        for residual in RESIDUALS {
            for patterns in [1, 12] {
                let owned = OwnedMask::random([331, 349], [16, 32], patterns, 0.3, 170);
                let params = Params { min_seq_len: 30, ..paper(mask, residual, 64, 40) };
                for dtype in DTYPES {
                    check_masked(&params, shape, dtype, &owned, 171);
                }
            }
        }
    }
}

#[test]
fn empty_full_and_oversized_block_masks() {
    let Some(_device) = Device::first() else { return };
    for mask in MASKS {
        for residual in RESIDUALS {
            for (blocks, density) in [([16, 16], 0.0), ([16, 16], 1.0), ([1000, 1000], 1.0), ([600, 1], 0.5)]
            {
                let owned = OwnedMask::random([701, 199], blocks, 1, density, 180);
                let params = Params { min_seq_len: 40, ..paper(mask, residual, 64, 24) };
                check_masked(&params, Shape::single(701, 199), DType::BF16, &owned, 181);
                check_masked(&params, Shape::single(701, 199), DType::F32, &owned, 182);
            }
        }
    }
    // Several chunks of queries, and query blocks by the hundred.
    let owned = OwnedMask::random([9000, 1000], [64, 128], 1, 0.1, 183);
    let params = paper(Mask::None, Residual::Uniform, 64, 200);
    check_masked(&params, shape(9000, 1000, 64, 64), DType::BF16, &owned, 184);
}

/// Heads that share a KV head have methods of their own.
#[test]
fn methods_of_heads() {
    let Some(_device) = Device::first() else { return };
    use Method::{Auto, Exact, Paper};
    let base = Shape { batch: 2, heads_kv: 2, ..shape(300, 400, 64, 64) };
    for methods in [
        &[Exact, Paper, Paper, Exact][..],
        &[Paper, Paper, Exact, Exact, Paper, Exact],
        &[Exact, Paper, Exact, Paper, Paper, Paper, Paper, Paper],
        // AUTO is exact here.
        &[Paper, Paper, Auto, Auto],
    ] {
        let division = Division { head_methods: Some(methods), ..Division::default() };
        for residual in [Residual::Uniform, Residual::RowNorm] {
            for dtype in DTYPES {
                let params = Params { min_seq_len: 90, ..paper(Mask::CausalBottomRight, residual, 32, 40) };
                let inputs = Inputs::normal(Shape { heads_q: methods.len(), ..base }, 190).rounded(dtype);
                let call = BackwardCall::new(Call::new(&params, &inputs), 191);
                BackwardCall { division, arrangement: Arrangement::Reversed, ..call }.check();
                BackwardCall { division, gradients: [DType::F32; 2], ..call }.check();
            }
        }
    }
    // Of sequences, one of which has no keys.
    let [ends_q, ends_k] = [[0, 100, 130, 300], [0, 180, 180, 400]];
    let sequences = Some(Sequences { cu_seqlens_q: &ends_q, cu_seqlens_k: &ends_k });
    let division = Division { sequences, head_methods: Some(&[Exact, Paper, Paper, Exact]) };
    let params = Params { min_seq_len: 50, ..paper(Mask::CausalTopLeft, Residual::Uniform, 32, 40) };
    let inputs = Inputs::normal(Shape { batch: 1, heads_q: 4, ..base }, 192).rounded(DType::BF16);
    BackwardCall { division, ..BackwardCall::new(Call::new(&params, &inputs), 193) }.check();
}

/// The blocks of a mask are those of the heads whose method is PAPER.
#[test]
fn methods_of_heads_and_a_block_mask() {
    let Some(_device) = Device::first() else { return };
    let methods = [Method::Exact, Method::Paper, Method::Paper, Method::Exact];
    let division = Division { head_methods: Some(&methods), ..Division::default() };
    let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..shape(300, 300, 64, 64) };
    let owned = OwnedMask::random([300, 300], [32, 32], 8, 0.2, 200);
    for residual in RESIDUALS {
        let params = paper(Mask::None, residual, 32, 40);
        let inputs = Inputs::normal(shape, 201).rounded(DType::F16);
        let forward = Call { block_mask: Some(owned.view()), ..Call::new(&params, &inputs) };
        BackwardCall { division, ..BackwardCall::new(forward, 202) }.check();
    }
}

#[test]
fn paper_has_the_same_bits_each_time_and_in_a_graph() {
    let Some(_device) = Device::alone() else { return };
    let inputs = Inputs::normal(Shape { heads_q: 4, heads_kv: 2, ..shape(2000, 2500, 64, 64) }, 120)
        .rounded(DType::BF16);
    let owned = OwnedMask::random([2000, 2500], [64, 64], 4, 0.1, 122);
    let methods = [Method::Paper, Method::Exact, Method::Exact, Method::Paper];
    for residual in RESIDUALS {
        let params = Params { min_seq_len: 300, ..paper(Mask::CausalBottomRight, residual, 128, 128) };
        for (block_mask, head_methods) in
            [(None, None), (Some(owned.view()), None), (None, Some(&methods[..]))]
        {
            let call = BackwardCall::new(Call { block_mask, ..Call::new(&params, &inputs) }, 121);
            let division = Division { head_methods, ..Division::default() };
            let prepared = BackwardCall { division, ..call }.prepare();
            prepared.check_bits();
        }
    }
}

/// What is not finite in the second leaf does not reach the first one's queries, which share a block with its first.
#[test]
fn paper_leaves_keep_apart() {
    let Some(_device) = Device::first() else { return };
    let n = 600;
    for (dtype, dim) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 64), (dtype, 128)]) {
        let params = Params { min_seq_len: 300, ..paper(Mask::CausalTopLeft, Residual::Uniform, 64, 64) };
        let clean = Inputs::normal(shape(n, n, dim, dim), 140).rounded(dtype);
        let call = BackwardCall::new(Call::new(&params, &clean), 141);
        let expected = call.prepare().run();
        for tensor in 0..3 {
            let mut dirty = clean.clone();
            for row in [300, 310] {
                [&mut dirty.q, &mut dirty.k, &mut dirty.v][tensor][row * dim + 5] = f32::NAN;
            }
            let found = BackwardCall { forward: Call::new(&params, &dirty), ..call }.prepare().run();
            let of_first = |gradients: &[f32]| gradients[..300 * dim].to_vec();
            assert!(
                of_first(&found[0]) == of_first(&expected[0]),
                "{dtype:?} {dim}: NaN in tensor {tensor} changes dq of the first leaf"
            );
            assert!(found[0][310 * dim..][..dim].iter().all(|x| x.is_nan()), "{dtype:?} {dim}: {tensor}");
        }
    }
}

/// Errors that need no device.
#[test]
fn errors_name_the_argument() {
    let tensor = |number: u64, heads| packed_tensor(number << 20, heads, 100, 64, DType::BF16);
    let tensors = DeviceTensors {
        lse: Some(packed_tensor(9 << 20, 4, 100, 1, DType::F32)),
        ..DeviceTensors::new(tensor(1, 4), tensor(2, 2), tensor(3, 2), tensor(4, 4))
    };
    let gradients = DeviceGradients {
        dout: tensor(5, 4),
        dlse: None,
        dq: tensor(6, 4),
        dk: tensor(7, 2),
        dv: tensor(8, 2),
    };
    let params = exact(Mask::None);
    let expect = |tensors: &DeviceTensors, gradients: &DeviceGradients, kind: ErrorKind, part: &str| {
        let stream = std::ptr::null_mut();
        // SAFETY: an error of the arguments is found before anything is touched.
        let result = unsafe { hyperattn_cuda::backward(&params, tensors, gradients, None, stream) };
        let error = result.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(part), "{error:?}, not {part}");
    };
    let without_lse = DeviceTensors { lse: None, ..tensors };
    expect(&without_lse, &gradients, ErrorKind::InvalidArgument, "lse");
    let wrong = DeviceGradients { dk: tensor(7, 4), ..gradients };
    expect(&tensors, &wrong, ErrorKind::InvalidArgument, "dk");
    let overlapping = DeviceGradients { dv: tensor(2, 2), ..gradients };
    expect(&tensors, &overlapping, ErrorKind::InvalidArgument, "dv");
    let odd = DeviceGradients { dq: DeviceTensor { address: (6 << 20) + 1, ..tensor(6, 4) }, ..gradients };
    expect(&tensors, &odd, ErrorKind::InvalidArgument, "dq");
}

/// Sequences in one call give the gradients of each by itself.
#[test]
fn sequences() {
    let Some(_device) = Device::first() else { return };
    let ends = [0, 100, 100, 333];
    let params = exact(Mask::CausalBottomRight);
    let shape = Shape { heads_q: 2, heads_kv: 1, ..shape(333, 333, 64, 64) };
    let inputs = Inputs::normal(shape, 70).rounded(DType::BF16);
    let call = BackwardCall::new(Call::new(&params, &inputs), 71);
    let prepared = call.prepare();
    let division = Division {
        sequences: Some(Sequences { cu_seqlens_q: &ends, cu_seqlens_k: &ends }),
        ..Division::default()
    };
    // The figures of heads are others for sequences.
    let tensors = DeviceTensors { error: None, keys_per_query: None, ..prepared.forward.tensors() };
    let stream = Stream::new();
    // SAFETY: tensors and gradients are the device's memory, which outlives the work, as it is waited for.
    unsafe {
        hyperattn_cuda::forward_divided(&params, &division, &tensors, None, stream.raw()).unwrap();
        hyperattn_cuda::backward_divided(
            &params,
            &division,
            &tensors,
            &prepared.gradients(),
            None,
            stream.raw(),
        )
        .unwrap();
    }
    stream.synchronize();
    let found = prepared.found();
    let [_, lse] = prepared.forward.out_and_lse();
    let [dout, dlse] = call.losses();
    for range in [0..100, 100..333] {
        let part = |values: &[f32], heads: usize, dim: usize| -> Vec<f32> {
            (0..heads)
                .flat_map(|head| values[head * 333 * dim..][range.start * dim..range.end * dim].to_vec())
                .collect()
        };
        let inputs = inputs.rows(range.clone(), range.clone());
        let alone = BackwardCall::new(Call::new(&params, &inputs), 71).prepare();
        alone.write_losses(&part(&dout, 2, 64), &part(&dlse, 2, 1));
        assert_eq!(alone.forward.out_and_lse()[1], part(&lse, 2, 1));
        let expected = alone.run();
        for (at, heads) in [2, 1, 1].into_iter().enumerate() {
            assert!(expected[at] == part(&found[at], heads, 64), "{range:?}, gradient {at}");
        }
    }
}

fn estimated(mask: Mask) -> Params {
    Params { method: Method::Paper, residual: Residual::Uniform, mask, ..Params::default() }
}

/// Times of gradients whose sums have a fixed order, and of those that may be added in any, in milliseconds:
/// `backward --ignored --nocapture speed`.
#[test]
#[ignore = "a measurement"]
fn speed_of_any_order() {
    let Some(_device) = Device::alone() else { return };
    let causal = Mask::CausalBottomRight;
    let lengths = [(exact(causal), 4096), (exact(Mask::None), 4096), (exact(causal), 16_384)];
    let long = [(exact(Mask::None), 16_384), (estimated(causal), 131_072)];
    for (params, n) in lengths.into_iter().chain(long) {
        for dim in [64, 128] {
            for heads in [[2, 2], [8, 8], [32, 32], [32, 8]] {
                let timed = Timed::new(&params, heads, n, dim, None);
                // For an lse to begin with.
                timed.forward(&params);
                let any = Params { deterministic: false, ..params };
                let [in_order, any] = timed.backward([&params, &any]);
                println!(
                    "TIME {:?} {:?} n {n} d {dim} heads {heads:?}: in order {in_order:.3} ms, any {any:.3} ms, {:.3}",
                    params.method,
                    params.mask,
                    any / in_order
                );
            }
        }
    }
}

/// Times of the sizes that matter, in milliseconds; not a test of anything:
/// `backward --ignored --nocapture times`.
#[test]
#[ignore = "a measurement"]
fn times() {
    let Some(_device) = Device::alone() else { return };
    let refined = Params {
        method: Method::Refined,
        mask: Mask::CausalBottomRight,
        budget: 3392,
        target_error: 0.0,
        ..Params::default()
    };
    let row_norm = Params { residual: Residual::RowNorm, ..estimated(Mask::None) };
    // Four of 1024 blocks for each.
    let blocks = OwnedMask::random([131_072; 2], [128; 2], 1, 4.0 / 1024.0, 81);
    let blocks = DeviceMask::new(&blocks.view());
    for (params, n, dim, is_masked) in [
        (exact(Mask::CausalBottomRight), 16_384, 128, false),
        (exact(Mask::CausalBottomRight), 16_384, 64, false),
        (exact(Mask::None), 8192, 128, false),
        (estimated(Mask::None), 131_072, 64, false),
        (estimated(Mask::CausalBottomRight), 131_072, 64, false),
        (estimated(Mask::None), 131_072, 128, false),
        (estimated(Mask::CausalBottomRight), 131_072, 128, false),
        (estimated(Mask::None), 131_072, 64, true),
        (row_norm, 131_072, 64, false),
        (refined, 131_072, 128, false),
    ] {
        let timed = Timed::new(&params, [32; 2], n, dim, is_masked.then_some(blocks.mask));
        let (forward, [backward]) = (timed.forward(&params), timed.backward([&params]));
        println!(
            "TIME {:?} {:?} {:?} blocks {is_masked} n {n} d {dim}: forward {forward:.3} ms, backward {backward:.3} ms, \
             workspace {} MiB",
            params.method,
            params.mask,
            params.residual,
            timed.needed >> 20
        );
    }
}
