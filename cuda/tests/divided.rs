//! Sequences and methods of heads on a device: what calls by themselves compute. Skips itself where there is no device.

mod support;

use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_core::{DType, Division, Mask, Method, Params, Residual, Sequences};
use hyperattn_cuda::DeviceTensors;

use support::call::Call;
use support::device::{Device, Memory, Stream};
use support::graph::Graph;
use support::tensor::{Arrangement, Tensor};

const METHODS: [Method; 4] = [Method::Auto, Method::Exact, Method::Paper, Method::Refined];
const HEADS: [usize; 2] = [4, 2];
/// One without queries, one without keys, one with more queries than keys.
const STARTS_Q: [i32; 6] = [0, 256, 256, 300, 700, 1000];
const STARTS_K: [i32; 6] = [0, 400, 420, 420, 900, 1000];

/// Estimated from short lengths on.
fn params(method: Method, mask: Mask, residual: Residual) -> Params {
    let params = Params { method, mask, residual, block_size: 64, sample_size: 48, ..Params::default() };
    Params { min_seq_len: 100, budget: 64, target_error: 0.3, seed: 3, offset: 5, ..params }
}

fn inputs(dtype: DType, seed: u64) -> Inputs {
    let [heads_q, heads_kv] = HEADS;
    let shape = Shape { heads_q, heads_kv, head_dim: 64, value_dim: 64, ..Shape::single(1000, 1000) };
    Inputs::clustered(shape, seed).rounded(dtype)
}

/// A call's tensors on the device, with an error for each of `items`.
struct Prepared {
    call: support::call::Prepared,
    lse: Tensor,
    error: Tensor,
}

impl Prepared {
    fn new(params: &Params, inputs: &Inputs, items: usize) -> Self {
        let shape = &inputs.shape;
        let scalars = |shape| Tensor::poisoned(shape, DType::F32, Arrangement::Packed);
        Prepared {
            call: Call { all_outputs: false, ..Call::new(params, inputs) }.prepare(),
            lse: scalars(shape.lse()),
            error: scalars([items as i64, shape.heads_q as i64, 1, 1]),
        }
    }

    fn tensors(&self) -> DeviceTensors {
        let (lse, error) = (Some(self.lse.view()), Some(self.error.view()));
        DeviceTensors { lse, error, ..self.call.tensors() }
    }

    /// What the call writes: outputs, log-sum-exps and errors.
    fn run(&self, params: &Params, division: &Division<'_>) -> [Vec<f32>; 3] {
        let stream = Stream::new();
        // SAFETY: the tensors outlive the work, which is waited for.
        unsafe { hyperattn_cuda::forward_divided(params, division, &self.tensors(), None, stream.raw()) }
            .unwrap_or_else(|error| panic!("{params:?}: {error:?}"));
        stream.synchronize();
        [self.call.outcome().out, self.lse.values(true), self.error.values(true)]
    }
}

/// Asserts that two results over the same keys and random numbers differ by rounding only.
fn assert_near(what: &str, dtype: DType, actual: &[f32], expected: &[f32]) {
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    assert_eq!(actual.len(), expected.len(), "{what}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let finite = |x: f32| if x.is_finite() { f64::from(x) } else { 0.0 };
    assert!(actual.iter().zip(expected).all(|(a, b)| a.is_finite() == b.is_finite()), "{what}");
    let difference = norm(&mut actual.iter().zip(expected).map(|(&a, &b)| finite(a) - finite(b)));
    let whole = norm(&mut expected.iter().map(|&x| finite(x)));
    assert!(difference <= tolerance * whole, "{what}: {difference:e} of {whole:e} off");
}

/// Rows `queries` of each head.
fn rows(values: &[f32], dim: usize, queries: std::ops::Range<usize>) -> Vec<f32> {
    let heads = values.chunks(1000 * dim);
    heads.flat_map(|head| head[queries.start * dim..queries.end * dim].to_vec()).collect()
}

#[test]
fn sequences_are_computed_as_if_they_were_alone() {
    let Some(_device) = Device::first() else { return };
    let sequences = Some(Sequences { cu_seqlens_q: &STARTS_Q, cu_seqlens_k: &STARTS_K });
    let division = Division { sequences, head_methods: None };
    for dtype in [DType::F32, DType::BF16] {
        let inputs = inputs(dtype, 5600);
        for method in METHODS {
            for mask in [Mask::None, Mask::CausalBottomRight] {
                let params = params(method, mask, Residual::Uniform);
                let [out, lse, errors] = Prepared::new(&params, &inputs, 5).run(&params, &division);
                for index in 0..5 {
                    let range = |starts: &[i32]| starts[index] as usize..starts[index + 1] as usize;
                    let queries = range(&STARTS_Q);
                    let alone = inputs.rows(queries.clone(), range(&STARTS_K));
                    let alone = Prepared::new(&params, &alone, 1).run(&params, &Division::default());
                    let what = format!("{params:?}, {dtype:?}, sequence {index}");
                    assert_near(&what, dtype, &rows(&out, 64, queries.clone()), &alone[0]);
                    assert_near(&what, dtype, &rows(&lse, 1, queries), &alone[1]);
                    // An estimate of what is rounding only is itself rounding.
                    let of_sequence = &errors[index * HEADS[0]..(index + 1) * HEADS[0]];
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.05 * b + 1e-2;
                    assert!(of_sequence.iter().zip(&alone[2]).all(near), "{what}: {of_sequence:?}");
                }
            }
        }
    }
}

#[test]
fn heads_have_methods_of_their_own() {
    let Some(_device) = Device::first() else { return };
    let mixes = [
        [Method::Exact, Method::Exact, Method::Paper, Method::Paper],
        [Method::Paper, Method::Refined, Method::Exact, Method::Refined],
        [Method::Refined, Method::Auto, Method::Auto, Method::Paper],
    ];
    for dtype in [DType::F32, DType::BF16] {
        let inputs = inputs(dtype, 5601);
        for residual in [Residual::Uniform, Residual::RowNorm] {
            for mask in [Mask::None, Mask::CausalTopLeft] {
                let of = |method| params(method, mask, residual);
                let wholes = METHODS.map(|method| {
                    Prepared::new(&of(method), &inputs, 1).run(&of(method), &Division::default())
                });
                for mix in &mixes {
                    let division = Division { sequences: None, head_methods: Some(mix) };
                    let params = of(Method::Exact);
                    let mixed = Prepared::new(&params, &inputs, 1).run(&params, &division);
                    for (head, method) in mix.iter().enumerate() {
                        let whole = &wholes[METHODS.iter().position(|of| of == method).expect("listed")];
                        for (part, len) in [(0, 1000 * 64), (1, 1000)] {
                            let [a, b] = [&mixed, whole].map(|result| &result[part][head * len..][..len]);
                            assert_near(&format!("{params:?}, {mix:?}, head {head}"), dtype, a, b);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn captured_and_replayed() {
    let Some(_device) = Device::alone() else { return };
    let sequences = Some(Sequences { cu_seqlens_q: &STARTS_Q, cu_seqlens_k: &STARTS_K });
    let head_methods = [Method::Exact, Method::Refined, Method::Paper, Method::Paper];
    let division = Division { sequences, head_methods: Some(&head_methods) };
    let params = params(Method::Auto, Mask::CausalBottomRight, Residual::Uniform);
    let prepared = Prepared::new(&params, &inputs(DType::BF16, 5602), 5);
    let tensors = prepared.tensors();
    let need = hyperattn_cuda::forward_divided_workspace(&params, &division, &tensors).unwrap().size;
    let workspace = Memory::filled(need, 0xff);
    let stream = Stream::new();
    hyperattn_cuda::prepare().unwrap();
    let graph = Graph::capture(&stream, || {
        let workspace = Some((workspace.address(), workspace.size()));
        // SAFETY: tensors and workspace outlive the work, which is waited for.
        unsafe { hyperattn_cuda::forward_divided(&params, &division, &tensors, workspace, stream.raw()) }
            .unwrap();
    });
    for seed in 5602..5604 {
        let inputs = inputs(DType::BF16, seed);
        prepared.call.write(&inputs);
        graph.launch(&stream);
        let replayed = prepared.call.outcome().out;
        let expected = Prepared::new(&params, &inputs, 5).run(&params, &division);
        assert_near(&format!("seed {seed}"), DType::BF16, &replayed, &expected[0]);
    }
}
