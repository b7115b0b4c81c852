//! The backward call of the core.

use hyperattn_core::{DType, Layout, Result, backward, backward_workspace};
use hyperattn_reference::Generator;

use crate::inputs::Shape;
use crate::run::{Memory, Outcome, POISON, Setup, Workspace, assert_written};
use crate::storage::{Arrangement, Storage, Tensor};

/// The gradients of a loss with respect to what a forward call wrote, in packed order.
#[derive(Clone, Debug)]
pub struct Loss {
    /// `[batch, heads_q, n_q, value_dim]`, in the element type in which the call receives it.
    pub dout: Vec<f32>,
    /// `[batch, heads_q, n_q]`.
    pub dlse: Option<Vec<f32>>,
}

impl Loss {
    /// Independent standard normal numbers, rounded to `dtype`.
    pub fn normal(shape: &Shape, dtype: DType, seed: u64) -> Self {
        println!("normal loss, seed {seed}");
        let mut generator = Generator::new(seed);
        let rows = shape.batch * shape.heads_q * shape.n_q;
        let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| generator.normal() as f32).collect() };
        let dout = draw(rows * shape.value_dim);
        Loss { dout: Storage::new(&dout, dtype).widened(), dlse: Some(draw(rows)) }
    }
}

/// What a backward call wrote, in packed order and widened.
#[derive(Clone, Debug)]
pub struct Slopes {
    /// `[batch, heads_q, n_q, head_dim]`
    pub dq: Vec<f32>,
    /// `[batch, heads_kv, n_k, head_dim]`
    pub dk: Vec<f32>,
    /// `[batch, heads_kv, n_k, value_dim]`
    pub dv: Vec<f32>,
}

impl Slopes {
    /// dq, dk and dv.
    pub fn all(&self) -> [&[f32]; 3] {
        [&self.dq, &self.dk, &self.dv]
    }

    /// Everything, bit by bit.
    pub fn bits(&self) -> Vec<u32> {
        self.all().into_iter().flatten().map(|x| x.to_bits()).collect()
    }
}

/// One backward call, to be run.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    /// The forward call.
    pub of: Setup<'a>,
    /// The gradients that it begins with.
    pub loss: &'a Loss,
    /// Element types of dout, dq, dk and dv.
    pub dtypes: [DType; 4],
    /// How they lie in memory.
    pub arrangements: [Arrangement; 4],
}

impl<'a> Backward<'a> {
    /// Packed gradients of f32.
    pub fn new(of: Setup<'a>, loss: &'a Loss) -> Self {
        Backward { of, loss, dtypes: [DType::F32; 4], arrangements: [Arrangement::Packed; 4] }
    }

    /// Runs the forward call and this one.
    pub fn run(&self) -> Slopes {
        self.run_from(&self.of.run())
    }

    /// Runs the call with what a forward call left. Panics on an error, and when the call wrote where it must not.
    pub fn run_from(&self, outcome: &Outcome) -> Slopes {
        self.attempt(outcome, |layout| layout).expect("the call is legal")
    }

    /// Runs the call with a workspace of `granted(needed)`. On an error, panics when a gradient changed.
    pub fn attempt(&self, outcome: &Outcome, granted: impl Fn(Layout) -> Layout) -> Result<Slopes> {
        self.attempt_in(outcome, granted, Workspace::exact)
    }

    /// [`Backward::attempt`] with a part of the workspace's memory of its own choice.
    pub fn attempt_in(
        &self,
        outcome: &Outcome,
        granted: impl Fn(Layout) -> Layout,
        memory_of: impl FnOnce(&mut Workspace) -> &mut [u8],
    ) -> Result<Slopes> {
        let Setup { kernels, params, division, executor, fill, inputs, .. } = self.of;
        let shape = &inputs.shape;
        let mut memory = Memory::new(&self.of, Some(outcome));
        let tensor = |values: &[f32], shape, place: usize, filler| {
            Tensor::new(values, shape, self.dtypes[place], self.arrangements[place], filler)
        };
        let mut dout = tensor(&self.loss.dout, shape.out(), 0, f32::NAN);
        let of_lse =
            |values: &Vec<f32>| Tensor::new(values, shape.lse(), DType::F32, Arrangement::Padded, f32::NAN);
        let mut dlse = self.loss.dlse.as_ref().map(of_lse);
        let mut written = [(shape.q(), 1), (shape.k(), 2), (shape.v(), 3)]
            .map(|(shape, place)| tensor(&[], shape, place, POISON));
        let gaps = written.each_ref().map(Tensor::gaps);
        let before = memory.outcome(false).bits();

        let result = {
            let [dq, dk, dv] = &mut written;
            let tensors = memory.tensors(&self.of);
            let mut gradients = hyperattn_core::Gradients {
                dout: dout.view(),
                dlse: dlse.as_mut().map(Tensor::view),
                dq: dq.view_mut(),
                dk: dk.view_mut(),
                dv: dv.view_mut(),
            };
            let layout = backward_workspace(params, &division, &tensors.layouts(), kernels, executor)?;
            let mut workspace = Workspace::new(granted(layout), fill);
            let memory = memory_of(&mut workspace);
            let result = backward(params, &division, &tensors, &mut gradients, kernels, executor, memory);
            assert!(workspace.guards_are_intact(), "a workspace of {layout:?} was overrun");
            result
        };

        assert!(written.each_ref().map(Tensor::gaps) == gaps, "written beyond a gradient");
        assert!(memory.outcome(false).bits() == before, "out or lse changed");
        let [dq, dk, dv] = written.map(|tensor| tensor.values());
        let slopes = Slopes { dq, dk, dv };
        for values in slopes.all() {
            match result {
                Ok(()) => assert_written(values),
                Err(_) => assert!(values.iter().all(|&x| x == POISON), "a gradient changed"),
            }
        }
        result.map(|()| slopes)
    }
}
