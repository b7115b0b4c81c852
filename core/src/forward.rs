//! The forward pass: checks the workspace and runs the method.

use crate::division::{Divided, Division, Part};
use crate::error::{Result, invalid};
use crate::exact;
use crate::exec::{Executor, Serial, for_each_item};
use crate::keys_per_query::planned_keys_per_query;
use crate::pack::PackedShape;
use crate::paper::Paper;
use crate::params::Params;
use crate::pass::Pass;
use crate::plan::{Plan, Run};
use crate::probe;
use crate::problem::{Layouts, Problem, Tensors};
use crate::refined::Refined;
use crate::scratch::{Carver, Lanes, Layout, WORKSPACE_ALIGN};
use crate::select::Rectangle;
use crate::simd::Kernels;
use crate::tile::Call;
use crate::tiling::HeadSet;
use crate::unmet::Unmet;
use crate::workspace::{Shared, Sizes, check_workspace};

/// Size and alignment of the workspace that [`forward`] needs for these options, layouts, kernels and
/// number of lanes. Every error that does not concern addresses or contents is reported here too.
///
/// Sizes are those of one batch item:
///
/// - for every lane a tile: about `256 (head_dim + value_dim) + 64 (head_dim + value_dim)` numbers of 4 bytes,
///   with a mask tensor 256 KiB more, and for METHOD_PAPER at least 16 KiB for sorting;
/// - exact parts: k and v once as f32 (as bf16 where the kernels multiply that), of `heads_kv n_k (head_dim +
///   value_dim)` elements; not where a single tile of queries reads them;
/// - METHOD_PAPER: 8 bytes for every query row of every head and every key row of every KV head;
/// - METHOD_PAPER under a causal mask: `4 (value_dim + 2)` bytes for every query row of the heads that are
///   worked on together, which are as many as keep the two items above it within twice the bytes of k and v,
///   but at least one.
///
/// - METHOD_REFINED: k and v packed as for exact parts, 1 / 26 of that for what stands for their blocks, `2 + 2 value_dim`
///   numbers for every probe row (at most 256 a head), and for every lane `256 head_dim + 10 budget + n_k / 32` numbers,
///   where the budget is the largest that a head may get.
///
/// So but for METHOD_REFINED's lanes and probe rows, with n_q <= n_k never more than twice the bytes of k and v, some 16 bytes per row of each head, the lanes, and
/// the rounding to whole vectors and tiles of 64 keys. Never quadratic in the sequence.
pub fn forward_workspace(
    params: &Params,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
) -> Result<Layout> {
    forward_divided_workspace(params, &Division::default(), layouts, kernels, executor)
}

/// [`forward_workspace`] of [`forward_divided`].
pub fn forward_divided_workspace(
    params: &Params,
    division: &Division<'_>,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
) -> Result<Layout> {
    let divided = Divided::new(params, division, layouts)?;
    let schedule = Schedule::new(&divided, kernels, executor.lanes().max(1))?;
    Ok(Layout { size: schedule.total(), align: WORKSPACE_ALIGN })
}

/// Attention: `out = softmax(scale * q k^T) v` under the mask, exactly or by the estimator that `params`
/// asks for, and its natural log-sum-exp.
///
/// A row that sees no key gets output 0 and lse -inf. NaN stays in the rows that see it, also one in the mask tensor,
/// where +inf makes its row NaN too. The result
/// depends on nothing but the arguments and the kernels' instruction set: not on the executor, nor on the workspace.
/// Nothing is allocated. On an error nothing has been written, unless it is
/// [`ErrorKind::Executor`](crate::ErrorKind::Executor).
///
/// Cost: n_q * n_k pairs of `head_dim + value_dim` multiply-adds per query head for exact attention (half under a
/// causal mask); about n_q * (block_size + sample_size) for the estimator without a mask.
pub fn forward(
    params: &Params,
    tensors: &mut Tensors<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    run(params, &Division::default(), tensors, kernels, executor, workspace, None)
}

/// [`forward`] of a call that is divided. Each sequence gets the bits that it would get alone, and each head those that
/// it would get if its method were that of all heads.
pub fn forward_divided(
    params: &Params,
    division: &Division<'_>,
    tensors: &mut Tensors<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    run(params, division, tensors, kernels, executor, workspace, None)
}

/// [`forward`], which notes besides which keys the sampled rows do not meet exactly. `unmet` is made for these params
/// and layouts.
pub fn forward_recording(
    params: &Params,
    tensors: &mut Tensors<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
    unmet: &Unmet<'_>,
) -> Result<()> {
    run(params, &Division::default(), tensors, kernels, executor, workspace, Some(unmet))
}

/// How the parts of a call are run.
struct Schedule {
    lanes: usize,
    /// Whether every lane takes parts of its own; else the lanes share one part after the other.
    at_once: bool,
    /// Bytes for a part, or for each of the lanes.
    size: usize,
}

impl Schedule {
    fn new(divided: &Divided<'_>, kernels: &Kernels, lanes: usize) -> Result<Self> {
        let pairs = |part: &Part<'_>| {
            let problem = &part.plan.problem;
            problem.heads_q as f64 * problem.n_q as f64 * problem.n_k as f64
        };
        let parts = || (0..divided.count()).map(|index| divided.part(index, kernels));
        let (most, all) = parts()
            .map(|part| pairs(&part))
            .fold((0.0f64, 0.0), |(most, all), pairs| (most.max(pairs), all + pairs));
        // The longest is a small part of what each lane has to do, and so is its workspace.
        let at_once = divided.count() > 1 && lanes > 1 && most * 2.0 * lanes as f64 <= all;
        let lanes_of_a_part = if at_once { 1 } else { lanes };
        let size = parts().try_fold(0, |most: usize, part| {
            Ok(Sizes::new(&part.plan, &part.params, kernels, lanes_of_a_part)?.total.max(most))
        })?;
        let schedule = Schedule { lanes, at_once, size };
        if isize::try_from(schedule.total()).is_err() {
            invalid!("the shapes need more scratch memory than an address space holds");
        }
        Ok(schedule)
    }

    fn total(&self) -> usize {
        if self.at_once { self.size.saturating_mul(self.lanes) } else { self.size }
    }
}

fn run(
    params: &Params,
    division: &Division<'_>,
    tensors: &mut Tensors<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
    unmet: Option<&Unmet<'_>>,
) -> Result<()> {
    let divided = Divided::new(params, division, &tensors.layouts())?;
    tensors.check_overlap()?;
    let schedule = Schedule::new(&divided, kernels, executor.lanes().max(1))?;
    check_workspace(workspace, schedule.total())?;
    let tensors = &*tensors;
    let run_part = |index: usize, executor: &dyn Executor, workspace: &mut [u8]| {
        let part = divided.part(index, kernels);
        // SAFETY: parts have rows of their own, and the tensors are this call's.
        let tensors = unsafe { tensors.part(&part.section) };
        execute(&part.plan, &part.params, &tensors, kernels, executor, workspace, unmet)
    };
    if !schedule.at_once {
        return (0..divided.count()).try_for_each(|index| run_part(index, executor, workspace));
    }
    let mut lanes = Lanes::new(workspace, schedule.size, schedule.lanes);
    for_each_item(executor, &mut lanes, divided.count(), &|scratch, index| {
        run_part(index, &Serial, scratch).expect("the calling thread runs every task");
    })
}

/// Runs what is planned for tensors that are checked, with a workspace of [`Sizes`].
pub(crate) fn execute(
    plan: &Plan,
    params: &Params,
    tensors: &Tensors<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
    unmet: Option<&Unmet<'_>>,
) -> Result<()> {
    let lane_count = executor.lanes().max(1);
    let sizes = Sizes::new(plan, params, kernels, lane_count)?;
    let (shared, rest) = workspace.split_at_mut(sizes.shared);
    let mut lanes = Lanes::new(rest, sizes.lane, lane_count);
    let mut shared = Shared::carve(plan, params, kernels, &mut Carver::new(shared));
    let shape = PackedShape::new(kernels, &plan.problem);
    let Problem { batch, heads_q, n_q, n_k, .. } = plan.problem;
    let mask = tensors.mask.map(|mask| mask.expanded([batch, heads_q, n_q, n_k]));
    let call = Call { kernels, params, problem: plan.problem, tensors, mask, shape, unmet };
    match plan.run {
        Run::Exact => exact(&call, &plan.rectangle, executor, &mut lanes, shared.packed)?,
        Run::Paper => {
            let mut paper =
                Paper { plan, call: &call, executor, lanes: &mut lanes, shared: &mut shared, gradient: None };
            paper.run()?;
        }
        Run::Refined => {
            let mut refined = Refined {
                plan,
                call: &call,
                executor,
                lanes: &mut lanes,
                shared: &mut shared,
                gradient: None,
            };
            return refined.run();
        }
    }
    for batch in 0..plan.problem.batch {
        if let Some(to) = &tensors.keys_per_query {
            for head in 0..plan.problem.heads_q {
                let pattern = batch * plan.problem.heads_q + head;
                let mask = tensors.block_mask.map(|mask| mask.patterns_from(pattern));
                let keys = planned_keys_per_query(params, mask.as_ref(), plan);
                // SAFETY: this tensor is written here only, by one thread.
                unsafe { to.write_row(batch, head, 0, &[keys as f32]) };
            }
        }
        if let Some(probes) = &plan.probes {
            probe::draw(&call, executor, &mut lanes, batch, probes, &mut shared.probed)?;
            probe::attend(&call, executor, &mut lanes, (batch, None), probes, &mut shared.probed)?;
        }
        probe::write_errors(&call, batch, plan.probes.as_ref(), &shared.probed, |_| false);
    }
    Ok(())
}

/// Exact attention for every head of every batch item.
fn exact(
    call: &Call<'_>,
    rectangle: &Rectangle,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    packed: &mut [u32],
) -> Result<()> {
    let problem = &call.problem;
    let pass = Pass { rectangle: &|_| Some(rectangle.clone()), count: 1, states: None, last: true };
    // What is packed is that of one batch item.
    let batches_at_once = if packed.is_empty() { problem.batch } else { 1 };
    for batch in (0..problem.batch).step_by(batches_at_once) {
        let batches = batch..batch + batches_at_once;
        exact::run_pass(call, executor, lanes, batches, &HeadSet::all(problem), &pass, packed)?;
    }
    Ok(())
}
