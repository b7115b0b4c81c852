//! The workspace of a call: what its tasks share, and what each needs for itself.

use crate::error::{Error, ErrorKind, Result, invalid};
use crate::lsh;
use crate::pack::PackedShape;
use crate::params::Params;
use crate::plan::{Plan, Run};
use crate::probe::Probed;
use crate::refine::RefineScratch;
use crate::represent::Representatives;
use crate::scratch::{Carver, WORKSPACE_ALIGN};
use crate::simd::Kernels;
use crate::sort;
use crate::summary::{self, SummaryScratch};
use crate::tile::TileMemory;

/// The parts of the workspace that all tasks share.
pub(crate) struct Shared<'a> {
    pub(crate) projections: &'a mut [f32],
    /// Ranks first, then the other half of the order's double buffer.
    pub(crate) query_spare: &'a mut [u32],
    pub(crate) query_order: &'a mut [u32],
    pub(crate) key_spare: &'a mut [u32],
    pub(crate) key_order: &'a mut [u32],
    pub(crate) norms: &'a mut [f32],
    pub(crate) norm_prefix: &'a mut [f64],
    pub(crate) log2_row_sums: &'a mut [f32],
    pub(crate) max: &'a mut [f32],
    pub(crate) sum: &'a mut [f32],
    pub(crate) accumulated: &'a mut [f32],
    /// Keys and values of the passes that are exact, or all of them.
    pub(crate) packed: &'a mut [u32],
    /// Summaries of the blocks of keys, and the keys in them packed.
    pub(crate) summaries: &'a mut [f32],
    pub(crate) packed_summaries: &'a mut [u32],
    /// Keys that each query head's rows meet, and whether that is settled.
    pub(crate) budgets: &'a mut [u32],
    pub(crate) settled: &'a mut [u32],
    pub(crate) probed: Probed<'a>,
    /// Outputs of the probe rows by the estimator.
    pub(crate) probe_estimate: &'a mut [f32],
}

impl<'a> Shared<'a> {
    pub(crate) fn carve(plan: &Plan, params: &Params, kernels: &Kernels, carver: &mut Carver<'a>) -> Self {
        let problem = &plan.problem;
        let when = |wanted: bool, len: Option<usize>| if wanted { len.unwrap_or(usize::MAX) } else { 0 };
        let estimated = plan.run == Run::Paper;
        let (sorted, refined) = (estimated && plan.sorted, plan.run == Run::Refined);
        let [query_heads, kv_heads] = plan.most_heads();
        let query_rows = query_heads.checked_mul(problem.n_q);
        let key_rows = kv_heads.checked_mul(problem.n_k);
        let width = lsh::projection_width(kernels, params.lsh_num_projs as usize);
        let states = when(plan.stateful, query_rows);
        let row_norm = estimated && plan.row_norm;
        let shape = PackedShape::new(kernels, problem);
        let summaries = problem.heads_kv.checked_mul(summary::summaries_len(problem));
        let packed_summaries = problem.heads_kv.checked_mul(summary::packed_len(problem, shape.keys_len()));
        let probe_rows =
            plan.probes.as_ref().and_then(|probes| problem.heads_q.checked_mul(probes.rows_of_a_head()));
        let probed = plan.probes.as_ref().map(|probes| probes.outputs_len(problem));
        let packed =
            plan.packed_tiles.saturating_mul(shape.len_of(plan.packs_values)).saturating_mul(kv_heads);
        Shared {
            projections: carver.take(when(sorted, problem.heads_kv.checked_mul(problem.head_dim * width))),
            query_spare: carver.take(when(sorted, query_rows)),
            query_order: carver.take(when(sorted, query_rows)),
            key_spare: carver.take(when(sorted, key_rows)),
            key_order: carver.take(when(sorted, key_rows)),
            norms: carver.take(when(row_norm, key_rows)),
            norm_prefix: carver.take(when(row_norm, key_rows)),
            log2_row_sums: carver.take(when(row_norm, query_rows)),
            max: carver.take(states),
            sum: carver.take(states),
            accumulated: carver.take(when(states > 0, states.checked_mul(problem.value_dim))),
            packed: carver.take(packed),
            summaries: carver.take(when(refined, summaries)),
            packed_summaries: carver.take(when(refined, packed_summaries)),
            budgets: carver.take(when(refined, Some(problem.heads_q))),
            settled: carver.take(when(refined, Some(problem.heads_q))),
            probed: Probed {
                rows: carver.take(when(probed.is_some(), probe_rows)),
                weights: carver.take(when(probed.is_some(), probe_rows)),
                outputs: carver.take(when(probed.is_some(), probed.flatten())),
            },
            probe_estimate: carver.take(when(refined && probed.is_some(), probed.flatten())),
        }
    }
}

/// Scratch of one task: the largest that any pass carves.
fn lane_size(plan: &Plan, params: &Params, kernels: &Kernels) -> Option<usize> {
    let problem = &plan.problem;
    let mut tile = Carver::measuring();
    TileMemory::carve(kernels, problem, &PackedShape::new(kernels, problem), &mut tile);
    let mut summary = Carver::measuring();
    if plan.run == Run::Refined {
        RefineScratch::carve(problem, plan.most_budget, &mut tile);
        SummaryScratch::carve(problem, &mut summary);
    }
    let mut draw = Carver::measuring();
    if plan.probes.is_some() {
        Representatives::carve(problem, &mut draw);
    }
    let mut sort = Carver::measuring();
    if plan.run == Run::Paper && plan.sorted {
        SortScratch::carve(params, problem.n_q.max(problem.n_k), &mut sort);
    }
    let mut norms = Carver::measuring();
    norms.take::<f32>(problem.head_dim + problem.value_dim);
    let parts = [tile, summary, draw, sort, norms];
    parts.iter().try_fold(0, |most, part| Some(part.used()?.max(most)))
}

/// What one task needs to sort the rows of one head.
pub(crate) struct SortScratch<'a> {
    pub(crate) counters: &'a mut [u32],
    pub(crate) spare: &'a mut [u32],
}

impl<'a> SortScratch<'a> {
    pub(crate) fn carve(params: &Params, rows: usize, carver: &mut Carver<'a>) -> Self {
        let spare = if sort::needs_spare(params.lsh_num_projs) { rows } else { 0 };
        SortScratch {
            counters: carver.take(sort::counter_len(params.lsh_num_projs)),
            spare: carver.take(spare),
        }
    }
}

/// How many bytes a call needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) shared: usize,
    pub(crate) lane: usize,
    pub(crate) total: usize,
}

impl Sizes {
    pub(crate) fn new(plan: &Plan, params: &Params, kernels: &Kernels, lanes: usize) -> Result<Self> {
        let sizes = || {
            let mut carver = Carver::measuring();
            Shared::carve(plan, params, kernels, &mut carver);
            let (shared, lane) = (carver.used()?, lane_size(plan, params, kernels)?);
            let total = shared.checked_add(lane.checked_mul(lanes)?)?;
            isize::try_from(total).ok()?;
            Some(Sizes { shared, lane, total })
        };
        match sizes() {
            Some(sizes) => Ok(sizes),
            None => invalid!("the shapes need more scratch memory than an address space holds"),
        }
    }
}

/// The workspace is aligned and has `need` bytes.
pub(crate) fn check_workspace(workspace: &[u8], need: usize) -> Result<()> {
    if !workspace.as_ptr().addr().is_multiple_of(WORKSPACE_ALIGN) {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!("workspace.data = {:p} is not a multiple of {WORKSPACE_ALIGN}", workspace.as_ptr()),
        ));
    }
    if workspace.len() < need {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!("workspace.size = {} bytes but {need} are needed", workspace.len()),
        ));
    }
    Ok(())
}
