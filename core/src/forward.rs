//! The forward pass: checks the workspace, prepares the selection and runs the passes.

use crate::error::{Error, ErrorKind, Result};
use crate::exact;
use crate::exec::{Executor, for_each_chunk};
use crate::hyper::{self, Prepared};
use crate::lsh;
use crate::pack::PackedShape;
use crate::params::Params;
use crate::pass::Pass;
use crate::plan::Plan;
use crate::problem::{Layouts, Tensors};
use crate::residual;
use crate::scratch::{Carver, Lanes, Layout, WORKSPACE_ALIGN};
use crate::select::Rectangle;
use crate::simd::Kernels;
use crate::sort;
use crate::tile::{Call, KeyOrder, States};
use crate::view::Rows;
use crate::workspace::{Shared, Sizes, SortScratch};

/// Rows hashed by one task.
const HASH_CHUNK: usize = 512;

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
    let sizes = Sizes::new(&plan, params, kernels, executor.lanes().max(1))?;
    Ok(Layout { size: sizes.total, align: WORKSPACE_ALIGN })
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
    let plan = Plan::new(params, &tensors.layouts())?;
    tensors.check_overlap()?;
    let lane_count = executor.lanes().max(1);
    let sizes = Sizes::new(&plan, params, kernels, lane_count)?;
    if !workspace.as_ptr().addr().is_multiple_of(WORKSPACE_ALIGN) {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!("workspace.data = {:p} is not a multiple of {WORKSPACE_ALIGN}", workspace.as_ptr()),
        ));
    }
    if workspace.len() < sizes.total {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!("workspace.size = {} bytes but {} are needed", workspace.len(), sizes.total),
        ));
    }
    let (shared, rest) = workspace.split_at_mut(sizes.shared);
    let mut lanes = Lanes::new(rest, sizes.lane, lane_count);
    let mut shared = Shared::carve(&plan, params, kernels, &mut Carver::new(shared));
    let shape = PackedShape::new(kernels, &plan.problem);
    let call = Call { kernels, params, problem: plan.problem, tensors, shape };
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
        let packed = &mut *self.shared.packed;
        // What is packed is that of one batch item.
        let batches_at_once = if packed.is_empty() { problem.batch } else { 1 };
        for batch in (0..problem.batch).step_by(batches_at_once) {
            let batches = batch..batch + batches_at_once;
            exact::run_pass(self.call, self.executor, self.lanes, batches, &pass, packed)?;
        }
        Ok(())
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
            let batches = batch..batch + 1;
            return exact::run_pass(self.call, self.executor, self.lanes, batches, &pass, shared.packed);
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
