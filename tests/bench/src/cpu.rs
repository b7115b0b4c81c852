//! This library on the processor.

use std::error::Error;
use std::time::Instant;

use hyperattn_core::{
    Division, Gradients, Kernels, TensorMut, Tensors, backward, backward_workspace, forward,
    forward_workspace,
};

use crate::accuracy::{Accuracy, of_out, of_query_gradient};
use crate::csv::Memory;
use crate::executor::Threads;
use crate::gradients::GradientTensors;
use crate::group::{Ours, Report};
use crate::inputs::Inputs;
use crate::load::{Moment, Waiting};
use crate::memory;
use crate::peak::Peak;
use crate::problem::{Pass, Problem, Shape};
use crate::statistics::Summary;
use crate::tensor::Tensor;
use crate::timing::Member;
use crate::workspace::Workspace;

/// A problem, ready to run.
pub struct OnCpu<'a> {
    problem: Problem,
    inputs: &'a Inputs,
    out: Tensor,
    /// Of a backward problem.
    gradients: Option<GradientTensors>,
    kernels: &'static Kernels,
    threads: Threads,
    peak: Peak,
    workspace: Workspace,
    memory: Memory,
    turn: Option<Moment>,
    waiting: Waiting,
}

impl<'a> OnCpu<'a> {
    /// Makes everything that the calls need: for gradients also the forward's output.
    ///
    /// # Errors
    /// What the library answers to the problem, and threads that do not start.
    pub fn new(
        problem: Problem,
        inputs: &'a Inputs,
        kernels: &'static Kernels,
    ) -> Result<Self, Box<dyn Error>> {
        let Shape { dtypes, layout, batch, heads_q, n_q, head_dim, .. } = problem.shape;
        let threads = Threads::new(problem.threads)?;
        let mut out = Tensor::new(problem.dtype_out, [batch, heads_q, n_q, head_dim], layout);
        let mut gradients = (problem.pass == Pass::Backward).then(|| GradientTensors::new(&problem));
        let (mut tensors, _) = tensors(inputs, &mut out, gradients.as_mut())?;
        let (params, layouts) = (&problem.params, tensors.layouts());
        let mut need = forward_workspace(params, &layouts, kernels, &threads)?;
        if problem.pass == Pass::Backward {
            forward(params, &mut tensors, kernels, &threads, Workspace::new(need).bytes())?;
            need = backward_workspace(params, &Division::default(), &layouts, kernels, &threads)?;
        }
        Ok(OnCpu {
            problem,
            inputs,
            gradients,
            kernels,
            threads,
            peak: Peak::new(kernels.isa(), dtypes),
            workspace: Workspace::new(need),
            memory: Memory { workspace_bytes: Some(need.size as u64), ..Memory::default() },
            out,
            turn: None,
            waiting: Waiting::default(),
        })
    }
}

/// The tensors of a call.
fn tensors<'t>(
    inputs: &'t Inputs,
    out: &'t mut Tensor,
    gradients: Option<&'t mut GradientTensors>,
) -> hyperattn_core::Result<(Tensors<'t>, Option<Gradients<'t>>)> {
    let [q, k, v] = &inputs.tensors;
    let (lse, gradients) = gradients.map(GradientTensors::views).transpose()?.unzip();
    let tensors = Tensors {
        q: q.view()?,
        k: k.view()?,
        v: v.view()?,
        out: out.view_mut()?,
        lse,
        block_mask: None,
        error: None,
        keys_per_query: None,
        mask: None,
    };
    Ok((tensors, gradients))
}

impl Ours for OnCpu<'_> {
    fn report(&mut self) -> Result<Report, Box<dyn Error>> {
        let Shape { batch, heads_q, .. } = self.inputs.shape;
        let of_heads = [batch as i64, heads_q as i64, 1, 1];
        let mut errors = vec![f32::NAN; batch * heads_q];
        let mut keys = errors.clone();
        let (tensors, _) = tensors(self.inputs, &mut self.out, None)?;
        let mut tensors = Tensors {
            error: Some(TensorMut::contiguous(&mut errors, of_heads)?),
            keys_per_query: Some(TensorMut::contiguous(&mut keys, of_heads)?),
            ..tensors
        };
        let params = &self.problem.params;
        let need = forward_workspace(params, &tensors.layouts(), self.kernels, &self.threads)?;
        let mut workspace = Workspace::new(need);
        forward(params, &mut tensors, self.kernels, &self.threads, workspace.bytes())?;
        Ok(Report::of_heads(&keys, &errors))
    }

    fn accuracy(&mut self) -> Result<Accuracy, Box<dyn Error>> {
        Ok(match &self.gradients {
            None => of_out(&self.problem, self.inputs, &self.out),
            Some(gradients) => of_query_gradient(&self.problem, self.inputs, &gradients.dout, &gradients.dq),
        })
    }

    fn memory(&self) -> Memory {
        self.memory
    }

    fn waiting(&self) -> Option<f64> {
        self.waiting.share(self.problem.threads)
    }

    fn peak(&self) -> Option<(&'static str, f64)> {
        Some((self.peak.name(), Summary::of(self.peak.gflops()).median))
    }
}

impl Member for OnCpu<'_> {
    fn begin(&mut self) {
        self.turn = Some(Moment::now());
    }

    fn rest(&mut self) {
        if let Some(start) = self.turn.take() {
            self.waiting.add_since(&start);
        }
    }

    fn call(&mut self) -> Result<f64, Box<dyn Error>> {
        self.peak.measure_if_due(&self.threads);
        // Later calls add nothing to what the first one touched.
        let first = self.memory.peak_bytes.is_none() && memory::reset_peak();
        let before = if first { memory::resident() } else { None };
        let (mut tensors, gradients) = tensors(self.inputs, &mut self.out, self.gradients.as_mut())?;
        let (params, kernels, threads) = (&self.problem.params, self.kernels, &self.threads);
        let (whole, workspace) = (Division::default(), self.workspace.bytes());
        let clock = Instant::now();
        match gradients {
            None => forward(params, &mut tensors, kernels, threads, workspace)?,
            Some(mut gradients) => {
                backward(params, &whole, &tensors, &mut gradients, kernels, threads, workspace)?;
            }
        }
        let seconds = clock.elapsed().as_secs_f64();
        if first {
            self.memory.peak_bytes = memory::peak();
            self.memory.added_bytes =
                self.memory.peak_bytes.zip(before).map(|(peak, before)| peak.saturating_sub(before));
        }
        // After a long call the clock rate may be another.
        self.peak.measure_if_due(&self.threads);
        Ok(seconds)
    }
}
