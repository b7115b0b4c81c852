//! The call of the core.

use hyperattn_core::{
    BlockMask, DType, Division, Executor, Kernels, Layout, Params, Result, Sequences, Serial, Tensors,
    forward_divided, forward_divided_workspace,
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
pub(crate) const POISON: f32 = -61440.0;

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
    /// Sequences and methods of heads.
    pub division: Division<'a>,
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
            division: Division::default(),
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
        let Setup { kernels, params, division, executor, .. } = *self;
        self.outcome_of(|tensors| {
            let layout = forward_divided_workspace(params, &division, &tensors.layouts(), kernels, executor)?;
            let mut workspace = Workspace::new(granted(layout), self.fill);
            let result = forward_divided(params, &division, tensors, kernels, executor, workspace.exact());
            assert!(workspace.guards_are_intact(), "a workspace of {layout:?} was overrun");
            result
        })
    }

    /// What `call` writes into tensors of this setup. Panics when it wrote where it must not: on an error, anywhere.
    pub fn outcome_of(&self, call: impl FnOnce(&mut Tensors<'_>) -> Result<()>) -> Result<Outcome> {
        let mut memory = Memory::new(self, None);
        let before = memory.outputs().map(Tensor::gaps);
        let result = call(&mut memory.tensors(self));
        assert!(memory.outputs().map(Tensor::gaps) == before, "written beyond an output");
        let outcome = memory.outcome(self.estimates);
        if result.is_err() {
            assert!(outcome.all().into_iter().flatten().all(|&x| x == POISON), "an output changed");
        } else {
            assert_written(&outcome.out);
            let scalars = [&outcome.lse, &outcome.error, &outcome.keys_per_query];
            assert!(scalars.into_iter().flatten().all(|&x| x != POISON), "an output was not written");
        }
        result.map(|()| outcome)
    }
}

/// Asserts that a tensor was written: a single number may be the poison by chance, a row is not.
pub(crate) fn assert_written(values: &[f32]) {
    let mut rows = values.chunks(8);
    assert!(rows.all(|row| row.iter().any(|&x| x != POISON)), "an output was not written");
}

/// The tensors of a call.
pub(crate) struct Memory {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Tensor>,
    out: Tensor,
    lse: Tensor,
    error: Tensor,
    keys_per_query: Tensor,
}

impl Memory {
    /// The outputs hold what a call wrote, or poison.
    pub(crate) fn new(setup: &Setup<'_>, outcome: Option<&Outcome>) -> Self {
        let Setup { inputs, arrangements, .. } = *setup;
        let Inputs { shape, dtypes, .. } = inputs;
        let [batch, heads, ..] = shape.of_heads();
        let items =
            setup.division.sequences.as_ref().map_or(batch, |sequences| Sequences::count(sequences) as i64);
        let input = |values: &[f32], shape, dtype, place: usize| {
            Tensor::new(values, shape, dtype, arrangements[place], f32::NAN)
        };
        let scalars =
            |values: &[f32], shape| Tensor::new(values, shape, DType::F32, Arrangement::Padded, POISON);
        let (out, lse) = outcome.map_or((&[][..], &[][..]), |outcome| (&outcome.out, &outcome.lse));
        Memory {
            q: input(&inputs.q, shape.q(), dtypes.q, 0),
            k: input(&inputs.k, shape.k(), dtypes.kv, 1),
            v: input(&inputs.v, shape.v(), dtypes.kv, 2),
            mask: setup.mask.map(AdditiveMask::tensor),
            out: Tensor::new(out, shape.out(), setup.out, arrangements[3], POISON),
            lse: scalars(lse, shape.lse()),
            error: scalars(&[], [items, heads, 1, 1]),
            keys_per_query: scalars(&[], [items, heads, 1, 1]),
        }
    }

    pub(crate) fn tensors<'m>(&'m mut self, setup: &Setup<'m>) -> Tensors<'m> {
        Tensors {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            out: self.out.view_mut(),
            lse: Some(self.lse.view_mut()),
            block_mask: setup.block_mask,
            error: setup.estimates.then(|| self.error.view_mut()),
            keys_per_query: setup.estimates.then(|| self.keys_per_query.view_mut()),
            mask: self.mask.as_mut().map(Tensor::view),
        }
    }

    fn outputs(&self) -> [&Tensor; 4] {
        [&self.out, &self.lse, &self.error, &self.keys_per_query]
    }

    /// What the outputs hold.
    pub(crate) fn outcome(&self, estimates: bool) -> Outcome {
        let of_heads = |tensor: &Tensor| if estimates { tensor.values() } else { Vec::new() };
        Outcome {
            out: self.out.values(),
            lse: self.lse.values(),
            error: of_heads(&self.error),
            keys_per_query: of_heads(&self.keys_per_query),
        }
    }
}
