//! The call of the core.

use hyperattn_core::{
    BlockMask, DType, Executor, Kernels, Layout, Params, Result, Serial, Tensors, forward, forward_workspace,
};

use crate::additive_mask::AdditiveMask;
use crate::inputs::Inputs;
use crate::storage::{Arrangement, Tensor};

/// What a call wrote, in packed order and widened.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// `[batch, heads_q, n_q, value_dim]`
    pub out: Vec<f32>,
    /// `[batch, heads_q, n_q]`
    pub lse: Vec<f32>,
    /// `[batch, heads_q]`; empty unless [`Setup::estimates`] asks for it.
    pub error: Vec<f32>,
    /// `[batch, heads_q]`; empty unless [`Setup::estimates`] asks for it.
    pub keys_per_query: Vec<f32>,
}

impl Outcome {
    /// Everything, bit by bit.
    pub fn bits(&self) -> Vec<u32> {
        self.all().into_iter().flatten().map(|x| x.to_bits()).collect()
    }

    /// What belongs to batch item `batch` of `batches`.
    pub fn batch_item(&self, batch: usize, batches: usize) -> Self {
        let [out, lse, error, keys_per_query] = self.all().map(|values| {
            let len = values.len() / batches;
            values[batch * len..][..len].to_vec()
        });
        Outcome { out, lse, error, keys_per_query }
    }

    fn all(&self) -> [&[f32]; 4] {
        [&self.out, &self.lse, &self.error, &self.keys_per_query]
    }
}

/// What outputs hold before the call: a number of every element type, and no result of the tests' problems.
const POISON: f32 = -61440.0;

/// Memory with a stretch of a given size that begins at a given alignment, and guard bytes around it.
#[derive(Debug)]
pub struct Workspace {
    memory: Vec<u8>,
    start: usize,
    size: usize,
}

const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xA5;

impl Workspace {
    /// `layout.size` bytes, byte `i` being `fill(i)`.
    pub fn new(layout: Layout, fill: impl Fn(usize) -> u8) -> Self {
        let mut memory = vec![GUARD_BYTE; layout.size + layout.align + 2 * GUARD];
        let start = GUARD + memory[GUARD..].as_ptr().align_offset(layout.align);
        memory[start..start + layout.size].iter_mut().enumerate().for_each(|(i, byte)| *byte = fill(i));
        Workspace { memory, start, size: layout.size }
    }

    /// The stretch, with all bytes up to the end of the memory after it.
    pub fn with_tail(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }

    /// The stretch alone.
    pub fn exact(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.size]
    }

    /// Whether nobody wrote before or after the stretch.
    pub fn guards_are_intact(&self) -> bool {
        let (before, after) = (&self.memory[..self.start], &self.memory[self.start + self.size..]);
        before.iter().chain(after).all(|&byte| byte == GUARD_BYTE)
    }
}

/// One call, to be run.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    /// The table.
    pub kernels: &'a Kernels,
    /// The options.
    pub params: &'a Params,
    /// The inputs.
    pub inputs: &'a Inputs,
    /// Exact blocks of the caller.
    pub block_mask: Option<BlockMask<'a>>,
    /// The mask tensor.
    pub mask: Option<&'a AdditiveMask>,
    /// Who runs the tasks.
    pub executor: &'a dyn Executor,
    /// Element type of the output.
    pub out: DType,
    /// How q, k, v and out lie in memory.
    pub arrangements: [Arrangement; 4],
    /// Whether the call receives tensors for its error and its keys per query.
    pub estimates: bool,
    /// What the workspace holds at first.
    pub fill: fn(usize) -> u8,
}

impl<'a> Setup<'a> {
    /// Packed tensors, an f32 output, the calling thread, and a workspace of 0xFF (as f32 numbers: NaN).
    pub fn new(kernels: &'a Kernels, params: &'a Params, inputs: &'a Inputs) -> Self {
        Setup {
            kernels,
            params,
            inputs,
            block_mask: None,
            mask: None,
            executor: &Serial,
            out: DType::F32,
            arrangements: [Arrangement::Packed; 4],
            estimates: false,
            fill: |_| 0xFF,
        }
    }

    /// Runs the call. Panics on an error, and when the call wrote where it must not.
    pub fn run(&self) -> Outcome {
        self.attempt(|layout| layout).expect("the call is legal")
    }

    /// Runs the call with a workspace of `granted(needed)`. On an error, panics when an output changed.
    pub fn attempt(&self, granted: impl Fn(Layout) -> Layout) -> Result<Outcome> {
        let Setup { kernels, params, inputs, executor, .. } = *self;
        let shape = &inputs.shape;
        let tensor = |values: &[f32], shape, dtype, place: usize| {
            Tensor::new(values, shape, dtype, self.arrangements[place], f32::NAN)
        };
        let mut q = tensor(&inputs.q, shape.q(), inputs.dtypes.q, 0);
        let mut k = tensor(&inputs.k, shape.k(), inputs.dtypes.kv, 1);
        let mut v = tensor(&inputs.v, shape.v(), inputs.dtypes.kv, 2);
        let mut mask = self.mask.map(AdditiveMask::tensor);
        let mut out = Tensor::new(&[], shape.out(), self.out, self.arrangements[3], POISON);
        let scalars = |shape| Tensor::new(&[], shape, DType::F32, Arrangement::Padded, POISON);
        let (mut lse, mut error, mut keys) =
            (scalars(shape.lse()), scalars(shape.of_heads()), scalars(shape.of_heads()));
        let before = [&out, &lse, &error, &keys].map(Tensor::gaps);
        let (result, layout, workspace) = {
            let mut tensors = Tensors {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                out: out.view_mut(),
                lse: Some(lse.view_mut()),
                block_mask: self.block_mask,
                error: self.estimates.then(|| error.view_mut()),
                keys_per_query: self.estimates.then(|| keys.view_mut()),
                mask: mask.as_mut().map(Tensor::view),
            };
            let layout = forward_workspace(params, &tensors.layouts(), kernels, executor)?;
            let mut workspace = Workspace::new(granted(layout), self.fill);
            let result = forward(params, &mut tensors, kernels, executor, workspace.exact());
            (result, layout, workspace)
        };
        assert!(workspace.guards_are_intact(), "a workspace of {layout:?} was overrun");
        assert!([&out, &lse, &error, &keys].map(Tensor::gaps) == before, "written beyond an output");
        let of_heads = |tensor: &Tensor| if self.estimates { tensor.values() } else { Vec::new() };
        let outcome = Outcome {
            out: out.values(),
            lse: lse.values(),
            error: of_heads(&error),
            keys_per_query: of_heads(&keys),
        };
        if result.is_err() {
            assert!(outcome.all().into_iter().flatten().all(|&x| x == POISON), "an output changed");
        } else {
            // A single number may be the poison by chance, a row is not.
            let rows = outcome.out.chunks(8);
            assert!(
                rows.into_iter().all(|row| row.iter().any(|&x| x != POISON)),
                "an output was not written"
            );
            let scalars = [&outcome.lse, &outcome.error, &outcome.keys_per_query];
            assert!(scalars.into_iter().flatten().all(|&x| x != POISON), "an output was not written");
        }
        result.map(|()| outcome)
    }
}
