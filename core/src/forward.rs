//! The forward pass: chooses the method, carves the workspace, prepares the selection and runs the passes.

use crate::causal::Decomposition;
use crate::cost;
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::exact::{self, Pass};
use crate::exec::{Executor, for_each_chunk};
use crate::hyper::{self, Prepared};
use crate::lsh;
use crate::params::{Method, Params, Residual};
use crate::problem::{Layouts, Problem, Tensors};
use crate::residual;
use crate::scratch::{Carver, Lanes, Layout, WORKSPACE_ALIGN};
use crate::select::Rectangle;
use crate::simd::Kernels;
use crate::sort;
use crate::tile::{Call, KeyOrder, States, TileMemory};
use crate::view::Rows;

/// Rows hashed by one task.
const HASH_CHUNK: usize = 512;

/// What one call will do: everything that follows from the options and shapes alone.
struct Plan {
    problem: Problem,
    parts: Decomposition,
    exact: bool,
    /// Sub-problems with at most this many keys are exact.
    leaf: usize,
    /// Whether Algorithm 1 runs; otherwise the order in memory is the order.
    sorted: bool,
    /// Whether rows are visited by more than one pass.
    stateful: bool,
    row_norm: bool,
}

impl Plan {
    fn new(params: &Params, layouts: &Layouts<'_>) -> Result<Self> {
        let problem = Problem::new(params, layouts)?;
        let blocks_are_sorted = layouts.block_mask.is_none() && params.block_size > 0;
        // One block holds all keys of such a sub-problem, so dividing it would change nothing.
        let block = if blocks_are_sorted { params.block_size as usize } else { 0 };
        let leaf = params.min_seq_len.max(block);
        let parts = Decomposition::new(&problem, leaf);
        let nothing_to_estimate = {
            let dense_is_small = parts.dense.as_ref().is_none_or(|dense| dense.keys.len() <= leaf);
            dense_is_small && parts.square.is_none_or(|square| square.levels() == 0)
        };
        let exact = match params.method {
            Method::Exact => true,
            Method::Auto => nothing_to_estimate || cost::exact_is_faster(params, &problem, &parts),
            _ => nothing_to_estimate,
        };
        let divided = parts.square.is_some_and(|square| square.levels() > 0);
        Ok(Plan {
            sorted: blocks_are_sorted && params.lsh_num_projs > 0,
            stateful: divided || parts.dense_precedes_square(),
            row_norm: hyper::effective_residual(params) == Residual::RowNorm,
            problem,
            parts,
            exact,
            leaf,
        })
    }
}

/// The parts of the workspace that all tasks share.
struct Shared<'a> {
    projections: &'a mut [f32],
    /// Ranks first, then the other half of the order's double buffer.
    query_spare: &'a mut [u32],
    query_order: &'a mut [u32],
    key_spare: &'a mut [u32],
    key_order: &'a mut [u32],
    norms: &'a mut [f32],
    norm_prefix: &'a mut [f64],
    log2_row_sums: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    accumulated: &'a mut [f32],
}

impl<'a> Shared<'a> {
    fn carve(plan: &Plan, params: &Params, kernels: &Kernels, carver: &mut Carver<'a>) -> Self {
        let problem = &plan.problem;
        let when = |wanted: bool, len: Option<usize>| if wanted { len.unwrap_or(usize::MAX) } else { 0 };
        let (estimated, sorted) = (!plan.exact, !plan.exact && plan.sorted);
        let query_rows = problem.heads_q.checked_mul(problem.n_q);
        let key_rows = problem.heads_kv.checked_mul(problem.n_k);
        let width = lsh::projection_width(kernels, params.lsh_num_projs as usize);
        let states = when(estimated && plan.stateful, query_rows);
        let row_norm = estimated && plan.row_norm;
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
        }
    }
}

/// Scratch of one task: the largest that any pass carves.
fn lane_size(plan: &Plan, params: &Params, layouts: &Layouts<'_>, kernels: &Kernels) -> Option<usize> {
    let problem = &plan.problem;
    let mut tile = Carver::measuring();
    TileMemory::carve(kernels, problem, &mut tile);
    let mut sort = Carver::measuring();
    if !plan.exact && plan.sorted {
        SortScratch::carve(params, problem.n_q.max(problem.n_k), &mut sort);
    }
    let mut hash = Carver::measuring();
    hash.take::<f32>(lsh::rank_scratch_len(layouts.q.extents()[3].max(problem.value_dim)));
    Some(tile.used()?.max(sort.used()?).max(hash.used()?))
}

struct SortScratch<'a> {
    counters: &'a mut [u32],
    spare: &'a mut [u32],
}

impl<'a> SortScratch<'a> {
    fn carve(params: &Params, rows: usize, carver: &mut Carver<'a>) -> Self {
        let spare = if sort::needs_spare(params.lsh_num_projs) { rows } else { 0 };
        SortScratch {
            counters: carver.take(sort::counter_len(params.lsh_num_projs)),
            spare: carver.take(spare),
        }
    }
}

/// Bytes of the shared part and of one lane.
fn sizes(plan: &Plan, params: &Params, layouts: &Layouts<'_>, kernels: &Kernels) -> Option<(usize, usize)> {
    let mut shared = Carver::measuring();
    Shared::carve(plan, params, kernels, &mut shared);
    Some((shared.used()?, lane_size(plan, params, layouts, kernels)?))
}

fn total(sizes: Option<(usize, usize)>, lanes: usize) -> Result<(usize, usize, usize)> {
    let total =
        sizes.and_then(|(shared, lane)| Some((shared, lane, shared.checked_add(lane.checked_mul(lanes)?)?)));
    match total {
        Some(sizes) if isize::try_from(sizes.2).is_ok() => Ok(sizes),
        _ => invalid!("the shapes need more scratch memory than an address space holds"),
    }
}

/// Size and alignment of the workspace that [`forward`] needs for these options, layouts, kernels and
/// number of lanes. Every error that does not concern addresses or contents is reported here too.
///
/// With L lanes: L times a tile (about `264 * (head_dim + value_dim + 10) + 64 * (head_dim + value_dim)`
/// numbers); for the estimator 8 bytes per query row and per key row of a batch item; under a causal
/// mask `4 * (value_dim + 2)` bytes per query row more. Never quadratic in the sequence.
pub fn forward_workspace(
    params: &Params,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
) -> Result<Layout> {
    let plan = Plan::new(params, layouts)?;
    let (_, _, size) = total(sizes(&plan, params, layouts, kernels), executor.lanes().max(1))?;
    Ok(Layout { size, align: WORKSPACE_ALIGN })
}

/// Attention: `out = softmax(scale * q k^T) v` under the mask, exactly or by the estimator that `params`
/// asks for, and its natural log-sum-exp.
///
/// A row that sees no key gets output 0 and lse -inf. NaN stays in the rows that see it. The result
/// depends on nothing but the arguments and the kernels' instruction set: not on the executor, nor on the workspace.
/// Nothing is allocated. On an error nothing has been written, unless it is [`ErrorKind::Executor`].
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
    let layouts = tensors.layouts();
    let plan = Plan::new(params, &layouts)?;
    tensors.check_overlap()?;
    let lane_count = executor.lanes().max(1);
    let (shared_size, lane_size, size) = total(sizes(&plan, params, &layouts, kernels), lane_count)?;
    if !workspace.as_ptr().addr().is_multiple_of(WORKSPACE_ALIGN) {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!("workspace.data = {:p} is not a multiple of {WORKSPACE_ALIGN}", workspace.as_ptr()),
        ));
    }
    if workspace.len() < size {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!("workspace.size = {} bytes but {size} are needed", workspace.len()),
        ));
    }
    let (shared, rest) = workspace.split_at_mut(shared_size);
    let mut lanes = Lanes::new(rest, lane_size, lane_count);
    let mut shared = Shared::carve(&plan, params, kernels, &mut Carver::new(shared));
    let call = Call { kernels, params, problem: plan.problem, tensors };
    let mut run = Run { plan: &plan, call: &call, executor, lanes: &mut lanes, shared: &mut shared };
    if plan.exact { run.exact() } else { run.paper() }
}

/// A call under way.
struct Run<'r, 'a> {
    plan: &'r Plan,
    call: &'r Call<'r>,
    executor: &'r dyn Executor,
    lanes: &'r mut Lanes<'a>,
    shared: &'r mut Shared<'a>,
}

impl Run<'_, '_> {
    fn exact(&mut self) -> Result<()> {
        let problem = &self.plan.problem;
        let whole = Rectangle { queries: 0..problem.n_q, keys: 0..problem.n_k };
        let pass = Pass { rectangle: &|_| Some(whole.clone()), count: 1, states: None, last: true };
        exact::run_pass(self.call, self.executor, self.lanes, 0..problem.batch, &pass)
    }

    fn paper(&mut self) -> Result<()> {
        if self.plan.sorted {
            self.draw_projections()?;
        }
        for batch in 0..self.plan.problem.batch {
            self.paper_batch(batch)?;
        }
        Ok(())
    }

    /// The hyperplanes of every KV head; its query heads share them, and so do all batch items.
    fn draw_projections(&mut self) -> Result<()> {
        let (params, head_dim) = (self.call.params, self.plan.problem.head_dim);
        let num_projs = params.lsh_num_projs as usize;
        let width = lsh::projection_width(self.call.kernels, num_projs);
        for_each_chunk(
            self.executor,
            self.lanes,
            self.shared.projections,
            head_dim * width,
            &|_, kv_head, to| {
                let stream_of = (params.seed, params.offset, kv_head);
                lsh::fill_projections(stream_of, head_dim, num_projs, width, to);
            },
        )
    }

    fn paper_batch(&mut self, batch: usize) -> Result<()> {
        let parts = &self.plan.parts;
        if self.plan.sorted {
            self.sort_rows(batch, Side::Query)?;
            self.sort_rows(batch, Side::Key)?;
            self.split(Side::Query, 1, &|_| Some([0, parts.query_boundary, self.plan.problem.n_q]))?;
            self.split(Side::Key, 1, &|_| Some([0, parts.key_boundary, self.plan.problem.n_k]))?;
        }
        if self.plan.row_norm {
            self.square_norms(batch)?;
        }
        self.shared.max.fill(f32::NEG_INFINITY);
        self.shared.sum.fill(0.0);

        if let Some(blind) = &parts.blind {
            self.pass(batch, 1, &|_| Some(blind.clone()), Exactness::Exact, Place::Only)?;
        }
        if let Some(dense) = &parts.dense {
            let exactness =
                if dense.keys.len() <= self.plan.leaf { Exactness::Exact } else { Exactness::Estimated };
            let place = if parts.dense_precedes_square() { Place::Inner } else { Place::Only };
            self.pass(batch, 1, &|_| Some(dense.clone()), exactness, place)?;
        }
        let Some(square) = parts.square else { return Ok(()) };
        for level in 0..square.levels() {
            let count = 1 << level;
            if self.plan.sorted {
                let shifted = |start: usize| {
                    move |index: usize| square.division(level, index).map(|cut| cut.map(|at| at + start))
                };
                self.split(Side::Query, count, &shifted(square.query_start))?;
                self.split(Side::Key, count, &shifted(square.key_start))?;
            }
            let rectangle = |index: usize| square.rectangle(level, index);
            self.pass(batch, count, &rectangle, Exactness::Estimated, Place::Inner)?;
        }
        let leaf = |index: usize| square.leaf_rectangle(index);
        self.pass(batch, 1 << square.levels(), &leaf, Exactness::Exact, Place::Last)
    }

    /// Algorithm 1 for all heads of one side: ranks, then one stable sort each.
    fn sort_rows(&mut self, batch: usize, side: Side) -> Result<()> {
        let (params, kernels, problem) = (self.call.params, self.call.kernels, &self.plan.problem);
        let width = lsh::projection_width(kernels, params.lsh_num_projs as usize);
        let (view, rows, heads_per_projection) = match side {
            Side::Query => (&self.call.tensors.q, problem.n_q, problem.group),
            Side::Key => (&self.call.tensors.k, problem.n_k, 1),
        };
        let projections = &*self.shared.projections;
        let (ranks, order) = match side {
            Side::Query => (&mut *self.shared.query_spare, &mut *self.shared.query_order),
            Side::Key => (&mut *self.shared.key_spare, &mut *self.shared.key_order),
        };
        for_each_chunk(self.executor, self.lanes, ranks, HASH_CHUNK, &|scratch, chunk, ranks| {
            let wide = Carver::new(scratch).take::<f32>(lsh::rank_scratch_len(problem.head_dim));
            // A chunk of the flat array may end one head and begin the next.
            let mut done = 0;
            while done < ranks.len() {
                let (head, first) = ((chunk * HASH_CHUNK + done) / rows, (chunk * HASH_CHUNK + done) % rows);
                let count = (rows - first).min(ranks.len() - done);
                let kv_head = head / heads_per_projection;
                let normals = &projections[kv_head * problem.head_dim * width..][..problem.head_dim * width];
                let ranks = &mut ranks[done..done + count];
                lsh::rank_rows(kernels, view, (batch, head), first, normals, width, wide, ranks);
                done += count;
            }
        })?;
        let ranks = &*ranks;
        for_each_chunk(self.executor, self.lanes, order, rows, &|scratch, head, order| {
            let SortScratch { counters, spare } =
                SortScratch::carve(params, order.len(), &mut Carver::new(scratch));
            sort::sort_by_rank(&ranks[head * rows..][..rows], params.lsh_num_projs, order, spare, counters);
        })
    }

    /// Divides the sorted order of every head of one side at `[start, middle, end]` for each cut.
    fn split(
        &mut self,
        side: Side,
        count: usize,
        cut: &(dyn Fn(usize) -> Option<[usize; 3]> + Sync),
    ) -> Result<()> {
        let cuts =
            || (0..count).filter_map(cut).filter(|[start, middle, end]| start < middle && middle < end);
        if cuts().next().is_none() {
            return Ok(());
        }
        let shared = &mut *self.shared;
        let (from, to, rows) = match side {
            Side::Query => (&mut shared.query_order, &mut shared.query_spare, self.plan.problem.n_q),
            Side::Key => (&mut shared.key_order, &mut shared.key_spare, self.plan.problem.n_k),
        };
        let order = &**from;
        for_each_chunk(self.executor, self.lanes, to, rows, &|_, head, to| {
            for [start, middle, end] in cuts() {
                sort::split(&order[head * rows..][start..end], middle, &mut to[start..end]);
            }
        })?;
        // What no cut touched is not looked at again.
        core::mem::swap(from, to);
        Ok(())
    }

    /// |v|^2 of every key.
    fn square_norms(&mut self, batch: usize) -> Result<()> {
        let (kernels, problem) = (self.call.kernels, &self.plan.problem);
        let value = &self.call.tensors.v;
        for_each_chunk(self.executor, self.lanes, self.shared.norms, HASH_CHUNK, &|scratch, chunk, norms| {
            let wide = Carver::new(scratch).take::<f32>(problem.value_dim);
            for (i, norm) in norms.iter_mut().enumerate() {
                let flat = chunk * HASH_CHUNK + i;
                value.read_row(kernels, batch, flat / problem.n_k, flat % problem.n_k, wide);
                *norm = wide.iter().map(|x| x * x).sum();
            }
        })
    }

    /// One pass over disjoint query rows of one batch item.
    fn pass(
        &mut self,
        batch: usize,
        count: usize,
        rectangle: &(dyn Fn(usize) -> Option<Rectangle> + Sync),
        exactness: Exactness,
        place: Place,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        let shared = &mut *self.shared;
        let states = States {
            max: Rows::new(shared.max, 1),
            sum: Rows::new(shared.sum, 1),
            accumulated: Rows::new(shared.accumulated, problem.value_dim),
        };
        let states = (self.plan.stateful && place != Place::Only).then_some(&states);
        let pass = Pass { rectangle, count, states, last: place != Place::Inner };
        if exactness == Exactness::Exact {
            return exact::run_pass(self.call, self.executor, self.lanes, batch..batch + 1, &pass);
        }
        let key_order = self.plan.sorted.then_some(&*shared.key_order);
        if self.plan.row_norm {
            let (norms, n_k) = (&*shared.norms, problem.n_k);
            for_each_chunk(self.executor, self.lanes, shared.norm_prefix, n_k, &|_, kv_head, prefix| {
                let order = key_order.map(|order| &order[kv_head * n_k..][..n_k]);
                let keys = KeyOrder { batch, kv_head, order };
                for Rectangle { keys: positions, .. } in pass.rectangles() {
                    let norms = positions.clone().map(|position| norms[kv_head * n_k + keys.row(position)]);
                    residual::accumulate_norms(norms, &mut prefix[positions]);
                }
            })?;
        }
        let prepared = Prepared {
            batch,
            query_order: self.plan.sorted.then_some(&*shared.query_order),
            key_order,
            norm_prefix: shared.norm_prefix,
        };
        hyper::run_pass(self.call, self.executor, self.lanes, &prepared, shared.log2_row_sums, &pass)
    }
}

/// Queries or keys.
#[derive(Clone, Copy)]
enum Side {
    Query,
    Key,
}

/// How a pass computes its sub-problems.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exactness {
    Exact,
    Estimated,
}

/// Where a pass stands among those that visit its rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing before and nothing after it.
    Only,
    /// Others follow.
    Inner,
    /// Nothing follows.
    Last,
}
