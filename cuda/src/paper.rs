//! PAPER: selection on the device, then one launch of the attention kernel for every pass of the recursion, over as
//! many heads at once as there is workspace for.

mod gradient;
mod lists;
mod mirror;
mod row_norm;
mod samples_gradient;

use std::ops::Range;

use hyperattn_core::device::{PaperParts, ProbePlan, RefinedPlan, effective_residual};
use hyperattn_core::stages::{keys_per_query, uniform_columns, uniform_stream};
use hyperattn_core::{Error, ErrorKind, Layouts, Method, Params, Residual, Result};

use crate::abi::{AttendParams, Segment, Tile, element_type};
use crate::attend::attend;
use crate::call::{Call, DeviceBlockMask, DeviceTensor};
use crate::figures::fill_heads;
use crate::launch::{Queue, args};
use crate::refined::Probing;
use crate::states::States;
use crate::workspace::{Carver, Pointer};
pub(crate) use gradient::run_gradient;
use lists::{Lists, Step};

/// Hyperplanes are stored in groups of this many (HYPERPLANE_GROUP).
const HYPERPLANE_GROUP: usize = 8;
/// Threads of the blocks that hash, and the rows they hash (HASH_THREADS, HASH_TILE_ROWS * HASH_TILES).
const HASH_THREADS: u32 = 128;
const HASH_ROWS: usize = 256 * 8;
/// Bytes of the rows that are staged in shared memory (2 * HASH_STAGE).
const HASH_STAGES: usize = 2 * 256 * 128;
/// Threads of the blocks that sort, rows of a chunk and values of a digit (SORT_THREADS, SORT_CHUNK, SORT_DIGITS).
const SORT_THREADS: u32 = 256;
const SORT_CHUNK: usize = 4096;
const SORT_DIGITS: usize = 256;
const SORT_DIGIT_BITS: u32 = 8;
/// Threads of the blocks of the other kernels here.
const THREADS: usize = 128;

/// Queries or keys are sorted.
const SEGMENT_SORTED: u32 = 2;
const TILE_SORTED: u32 = 1;
const TILE_STORE: u32 = 4;

const PASS_ONE: u32 = 0;
const PASS_LEVEL: u32 = 1;
const PASS_LEAVES: u32 = 2;

const VISITED_NONE: u32 = 0;
const VISITED_LATER: u32 = 1;
const VISITED_ALL: u32 = 2;

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
    /// KV heads, counted through the batch, that are worked on together.
    heads: usize,
    projections: Pointer<f32>,
    /// Of queries and of keys.
    ranks: [Pointer<u32>; 2],
    orders: [Pointer<u32>; 2],
    spares: [Pointer<u32>; 2],
    states: States,
    /// The error estimate, where it is wanted.
    probing: Option<Probing>,
    row_norm: Option<row_norm::Buffers>,
    tiles: Pointer<Tile>,
    segments: Pointer<Segment>,
    positions: Pointer<u32>,
    /// Of the sampled keys, where they are sorted.
    listed_rows: Pointer<u32>,
    counters: Pointer<u32>,
    next_tile: Pointer<u32>,
    /// Of a backward call, which has no states.
    gradient: Option<gradient::Buffers>,
}

fn unsupported(sentence: std::fmt::Arguments<'_>) -> Error {
    Error::new(ErrorKind::Unsupported, sentence)
}

/// Columns of a stored projection matrix.
fn projection_width(params: &Params) -> usize {
    (params.lsh_num_projs as usize).next_multiple_of(HYPERPLANE_GROUP)
}

/// Rows of a stored projection matrix.
fn projection_rows(call: &Call<'_>) -> usize {
    call.problem.head_dim.next_multiple_of(8)
}

/// The call's part of the workspace.
///
/// States take `4 (value_dim + 2)` bytes for every query row under a causal mask, and as much again for the row-norm
/// residual; orders and ranks 8 to 12 for every row that is sorted; lists less than that but for small blocks. Where
/// all heads together would take more than k and v twice, they are worked on in sets.
pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    carve_for(call, false, carver)
}

/// The part of the workspace of a backward call: the selection's lists, their inverse and the sums of gradients in place of
/// states. A query row's sums take `4 head_dim` bytes under a causal mask or with the row-norm residual, which takes
/// `4 (value_dim + 3)` more, leaves that the fused kernel may run 4 for turns, a key row's `4 (head_dim + value_dim + 1)`.
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
    let steps = Step::all(&plan);
    let stateful = steps.iter().any(|step| step.stores);
    let sorted = plan.sorted && steps.iter().any(|step| step.estimated);
    // The row-norm residual's samples are no segments.
    let lists_rows = sorted && !is_row_norm;
    let spare = sorted && params.lsh_num_projs > SORT_DIGIT_BITS;

    // Of one KV head.
    let query_rows = group.saturating_mul(problem.n_q);
    let states = usize::from(stateful && !is_gradient) + usize::from(is_row_norm);
    let state = query_rows.saturating_mul((problem.value_dim + 2) * size_of::<f32>() * states);
    let query_sums = gradient::QuerySums::new(call, &steps);
    let sums = if is_gradient { query_sums.bytes(problem) } else { 0 };
    let row_words = if spare { 3 } else { 2 * usize::from(sorted) };
    let fixed = query_rows
        .saturating_add(problem.n_k)
        .saturating_mul(row_words * size_of::<u32>())
        .saturating_add(state)
        .saturating_add(sums);
    let lists: Vec<Lists> = steps.iter().map(|step| Lists::new(call, &plan, step)).collect();
    let of_a_rectangle = |step: &Step, lists: &Lists| {
        let inverse = if is_gradient { gradient::Lists::new(call, step, lists).bytes(problem) } else { 0 };
        lists.bytes(group).saturating_add(inverse)
    };
    let of_step = |(step, lists): (&Step, &Lists)| of_a_rectangle(step, lists).saturating_mul(step.count);
    let most = steps.iter().zip(&lists).map(of_step).max().unwrap_or(0);

    let kv_bytes = all_heads
        .saturating_mul(problem.n_k)
        .saturating_mul((problem.head_dim + problem.value_dim) * call.kv_size());
    let budget = kv_bytes.saturating_mul(2).clamp(LEAST_BUDGET, MOST_BUDGET);
    let heads = (budget / fixed.saturating_add(most).max(1)).clamp(1, all_heads.max(1));
    // Equal sets.
    let heads = all_heads.max(1).div_ceil(all_heads.max(1).div_ceil(heads));
    let for_lists = budget.saturating_sub(heads.saturating_mul(fixed)).max(LEAST_BUDGET);

    let (mut lens, mut rectangles) = ([0usize; 4], 0usize);
    let mut planned = Vec::new();
    for (step, lists) in steps.into_iter().zip(lists) {
        let bytes = heads.saturating_mul(of_a_rectangle(&step, &lists)).max(1);
        let at_once = (for_lists / bytes).clamp(1, step.count);
        for (most, len) in lens.iter_mut().zip(lists.lens(group)) {
            *most = len.saturating_mul(heads).saturating_mul(at_once).max(*most);
        }
        rectangles = rectangles.max(at_once);
        planned.push((step, lists, at_once));
    }
    let [tiles, segments, positions, counters] = lens;
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
        heads,
        projections: carver.take(when(sorted, normals)),
        ranks: rows.map(|rows| carver.take(when(sorted, rows))),
        orders: rows.map(|rows| carver.take(when(sorted, rows))),
        spares: rows.map(|rows| carver.take(when(spare, rows))),
        states: States::carve(when(stateful && !is_gradient, rows[0]), problem.value_dim, carver),
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
        // NULL tells the kernel that there is none.
        listed_rows: if lists_rows { carver.take(positions) } else { Pointer::NULL },
        counters: carver.take(counters),
        next_tile: carver.take(1),
    })
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
            paper.for_each_launch(|step, lists, rectangles| paper.pass(heads, step, lists, rectangles))
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

/// A block of a mask; one that is longer than any sequence is as good.
fn block_length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Paper<'_, '_> {
    fn sorted(&self) -> bool {
        self.buffers.plan.sorted && self.buffers.steps.iter().any(|(step, ..)| step.estimated)
    }

    /// Calls `body` for every set of heads, after their rows' ranks.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn for_each_set(&self, body: &dyn Fn(&Range<usize>) -> Result<()>) -> Result<()> {
        let sorted = self.sorted();
        if sorted {
            // SAFETY: the caller's contract.
            unsafe { self.draw_projections() }?;
        }
        let all_heads = self.call.problem.batch * self.call.problem.heads_kv;
        for first in (0..all_heads).step_by(self.buffers.heads) {
            let heads = first..all_heads.min(first + self.buffers.heads);
            if sorted {
                // SAFETY: the caller's contract.
                unsafe { self.hash(&heads) }?;
            }
            body(&heads)?;
        }
        Ok(())
    }

    /// Calls `body` for the rectangles of every pass that are worked on together, in order.
    fn for_each_launch(&self, body: impl Fn(&Step, &Lists, Range<usize>) -> Result<()>) -> Result<()> {
        for (step, lists, at_once) in &self.buffers.steps {
            for first in (0..step.count).step_by(*at_once) {
                body(step, lists, first..step.count.min(first + at_once))?;
            }
        }
        Ok(())
    }

    /// The hyperplanes of every KV head of a batch item.
    ///
    /// # Safety
    /// As for [`run`], like all that follow.
    unsafe fn draw_projections(&self) -> Result<()> {
        let (params, problem) = (self.call.params, &self.call.problem);
        let width = projection_width(params);
        let arguments = mirror::ProjectionParams {
            seed: params.seed,
            offset: params.offset,
            projections: self.buffers.projections,
            heads_kv: problem.heads_kv as u32,
            head_dim: problem.head_dim as u32,
            num_projs: params.lsh_num_projs,
            width: width as u32,
            first_stream_head: problem.first_kv_head as u32,
            reserved: 0,
        };
        let grid = blocks_of(problem.heads_kv * projection_rows(self.call) * width, THREADS);
        // SAFETY: this is the kernel's parameter, and it writes the projections only.
        unsafe { self.queue.launch(c"paper_projections", grid, THREADS as u32, 0, args![arguments]) }
    }

    /// The ranks of all rows of `heads`.
    unsafe fn hash(&self, heads: &Range<usize>) -> Result<()> {
        let (params, problem, tensors) = (self.call.params, &self.call.problem, &self.call.tensors);
        let group = problem.group;
        let side = |tensor: &DeviceTensor, ranks, count: usize, group: usize, per_projection: usize| {
            let rows = tensor.view();
            let bytes = problem.head_dim * tensor.layout.dtype.size();
            let strides = rows.batch_stride | rows.head_stride | rows.row_stride;
            let common = rows.data | strides as u64 | bytes as u64;
            mirror::HashSide {
                rows,
                ranks,
                element: element_type(tensor.layout.dtype),
                heads: (problem.heads_kv * group) as u32,
                heads_per_projection: per_projection as u32,
                first_head: (heads.start * group) as u32,
                set_heads: (heads.len() * group) as u32,
                count: count as u32,
                unit: 1 << common.trailing_zeros().min(4),
                blocks: count.div_ceil(HASH_ROWS) as u32,
            }
        };
        let arguments = mirror::HashParams {
            query: side(&tensors.q, self.buffers.ranks[0], problem.n_q, group, group),
            key: side(&tensors.k, self.buffers.ranks[1], problem.n_k, 1, 1),
            projections: self.buffers.projections,
            head_dim: problem.head_dim as u32,
            reserved: 0,
        };
        let width = projection_width(params);
        let name = match width / HYPERPLANE_GROUP {
            1 => c"paper_hash_8",
            2 => c"paper_hash_16",
            _ => c"paper_hash_24",
        };
        let blocks = |side: &mirror::HashSide| side.set_heads * side.blocks;
        let grid = [blocks(&arguments.query) + blocks(&arguments.key), 1, 1];
        let shared = projection_rows(self.call) * width * size_of::<f32>() + HASH_STAGES;
        // SAFETY: this is the kernel's parameter; it reads q, k and the projections and writes the ranks.
        unsafe { self.queue.launch(name, grid, HASH_THREADS, shared as u32, args![arguments]) }
    }

    /// Rectangles `rectangles` of one pass, for `heads`.
    unsafe fn pass(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        rectangles: Range<usize>,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        let common = unsafe { self.sort_rectangles(heads, step, lists, rectangles) }?;
        if let (true, Some(row_norm)) = (step.estimated, &self.buffers.row_norm) {
            // SAFETY: the caller's contract.
            return unsafe { self.row_norm_pass(heads, step, lists, common, row_norm) };
        }
        // SAFETY: the caller's contract; the tiles are written before they are read.
        unsafe {
            self.select(heads, step, lists, &common)?;
            attend(self.queue, self.call, &self.attention(heads, &common, &self.buffers.states))
        }
    }

    /// The orders of the rectangles' rows, and what all tiles have in common.
    unsafe fn sort_rectangles(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        rectangles: Range<usize>,
    ) -> Result<mirror::PassTiles> {
        let one = step.one.as_ref().map_or(mirror::Rectangle::default(), |one| mirror::Rectangle {
            query_start: one.queries.start as u32,
            query_end: one.queries.end as u32,
            key_start: one.keys.start as u32,
            key_end: one.keys.end as u32,
        });
        let square =
            self.buffers.plan.parts.square.map_or(mirror::Square::default(), |square| mirror::Square {
                query_start: square.query_start as u32,
                key_start: square.key_start as u32,
                len: square.len as u32,
                // Longer than any interval is as good.
                leaf: u32::try_from(square.leaf).unwrap_or(u32::MAX),
            });
        let count = rectangles.len() as u32;
        let pass = mirror::Pass {
            kind: step.kind,
            level: step.level,
            first: rectangles.start as u32,
            count,
            one,
            square,
        };
        if step.estimated && self.buffers.plan.sorted {
            // SAFETY: the caller's contract.
            unsafe { self.sort(heads, lists, pass) }?;
        }
        Ok(self.common(heads, step, lists, pass))
    }

    /// The uniform samples and the tiles.
    unsafe fn select(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        common: &mirror::PassTiles,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe {
            if step.estimated && self.call.tensors.block_mask.is_none() {
                self.samples(heads, common, self.buffers.positions)?;
            }
            self.tiles(step, lists, *common)
        }
    }

    /// Sorts the query rows and the key rows of every rectangle.
    unsafe fn sort(&self, heads: &Range<usize>, lists: &Lists, pass: mirror::Pass) -> Result<()> {
        let (problem, buffers) = (&self.call.problem, self.buffers);
        let side = |ranks, rows: usize, heads: usize| mirror::SortSide {
            ranks,
            from: Pointer::NULL,
            to: Pointer::NULL,
            rows: rows as u32,
            heads: heads as u32,
        };
        let mut arguments = mirror::SortParams {
            pass,
            query: side(buffers.ranks[0], problem.n_q, heads.len() * problem.group),
            key: side(buffers.ranks[1], problem.n_k, heads.len()),
            counters: buffers.counters,
            chunks: lists.chunks as u32,
            shift: 0,
        };
        let intervals = (arguments.query.heads + arguments.key.heads) * pass.count;
        let of_chunks = [intervals * arguments.chunks, 1, 1];
        let passes = self.call.params.lsh_num_projs.div_ceil(SORT_DIGIT_BITS);
        for pass in 0..passes {
            // The last one writes the orders.
            let to = if (passes - 1 - pass).is_multiple_of(2) { buffers.orders } else { buffers.spares };
            (arguments.query.to, arguments.key.to) = (to[0], to[1]);
            arguments.shift = pass * SORT_DIGIT_BITS;
            // SAFETY: these are the kernels' parameters; they read the ranks, and read and write orders and counters.
            unsafe {
                if arguments.chunks > 1 {
                    self.queue.launch(c"paper_sort_count", of_chunks, SORT_THREADS, 0, args![arguments])?;
                    self.queue.launch(
                        c"paper_sort_scan",
                        [intervals, 1, 1],
                        SORT_THREADS,
                        0,
                        args![arguments],
                    )?;
                }
                self.queue.launch(c"paper_sort_scatter", of_chunks, SORT_THREADS, 0, args![arguments])?;
            }
            (arguments.query.from, arguments.key.from) = (to[0], to[1]);
        }
        Ok(())
    }

    /// What all tiles of a pass have in common.
    fn common(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        pass: mirror::Pass,
    ) -> mirror::PassTiles {
        let (problem, plan) = (&self.call.problem, &self.buffers.plan);
        let samples = if step.estimated { sample_size(self.call.params) } else { 0 };
        let log_weight = |keys: usize| {
            let column = uniform_columns(uniform_stream(0, 0, 0), 0..keys.max(1), samples).next();
            column.map_or(0.0, |column| column.log_weight)
        };
        let sorted = if step.estimated && plan.sorted { TILE_SORTED } else { 0 };
        let visited = match step.kind {
            PASS_ONE => VISITED_NONE,
            _ if plan.parts.dense_precedes_square() => VISITED_ALL,
            _ => VISITED_LATER,
        };
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
            flags: sorted | if step.stores { TILE_STORE } else { 0 },
            visited,
            sample_size: samples as u32,
            most_keys: step.keys as u32,
            log_weight: log_weight(step.keys),
            log_weight_less: log_weight(step.keys.saturating_sub(1)),
        }
    }

    /// Which keys the queries of estimated rectangles meet exactly.
    fn exact_blocks(&self) -> mirror::ExactBlocks {
        let mask = self.call.tensors.block_mask;
        mirror::ExactBlocks {
            row_offsets: mask.map_or(0, |mask| mask.row_offsets),
            columns: mask.map_or(0, |mask| mask.columns),
            head_stride: mask.map_or(0, |mask| mask.head_stride as u64),
            query_block: mask.map_or(0, |mask| block_length(mask.query_block)),
            key_block: mask.map_or(0, |mask| block_length(mask.key_block)),
            block_size: self.call.params.block_size,
            sorted: if self.buffers.plan.sorted { SEGMENT_SORTED } else { 0 },
        }
    }

    /// The uniform samples of every rectangle, to `positions`.
    unsafe fn samples(
        &self,
        heads: &Range<usize>,
        common: &mirror::PassTiles,
        positions: Pointer<u32>,
    ) -> Result<()> {
        let (params, problem) = (self.call.params, &self.call.problem);
        let samples = mirror::SampleParams {
            pass: common.pass,
            seed: params.seed,
            offset: params.offset,
            positions,
            heads_kv: problem.heads_kv as u32,
            first_head: heads.start as u32,
            set_heads: heads.len() as u32,
            sample_size: common.sample_size,
            key_order: self.buffers.orders[1],
            listed_rows: self.buffers.listed_rows,
            n_k: problem.n_k as u32,
            first_stream_head: problem.first_kv_head as u32,
        };
        let count = common.sample_size as usize * heads.len() * common.pass.count as usize;
        // SAFETY: this is the kernel's parameter, and it writes the positions and their rows only.
        unsafe {
            self.queue.launch(c"paper_samples", blocks_of(count, THREADS), THREADS as u32, 0, args![samples])
        }
    }

    /// The tiles of a pass.
    unsafe fn tiles(&self, step: &Step, lists: &Lists, common: mirror::PassTiles) -> Result<()> {
        match &self.call.tensors.block_mask {
            // SAFETY: the caller's contract.
            Some(mask) if step.estimated => return unsafe { self.block_mask_tiles(lists, common, mask) },
            _ => {}
        }
        let arguments = mirror::PaperTileParams {
            common,
            exact: u32::from(!step.estimated),
            limited: self.call.limited(),
            visible: self.call.visible(),
            block_size: self.call.params.block_size,
            sorted: if step.estimated && self.buffers.plan.sorted { SEGMENT_SORTED } else { 0 },
            reserved: 0,
        };
        let grid = blocks_of(tile_count(&common), THREADS);
        // SAFETY: this is the kernel's parameter, and it writes tiles and segments only.
        unsafe { self.queue.launch(c"paper_tiles", grid, THREADS as u32, 0, args![arguments]) }
    }

    /// Tiles of the caller's blocks.
    unsafe fn block_mask_tiles(
        &self,
        lists: &Lists,
        common: mirror::PassTiles,
        mask: &DeviceBlockMask,
    ) -> Result<()> {
        let (params, problem) = (self.call.params, &self.call.problem);
        let arguments = mirror::BlockMaskTileParams {
            common,
            seed: params.seed,
            offset: params.offset,
            row_offsets: mask.row_offsets,
            columns: mask.columns,
            head_stride: mask.head_stride as u64,
            positions: self.buffers.positions,
            heads_kv: problem.heads_kv as u32,
            per_head: u32::from(mask.head_stride != 0),
            query_block: block_length(mask.query_block),
            key_block: block_length(mask.key_block),
            segments_per_block: lists.segments_per_block as u32,
            first_stream_head: problem.first_kv_head as u32,
        };
        let warps = (common.kv_heads * common.pass.count) as usize * lists.blocks * lists.lists_per_block;
        let grid = blocks_of(warps, THREADS / 32);
        // SAFETY: this is the kernel's parameter; it reads the mask's arrays and writes tiles, segments and positions.
        unsafe { self.queue.launch(c"paper_block_mask_tiles", grid, THREADS as u32, 0, args![arguments]) }
    }

    /// The attention kernel's view of the lists. Orders and states are those of `heads` only, while it counts heads
    /// from the first.
    fn attention(&self, heads: &Range<usize>, common: &mirror::PassTiles, states: &States) -> AttendParams {
        let (problem, buffers) = (&self.call.problem, self.buffers);
        let earlier = heads.start * problem.group * problem.n_q;
        let states = states.before(earlier, problem.value_dim);
        let mut attention = self.call.attend_params();
        attention.tile_count = tile_count(common) as u32;
        attention.tiles = buffers.tiles;
        attention.segments = buffers.segments;
        attention.positions = buffers.positions;
        attention.query_order = buffers.orders[0].before(earlier);
        attention.key_order = buffers.orders[1].before(heads.start * problem.n_k);
        attention.listed_rows = buffers.listed_rows;
        states.give(&mut attention);
        attention.next_tile = buffers.next_tile;
        attention
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::DeviceTensors;
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
        assert!(heads == 32 && bytes < 2400 << 20, "{heads} heads, {bytes} bytes");
        let (heads, bytes) = size(Mask::CausalBottomRight, [32, 8], 131_072, 128);
        assert!(heads == 3 && bytes < 1024 << 20, "{heads} heads, {bytes} bytes");
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
