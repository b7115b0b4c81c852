//! Gradients of REFINED on a device against the CPU, which selects nearly the same. Skips itself where there is no
//! device.

mod support;

use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::patterns::{needle, sinks_and_neighbours, square, together, topics};
use hyperattn_core::{DType, Division, Mask, Method, Params, Residual, Sequences};

use support::call::Call;
use support::device::{Device, Stream};
use support::gradients::{BackwardCall, Found};
use support::tensor::Arrangement;

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn refined(mask: Mask, budget: u32) -> Params {
    Params {
        method: Method::Refined,
        mask,
        budget,
        band: 70,
        target_error: 0.0,
        min_seq_len: 0,
        ..Params::default()
    }
}

/// The gradients of one call.
fn check(params: &Params, inputs: &Inputs, seed: u64) {
    BackwardCall::new(Call::new(params, inputs), seed).check();
}

#[test]
fn lengths_around_tiles() {
    let Some(_device) = Device::first() else { return };
    for (number, (n_q, n_k)) in [
        (257, 257),
        (640, 640),
        (1009, 1009),
        (1100, 1111),
        (301, 1501),
        (1500, 700),
        (1, 1500),
        (33, 1300),
        (128, 1200),
        (700, 330),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 200 + number as u64;
        let shape = Shape { head_dim: 64, value_dim: 64, ..Shape::single(n_q, n_k) };
        for mask in MASKS {
            for dtype in DTYPES {
                check(&refined(mask, 128), &topics(shape, seed).rounded(dtype), seed);
                check(&refined(mask, 128), &Inputs::normal(shape, seed).rounded(dtype), seed);
            }
        }
    }
}

#[test]
fn dimensions_and_types() {
    let Some(_device) = Device::first() else { return };
    for (number, (head_dim, value_dim)) in
        [(128, 128), (57, 33), (250, 7), (24, 256), (192, 128), (256, 256), (1, 1)].into_iter().enumerate()
    {
        let shape = Shape { head_dim, value_dim, ..Shape::single(700, 800) };
        for dtype in DTYPES {
            let mask = MASKS[number % 3];
            let seed = 300 + number as u64;
            check(&refined(mask, 200), &topics(shape, seed).rounded(dtype), seed);
        }
    }
}

#[test]
fn heads_and_arrangements() {
    let Some(_device) = Device::first() else { return };
    use Arrangement::*;
    let all = [Packed, TokensFirst, PaddedBy3, PaddedBy8, Reversed];
    for (number, (batch, heads_q, heads_kv)) in [(1, 4, 4), (2, 4, 2), (3, 6, 1)].into_iter().enumerate() {
        let shape =
            Shape { batch, heads_q, heads_kv, head_dim: 64, value_dim: 48, ..Shape::single(600, 700) };
        let inputs = topics(shape, 400);
        for mask in MASKS {
            for (turn, dtypes) in DTypes::ALL.into_iter().enumerate() {
                let inputs = inputs.clone().rounded(dtypes);
                let params = refined(mask, 150);
                let (of_inputs, of_outputs) = (all[(number + turn) % 5], all[(2 * number + turn) % 5]);
                let forward = Call { arrangements: [of_inputs, of_outputs], ..Call::new(&params, &inputs) };
                let call = BackwardCall { arrangement: of_outputs, ..BackwardCall::new(forward, 401) };
                call.check();
                BackwardCall { dout: DType::F32, gradients: [DType::F32; 2], of_lse: false, ..call }.check();
            }
        }
    }
}

#[test]
fn options() {
    let Some(_device) = Device::first() else { return };
    let shape = Shape { heads_q: 2, head_dim: 64, value_dim: 64, ..Shape::single(900, 1000) };
    for mask in MASKS {
        let base = refined(mask, 256);
        for (number, params) in [
            Params { budget: 64, ..base },
            Params { budget: 900, ..base },
            Params { band: 0, ..base },
            Params { band: 200, ..base },
            Params { band: 5000, ..base },
            Params { num_first_keys: 0, ..base },
            Params { num_first_keys: 300, ..base },
            Params { num_first_keys: 0, band: 0, ..base },
            Params { residual: Residual::None, ..base },
            Params { residual: Residual::RowNorm, ..base },
            Params { scale: -0.1, ..base },
        ]
        .into_iter()
        .enumerate()
        {
            let inputs = topics(shape, 500).rounded(DTYPES[number % 2]);
            check(&params, &inputs, 501);
            check(&params, &topics(shape, 500), 501);
        }
    }
}

/// Heads get budgets of their own, some of them all keys.
#[test]
fn budgets_by_target() {
    let Some(_device) = Device::first() else { return };
    let square = square(1500, 64);
    let inputs = together(&[
        Inputs::normal(square, 600),
        needle(square, 300, 601),
        topics(square, 602),
        sinks_and_neighbours(square, 603),
    ]);
    for mask in MASKS {
        for dtype in DTYPES {
            for target_error in [0.2, 1e-6] {
                let params = Params { target_error, ..refined(mask, 128) };
                check(&params, &inputs.clone().rounded(dtype), 604);
            }
        }
    }
}

/// Larger tiles of queries, and listed keys in several turns.
#[test]
fn many_keys() {
    let Some(_device) = Device::first() else { return };
    let shape = Shape { heads_q: 2, head_dim: 128, value_dim: 128, ..Shape::single(34_000, 34_000) };
    let inputs = topics(shape, 700).rounded(DType::BF16);
    check(&Params { band: 1000, ..refined(Mask::CausalBottomRight, 4000) }, &inputs, 701);
    let few = Shape { heads_q: 4, heads_kv: 2, n_q: 300, ..shape };
    check(&refined(Mask::None, 512), &topics(few, 702), 703);
}

/// Rows that have a NaN, of a tensor with rows of `dim`.
fn rows_with_nan(values: &[f32], dim: usize) -> Vec<bool> {
    values.chunks(dim).map(|row| row.iter().any(|x| x.is_nan())).collect()
}

/// What is not finite reaches what it reaches on the CPU: a query's keys and their blocks, a key's queries.
#[test]
fn not_finite_beyond_the_limit() {
    let Some(_device) = Device::first() else { return };
    let (n, dim) = (700, 64);
    for dtype in DTYPES {
        for mask in [Mask::None, Mask::CausalBottomRight] {
            let params = refined(mask, 128);
            // The last queries have a tile of their own; one test makes a whole tile of NaN.
            for (tensor, rows) in
                [(0, 600..601), (0, 200..201), (0, 512..640), (1, 20..21), (1, 690..691), (2, 300..301)]
            {
                let mut inputs = topics(square(n, dim), 800).rounded(dtype);
                let values = [&mut inputs.q, &mut inputs.k, &mut inputs.v];
                rows.clone().for_each(|row| values[tensor][row * dim + 5] = f32::NAN);
                let call = BackwardCall::new(Call::new(&params, &inputs), 801);
                let prepared = call.prepare();
                let (found, expected) = (prepared.run(), call.on_cpu(&prepared));
                for at in 0..3 {
                    assert!(
                        rows_with_nan(&found[at], dim) == rows_with_nan(&expected[at], dim),
                        "{dtype:?} {mask:?}: gradient {at} with NaN in rows {rows:?} of tensor {tensor}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_same_bits_each_time_and_in_a_graph() {
    let Some(_device) = Device::alone() else { return };
    for target_error in [0.0, 0.1] {
        let params = Params { target_error, ..refined(Mask::CausalBottomRight, 256) };
        let shape =
            Shape { heads_q: 4, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(2000, 2500) };
        let inputs = topics(shape, 900).rounded(DType::BF16);
        let prepared = BackwardCall::new(Call::new(&params, &inputs), 901).prepare();
        prepared.check_bits();
    }
}

/// The gradients of a divided call, whose forward is run anew.
fn divided(call: &BackwardCall<'_>, division: &Division<'_>) -> Found {
    let prepared = call.prepare();
    let tensors = hyperattn_cuda::DeviceTensors {
        // The figures of heads are others for sequences.
        error: None,
        keys_per_query: None,
        ..prepared.forward.tensors()
    };
    let (stream, params, gradients) = (Stream::new(), call.forward.params, prepared.gradients());
    // SAFETY: tensors and gradients are the device's memory, which outlives the work, as it is waited for.
    unsafe {
        hyperattn_cuda::forward_divided(params, division, &tensors, None, stream.raw()).unwrap();
        hyperattn_cuda::backward_divided(params, division, &tensors, &gradients, None, stream.raw()).unwrap();
    }
    stream.synchronize();
    prepared.found()
}

/// Sequences in one call give the gradients of each by itself, and heads with methods of their own those of a call
/// with the method.
#[test]
fn parts_by_themselves() {
    let Some(_device) = Device::first() else { return };
    let (n, dim) = (1400, 64);
    let shape = Shape { heads_q: 4, heads_kv: 2, head_dim: dim, value_dim: dim, ..Shape::single(n, n) };
    let inputs = topics(shape, 1000).rounded(DType::BF16);
    let params = refined(Mask::CausalBottomRight, 200);
    let call = BackwardCall::new(Call::new(&params, &inputs), 1001);
    let ends = [0, 600, 600, n as i32];
    let sequences = Sequences { cu_seqlens_q: &ends, cu_seqlens_k: &ends };
    let found = divided(&call, &Division { sequences: Some(sequences), ..Division::default() });
    let [dout, dlse] = call.losses();
    for range in [0..600, 600..n] {
        let part = |values: &[f32], dim: usize| -> Vec<f32> {
            let heads = values.chunks(n * dim);
            heads.flat_map(|head| head[range.start * dim..range.end * dim].to_vec()).collect()
        };
        let inputs = inputs.rows(range.clone(), range.clone());
        let alone = BackwardCall::new(Call::new(&params, &inputs), 1001).prepare();
        alone.write_losses(&part(&dout, dim), &part(&dlse, 1));
        let expected = alone.run();
        for at in 0..3 {
            assert!(expected[at] == part(&found[at], dim), "{range:?}, gradient {at}");
        }
    }

    let methods = [Method::Exact, Method::Exact, Method::Refined, Method::Refined];
    let found = divided(&call, &Division { head_methods: Some(&methods), ..Division::default() });
    let exact_params = Params { method: Method::Exact, ..params };
    let exact = BackwardCall { forward: Call::new(&exact_params, &inputs), ..call }.prepare().run();
    let estimated = call.prepare().run();
    for at in 0..3 {
        let half = found[at].len() / 2;
        assert!(found[at][..half] == exact[at][..half], "exact heads, gradient {at}");
        assert!(found[at][half..] == estimated[at][half..], "refined heads, gradient {at}");
    }
}

/// AUTO has the gradients of what its forward took.
#[test]
fn auto_where_it_estimates() {
    let Some(_device) = Device::first() else { return };
    let shape =
        Shape { heads_q: 32, heads_kv: 1, head_dim: 64, value_dim: 64, ..Shape::single(33_000, 33_000) };
    let inputs = topics(shape, 1100).rounded(DType::BF16);
    let run = |method| {
        let params = Params { method, target_error: 0.0, ..Params::default() };
        let params = Params { mask: Mask::CausalBottomRight, ..params };
        BackwardCall::new(Call::new(&params, &inputs), 1101).prepare().run()
    };
    assert!(run(Method::Auto) == run(Method::Refined));
}
