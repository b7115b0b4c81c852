//! PAPER: selection on the device for all passes of the recursion, then a launch of the attention kernel for all levels
//! and one for the leaves, which go on from the levels' outputs, over as many heads at once as there is workspace for.
//! The row-norm residual, whose outputs have no bound, has a launch for every pass, which goes on from the states of
//! the one before.

mod gradient;
mod hash;
mod lists;
mod mirror;
mod orders;
mod partials;
mod row_norm;
mod samples_gradient;
mod select;

use std::ops::Range;

use hyperattn_core::device::{PaperParts, ProbePlan, RefinedPlan, effective_residual};
use hyperattn_core::stages::{keys_per_query, uniform_columns, uniform_stream};
use hyperattn_core::{Error, ErrorKind, Layouts, Method, Params, Residual, Result};

use crate::abi::{AttendParams, Segment, Tile};
use crate::attend::attend;
use crate::call::Call;
use crate::figures::fill_heads;
use crate::launch::Queue;
use crate::refined::Probing;
use crate::states::States;
use crate::workspace::{Carver, Pointer};
pub(crate) use gradient::run_gradient;
use hash::{projection_rows, projection_width};
use lists::{Lists, Step};
use orders::Orders;
use partials::Partials;

/// Threads of the blocks of the other kernels here.
const THREADS: usize = 128;

/// Queries or keys are sorted.
const SEGMENT_SORTED: u32 = 2;
const TILE_SORTED: u32 = 1;
const TILE_RESUME: u32 = 2;
const TILE_STORE: u32 = 4;
const TILE_PARTIAL: u32 = 16;
const TILE_MERGE: u32 = 32;
const TILE_ORDER_SHIFT: u32 = 8;

const PASS_ONE: u32 = 0;
const PASS_LEVEL: u32 = 1;
const PASS_LEAVES: u32 = 2;

/// Workspace for states and lists that is no reason to divide the heads, and the most of it there may be.
const LEAST_BUDGET: usize = 256 << 20;
const MOST_BUDGET: usize = 8 << 30;

/// Whether there is anything to estimate; otherwise the method is exact attention.
pub(crate) fn estimates(call: &Call<'_>) -> bool {
    !parts(call).nothing_to_estimate
}

fn parts(call: &Call<'_>) -> PaperParts {
    PaperParts::new(call.params, &call.problem, call.tensors.block_mask.is_some())
}

/// Sampled keys of a sub-problem.
fn sample_size(params: &Params) -> usize {
    if effective_residual(params) == Residual::None { 0 } else { params.sample_size as usize }
}

/// The passes of a call, and its part of the workspace.
pub(crate) struct Buffers {
    plan: PaperParts,
    /// Every pass with the lists of a rectangle of it, and how many rectangles are worked on together.
    steps: Vec<(Step, Lists, usize)>,
    /// The launches of the attention kernel, as the numbers of passes and their rectangles. Of the uniform residual and
    /// of none, in a forward call.
    launches: Vec<Vec<(usize, Range<usize>)>>,
    /// KV heads, counted through the batch, that are worked on together.
    heads: usize,
    projections: Pointer<f32>,
    orders: Option<Orders>,
    /// Of the uniform residual and of none.
    partials: Partials,
    /// Of the row-norm residual.
    states: States,
    /// The error estimate, where it is wanted.
    probing: Option<Probing>,
    row_norm: Option<row_norm::Buffers>,
    tiles: Pointer<Tile>,
    segments: Pointer<Segment>,
    positions: Pointer<u32>,
    /// Of the sampled keys, where they are sorted.
    listed_rows: Option<Pointer<u32>>,
    next_tile: Pointer<u32>,
    /// Of a backward call, which has no states.
    gradient: Option<gradient::Buffers>,
}

fn unsupported(sentence: std::fmt::Arguments<'_>) -> Error {
    Error::new(ErrorKind::Unsupported, sentence)
}

/// The call's part of the workspace.
///
/// Under a causal mask a query row has a partial output from half of the levels on average, and one more from a past that is
/// estimated, each the size of a row of out and 4 bytes. With the row-norm residual states take `4 (value_dim + 2)` bytes
/// instead, and as much again for the exact blocks. Every row that is sorted takes 4 bytes for its rank and 4 for each level
/// and the past, those twice with more than 8 hyperplanes; every leaf, or 4096 rows of it, 1 KiB for each of them and once
/// more. Lists take less than that but for small blocks. Where all heads together would take more than k and v twice, they
/// are worked on in sets.
pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    carve_for(call, false, carver)
}

/// The part of the workspace of a backward call: the selection's lists, their inverse and the sums of gradients in
/// place of states. A query row's sums take `4 head_dim` bytes under a causal mask or with the row-norm residual, which
/// takes `4 (value_dim + 3)` more, leaves that the fused kernel may run 4 for turns, a key row's `4 (head_dim +
/// value_dim + 1)`.
pub(crate) fn carve_gradient(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    carve_for(call, true, carver)
}

fn carve_for(call: &Call<'_>, is_gradient: bool, carver: &mut Carver) -> Result<Buffers> {
    let (params, problem) = (call.params, &call.problem);
    if call.tensors.keys_per_query.is_some() && call.tensors.block_mask.is_some() {
        return Err(unsupported(format_args!(
            "keys_per_query is not counted for a block mask in the device's memory; pass NULL"
        )));
    }
    let plan = parts(call);
    let is_row_norm = effective_residual(params) == Residual::RowNorm;
    let (group, all_heads) = (problem.group, problem.batch.saturating_mul(problem.heads_kv));
    let mut steps = if is_gradient { Step::all(&plan) } else { Step::forward(&plan, !is_row_norm) };
    // What is no state cannot go on from one: attention kernels come first.
    if is_row_norm && !is_gradient {
        steps.reverse();
    }
    let stateful = steps.iter().any(|step| step.stores) && !is_gradient;
    let partials = if stateful && !is_row_norm { partials::rows(&plan, &steps) } else { 0 };
    let orders = orders::Shape::new(call, &plan, &steps);
    let sorted = orders.is_some();
    // The row-norm residual's samples are no segments.
    let lists_rows = sorted && !is_row_norm;

    // Of one KV head.
    let query_rows = group.saturating_mul(problem.n_q);
    let states = if is_row_norm { 1 + usize::from(stateful) } else { 0 };
    let state = query_rows
        .saturating_mul((problem.value_dim + 2) * size_of::<f32>() * states)
        .saturating_add(partials::bytes(call, partials.saturating_mul(group)));
    let query_sums = gradient::QuerySums::new(call, &steps);
    let sums = if is_gradient { query_sums.bytes(problem) } else { 0 };
    let fixed =
        orders.as_ref().map_or(0, |orders| orders.bytes(1)).saturating_add(state).saturating_add(sums);
    let lists: Vec<Lists> = steps.iter().map(|step| Lists::new(call, step)).collect();
    let of_a_rectangle = |step: &Step, lists: &Lists| {
        let inverse = if is_gradient { gradient::Lists::new(call, step, lists).bytes(problem) } else { 0 };
        lists.bytes(group).saturating_add(inverse)
    };
    let of_step = |(step, lists): (&Step, &Lists)| of_a_rectangle(step, lists).saturating_mul(step.count);
    let of_steps = steps.iter().zip(&lists).map(of_step);
    // A launch of several passes has the lists of all.
    let is_together = !is_gradient && !is_row_norm;
    let most =
        if is_together { of_steps.fold(0, usize::saturating_add) } else { of_steps.max().unwrap_or(0) };

    let kv_bytes = all_heads
        .saturating_mul(problem.n_k)
        .saturating_mul((problem.head_dim + problem.value_dim) * call.kv_size());
    let budget = kv_bytes.saturating_mul(2).clamp(LEAST_BUDGET, MOST_BUDGET);
    let heads = (budget / fixed.saturating_add(most).max(1)).clamp(1, all_heads.max(1));
    // Equal sets.
    let heads = all_heads.max(1).div_ceil(all_heads.max(1).div_ceil(heads));
    let for_lists = budget.saturating_sub(heads.saturating_mul(fixed)).max(LEAST_BUDGET);

    let mut planned = Vec::new();
    for (step, lists) in steps.into_iter().zip(lists) {
        let bytes = heads.saturating_mul(of_a_rectangle(&step, &lists)).max(1);
        let at_once = (for_lists / bytes).clamp(1, step.count);
        planned.push((step, lists, at_once));
    }
    let rectangles = planned.iter().map(|&(.., at_once)| at_once).max().unwrap_or(0);
    let mut launches = launches(&planned);
    if is_together {
        let bytes = |(number, rectangles): &(usize, Range<usize>)| {
            let (step, lists, _) = &planned[*number];
            of_a_rectangle(step, lists).saturating_mul(heads).saturating_mul(rectangles.len())
        };
        let merges = |&(number, _): &(usize, Range<usize>)| planned[number].0.merges > 0;
        launches = together(launches, for_lists, bytes, merges);
    }
    let mut lens = [0usize; 3];
    for launch in &launches {
        let of_launch = launch.iter().fold([0usize; 3], |sums, (number, rectangles)| {
            let times = heads.saturating_mul(rectangles.len());
            let lens = planned[*number].1.lens(group);
            [0, 1, 2].map(|list| sums[list].saturating_add(lens[list].saturating_mul(times)))
        });
        lens = [0, 1, 2].map(|list| lens[list].max(of_launch[list]));
    }
    let [tiles, segments, positions] = lens;
    if let Some(len) = [tiles, segments, positions].into_iter().find(|&len| u32::try_from(len).is_err()) {
        return Err(unsupported(format_args!(
            "params.block_size, params.sample_size or the block mask make a head's lists {len} long; 2^32 is too much"
        )));
    }
    let rows = [query_rows.saturating_mul(heads), problem.n_k.saturating_mul(heads)];
    let when = |wanted: bool, len: usize| if wanted { len } else { 0 };
    let normals = problem.heads_kv.saturating_mul(projection_rows(call) * projection_width(params));
    let gradient = if is_gradient {
        Some(gradient::Buffers::carve(call, &plan, &planned, heads, query_sums, carver)?)
    } else {
        None
    };
    Ok(Buffers {
        plan,
        gradient,
        steps: planned,
        launches,
        heads,
        projections: carver.take(when(sorted, normals)),
        orders: orders.map(|orders| Orders::carve(orders, heads, carver)),
        partials: Partials::carve(call, partials, heads * group, carver)?,
        states: States::carve(when(stateful && is_row_norm, rows[0]), problem.value_dim, carver),
        probing: match &call.tensors.error {
            Some(_) => {
                let refined = RefinedPlan::new(params, problem, true);
                let probes = ProbePlan::new(params, problem, 0);
                Some(Probing::carve(call, &refined, &probes, carver)?)
            }
            None => None,
        },
        row_norm: is_row_norm.then(|| {
            row_norm::Buffers::carve(call, rows, positions, rectangles.saturating_mul(heads), carver)
        }),
        tiles: carver.take(tiles),
        segments: carver.take(segments),
        positions: carver.take(positions),
        listed_rows: lists_rows.then(|| carver.take(positions)),
        next_tile: carver.take(1),
    })
}

/// Every pass, divided into as many rectangles at once as there may be, as launches of their own.
fn launches(steps: &[(Step, Lists, usize)]) -> Vec<Vec<(usize, Range<usize>)>> {
    let of_step = |(number, (step, _, at_once)): (usize, &(Step, Lists, usize))| {
        let (count, at_once) = (step.count, *at_once);
        (0..count).step_by(at_once).map(move |first| vec![(number, first..count.min(first + at_once))])
    };
    steps.iter().enumerate().flat_map(of_step).collect()
}

/// Launches in one where their lists take no more than `most` bytes, and none of them goes on from what others leave.
fn together(
    launches: Vec<Vec<(usize, Range<usize>)>>,
    most: usize,
    bytes: impl Fn(&(usize, Range<usize>)) -> usize,
    merges: impl Fn(&(usize, Range<usize>)) -> bool,
) -> Vec<Vec<(usize, Range<usize>)>> {
    let (mut joined, mut room) = (Vec::new(), 0);
    for launch in launches {
        let own = launch.iter().map(&bytes).fold(0, usize::saturating_add);
        match joined.last_mut() {
            Some(last) if own <= room && !launch.iter().any(&merges) => Vec::extend(last, launch),
            _ => {
                joined.push(launch);
                room = most;
            }
        }
        room = room.saturating_sub(own);
    }
    joined
}

/// The estimator of the whole call.
///
/// # Safety
/// The call's tensors and the buffers are there, see [`crate::forward`].
pub(crate) unsafe fn run(queue: &Queue<'_>, call: &Call<'_>, buffers: &Buffers) -> Result<()> {
    let paper = Paper { queue, call, buffers };
    // SAFETY: the caller's contract.
    unsafe {
        paper.for_each_set(&|heads| {
            if let Some(row_norm) = &buffers.row_norm {
                paper.square_norms(heads, row_norm)?;
            }
            buffers.launches.iter().try_for_each(|launch| paper.launch(heads, launch))
        })
    }?;
    if let Some(probing) = &buffers.probing {
        // SAFETY: the caller's contract; the output is complete.
        unsafe {
            probing.draw(queue, call)?;
            probing.write_errors(queue)?;
        }
    }
    let Some(to) = &call.tensors.keys_per_query else { return Ok(()) };
    let tensors = &call.tensors;
    let layouts = Layouts {
        q: tensors.q.layout,
        k: tensors.k.layout,
        v: tensors.v.layout,
        out: tensors.out.layout,
        lse: None,
        block_mask: None,
        error: None,
        keys_per_query: None,
        mask: None,
    };
    let keys = keys_per_query(&Params { method: Method::Paper, ..*call.params }, &layouts)?;
    // SAFETY: the tensor is the call's to write.
    unsafe { fill_heads(queue, call, to, keys as f32) }
}

/// A pass or some rectangles of it, and what its tiles have in common.
type PassWork<'a> = (&'a Step, &'a Lists, mirror::PassTiles);

/// A call under way. KV heads are counted through the batch here, and query heads are those of these KV heads.
struct Paper<'r, 'a> {
    queue: &'r Queue<'a>,
    call: &'r Call<'r>,
    buffers: &'r Buffers,
}

/// Blocks of `threads` for `items`.
fn blocks_of(items: usize, threads: usize) -> [u32; 3] {
    [items.div_ceil(threads) as u32, 1, 1]
}

/// Tiles of a launch.
fn tile_count(common: &mirror::PassTiles) -> usize {
    let of_a_rectangle = common.blocks as usize * (common.group * common.tiles_per_block) as usize;
    of_a_rectangle * common.kv_heads as usize * common.pass.count as usize
}

impl Paper<'_, '_> {
    /// Calls `body` for every set of heads, after their rows' orders.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn for_each_set(&self, body: &dyn Fn(&Range<usize>) -> Result<()>) -> Result<()> {
        let orders = self.buffers.orders.as_ref();
        if orders.is_some() {
            // SAFETY: the caller's contract.
            unsafe { self.draw_projections() }?;
        }
        let all_heads = self.call.problem.batch * self.call.problem.heads_kv;
        for first in (0..all_heads).step_by(self.buffers.heads) {
            let heads = first..all_heads.min(first + self.buffers.heads);
            if let Some(orders) = orders {
                // SAFETY: the caller's contract; ranks are written before they are sorted.
                unsafe {
                    self.hash(&heads, orders)?;
                    self.sort(&heads, orders)?;
                }
            }
            body(&heads)?;
        }
        Ok(())
    }

    /// Calls `body` for the rectangles of every pass that are worked on together, in order.
    fn for_each_part(&self, body: impl Fn(&Step, &Lists, Range<usize>) -> Result<()>) -> Result<()> {
        self.buffers.launches.iter().flatten().try_for_each(|(number, rectangles)| {
            let (step, lists, _) = &self.buffers.steps[*number];
            body(step, lists, rectangles.clone())
        })
    }

    /// A launch of the attention kernel for `heads`, or a pass with the row-norm residual.
    ///
    /// # Safety
    /// As for [`run`], like all that follow.
    unsafe fn launch(&self, heads: &Range<usize>, launch: &[(usize, Range<usize>)]) -> Result<()> {
        let buffers = self.buffers;
        let (mut tiles, mut segments, mut positions) = (0, 0, 0);
        let mut passes = Vec::new();
        for (number, rectangles) in launch {
            let (step, lists, _) = &buffers.steps[*number];
            let mut common = self.rectangles(heads, step, lists, rectangles.clone());
            if let (true, Some(row_norm)) = (step.estimated, &buffers.row_norm) {
                // SAFETY: the caller's contract.
                return unsafe { self.row_norm_pass(heads, step, lists, common, row_norm) };
            }
            common.tiles = buffers.tiles.after(tiles);
            (common.first_segment, common.first_position) = (segments as u32, positions as u32);
            passes.push((step, lists, common));
            let lens = lists.lens(common.group as usize).map(|len| len * heads.len() * rectangles.len());
            (tiles, segments, positions) = (tiles + lens[0], segments + lens[1], positions + lens[2]);
        }
        let mut attention = self.attention(heads, None, &buffers.states);
        attention.tile_count = tiles as u32;
        // SAFETY: the caller's contract; the tiles are written before they are read.
        unsafe {
            self.select(heads, &passes)?;
            attend(self.queue, self.call, &attention)
        }
    }

    fn square(&self) -> mirror::Square {
        self.buffers.plan.parts.square.map_or(mirror::Square::default(), |square| mirror::Square {
            query_start: square.query_start as u32,
            key_start: square.key_start as u32,
            len: square.len as u32,
            // Longer than any interval is as good.
            leaf: u32::try_from(square.leaf).unwrap_or(u32::MAX),
        })
    }

    /// What all tiles of rectangles of a pass have in common.
    fn rectangles(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        rectangles: Range<usize>,
    ) -> mirror::PassTiles {
        let one = step.one.as_ref().map_or(mirror::Rectangle::default(), |one| mirror::Rectangle {
            query_start: one.queries.start as u32,
            query_end: one.queries.end as u32,
            key_start: one.keys.start as u32,
            key_end: one.keys.end as u32,
        });
        let count = rectangles.len() as u32;
        let pass = mirror::Pass {
            kind: step.kind,
            level: step.level,
            first: rectangles.start as u32,
            count,
            one,
            square: self.square(),
        };
        self.common(heads, step, lists, pass)
    }

    /// The orders of a pass of a set of heads.
    fn orders(&self, heads: &Range<usize>, step: &Step) -> [Pointer<u32>; 2] {
        let orders = self.buffers.orders.as_ref().filter(|_| step.estimated);
        orders.map_or([Pointer::NULL; 2], |orders| orders.of(orders.number(step), heads.len()))
    }

    /// Flags of all tiles of a pass, and of those of all rectangles but the first.
    fn flags(&self, step: &Step) -> [u32; 2] {
        let orders = self.buffers.orders.as_ref().filter(|_| step.estimated);
        let sorted = orders.map_or(0, |_| TILE_SORTED);
        let of_square = step.kind != PASS_ONE;
        // Rows of the first rectangle are in no pass before a level's, and in none after it backwards, but in the past.
        let past = self.buffers.steps.iter().any(|(step, ..)| step.kind == PASS_ONE && step.stores);
        let unless_first = |flag| {
            if !of_square {
                [0, 0]
            } else if past {
                [flag, 0]
            } else {
                [0, flag]
            }
        };
        let stored = |flag| if step.stores { flag } else { 0 };
        let [always, later] = if self.buffers.gradient.is_some() {
            let [resume, later] = unless_first(TILE_RESUME);
            [stored(TILE_STORE) | resume, later]
        } else if self.buffers.row_norm.is_some() {
            // Leaves come first and go on from nothing.
            let [store, later] = unless_first(TILE_STORE);
            [store | stored(TILE_RESUME), later]
        } else {
            let order = orders.map_or(0, |orders| (orders.number(step) as u32) << TILE_ORDER_SHIFT);
            let merge = if step.merges > 0 { TILE_MERGE } else { 0 };
            [stored(TILE_PARTIAL) | merge | order, 0]
        };
        [sorted | always, later]
    }

    /// What all tiles of a pass have in common.
    fn common(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        pass: mirror::Pass,
    ) -> mirror::PassTiles {
        let problem = &self.call.problem;
        let samples = if step.estimated { sample_size(self.call.params) } else { 0 };
        let log_weight = |keys: usize| {
            let column = uniform_columns(uniform_stream(0, 0, 0), 0..keys.max(1), samples).next();
            column.map_or(0.0, |column| column.log_weight)
        };
        let [flags, later_flags] = self.flags(step);
        let of_levels = |(step, ..): &&(Step, Lists, usize)| step.kind == PASS_LEVEL;
        let levels = self.buffers.steps.iter().filter(of_levels).count();
        mirror::PassTiles {
            pass,
            tiles: self.buffers.tiles,
            segments: self.buffers.segments,
            heads_q: problem.heads_q as u32,
            group: problem.group as u32,
            first_kv_head: heads.start as u32,
            kv_heads: heads.len() as u32,
            blocks: lists.blocks as u32,
            tiles_per_block: lists.tiles_per_block as u32,
            flags,
            later_flags,
            sample_size: samples as u32,
            most_keys: step.keys as u32,
            log_weight: log_weight(step.keys),
            log_weight_less: log_weight(step.keys.saturating_sub(1)),
            first_segment: 0,
            first_position: 0,
            levels: levels as u32,
            merges_one: u32::from(step.merges > levels),
        }
    }

    /// The attention kernel's view of the lists, of one pass or of all. Orders and states are those of `heads` only,
    /// while it counts heads from the first.
    fn attention(
        &self,
        heads: &Range<usize>,
        pass: Option<(&Step, &mirror::PassTiles)>,
        states: &States,
    ) -> AttendParams {
        let (problem, buffers) = (&self.call.problem, self.buffers);
        let earlier = heads.start * problem.group * problem.n_q;
        let states = states.before(earlier, problem.value_dim);
        let mut attention = self.call.attend_params();
        attention.tile_count = pass.map_or(0, |(_, common)| tile_count(common) as u32);
        attention.tiles = buffers.tiles;
        attention.segments = buffers.segments;
        attention.positions = buffers.positions;
        let orders = match (pass, &buffers.orders) {
            (Some((step, _)), _) => self.orders(heads, step),
            (None, Some(orders)) => orders.of(0, heads.len()),
            (None, None) => [Pointer::NULL; 2],
        };
        attention.query_order = orders[0].before(earlier);
        attention.key_order = orders[1].before(heads.start * problem.n_k);
        attention.order_heads = heads.len() as u32;
        attention.listed_rows = buffers.listed_rows.unwrap_or(Pointer::NULL);
        states.give(&mut attention);
        buffers.partials.give(self.call, heads, &mut attention);
        attention.next_tile = buffers.next_tile;
        attention
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{DeviceTensor, DeviceTensors};
    use hyperattn_core::{DType, Mask, TensorLayout};

    fn tensors(heads: [i64; 2], rows: [i64; 2], dim: i64) -> DeviceTensors {
        let tensor = |heads, rows| DeviceTensor {
            address: 0,
            layout: TensorLayout::contiguous(DType::BF16, [1, heads, rows, dim]),
        };
        let (of_queries, of_keys) = (tensor(heads[0], rows[0]), tensor(heads[1], rows[1]));
        DeviceTensors::new(of_queries, of_keys, of_keys, of_queries)
    }

    fn params(mask: Mask) -> Params {
        Params { method: Method::Paper, mask, ..Params::default() }
    }

    #[test]
    fn passes_visit_the_rows_in_order() {
        let params = params(Mask::CausalBottomRight);
        let call = Call::new(&params, &tensors([1, 1], [20_000, 30_000], 64)).unwrap();
        let steps = Step::all(&parts(&call));
        let facts: Vec<_> =
            steps.iter().map(|step| (step.kind, step.count, step.estimated, step.stores)).collect();
        assert_eq!(
            facts,
            [
                (PASS_ONE, 1, true, true),
                (PASS_LEVEL, 1, true, true),
                (PASS_LEVEL, 2, true, true),
                (PASS_LEVEL, 4, true, true),
                (PASS_LEAVES, 8, false, false)
            ]
        );
        assert_eq!((steps[2].queries, steps[2].keys), (5000, 5000));
    }

    #[test]
    fn the_workspace_is_small_beside_the_tensors() {
        let size = |mask, heads, n, dim| {
            let (params, tensors) = (params(mask), tensors(heads, [n, n], dim));
            let mut carver = Carver::measuring();
            let buffers = carve(&Call::new(&params, &tensors).unwrap(), &mut carver).unwrap();
            assert!(buffers.steps.iter().all(|(step, _, at_once)| *at_once == step.count));
            (buffers.heads, carver.used().unwrap())
        };
        let (heads, bytes) = size(Mask::None, [32, 32], 131_072, 64);
        assert!(heads == 32 && bytes < 90 << 20, "{heads} heads, {bytes} bytes");
        let (heads, bytes) = size(Mask::CausalBottomRight, [32, 32], 131_072, 128);
        assert!(heads == 32 && bytes < 2900 << 20, "{heads} heads, {bytes} bytes");
        let (heads, bytes) = size(Mask::CausalBottomRight, [32, 8], 131_072, 128);
        assert!(heads == 2 && bytes < 1024 << 20, "{heads} heads, {bytes} bytes");
    }

    #[test]
    fn all_levels_are_one_launch_and_the_leaves_another() {
        let launches = |mask, residual| {
            let params = Params { residual, ..params(mask) };
            let call = Call::new(&params, &tensors([4, 4], [20_000, 30_000], 64)).unwrap();
            carve(&call, &mut Carver::measuring()).unwrap().launches
        };
        let of_causal = launches(Mask::CausalBottomRight, Residual::Uniform);
        assert_eq!(of_causal, [vec![(0, 0..1), (1, 0..1), (2, 0..2), (3, 0..4)], vec![(4, 0..8)]]);
        // Of the first queries there are levels and leaves, of the others nothing but a rectangle.
        let params = params(Mask::CausalTopLeft);
        let call = Call::new(&params, &tensors([4, 4], [30_000, 20_000], 64)).unwrap();
        let of_causal = carve(&call, &mut Carver::measuring()).unwrap().launches;
        assert_eq!(of_causal, [vec![(0, 0..1), (1, 0..1), (2, 0..2), (3, 0..4)], vec![(4, 0..8)]]);
        assert_eq!(launches(Mask::None, Residual::Uniform), [vec![(0, 0..1)]]);
        // States go through memory from one pass to the next.
        assert_eq!(launches(Mask::CausalBottomRight, Residual::RowNorm).len(), 5);
    }

    #[test]
    fn partials_and_orders_have_their_places() {
        let params = params(Mask::CausalBottomRight);
        let call = Call::new(&params, &tensors([4, 2], [20_001, 30_000], 64)).unwrap();
        let plan = parts(&call);
        let steps = Step::forward(&plan, true);
        // Three levels and the past.
        assert_eq!(partials::rows(&plan, &steps), 3 * 10_000 + 20_001);
        assert_eq!(steps.last().map(|step| step.merges), Some(4));
        let shape = orders::Shape::new(&call, &plan, &steps).unwrap();
        let orders = Orders::carve(shape, 2, &mut Carver::measuring());
        let numbers: Vec<_> = steps.iter().map(|step| orders.number(step)).collect();
        assert_eq!(numbers, [3, 0, 1, 2, 3]);
        let [queries, keys] =
            [0, 1].map(|side| orders.of(2, 2)[side].address() - orders.of(1, 2)[side].address());
        assert_eq!([queries, keys], [4 * 4 * 20_001, 4 * 2 * 30_000]);
        // A past that is exact is met by the leaves.
        let call = Call::new(&params, &tensors([4, 2], [20_000, 21_000], 64)).unwrap();
        let steps = Step::forward(&parts(&call), true);
        assert_eq!(steps.last().map(|step| (step.merges, step.one.is_some())), Some((3, true)));
        assert_eq!(steps.len(), 4);
    }

    #[test]
    fn lists_that_are_long_are_made_in_parts() {
        let params =
            Params { min_seq_len: 1, block_size: 0, sample_size: 1 << 14, ..params(Mask::CausalTopLeft) };
        let call = Call::new(&params, &tensors([8, 8], [131_072, 131_072], 64)).unwrap();
        let mut carver = Carver::measuring();
        let buffers = carve(&call, &mut carver).unwrap();
        assert!(buffers.steps.iter().any(|(step, _, at_once)| *at_once < step.count));
        assert!(carver.used().unwrap() < 1 << 30);
    }
}
