//! METHOD_PAPER: selection, then the passes of the recursion, for as many heads at once as there is workspace for.

use crate::error::Result;
use crate::exact;
use crate::exec::{Executor, for_each_chunk};
use crate::gradient_exact;
use crate::gradient_hyper::{self, Estimated};
use crate::gradient_run::GradientRun;
use crate::hyper::{self, Prepared};
use crate::lsh;
use crate::pack::{PackScratch, Packer};
use crate::pass::Pass;
use crate::plan::Plan;
use crate::residual;
use crate::scratch::{Carver, Lanes};
use crate::select::Rectangle;
use crate::simd::Packing;
use crate::sort;
use crate::states::States;
use crate::tile::{Call, KeyOrder};
use crate::tiling::HeadSet;
use crate::view::Rows;
use crate::workspace::{Shared, SortScratch};

/// Rows hashed by one task.
const HASH_CHUNK: usize = 512;

/// A call under way.
pub(crate) struct Paper<'r, 'a> {
    pub(crate) plan: &'r Plan,
    pub(crate) call: &'r Call<'r>,
    pub(crate) executor: &'r dyn Executor,
    pub(crate) lanes: &'r mut Lanes<'a>,
    pub(crate) shared: &'r mut Shared<'a>,
    /// What is wanted instead of outputs, if it is gradients.
    pub(crate) gradient: Option<GradientRun<'r, 'a>>,
}

impl Paper<'_, '_> {
    pub(crate) fn run(&mut self) -> Result<()> {
        (0..self.plan.problem.batch).try_for_each(|batch| self.run_batch(batch))
    }

    pub(crate) fn run_batch(&mut self, batch: usize) -> Result<()> {
        if self.plan.sorted {
            self.draw_projections()?;
        }
        for heads in HeadSet::divide(&self.plan.problem, self.plan.heads_at_once) {
            self.run_heads(batch, &heads)?;
        }
        Ok(())
    }

    /// The hyperplanes of every KV head; its query heads share them, and so do all batch items.
    fn draw_projections(&mut self) -> Result<()> {
        let (params, problem) = (self.call.params, &self.plan.problem);
        let head_dim = problem.head_dim;
        let num_projs = params.lsh_num_projs as usize;
        let width = lsh::projection_width(self.call.kernels, num_projs);
        for_each_chunk(
            self.executor,
            self.lanes,
            self.shared.projections,
            head_dim * width,
            &|_, kv_head, to| {
                let stream_of = (params.seed, params.offset, problem.first_kv_head + kv_head);
                lsh::fill_projections(stream_of, head_dim, num_projs, width, to);
            },
        )
    }

    /// All passes over the query rows of `heads`.
    fn run_heads(&mut self, batch: usize, heads: &HeadSet) -> Result<()> {
        let parts = &self.plan.parts;
        if self.plan.sorted {
            self.sort_rows(batch, heads, Side::Query)?;
            self.sort_rows(batch, heads, Side::Key)?;
            self.split(heads, Side::Query, 1, &|_| Some([0, parts.query_boundary, self.plan.problem.n_q]))?;
            self.split(heads, Side::Key, 1, &|_| Some([0, parts.key_boundary, self.plan.problem.n_k]))?;
        }
        if self.plan.row_norm {
            self.square_norms(batch, heads)?;
        }
        self.shared.max.fill(f32::NEG_INFINITY);
        self.shared.sum.fill(0.0);

        if let Some(blind) = &parts.blind {
            self.pass((batch, heads), 1, &|_| Some(blind.clone()), Exactness::Exact, Place::Only)?;
        }
        if let Some(dense) = &parts.dense {
            let exactness =
                if dense.keys.len() <= self.plan.leaf { Exactness::Exact } else { Exactness::Estimated };
            let place = if parts.dense_precedes_square() { Place::Inner } else { Place::Only };
            self.pass((batch, heads), 1, &|_| Some(dense.clone()), exactness, place)?;
        }
        let Some(square) = parts.square else { return Ok(()) };
        for level in 0..square.levels() {
            let count = 1 << level;
            if self.plan.sorted {
                let shifted = |start: usize| {
                    move |index: usize| square.division(level, index).map(|cut| cut.map(|at| at + start))
                };
                self.split(heads, Side::Query, count, &shifted(square.query_start))?;
                self.split(heads, Side::Key, count, &shifted(square.key_start))?;
            }
            let rectangle = |index: usize| square.rectangle(level, index);
            self.pass((batch, heads), count, &rectangle, Exactness::Estimated, Place::Inner)?;
        }
        let leaf = |index: usize| square.leaf_rectangle(index);
        self.pass((batch, heads), 1 << square.levels(), &leaf, Exactness::Exact, Place::Last)
    }

    /// Algorithm 1 for the heads of one side: ranks, then one stable sort each.
    fn sort_rows(&mut self, batch: usize, heads: &HeadSet, side: Side) -> Result<()> {
        let (params, kernels, problem) = (self.call.params, self.call.kernels, &self.plan.problem);
        let width = lsh::projection_width(kernels, params.lsh_num_projs as usize);
        let (view, rows, heads, heads_per_projection) = match side {
            Side::Query => (&self.call.tensors.q, problem.n_q, &heads.query, problem.group),
            Side::Key => (&self.call.tensors.k, problem.n_k, &heads.kv, 1),
        };
        let projections = &*self.shared.projections;
        let (ranks, order) = match side {
            Side::Query => (&mut *self.shared.query_spare, &mut *self.shared.query_order),
            Side::Key => (&mut *self.shared.key_spare, &mut *self.shared.key_order),
        };
        let (ranks, order) = (&mut ranks[..heads.len() * rows], &mut order[..heads.len() * rows]);
        for_each_chunk(self.executor, self.lanes, ranks, HASH_CHUNK, &|scratch, chunk, ranks| {
            let mut scratch = PackScratch::carve(kernels, problem, &mut Carver::new(scratch));
            let packer = Packer { kernels, packing: Packing::F32, batch };
            // A chunk of the flat array may end one head and begin the next.
            let mut done = 0;
            while done < ranks.len() {
                let flat = chunk * HASH_CHUNK + done;
                let (head, first) = (heads.start + flat / rows, flat % rows);
                let count = (rows - first).min(ranks.len() - done);
                let kv_head = head / heads_per_projection;
                let normals = &projections[kv_head * problem.head_dim * width..][..problem.head_dim * width];
                let ranks = &mut ranks[done..done + count];
                lsh::rank_rows(&packer, view, (head, first), (normals, width), &mut scratch, ranks);
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

    /// Divides the sorted order of the heads of one side at `[start, middle, end]` for each cut.
    fn split(
        &mut self,
        heads: &HeadSet,
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
        let (from, to, heads, rows) = match side {
            Side::Query => {
                (&mut shared.query_order, &mut shared.query_spare, &heads.query, self.plan.problem.n_q)
            }
            Side::Key => (&mut shared.key_order, &mut shared.key_spare, &heads.kv, self.plan.problem.n_k),
        };
        let order = &**from;
        let halves = &mut to[..heads.len() * rows];
        for_each_chunk(self.executor, self.lanes, halves, rows, &|_, head, to| {
            for [start, middle, end] in cuts() {
                sort::split(&order[head * rows..][start..end], middle, &mut to[start..end]);
            }
        })?;
        // What no cut touched is not looked at again.
        core::mem::swap(from, to);
        Ok(())
    }

    /// |v|^2 of every key.
    fn square_norms(&mut self, batch: usize, heads: &HeadSet) -> Result<()> {
        let (kernels, problem) = (self.call.kernels, &self.plan.problem);
        let value = &self.call.tensors.v;
        let norms = &mut self.shared.norms[..heads.kv.len() * problem.n_k];
        for_each_chunk(self.executor, self.lanes, norms, HASH_CHUNK, &|scratch, chunk, norms| {
            let wide = Carver::new(scratch).take::<f32>(problem.value_dim);
            for (i, norm) in norms.iter_mut().enumerate() {
                let flat = chunk * HASH_CHUNK + i;
                value.read_row(kernels, batch, heads.kv.start + flat / problem.n_k, flat % problem.n_k, wide);
                *norm = wide.iter().map(|x| x * x).sum();
            }
        })
    }

    /// One pass over disjoint query rows of `heads`.
    fn pass(
        &mut self,
        (batch, heads): (usize, &HeadSet),
        count: usize,
        rectangle: &(dyn Fn(usize) -> Option<Rectangle> + Sync),
        exactness: Exactness,
        place: Place,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        let shared = &mut *self.shared;
        let states = States {
            first_head: heads.query.start,
            max: Rows::new(shared.max, 1),
            sum: Rows::new(shared.sum, 1),
            accumulated: Rows::new(shared.accumulated, problem.value_dim),
        };
        let states = (self.plan.stateful && place != Place::Only).then_some(&states);
        let pass = Pass { rectangle, count, states, last: place != Place::Inner };
        if let (Some(GradientRun { of, sums, .. }), Exactness::Exact) = (&self.gradient, exactness) {
            return gradient_exact::run_pass(of, self.executor, self.lanes, (batch, heads), &pass, sums);
        }
        if exactness == Exactness::Exact {
            let batches = batch..batch + 1;
            return exact::run_pass(
                self.call,
                self.executor,
                self.lanes,
                batches,
                heads,
                &pass,
                shared.packed,
            );
        }
        let key_order = self.plan.sorted.then_some(&*shared.key_order);
        if self.plan.row_norm {
            let (norms, n_k) = (&*shared.norms, problem.n_k);
            let prefixes = &mut shared.norm_prefix[..heads.kv.len() * n_k];
            for_each_chunk(self.executor, self.lanes, prefixes, n_k, &|_, index, prefix| {
                let order = key_order.map(|order| &order[index * n_k..][..n_k]);
                let keys = KeyOrder { batch, kv_head: heads.kv.start + index, order };
                for Rectangle { keys: positions, .. } in pass.rectangles() {
                    let norms = positions.clone().map(|position| norms[index * n_k + keys.row(position)]);
                    residual::accumulate_norms(norms, &mut prefix[positions]);
                }
            })?;
        }
        let prepared = Prepared {
            batch,
            heads,
            query_order: self.plan.sorted.then_some(&*shared.query_order),
            key_order,
            norm_prefix: shared.norm_prefix,
        };
        if let Some(GradientRun { of, sums, columns, .. }) = &mut self.gradient {
            let log2_row_sums = &Rows::new(shared.log2_row_sums, 1);
            let estimated = Estimated { of, prepared: &prepared, pass: &pass, sums, log2_row_sums };
            return gradient_hyper::run_pass(&estimated, self.executor, self.lanes, columns);
        }
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
