//! Measures one group of problems.

use std::error::Error;
use std::time::Duration;

use hyperattn_core::{Layouts, Method, Params, TensorLayout};

use crate::accuracy::Accuracy;
use crate::csv::{Memory, OfPeak, Record};
use crate::device::Device;
use crate::inputs::Inputs;
use crate::peer::Peer;
use crate::problem::{Pass, Problem};
use crate::problem_list::Entry;
use crate::timing::{Member, Times, in_turns};

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
    /// One record per problem, and then those of the peers.
    pub records: Vec<Record>,
    /// Which peers have none, and why.
    pub without: Vec<(String, String)>,
}

/// A problem of this library, ready to run on some device.
pub trait Ours: Member {
    /// What the library says itself, in one forward call more: to estimate an error costs time, which is not to be in the
    /// time of a call that does not want it.
    ///
    /// # Errors
    /// What the call answers.
    fn report(&mut self) -> Result<Report, Box<dyn Error>>;

    /// How far the output is from exact attention, or the gradient with respect to the queries from exact attention's.
    ///
    /// # Errors
    /// When the output cannot be had.
    fn accuracy(&mut self) -> Result<Accuracy, Box<dyn Error>>;

    /// Memory of the call.
    fn memory(&self) -> Memory;

    /// Share of the time without a core, where that is known.
    fn waiting(&self) -> Option<f64>;

    /// The machine's peak meanwhile by its name and in GFLOP/s, where it is measured.
    fn peak(&self) -> Option<(&'static str, f64)>;
}

/// What the library says about its own call, on average over the heads.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Keys and columns that a query met.
    pub keys_per_query: f64,
    /// Estimate of the relative error.
    pub estimated_error: Option<f64>,
}

impl Report {
    /// From the figures of every head.
    pub fn of_heads(keys_per_query: &[f32], errors: &[f32]) -> Self {
        let mean =
            |of_heads: &[f32]| of_heads.iter().copied().map(f64::from).sum::<f64>() / of_heads.len() as f64;
        Report { keys_per_query: mean(keys_per_query), estimated_error: Some(mean(errors)) }
    }

    /// Of exact attention on the same inputs, which has nothing to estimate.
    fn of_exact(problem: &Problem, inputs: &Inputs) -> hyperattn_core::Result<Self> {
        let params = Params { method: Method::Exact, ..problem.params };
        let [q, k, v] = inputs.tensors.each_ref().map(|tensor| *tensor.layout());
        let out = TensorLayout { dtype: problem.dtype_out, ..q };
        let layouts = Layouts {
            q,
            k,
            v,
            out,
            lse: None,
            block_mask: None,
            error: None,
            keys_per_query: None,
            mask: None,
        };
        let keys_per_query = hyperattn_core::stages::keys_per_query(&params, &layouts)?;
        Ok(Report { keys_per_query, estimated_error: None })
    }
}

/// Times the problems of `group` in turns, then compares each with the oracle.
///
/// # Errors
/// What the library answers to a problem, and a peer that ended.
pub fn measure(
    place: Place<'_>,
    group: &[Entry],
    device: &Device,
    budget: Duration,
    peers: &mut [Peer],
) -> Result<Measured, Box<dyn Error>> {
    let mut inputs: Vec<Inputs> = Vec::new();
    for entry in group {
        if !inputs.iter().any(|inputs| inputs.shape == entry.problem.shape) {
            inputs.push(Inputs::new(entry.problem.shape)?);
        }
    }
    let inputs_of =
        |problem: &Problem| inputs.iter().find(|inputs| inputs.shape == problem.shape).expect("made above");
    let problems: Vec<(Problem, &Inputs)> =
        group.iter().map(|entry| (entry.problem, inputs_of(&entry.problem))).collect();
    let mut ours = device.prepare(&problems)?;
    let (mut ready, mut without) = (Vec::new(), Vec::new());
    for peer in peers {
        match peer.prepare(&group[0].problem) {
            Ok(()) => ready.push(peer),
            Err(reason) => without.push((peer.name().to_string(), reason)),
        }
    }

    let mut members: Vec<&mut dyn Member> =
        ours.iter_mut().map(|ours| ours.as_mut() as &mut dyn Member).collect();
    members.extend(ready.iter_mut().map(|peer| &mut **peer as &mut dyn Member));
    let times = in_turns(&mut members, budget)?;
    let mut records: Vec<Record> = Vec::new();
    for (((entry, (problem, inputs)), ours), time) in group.iter().zip(&problems).zip(&mut ours).zip(&times) {
        let mut report = match problem.params.method {
            Method::Exact => Report::of_exact(problem, inputs)?,
            _ => ours.report()?,
        };
        if problem.pass == Pass::Backward {
            // It is that of the output.
            report.estimated_error = None;
        }
        let implementation = device.implementation().to_string();
        let named = (implementation, device.isa().to_string(), *problem);
        let mut record = record(place, entry.line, named, report, ours.peak(), (time, &times[0]));
        record.accuracy = Some(ours.accuracy()?);
        record.memory = ours.memory();
        record.waiting = ours.waiting();
        records.push(record);
    }
    for (peer, time) in ready.iter().zip(&times[ours.len()..]) {
        let (mut problem, inputs) = problems[0];
        problem.params.method = Method::Exact;
        let report = Report::of_exact(&problem, inputs)?;
        let named = (peer.name().to_string(), String::new(), problem);
        records.push(record(place, group[0].line, named, report, ours[0].peak(), (time, &times[0])));
    }
    Ok(Measured { records, without })
}

/// What `time` says about the problem that `implementation` computed.
fn record(
    place: Place<'_>,
    line: usize,
    (implementation, isa, problem): (String, String, Problem),
    Report { keys_per_query, estimated_error }: Report,
    peak: Option<(&'static str, f64)>,
    (time, base): (&Times, &Times),
) -> Record {
    let seconds = time.summary();
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
        peak: peak.map(|(name, gflops)| OfPeak {
            name: name.to_string(),
            gflops,
            fraction: rate(problem.computed_flops(keys_per_query)) / gflops,
        }),
        ratio: time.over(base),
        keys_per_query,
        estimated_error,
        accuracy: None,
        memory: Memory::default(),
        waiting: None,
    }
}
