//! Seeded problems and their run on the device.

use hyperattn_core::{DType, Mask, Method, Params, Result};
use hyperattn_cuda::DeviceTensors;
use hyperattn_reference::Generator;

use super::device::{Memory, Stream};
use super::tensor::{Arrangement, Tensor, rounded};

/// The extents, types and arrangement of one call.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub batch: usize,
    pub heads_q: usize,
    pub heads_kv: usize,
    pub n_q: usize,
    pub n_k: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub q: DType,
    pub kv: DType,
    pub out: DType,
    pub mask: Mask,
    pub inputs: Arrangement,
    pub outputs: Arrangement,
    pub scale: f32,
}

impl Setup {
    /// Packed bf16 tensors of one batch item and head.
    pub fn new(n_q: usize, n_k: usize, dim: usize) -> Self {
        Setup {
            batch: 1,
            heads_q: 1,
            heads_kv: 1,
            n_q,
            n_k,
            head_dim: dim,
            value_dim: dim,
            q: DType::BF16,
            kv: DType::BF16,
            out: DType::BF16,
            mask: Mask::None,
            inputs: Arrangement::Packed,
            outputs: Arrangement::Packed,
            scale: 0.0,
        }
    }

    /// The same with these heads.
    pub fn heads(self, batch: usize, heads_q: usize, heads_kv: usize) -> Self {
        Setup { batch, heads_q, heads_kv, ..self }
    }

    /// The same with all tensors of this type.
    pub fn dtype(self, dtype: DType) -> Self {
        Setup { q: dtype, kv: dtype, out: dtype, ..self }
    }

    /// The options.
    pub fn params(&self) -> Params {
        Params { method: Method::Exact, mask: self.mask, scale: self.scale, ..Params::default() }
    }

    fn shape(&self, heads: usize, rows: usize, dim: usize) -> [i64; 4] {
        [self.batch, heads, rows, dim].map(|extent| extent as i64)
    }
}

/// Inputs as the element types hold them, in packed order.
#[derive(Clone)]
pub struct Inputs {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Inputs {
    /// Independent standard normal numbers.
    pub fn normal(setup: &Setup, seed: u64) -> Self {
        println!("{setup:?}, seed {seed}");
        let mut generator = Generator::new(seed);
        let mut draw = |heads: usize, rows: usize, dim: usize, dtype| {
            let matrix = generator.normal_matrix(setup.batch * heads * rows, dim);
            let mut values: Vec<f32> = matrix.into_iter().map(|x| x as f32).collect();
            if setup.inputs == Arrangement::OneHead && !values.is_empty() {
                // All heads are the last one.
                let len = rows * dim;
                let last = values[values.len() - len..].to_vec();
                values.chunks_mut(len).for_each(|head| head.copy_from_slice(&last));
            }
            rounded(&values, dtype)
        };
        Inputs {
            q: draw(setup.heads_q, setup.n_q, setup.head_dim, setup.q),
            k: draw(setup.heads_kv, setup.n_k, setup.head_dim, setup.kv),
            v: draw(setup.heads_kv, setup.n_k, setup.value_dim, setup.kv),
        }
    }
}

/// The tensors of one call on the device.
pub struct OnDevice {
    pub setup: Setup,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub out: Tensor,
    pub lse: Tensor,
    pub error: Tensor,
    pub keys_per_query: Tensor,
}

/// What came out, in packed order.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub error: Vec<f32>,
    pub keys_per_query: Vec<f32>,
}

impl OnDevice {
    /// Inputs on the device, and poisoned outputs.
    pub fn new(setup: &Setup, inputs: &Inputs) -> Self {
        let input = |values: &[f32], shape, dtype| Tensor::new(values, shape, dtype, setup.inputs);
        let of_heads = || Tensor::poisoned(setup.shape(setup.heads_q, 1, 1), DType::F32, setup.outputs);
        OnDevice {
            setup: *setup,
            q: input(&inputs.q, setup.shape(setup.heads_q, setup.n_q, setup.head_dim), setup.q),
            k: input(&inputs.k, setup.shape(setup.heads_kv, setup.n_k, setup.head_dim), setup.kv),
            v: input(&inputs.v, setup.shape(setup.heads_kv, setup.n_k, setup.value_dim), setup.kv),
            out: Tensor::poisoned(
                setup.shape(setup.heads_q, setup.n_q, setup.value_dim),
                setup.out,
                setup.outputs,
            ),
            lse: Tensor::poisoned(setup.shape(setup.heads_q, setup.n_q, 1), DType::F32, setup.outputs),
            error: of_heads(),
            keys_per_query: of_heads(),
        }
    }

    /// Other inputs in the same places.
    pub fn write(&self, inputs: &Inputs) {
        self.q.write(&inputs.q);
        self.k.write(&inputs.k);
        self.v.write(&inputs.v);
    }

    /// As the library takes them.
    pub fn tensors(&self) -> DeviceTensors {
        DeviceTensors {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            out: self.out.view(),
            lse: Some(self.lse.view()),
            block_mask: None,
            error: Some(self.error.view()),
            keys_per_query: Some(self.keys_per_query.view()),
        }
    }

    /// A workspace as large as the query says, with garbage in it.
    pub fn workspace(&self) -> Memory {
        let need = hyperattn_cuda::forward_workspace(&self.setup.params(), &self.tensors()).expect("a size");
        assert_eq!(need.align, 256);
        Memory::filled(need.size, 0xff)
    }

    /// Enqueues the call.
    pub fn enqueue(&self, workspace: Option<&Memory>, stream: &Stream) -> Result<()> {
        let workspace = workspace.map(|memory| (memory.address(), memory.size()));
        // SAFETY: tensors and workspace are the device's memory, which outlives the stream's work: every test waits for
        // it before it drops them.
        unsafe { hyperattn_cuda::forward(&self.setup.params(), &self.tensors(), workspace, stream.raw()) }
    }

    /// What the outputs hold; the stream has been waited for.
    pub fn outcome(&self) -> Outcome {
        Outcome {
            out: self.out.values(true),
            lse: self.lse.values(true),
            error: self.error.values(true),
            keys_per_query: self.keys_per_query.values(true),
        }
    }

    /// Runs the call with a workspace of the exact size.
    pub fn run(&self) -> Outcome {
        let (stream, workspace) = (Stream::new(), self.workspace());
        self.enqueue(Some(&workspace), &stream).unwrap_or_else(|error| panic!("{:?}: {error:?}", self.setup));
        stream.synchronize();
        self.outcome()
    }
}
