//! Measures one group of problems.

use std::error::Error;
use std::time::{Duration, Instant};

use hyperattn_core::stages::keys_per_query;
use hyperattn_core::{Kernels, Method, Params, TensorMut, Tensors, forward, forward_workspace};

use crate::accuracy::accuracy;
use crate::csv::{Memory, Record};
use crate::executor::Threads;
use crate::inputs::Inputs;
use crate::load::{Moment, Waiting};
use crate::memory;
use crate::peak::Peak;
use crate::peer::Peer;
use crate::problem::{Problem, Shape};
use crate::problem_list::Entry;
use crate::statistics::Summary;
use crate::tensor::Tensor;
use crate::timing::{Member, Times, in_turns};
use crate::workspace::Workspace;

/// Where the records of a group belong.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Name of the list.
    pub list: &'a str,
    /// Number of the group, from 1.
    pub group: usize,
}

/// What came of a group.
pub struct Measured {
    /// One record per problem, and then the peer's.
    pub records: Vec<Record>,
    /// Why the peer has none.
    pub without_peer: Option<String>,
}

/// Times the problems of `group` in turns, then compares each with the oracle.
///
/// # Errors
/// What the library answers to a problem, and a peer that ended.
pub fn measure(
    place: Place<'_>,
    group: &[Entry],
    kernels: &'static Kernels,
    budget: Duration,
    peer: Option<&mut Peer>,
) -> Result<Measured, Box<dyn Error>> {
    let mut inputs: Vec<Inputs> = Vec::new();
    for entry in group {
        if !inputs.iter().any(|inputs| inputs.shape == entry.problem.shape) {
            inputs.push(Inputs::new(entry.problem.shape));
        }
    }
    let mut ours = Vec::new();
    for entry in group {
        let inputs = inputs.iter().find(|inputs| inputs.shape == entry.problem.shape);
        ours.push(Ours::new(entry.problem, inputs.expect("made above"), kernels)?);
    }
    let (peer, without_peer) = match peer.map(|peer| peer.prepare(&group[0].problem).map(|()| peer)) {
        Some(Ok(peer)) => (Some(peer), None),
        Some(Err(reason)) => (None, Some(reason)),
        None => (None, None),
    };
    let peer_name = peer.as_ref().map(|peer| peer.name().to_string());

    let mut members: Vec<&mut dyn Member> = ours.iter_mut().map(|ours| ours as &mut dyn Member).collect();
    members.extend(peer.map(|peer| peer as &mut dyn Member));
    let times = in_turns(&mut members, budget)?;
    let mut records: Vec<Record> = Vec::new();
    for ((entry, ours), time) in group.iter().zip(&mut ours).zip(&times) {
        let isa = kernels.isa().name().to_string();
        let named = ("hyperattn".to_string(), isa, entry.problem);
        let report = ours.report()?;
        let mut record = ours.record(place, entry.line, named, report, (time, &times[0]));
        record.accuracy = Some(accuracy(&entry.problem, ours.inputs, &ours.out));
        record.memory = ours.memory;
        record.waiting = ours.waiting.share(entry.problem.threads);
        records.push(record);
    }
    if let (Some(name), Some(time)) = (peer_name, times.get(ours.len())) {
        let mut problem = group[0].problem;
        problem.params.method = Method::Exact;
        let report = ours[0].report_of_exact()?;
        let named = (name, String::new(), problem);
        records.push(ours[0].record(place, group[0].line, named, report, (time, &times[0])));
    }
    Ok(Measured { records, without_peer })
}

/// What the library says about its own call, on average over the heads.
struct Report {
    keys_per_query: f64,
    estimated_error: Option<f64>,
}

fn mean(of_heads: &[f32]) -> f64 {
    of_heads.iter().copied().map(f64::from).sum::<f64>() / of_heads.len() as f64
}

/// A problem of this library, ready to run.
struct Ours<'a> {
    params: Params,
    inputs: &'a Inputs,
    out: Tensor,
    kernels: &'static Kernels,
    threads: Threads,
    peak: Peak,
    workspace: Workspace,
    memory: Memory,
    turn: Option<Moment>,
    waiting: Waiting,
}

impl<'a> Ours<'a> {
    fn new(problem: Problem, inputs: &'a Inputs, kernels: &'static Kernels) -> Result<Self, Box<dyn Error>> {
        let Shape { dtypes, layout, batch, heads_q, n_q, head_dim, .. } = problem.shape;
        let threads = Threads::new(problem.threads)?;
        let mut out = Tensor::new(problem.dtype_out, [batch, heads_q, n_q, head_dim], layout);
        let layouts = tensors(inputs, &mut out)?.layouts();
        let need = forward_workspace(&problem.params, &layouts, kernels, &threads)?;
        Ok(Ours {
            params: problem.params,
            inputs,
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

    /// What the library says itself, in one call more: to estimate an error costs time, which is not to be in the
    /// time of a call that does not want it. Exact attention has nothing to estimate.
    fn report(&mut self) -> Result<Report, Box<dyn Error>> {
        if self.params.method == Method::Exact {
            return self.report_of_exact();
        }
        let Shape { batch, heads_q, .. } = self.inputs.shape;
        let of_heads = [batch as i64, heads_q as i64, 1, 1];
        let mut errors = vec![f32::NAN; batch * heads_q];
        let mut keys = errors.clone();
        let mut tensors = Tensors {
            error: Some(TensorMut::contiguous(&mut errors, of_heads)?),
            keys_per_query: Some(TensorMut::contiguous(&mut keys, of_heads)?),
            ..tensors(self.inputs, &mut self.out)?
        };
        let need = forward_workspace(&self.params, &tensors.layouts(), self.kernels, &self.threads)?;
        let mut workspace = Workspace::new(need);
        forward(&self.params, &mut tensors, self.kernels, &self.threads, workspace.bytes())?;
        Ok(Report { keys_per_query: mean(&keys), estimated_error: Some(mean(&errors)) })
    }

    /// The same where the problem is computed exactly.
    fn report_of_exact(&mut self) -> Result<Report, Box<dyn Error>> {
        let params = Params { method: Method::Exact, ..self.params };
        let layouts = tensors(self.inputs, &mut self.out)?.layouts();
        Ok(Report { keys_per_query: keys_per_query(&params, &layouts)?, estimated_error: None })
    }

    /// What `time` says about the problem that `implementation` computed beside this one.
    fn record(
        &self,
        place: Place<'_>,
        line: usize,
        (implementation, isa, problem): (String, String, Problem),
        Report { keys_per_query, estimated_error }: Report,
        (time, base): (&Times, &Times),
    ) -> Record {
        let seconds = time.summary();
        let peak_gflops = Summary::of(self.peak.gflops()).median;
        let rate = |flops: f64| flops / seconds.median * 1e-9;
        Record {
            list: place.list.to_string(),
            line,
            group: place.group,
            implementation,
            isa,
            problem,
            runs: time.runs(),
            time_ms: seconds.scaled(1e3),
            gflops: rate(problem.exact_flops()),
            peak: self.peak.name().to_string(),
            peak_gflops,
            fraction_of_peak: rate(problem.computed_flops(keys_per_query)) / peak_gflops,
            ratio: time.over(base),
            keys_per_query,
            estimated_error,
            accuracy: None,
            memory: Memory::default(),
            waiting: None,
        }
    }
}

/// The tensors of a call.
fn tensors<'t>(inputs: &'t Inputs, out: &'t mut Tensor) -> hyperattn_core::Result<Tensors<'t>> {
    let [q, k, v] = &inputs.tensors;
    Ok(Tensors {
        q: q.view()?,
        k: k.view()?,
        v: v.view()?,
        out: out.view_mut()?,
        lse: None,
        block_mask: None,
        error: None,
        keys_per_query: None,
    })
}

impl Member for Ours<'_> {
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
        let mut tensors = tensors(self.inputs, &mut self.out)?;
        let workspace = self.workspace.bytes();
        let clock = Instant::now();
        forward(&self.params, &mut tensors, self.kernels, &self.threads, workspace)?;
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
