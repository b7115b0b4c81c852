//! PAPER and AUTO on a device against the CPU, which draws the same permutations and samples. Skips itself where
//! there is no device.

mod support;

use hyperattn_conformance::inputs::{DTypes, Inputs, Shape, UNEVEN_LENGTHS};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::random_problem::{RandomProblem, pick};
use hyperattn_conformance::run::Outcome;
use hyperattn_core::{BlockMask, DType, ErrorKind, Mask, Method, Params, Residual};
use hyperattn_reference::Generator;

use support::call::Call;
use support::device::{Device, Stream, synchronize};
use support::graph::Graph;
use support::tensor::Arrangement;

const RESIDUALS: [Residual; 3] = [Residual::Uniform, Residual::RowNorm, Residual::None];
const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Every mask with every residual.
fn kinds() -> impl Iterator<Item = (Mask, Residual)> {
    MASKS.into_iter().flat_map(|mask| RESIDUALS.map(|residual| (mask, residual)))
}

/// Every causal mask with every residual.
fn causal_kinds() -> impl Iterator<Item = (Mask, Residual)> {
    kinds().filter(|(mask, _)| *mask != Mask::None)
}

/// Estimated from the first key on.
fn paper(mask: Mask, residual: Residual, block_size: u32, sample_size: u32) -> Params {
    Params {
        method: Method::Paper,
        mask,
        residual,
        block_size,
        sample_size,
        min_seq_len: 0,
        seed: 3,
        offset: 5,
        ..Params::default()
    }
}

/// Largest relative Frobenius error of one head's output. Two results in f32 are each within half of it of the truth;
/// 16-bit kernels round the weights, and the output to its type.
fn tolerance(inputs: &Inputs, out: DType) -> f64 {
    let of_type = |dtype| -> f64 {
        match dtype {
            DType::F32 => 1e-5,
            DType::F16 => 1.5e-3,
            DType::BF16 => 1e-2,
        }
    };
    let DTypes { q, kv } = inputs.dtypes;
    let weights = if q == kv { of_type(kv) } else { of_type(DType::F32) };
    weights.max(of_type(out))
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Asserts that `outcome` is what the CPU computes in f32 from the same numbers.
fn assert_agrees(call: &Call<'_>, outcome: &Outcome) {
    let Call { params, inputs, .. } = *call;
    let what = format!("{params:?}, {:?}, {:?}, {:?}", inputs.shape, inputs.dtypes, call.out);
    let expected = call.on_cpu(DType::F32);
    let tolerance = tolerance(inputs, call.out);
    // Where values cancel, little is left but the rounding errors of what they would be without a sign.
    let positive = || {
        let mut positive = inputs.clone();
        positive.v.iter_mut().for_each(|x| *x = x.abs());
        Call { inputs: &positive, ..*call }.on_cpu(DType::F32).out
    };
    let len = (inputs.shape.n_q * inputs.shape.value_dim).max(1);
    assert_eq!(outcome.out.len(), expected.out.len());
    let heads = outcome.out.chunks(len).zip(expected.out.chunks(len));
    let mut relative = vec![tolerance; inputs.shape.batch * inputs.shape.heads_q];
    for (head, (out, expected)) in heads.enumerate() {
        // What is too large for f16 is infinite in it.
        let too_large =
            |a: f32, b: f32| call.out == DType::F16 && a.is_infinite() && a * b > 0.0 && b.abs() > 65e3;
        let pairs = || out.iter().zip(expected).map(|(&a, &b)| (a, b));
        let differences: Vec<f32> = pairs().map(|(a, b)| if too_large(a, b) { 0.0 } else { a - b }).collect();
        let (difference, whole) = (norm(&differences), norm(expected));
        if pairs().any(|(a, b)| too_large(a, b)) {
            relative[head] = f64::INFINITY;
        }
        // A NaN passes no bound.
        if difference <= tolerance * whole {
            continue;
        }
        let allowed = tolerance * whole.max(0.1 * norm(&positive()[head * len..][..len]));
        assert!(difference <= allowed, "{what}: head {head} is {difference:e} of {whole:e} off");
        relative[head] = relative[head].max(allowed / whole);
    }
    if !call.all_outputs {
        return;
    }
    assert_eq!(outcome.lse.len(), expected.lse.len());
    for (row, (&lse, &expected)) in outcome.lse.iter().zip(&expected.lse).enumerate() {
        let near = lse == expected || (lse - expected).abs() <= 3e-5 * expected.abs().max(1.0);
        assert!(near, "{what}: lse {lse} of row {row}, expected {expected}");
    }
    // The probe rows are the same; what types of 16 bits add to the error, the CPU's has not.
    let is_f32 = tolerance <= 1e-5;
    for (head, (&error, &expected)) in outcome.error.iter().zip(&expected.error).enumerate() {
        let (a, b) = (f64::from(error), f64::from(expected));
        let allowed = if is_f32 { 1e-3 * b + 2.0 * relative[head] } else { 0.2 * b + relative[head] };
        // An output that is infinite has no error.
        let near = a == b || allowed == f64::INFINITY || (a - b).abs() <= allowed;
        assert!(near, "{what}: estimated error {error} of head {head}, expected {expected}");
    }
    if call.block_mask.is_none() {
        for (&keys, &expected) in outcome.keys_per_query.iter().zip(&expected.keys_per_query) {
            let near = keys == expected || (keys - expected).abs() <= 1e-6 * expected;
            assert!(near, "{what}: {keys} keys per query, expected {expected}");
        }
    }
}

/// One call with poisoned outputs.
fn check_call(call: &Call<'_>) {
    assert_agrees(call, &call.run());
}

/// One call of every type.
fn check(params: &Params, inputs: &Inputs) {
    for dtype in DTYPES {
        check_call(&Call::new(params, &inputs.clone().rounded(dtype)));
    }
}

#[test]
fn lengths() {
    let Some(_device) = Device::first() else { return };
    for (seed, (n_q, n_k, block_size, sample_size)) in UNEVEN_LENGTHS.into_iter().enumerate() {
        for residual in RESIDUALS {
            let inputs = Inputs::clustered(Shape::single(n_q, n_k), 200 + seed as u64);
            check(&paper(Mask::None, residual, block_size, sample_size), &inputs);
        }
    }
    for (n_q, n_k) in [(0, 50), (50, 0), (0, 0)] {
        for (mask, residual) in kinds() {
            check(&paper(mask, residual, 16, 16), &Inputs::normal(Shape::single(n_q, n_k), 215));
        }
    }
}

#[test]
fn hyperplanes() {
    let Some(_device) = Device::first() else { return };
    for lsh_num_projs in [0, 1, 7, 8, 9, 13, 16, 17, 24] {
        for (mask, residual) in kinds() {
            let min_seq_len = if mask == Mask::None { 0 } else { 40 };
            let params = Params { lsh_num_projs, min_seq_len, ..paper(mask, residual, 32, 20) };
            check(&params, &Inputs::clustered(Shape::single(389, 397), 220));
        }
    }
}

#[test]
fn residual_alone_and_blocks_alone() {
    let Some(_device) = Device::first() else { return };
    let inputs = Inputs::clustered(Shape::single(601, 311), 230);
    for residual in [Residual::Uniform, Residual::RowNorm] {
        check(&paper(Mask::None, residual, 0, 50), &inputs);
    }
    for (mask, residual) in kinds() {
        let params = Params { min_seq_len: 40, ..paper(mask, residual, 50, 0) };
        check(&params, &inputs);
        check(&params, &Inputs::clustered(Shape::single(401, 401), 231));
    }
}

#[test]
fn dimensions() {
    let Some(_device) = Device::first() else { return };
    let dims = [
        (1, 1),
        (3, 5),
        (64, 64),
        (80, 33),
        (5, 256),
        (256, 3),
        (128, 128),
        (96, 96),
        (192, 128),
        (256, 256),
    ];
    for (seed, (head_dim, value_dim)) in dims.into_iter().enumerate() {
        for (mask, residual) in kinds() {
            let shape = Shape { head_dim, value_dim, ..Shape::single(211, 223) };
            let inputs = Inputs::normal(shape, 240 + seed as u64);
            check(&Params { min_seq_len: 40, ..paper(mask, residual, 32, 32) }, &inputs);
        }
    }
}

#[test]
fn heads_and_batch() {
    let Some(_device) = Device::first() else { return };
    for (seed, (batch, heads_q, heads_kv)) in
        [(2, 1, 1), (1, 4, 4), (2, 6, 2), (1, 7, 1), (1, 40, 1), (3, 4, 2)].into_iter().enumerate()
    {
        for (mask, residual) in kinds() {
            let shape = Shape { batch, heads_q, heads_kv, head_dim: 24, ..Shape::single(163, 173) };
            let inputs = Inputs::clustered(shape, 250 + seed as u64);
            check(&Params { min_seq_len: 30, ..paper(mask, residual, 32, 16) }, &inputs);
        }
    }
}

#[test]
fn element_types() {
    let Some(_device) = Device::first() else { return };
    for dtypes in DTypes::ALL {
        for (mask, residual) in kinds() {
            for (head_dim, value_dim) in [(40, 24), (64, 64)] {
                let shape = Shape { heads_q: 4, heads_kv: 2, head_dim, value_dim, ..Shape::single(257, 263) };
                let inputs = Inputs::clustered(shape, 260).rounded(dtypes);
                let params = Params { min_seq_len: 50, ..paper(mask, residual, 32, 16) };
                check_call(&Call::new(&params, &inputs));
                check_call(&Call { out: DType::F32, ..Call::new(&params, &inputs) });
            }
        }
    }
}

/// Settings of Algorithm 2 under which the cap always bites, never, and under which the floor does.
#[test]
fn cap_and_floor() {
    let Some(_device) = Device::first() else { return };
    for (approx_d_epsilon, approx_d_kappa) in
        [(0.5, 1e4), (0.01, 1e4), (100.0, 1e12), (0.5, 1.0), (0.5, 0.01), (1e-6, 1e30)]
    {
        for (n_q, sample_size) in [(500, 30), (25, 30)] {
            for mask in MASKS {
                let params = Params {
                    approx_d_epsilon,
                    approx_d_kappa,
                    ..paper(mask, Residual::RowNorm, 32, sample_size)
                };
                check(&params, &Inputs::clustered(Shape::single(n_q, 311), 270));
            }
        }
    }
}

#[test]
fn seeds_and_offsets() {
    let Some(_device) = Device::first() else { return };
    for (seed, offset) in [(0, 0), (u64::MAX, u64::MAX), (1 << 32, 1 << 32), (7, 1 << 63)] {
        for residual in [Residual::Uniform, Residual::RowNorm] {
            let params = Params { seed, offset, ..paper(Mask::None, residual, 32, 16) };
            check(&params, &Inputs::clustered(Shape::single(151, 157), 280));
        }
    }
}

#[test]
fn scales() {
    let Some(_device) = Device::first() else { return };
    for scale in [0.0, 1.0, -0.3, 1e-3] {
        for residual in RESIDUALS {
            let params = Params { scale, ..paper(Mask::None, residual, 32, 16) };
            check(&params, &Inputs::clustered(Shape::single(151, 157), 290));
        }
    }
}

/// Keys whose values are zero are never drawn by row norm; without any value the output is zero.
#[test]
fn values_of_zero() {
    let Some(_device) = Device::first() else { return };
    let mut inputs = Inputs::clustered(Shape::single(151, 157), 295);
    inputs.v[..16 * 100].fill(0.0);
    check(&paper(Mask::None, Residual::RowNorm, 32, 16), &inputs);
    inputs.v.fill(0.0);
    check(&paper(Mask::None, Residual::RowNorm, 32, 16), &inputs);
}

/// From one level to six, with intervals of odd length.
#[test]
fn levels_of_the_recursion() {
    let Some(_device) = Device::first() else { return };
    for (n, min_seq_len) in [(64, 63), (65, 64), (251, 64), (509, 20), (1009, 64), (1009, 0), (1009, 600)] {
        for (mask, residual) in causal_kinds() {
            let params = Params { min_seq_len, ..paper(mask, residual, 16, 24) };
            check(&params, &Inputs::clustered(Shape::single(n, n), 300));
        }
    }
}

/// A dense part and a square, and every combination of exact and estimated of the two.
#[test]
fn unequal_lengths() {
    let Some(_device) = Device::first() else { return };
    for (n_q, n_k) in
        [(101, 401), (401, 101), (30, 401), (401, 30), (300, 331), (331, 300), (1, 200), (200, 1)]
    {
        for min_seq_len in [0, 50, 250] {
            for (mask, residual) in causal_kinds() {
                let params = Params { min_seq_len, ..paper(mask, residual, 16, 24) };
                check(&params, &Inputs::clustered(Shape::single(n_q, n_k), 310));
            }
        }
    }
}

#[test]
fn without_blocks_the_recursion_goes_down_to_single_keys() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in causal_kinds().filter(|(_, residual)| *residual != Residual::None) {
        for (n_q, n_k) in [(67, 67), (40, 67), (67, 40), (40, 1), (1, 40), (39, 40), (2, 1), (1, 2)] {
            check(&paper(mask, residual, 0, 24), &Inputs::clustered(Shape::single(n_q, n_k), 320));
        }
    }
}

/// Blocks longer than a tile, and off-diagonal parts that one block covers.
#[test]
fn large_blocks() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in causal_kinds() {
        for (n_q, n_k, block_size) in [(1009, 1009, 300), (601, 601, 256), (500, 1200, 280)] {
            let params = Params { min_seq_len: 100, ..paper(mask, residual, block_size, 24) };
            check(&params, &Inputs::clustered(Shape::single(n_q, n_k), 325));
        }
    }
}

/// The default block and sample on a few thousand keys.
#[test]
fn thousands_of_keys() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in kinds() {
        for (n_q, n_k, dim) in [(3000, 3000, 64), (2048, 2048, 128), (300, 3000, 64)] {
            let shape =
                Shape { heads_q: 4, heads_kv: 2, head_dim: dim, value_dim: dim, ..Shape::single(n_q, n_k) };
            let inputs = Inputs::clustered(shape, 370);
            for dtype in DTYPES {
                let params = Params {
                    method: Method::Paper,
                    mask,
                    residual,
                    min_seq_len: 512,
                    seed: 11,
                    ..Params::default()
                };
                check_call(&Call::new(&params, &inputs.clone().rounded(dtype)));
            }
        }
    }
}

/// States of all heads would take more memory than they may, so sets of heads take turns.
#[test]
fn more_heads_than_are_worked_on_at_once() {
    let Some(_device) = Device::first() else { return };
    let n = 10_000;
    let heads =
        Shape { batch: 2, heads_q: 16, heads_kv: 2, head_dim: 256, value_dim: 256, ..Shape::single(n, n) };
    let inputs = Inputs::clustered(heads, 350).rounded(DType::BF16);
    for residual in [Residual::Uniform, Residual::RowNorm] {
        let params = Params { min_seq_len: 512, ..paper(Mask::CausalBottomRight, residual, 128, 64) };
        let call = Call::new(&params, &inputs);
        let prepared = call.prepare();
        let of_all_heads = heads.batch * heads.heads_q * n * (heads.value_dim + 2) * size_of::<f32>();
        assert!(prepared.needed < of_all_heads, "{} bytes hold the states of all heads", prepared.needed);
        let stream = Stream::new();
        prepared.enqueue(&stream).expect("a legal call");
        stream.synchronize();
        assert_agrees(&call, &prepared.outcome());
    }
}

#[test]
fn arrangements() {
    let Some(_device) = Device::first() else { return };
    use Arrangement::{Packed, PaddedBy3, PaddedBy8, Reversed, TokensFirst};
    let all = [Packed, TokensFirst, PaddedBy8, PaddedBy3, Reversed];
    for arrangements in all.into_iter().flat_map(|inputs| all.map(|outputs| [inputs, outputs])) {
        for (index, dtype) in DTYPES.into_iter().enumerate() {
            let shape = Shape {
                batch: 2,
                heads_q: 4,
                heads_kv: 2,
                head_dim: 64,
                value_dim: 64,
                ..Shape::single(140, 200)
            };
            let inputs = Inputs::clustered(shape, 380).rounded(dtype);
            for mask in [Mask::None, Mask::CausalBottomRight] {
                let params = Params { min_seq_len: 30, ..paper(mask, RESIDUALS[index], 32, 16) };
                check_call(&Call { arrangements, ..Call::new(&params, &inputs) });
            }
        }
    }
}

/// A call with `block_size` 64 and this block mask.
fn check_masked(params: &Params, shape: Shape, blocks: [usize; 2], patterns: usize, density: f64) {
    let seed = 400;
    let inputs = Inputs::clustered(shape, seed);
    let mask = OwnedMask::random([shape.n_q, shape.n_k], blocks, patterns, density, seed);
    for dtype in DTYPES {
        let inputs = inputs.clone().rounded(dtype);
        check_call(&Call { block_mask: Some(mask.view()), ..Call::new(params, &inputs) });
    }
}

fn masked(mask: Mask, residual: Residual, min_seq_len: usize) -> Params {
    Params { min_seq_len, seed: 4, offset: 0, ..paper(mask, residual, 64, 24) }
}

#[test]
fn a_block_mask_for_all_heads() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in kinds() {
        for (n_q, n_k, blocks) in
            [(257, 263, [16, 32]), (263, 257, [32, 16]), (101, 401, [7, 11]), (500, 500, [128, 64])]
        {
            for min_seq_len in [0, 60] {
                check_masked(&masked(mask, residual, min_seq_len), Shape::single(n_q, n_k), blocks, 1, 0.2);
            }
        }
    }
}

#[test]
fn a_block_mask_per_head_and_batch_item() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in kinds() {
        let shape = Shape { batch: 2, heads_q: 6, heads_kv: 2, ..Shape::single(131, 149) };
        check_masked(&masked(mask, residual, 30), shape, [16, 16], 12, 0.3);
        check_masked(&masked(mask, residual, 30), shape, [16, 16], 1, 0.3);
    }
}

#[test]
fn empty_full_and_oversized_block_masks() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in kinds() {
        for (blocks, density) in [([16, 16], 0.0), ([16, 16], 1.0), ([1000, 1000], 1.0), ([600, 1], 0.5)] {
            check_masked(&masked(mask, residual, 40), Shape::single(701, 199), blocks, 1, density);
        }
    }
}

/// `block_size` has no part in it, nor have the hyperplanes.
#[test]
fn with_a_block_mask_block_size_and_hyperplanes_do_not_matter() {
    let Some(_device) = Device::first() else { return };
    for (block_size, lsh_num_projs) in [(0, 0), (0, 7), (1 << 20, 24)] {
        let params =
            Params { block_size, lsh_num_projs, ..masked(Mask::CausalBottomRight, Residual::Uniform, 40) };
        check_masked(&params, Shape::single(199, 199), [16, 16], 1, 0.2);
    }
}

/// The keys of a mask in the device's memory are not counted: the call says so before it enqueues anything.
#[test]
fn a_block_mask_and_keys_per_query() {
    let Some(_device) = Device::first() else { return };
    let params = masked(Mask::None, Residual::Uniform, 0);
    let inputs = Inputs::normal(Shape::single(200, 200), 420);
    let mask = OwnedMask::random([200, 200], [16, 16], 1, 0.2, 420);
    let prepared = Call { block_mask: Some(mask.view()), ..Call::new(&params, &inputs) }.prepare();
    let mut tensors = prepared.tensors();
    // Nobody gets to write it.
    tensors.keys_per_query = tensors.error.take();
    let error = hyperattn_cuda::forward_workspace(&params, &tensors).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

/// Under a causal mask what a row has met in a level or in a past is rounded to the output's type once, and the output
/// once: each by at most half of the last place (`unit` of the value, or 2^-25 below the normal numbers of f16). All
/// else is as in f32. The mean of the parts' absolute values is at most that of the values' absolute values.
#[test]
fn parts_of_an_output_are_rounded_once() {
    let Some(_device) = Device::first() else { return };
    for (dtype, unit, least) in
        [(DType::F16, 2f64.powi(-11), 2f64.powi(-25)), (DType::BF16, 2f64.powi(-8), 0.0)]
    {
        for (mask, n_q, n_k) in [
            (Mask::CausalBottomRight, 2000, 2600),
            (Mask::CausalBottomRight, 2000, 2000),
            (Mask::CausalTopLeft, 2100, 1900),
        ] {
            let shape =
                Shape { heads_q: 4, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(n_q, n_k) };
            let inputs = Inputs::clustered(shape, 435).rounded(dtype);
            let mut positive = inputs.clone();
            positive.v.iter_mut().for_each(|x| *x = x.abs());
            let params = Params { min_seq_len: 130, ..paper(mask, Residual::Uniform, 64, 48) };
            let call = Call::new(&params, &inputs);
            let rounded = call.run().out;
            let exact = Call { out: DType::F32, ..call }.run().out;
            let means = Call { inputs: &positive, out: DType::F32, ..call }.run().out;
            for (index, ((&rounded, &exact), &mean)) in rounded.iter().zip(&exact).zip(&means).enumerate() {
                let (rounded, exact, mean) = (f64::from(rounded), f64::from(exact), f64::from(mean));
                // Sums in f32 differ a little where their terms do.
                let allowed = unit * (mean + exact.abs()) * 1.01 + 2.0 * least + 1e-6 * mean;
                assert!(
                    (rounded - exact).abs() <= allowed,
                    "{mask:?}, {dtype:?}: element {index} is {rounded}, in f32 {exact}, allowed {allowed:e}"
                );
            }
        }
    }
}

/// Nothing but the output is asked for, and it is the same.
#[test]
fn the_output_alone() {
    let Some(_device) = Device::first() else { return };
    for (mask, residual) in kinds() {
        for dtype in DTYPES {
            let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(300, 330) };
            let inputs = Inputs::clustered(shape, 430).rounded(dtype);
            let params = Params { min_seq_len: 50, ..paper(mask, residual, 32, 16) };
            let call = Call::new(&params, &inputs);
            let alone = Call { all_outputs: false, ..call }.run();
            assert_eq!(alone.out, call.run().out, "{params:?}, {dtype:?}");
        }
    }
}

/// With few keys every method is exact attention, to the bit.
#[test]
fn fewer_keys_than_the_threshold_are_exact() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for mask in MASKS {
            let shape = Shape { heads_q: 4, heads_kv: 2, head_dim: 64, ..Shape::single(400, 500) };
            let inputs = Inputs::clustered(shape, 440).rounded(dtype);
            let exact = Params { method: Method::Exact, mask, ..Params::default() };
            let expected = Call::new(&exact, &inputs).run();
            for method in [Method::Paper, Method::Auto] {
                for min_seq_len in [500, 4096, usize::MAX] {
                    let params = Params { method, min_seq_len, ..exact };
                    let outcome = Call::new(&params, &inputs).run();
                    assert_eq!(outcome.bits(), expected.bits(), "{params:?}, {dtype:?}");
                }
            }
            assert_eq!(expected.error, vec![0.0; 4]);
        }
    }
}

/// AUTO computes what EXACT, REFINED or, with a block mask, PAPER computes, to the bit.
#[test]
fn auto_is_one_of_the_methods() {
    let Some(_device) = Device::first() else { return };
    let block_mask = |n: usize| OwnedMask::random([n, n], [64, 64], 1, 0.1, 450);
    for dtype in DTYPES {
        for mask in MASKS {
            for (n, min_seq_len, target_error) in
                [(300, 4096, 0.05), (700, 0, 0.0), (2500, 0, 0.05), (2500, 512, 0.0)]
            {
                let shape =
                    Shape { heads_q: 2, heads_kv: 1, head_dim: 64, value_dim: 64, ..Shape::single(n, n) };
                let inputs = Inputs::clustered(shape, 451).rounded(dtype);
                let auto =
                    Params { mask, min_seq_len, target_error, budget: 128, band: 32, ..Params::default() };
                let same = |block_mask: Option<BlockMask<'_>>, methods: [Method; 2]| {
                    let bits = |method| {
                        let params = Params { method, ..auto };
                        // Only PAPER and AUTO take a block mask.
                        let takes = matches!(method, Method::Paper | Method::Auto);
                        let block_mask = block_mask.filter(|_| takes);
                        let outcome = Call { block_mask, ..Call::new(&params, &inputs) }.run();
                        Outcome { keys_per_query: Vec::new(), ..outcome }.bits()
                    };
                    let of_auto = bits(Method::Auto);
                    let of = methods.into_iter().find(|&method| bits(method) == of_auto);
                    println!("n {n}, {dtype:?}, {mask:?}, target {target_error}: AUTO is {of:?}");
                    assert!(of.is_some(), "n {n}, {dtype:?}, {auto:?}: AUTO is none of {methods:?}");
                };
                same(None, [Method::Exact, Method::Refined]);
                let owned = block_mask(n);
                same(Some(owned.view()), [Method::Paper, Method::Exact]);
            }
        }
    }
}

/// What is long enough for REFINED is not EXACT.
#[test]
fn auto_refines_long_problems() {
    let Some(_device) = Device::first() else { return };
    let n = 20_000;
    let shape = Shape { heads_q: 32, heads_kv: 8, head_dim: 64, value_dim: 64, ..Shape::single(n, n) };
    let inputs = Inputs::normal(shape, 460).rounded(DType::BF16);
    let output = |method| {
        let params = Params { method, target_error: 0.0, ..Params::default() };
        Call { all_outputs: false, ..Call::new(&params, &inputs) }.run().out
    };
    let [auto, refined, exact] = [Method::Auto, Method::Refined, Method::Exact].map(output);
    assert!(auto == refined && auto != exact);
}

#[test]
fn the_same_bits_every_time() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for (mask, residual) in kinds() {
            let shape = Shape {
                batch: 2,
                heads_q: 6,
                heads_kv: 3,
                head_dim: 64,
                value_dim: 64,
                ..Shape::single(900, 900)
            };
            let inputs = Inputs::clustered(shape, 460).rounded(dtype);
            let params = Params { min_seq_len: 100, ..paper(mask, residual, 64, 64) };
            let call = Call::new(&params, &inputs);
            let first = call.run().bits();
            for _ in 0..2 {
                assert_eq!(call.run().bits(), first, "{params:?}, {dtype:?}");
            }
        }
    }
}

#[test]
fn without_a_workspace() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(500, 500) };
        let inputs = Inputs::clustered(shape, 470).rounded(dtype);
        let params = Params { min_seq_len: 50, ..paper(Mask::CausalBottomRight, Residual::Uniform, 32, 16) };
        let call = Call::new(&params, &inputs);
        let prepared = call.prepare();
        // SAFETY: the tensors outlive the work, which `synchronize` waits for.
        unsafe { hyperattn_cuda::forward(&params, &prepared.tensors(), None, std::ptr::null_mut()) }.unwrap();
        synchronize();
        assert_agrees(&call, &prepared.outcome());
    }
}

#[test]
fn captured_and_replayed() {
    let Some(_device) = Device::alone() else { return };
    for residual in RESIDUALS {
        for dtype in DTYPES {
            let shape =
                Shape { heads_q: 4, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(600, 700) };
            let params = Params { min_seq_len: 100, ..paper(Mask::CausalBottomRight, residual, 64, 48) };
            let inputs = Inputs::clustered(shape, 480).rounded(dtype);
            let prepared = Call::new(&params, &inputs).prepare();
            let stream = Stream::new();
            // The first call of these kernels may be the captured one.
            let graph = Graph::capture(&stream, || prepared.enqueue(&stream).unwrap());
            for seed in 480..483 {
                let inputs = Inputs::clustered(shape, seed).rounded(dtype);
                prepared.write(&inputs);
                graph.launch(&stream);
                assert_agrees(&Call::new(&params, &inputs), &prepared.outcome());
            }
        }
    }
}

/// A call with everything drawn at random.
fn check_random(seed: u64) {
    use Arrangement::{Packed, PaddedBy3, PaddedBy8, Reversed, TokensFirst};
    let generator = &mut Generator::new(seed);
    let RandomProblem { params, inputs, block_mask } = RandomProblem::draw(generator, seed, 700.0, 256.0);
    let arrangements =
        [0; 2].map(|_| pick(generator, &[Packed, TokensFirst, PaddedBy8, PaddedBy3, Reversed]));
    let out = pick(generator, &[inputs.dtypes.q, DType::F32]);
    let block_mask = block_mask.as_ref().map(OwnedMask::view);
    check_call(&Call { block_mask, arrangements, out, ..Call::new(&params, &inputs) });
}

#[test]
fn random_problems() {
    let Some(_device) = Device::first() else { return };
    (1400..1440).for_each(check_random);
}
