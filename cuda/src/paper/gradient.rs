//! The gradients of PAPER: the passes of the forward in the same order. Their tiles of queries give dq; their inverse,
//! tiles of keys, give dk and dv.

use std::iter;
use std::ops::Range;

use hyperattn_core::device::{PaperParts, Problem, effective_residual};
use hyperattn_core::{DType, Mask, Residual, Result};

use super::lists::{Lists as ForwardLists, Step, blocks_met};
use super::{
    PASS_LEAVES, Paper, SEGMENT_SORTED, THREADS, TILE_RESUME, blocks_of, mirror, sample_size, tile_count,
    unsupported,
};
use crate::abi::{BackwardParams, KeyTile, Segment, TILE_ROWS, element_type};
use crate::backward::fused::{self, Fused, Sums};
use crate::backward::launch::{key_sums_type, keys, queries};
use crate::call::Call;
use crate::launch::{Queue, args};
use crate::workspace::{Carver, Pointer};

/// Queries that a sampled key meets before its sums are stored.
const CHUNK_QUERIES: usize = 4096;
/// Threads of the blocks that add the samples' sums, a warp for each sample (BACKWARD_SAMPLES_THREADS).
const ADD_THREADS: usize = 128;

const KEY_TILE_RESUME: u32 = 2;
const KEY_TILE_STORE: u32 = 4;

/// Whether the residual is the row norms'.
fn is_row_norm(call: &Call<'_>) -> bool {
    effective_residual(call.params) == Residual::RowNorm
}

/// Which sums of queries there are.
#[derive(Debug, Clone, Copy)]
pub(super) struct QuerySums {
    /// Several passes or kernels meet them.
    kept: bool,
    /// The fused kernel meets them.
    in_turn: bool,
    /// The row norms' samples have bounds.
    bounded: bool,
}

impl QuerySums {
    pub(super) fn new(call: &Call<'_>, steps: &[Step]) -> Self {
        let in_turn = fused::may_serve(call) && steps.iter().any(|step| step.kind == PASS_LEAVES);
        let bounded = is_row_norm(call);
        QuerySums { kept: in_turn || bounded || steps.iter().any(|step| step.stores), in_turn, bounded }
    }

    /// [sums, turns, bounds] of so many queries.
    fn lens(self, problem: &Problem, queries: usize) -> [usize; 3] {
        let when = |wanted: bool, len: usize| if wanted { len } else { 0 };
        let sums = queries.saturating_mul(problem.head_dim);
        [when(self.kept, sums), when(self.in_turn, queries), when(self.bounded, queries)]
    }

    /// What the sums of one KV head and its query heads take.
    pub(super) fn bytes(self, problem: &Problem) -> usize {
        let of_queries = self.lens(problem, problem.group.saturating_mul(problem.n_q));
        let of_keys = problem.n_k.saturating_mul(problem.head_dim + problem.value_dim + 1);
        of_queries.into_iter().fold(of_keys, usize::saturating_add).saturating_mul(size_of::<f32>())
    }
}

/// The inverse lists of the caller's block mask in one rectangle.
#[derive(Debug, Clone, Copy)]
struct GivenBlocks {
    /// Blocks of keys.
    count: usize,
    /// Lists of each, and segments in one.
    lists: usize,
    segments: usize,
}

/// How long the inverse lists of one rectangle of a pass are, for one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lists {
    /// Tiles of all keys.
    key_tiles: usize,
    given: Option<GivenBlocks>,
    /// Tiles of the samples, for each chunk of queries; none of samples that are met apart.
    sample_tiles: usize,
    chunks: usize,
    samples: usize,
    /// Words that tell which samples a block meets exactly, of samples that are met apart, and lists of such.
    pub(super) covered_words: usize,
    pub(super) covered_lists: usize,
}

impl Lists {
    pub(super) fn new(call: &Call<'_>, step: &Step, lists: &ForwardLists) -> Self {
        let block_size = call.params.block_size as usize;
        let mask = call.tensors.block_mask.filter(|_| step.estimated);
        let keys = step.keys.max(1);
        let given = mask.map(|mask| GivenBlocks {
            count: blocks_met(keys, mask.key_block).min(mask.num_key_blocks),
            lists: lists.lists_per_block,
            segments: lists.blocks.div_ceil(2),
        });
        let tiles_of = |block: usize| block.min(keys).div_ceil(TILE_ROWS);
        let key_tiles = match (mask, given) {
            (Some(mask), Some(given)) => given.count.saturating_mul(tiles_of(mask.key_block)),
            _ if step.estimated && block_size > 0 => lists.blocks.saturating_mul(tiles_of(block_size)),
            _ => step.keys.div_ceil(TILE_ROWS),
        };
        let samples = if step.estimated { sample_size(call.params) } else { 0 };
        let apart = mask.is_some() || is_row_norm(call);
        let covered = apart && samples > 0 && (mask.is_some() || block_size > 0);
        Lists {
            key_tiles,
            given,
            sample_tiles: if apart { 0 } else { samples.div_ceil(TILE_ROWS) },
            chunks: step.queries.div_ceil(CHUNK_QUERIES),
            samples,
            covered_words: if covered { samples.div_ceil(32) } else { 0 },
            covered_lists: if covered { lists.blocks.saturating_mul(lists.lists_per_block) } else { 0 },
        }
    }

    /// [tiles, segments, hidden, rows of partial sums, words of covered samples, samples of the caller's blocks] of one
    /// rectangle.
    fn lens(&self) -> [usize; 6] {
        let tiles = self.sample_tiles.saturating_mul(self.chunks).saturating_add(self.key_tiles);
        let segments = self
            .given
            .map_or(tiles, |given| given.count.saturating_mul(given.lists).saturating_mul(given.segments));
        [
            tiles,
            segments,
            if self.sample_tiles > 0 { 2 * self.samples } else { 0 },
            self.samples.saturating_mul(self.chunks),
            self.covered_lists.saturating_mul(self.covered_words),
            if self.given.is_some() { self.samples } else { 0 },
        ]
    }

    pub(super) fn bytes(&self, problem: &Problem) -> usize {
        let of_a_row = (problem.head_dim + problem.value_dim) * size_of::<f32>();
        let word = size_of::<u32>();
        let sizes = [size_of::<KeyTile>(), size_of::<Segment>(), word, of_a_row, word, word];
        let bytes = self.lens().into_iter().zip(sizes).map(|(len, size)| len.saturating_mul(size));
        bytes.fold(0, usize::saturating_add)
    }
}

/// The part of the workspace.
pub(super) struct Buffers {
    tiles: Pointer<KeyTile>,
    segments: Pointer<Segment>,
    hidden: Pointer<u32>,
    pub(super) key_partials: Pointer<f32>,
    pub(super) value_partials: Pointer<f32>,
    /// Of samples that are met apart, see BackwardSamplesParams.
    pub(super) covered: Pointer<u32>,
    pub(super) bounds: Pointer<f32>,
    /// The uniform samples where the forward's lists have only those of them that a block does not meet.
    pub(super) samples: Pointer<u32>,
    query_sums: Sums,
    key_sums: Pointer<f32>,
    value_sums: Pointer<f32>,
    key_stored: Pointer<u32>,
    /// Keys that no pass finishes, as tiles without queries.
    rest: Vec<Range<usize>>,
}

impl Buffers {
    /// For passes with as many rectangles at once as `steps` says, over `heads` KV heads.
    pub(super) fn carve(
        call: &Call<'_>,
        plan: &PaperParts,
        steps: &[(Step, ForwardLists, usize)],
        heads: usize,
        query_sums: QuerySums,
        carver: &mut Carver,
    ) -> Result<Self> {
        let problem = &call.problem;
        let all_keys = problem.n_k.div_ceil(TILE_ROWS).saturating_mul(heads);
        let mut lens = [all_keys, all_keys, 0, 0, 0, 0];
        for (step, lists, at_once) in steps {
            for (most, len) in lens.iter_mut().zip(Lists::new(call, step, lists).lens()) {
                *most = len.saturating_mul(heads).saturating_mul(*at_once).max(*most);
            }
        }
        if let Some(len) = lens.into_iter().find(|&len| u32::try_from(len).is_err()) {
            return Err(unsupported(format_args!(
                "params.block_size, params.sample_size or the block mask make a head's lists {len} long; 2^32 is too much"
            )));
        }
        let [tiles, segments, hidden, partials, covered, samples] = lens;
        let queries = problem.group.saturating_mul(problem.n_q).saturating_mul(heads);
        let [of_queries, turns, bounds] = query_sums.lens(problem, queries);
        let keys = problem.n_k.saturating_mul(heads);
        Ok(Buffers {
            tiles: carver.take(tiles),
            segments: carver.take(segments),
            hidden: carver.take(hidden),
            key_partials: carver.take(partials.saturating_mul(problem.head_dim)),
            value_partials: carver.take(partials.saturating_mul(problem.value_dim)),
            covered: carver.take(covered),
            bounds: carver.take(bounds),
            samples: carver.take(samples),
            query_sums: Sums { queries: carver.take(of_queries), turns: carver.take(turns) },
            key_sums: carver.take(keys.saturating_mul(problem.head_dim)),
            value_sums: carver.take(keys.saturating_mul(problem.value_dim)),
            key_stored: carver.take(keys),
            rest: rest(plan, steps, problem.n_k),
        })
    }
}

/// Whether no later pass meets the keys of a pass: the leaves come last, and only the keys of a dense past are not
/// theirs.
fn finishes(plan: &PaperParts, step: &Step) -> bool {
    match (&step.one, plan.parts.square) {
        (Some(one), Some(square)) => {
            one.keys.end <= square.key_start || one.keys.start >= square.key_start + square.len
        }
        (Some(_), None) => true,
        (None, _) => !step.estimated,
    }
}

/// Keys that no pass finishes.
fn rest(plan: &PaperParts, steps: &[(Step, ForwardLists, usize)], n_k: usize) -> Vec<Range<usize>> {
    let mut finished: Vec<Range<usize>> = steps
        .iter()
        .filter(|(step, ..)| finishes(plan, step))
        .filter_map(|(step, ..)| match (&step.one, plan.parts.square) {
            (Some(one), _) => Some(one.keys.clone()),
            (None, square) => square.map(|square| square.key_start..square.key_start + square.len),
        })
        .filter(|keys| !keys.is_empty())
        .collect();
    finished.sort_by_key(|keys| keys.start);
    let mut rest = Vec::new();
    let mut at = 0;
    for keys in finished.into_iter().chain(iter::once(n_k..n_k)) {
        if at < keys.start {
            rest.push(at..keys.start);
        }
        at = at.max(keys.end);
    }
    rest
}

/// The gradients of the whole call. `params` has everything but lists, orders and sums.
///
/// # Safety
/// The call's tensors, the gradients and the buffers are there, see [`crate::backward()`].
pub(crate) unsafe fn run_gradient(
    queue: &Queue<'_>,
    call: &Call<'_>,
    buffers: &super::Buffers,
    params: &BackwardParams,
) -> Result<()> {
    let Some(own) = &buffers.gradient else { return Ok(()) };
    let paper = Paper { queue, call, buffers };
    // SAFETY: the caller's contract.
    unsafe {
        paper.for_each_set(&|heads| {
            if let Some(row_norm) = &buffers.row_norm {
                paper.square_norms(heads, row_norm)?;
            }
            queue.zero(own.key_stored.address(), heads.len() * call.problem.n_k)?;
            paper.for_each_part(|step, lists, rectangles| {
                paper.gradient_pass(heads, step, lists, rectangles, own, params)
            })?;
            own.rest.iter().try_for_each(|keys| paper.finish_keys(heads, keys, own, params))
        })
    }
}

/// Rectangles of one pass under way.
pub(super) struct Pass<'p> {
    pub(super) heads: &'p Range<usize>,
    pub(super) step: &'p Step,
    pub(super) lists: &'p ForwardLists,
    pub(super) inverse: &'p Lists,
    pub(super) arguments: &'p mirror::BackwardPaperParams,
}

impl Paper<'_, '_> {
    /// Rectangles `rectangles` of one pass, for `heads`.
    ///
    /// # Safety
    /// As for [`run_gradient`], like what follows.
    unsafe fn gradient_pass(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &ForwardLists,
        rectangles: Range<usize>,
        buffers: &Buffers,
        params: &BackwardParams,
    ) -> Result<()> {
        let common = self.rectangles(heads, step, lists, rectangles);
        let inverse = Lists::new(self.call, step, lists);
        let mut params = self.gradient_params(heads, step, &common, buffers, params);
        let mut arguments = self.inverse(heads, step, &common, &inverse, buffers);
        // SAFETY: the caller's contract; all lists are written before they are read.
        unsafe {
            match &self.buffers.row_norm {
                Some(row_norm) if step.estimated => {
                    let pass = Pass { heads, step, lists, inverse: &inverse, arguments: &arguments };
                    self.row_norm_gradient(&pass, row_norm, buffers, &params)?;
                }
                _ => {
                    self.select(heads, &[(step, lists, common)])?;
                    if let Some(fused) = self.fused(heads, step, buffers, &params)? {
                        return self.leaves_gradient(
                            &fused,
                            heads,
                            step,
                            &mut arguments,
                            &mut params,
                            buffers,
                        );
                    }
                    queries(self.queue, &params)?;
                    if common.sample_size > 0 && inverse.given.is_some() {
                        let pass = Pass { heads, step, lists, inverse: &inverse, arguments: &arguments };
                        self.given_samples_gradient(&pass, buffers, &params)?;
                    }
                }
            }
            self.keys_gradient(&arguments, inverse.given, &mut params)
        }
    }

    /// The fused kernel, for leaves.
    fn fused(
        &self,
        heads: &Range<usize>,
        step: &Step,
        buffers: &Buffers,
        params: &BackwardParams,
    ) -> Result<Option<Fused>> {
        if step.kind != PASS_LEAVES {
            return Ok(None);
        }
        let group = self.call.problem.group;
        let query_heads = heads.start * group..heads.end * group;
        Fused::new(self.queue, self.call, params, &buffers.query_sums, query_heads, true)
    }

    /// All gradients of leaves by the fused kernel.
    unsafe fn leaves_gradient(
        &self,
        fused: &Fused,
        heads: &Range<usize>,
        step: &Step,
        arguments: &mut mirror::BackwardPaperParams,
        params: &mut BackwardParams,
        buffers: &Buffers,
    ) -> Result<()> {
        let (problem, common) = (&self.call.problem, &arguments.common);
        let multiprocessors = self.queue.device.multiprocessors;
        let together = fused.rectangles_together(
            common.pass.count as usize,
            multiprocessors,
            problem.mask,
            problem.group,
            step.queries,
        );
        // SAFETY: the caller's contract; a rectangle's queries are rows of the sums.
        unsafe {
            // The first leaf, which is the longest, has met no pass.
            if common.flags & TILE_RESUME == 0 && common.pass.first == 0 {
                let (first, words) =
                    (common.pass.square.query_start as usize, step.queries * problem.head_dim);
                for head in 0..heads.len() * problem.group {
                    let before = (head * problem.n_q + first) * problem.head_dim * size_of::<f32>();
                    self.queue.zero(buffers.query_sums.queries.address() + before as u64, words)?;
                }
            }
            arguments.section = together as u32;
            self.key_tiles(arguments, None, params)?;
            fused.run(self.queue, params)
        }
    }

    /// Adds the samples' sums to those of the keys, or to their gradients.
    pub(super) unsafe fn add_samples(
        &self,
        arguments: &mirror::BackwardPaperParams,
        params: &BackwardParams,
    ) -> Result<()> {
        let common = &arguments.common;
        let samples = common.kv_heads as usize * common.pass.count as usize * common.sample_size as usize;
        let grid = blocks_of(samples, ADD_THREADS / 32);
        let arguments = args![*arguments, *params];
        // SAFETY: these are the kernel's parameters; the partial sums have been enqueued before.
        unsafe { self.queue.launch(c"backward_paper_add_samples", grid, ADD_THREADS as u32, 0, arguments) }
    }

    /// dk and dv of all keys of the rectangles, and of their samples that are not met apart.
    unsafe fn keys_gradient(
        &self,
        arguments: &mirror::BackwardPaperParams,
        given: Option<GivenBlocks>,
        params: &mut BackwardParams,
    ) -> Result<()> {
        let common = &arguments.common;
        let samples = (common.kv_heads * common.pass.count * common.sample_size) as usize;
        // SAFETY: the caller's contract; this is the kernel's parameter, and it writes from where samples are hidden.
        unsafe {
            if arguments.sample_tiles == 0 {
                self.key_tiles(arguments, given, params)?;
                return keys(self.queue, params);
            }
            if arguments.block_size > 0 {
                let grid = blocks_of(samples, THREADS);
                self.queue.launch(c"backward_paper_hidden", grid, THREADS as u32, 0, args![*arguments])?;
            }
            self.key_tiles(arguments, given, params)?;
            keys(self.queue, params)?;
            self.add_samples(arguments, params)
        }
    }

    /// The tiles of all keys of the rectangles, and of their samples that are not met apart.
    unsafe fn key_tiles(
        &self,
        arguments: &mirror::BackwardPaperParams,
        given: Option<GivenBlocks>,
        params: &mut BackwardParams,
    ) -> Result<()> {
        let common = &arguments.common;
        let rectangles = (common.kv_heads * common.pass.count) as usize;
        let of_samples = (arguments.chunks * arguments.sample_tiles) as usize;
        let tiles = rectangles * (arguments.key_tiles as usize + of_samples);
        params.key_tile_count = tiles as u32;
        // SAFETY: these are the kernels' parameters, and they write tiles and segments only.
        unsafe {
            match given {
                Some(GivenBlocks { count, lists, segments }) => self.queue.launch(
                    c"backward_block_mask_tiles",
                    blocks_of(rectangles * count, THREADS / 32),
                    THREADS as u32,
                    0,
                    args![*arguments, self.exact_blocks(), count as u32, lists as u32, segments as u32],
                ),
                None => {
                    let grid = blocks_of(tiles, THREADS);
                    self.queue.launch(c"backward_paper_key_tiles", grid, THREADS as u32, 0, args![*arguments])
                }
            }
        }
    }

    /// Gradients of keys that no further query meets.
    unsafe fn finish_keys(
        &self,
        heads: &Range<usize>,
        keys: &Range<usize>,
        buffers: &Buffers,
        params: &BackwardParams,
    ) -> Result<()> {
        let step = Step {
            kind: super::PASS_ONE,
            level: 0,
            count: 1,
            one: None,
            estimated: false,
            stores: false,
            merges: 0,
            queries: 0,
            keys: keys.len(),
        };
        let lists = ForwardLists::default();
        let one = mirror::Rectangle {
            query_start: 0,
            query_end: 0,
            key_start: keys.start as u32,
            key_end: keys.end as u32,
        };
        let pass = mirror::Pass { count: 1, one, ..mirror::Pass::default() };
        let common = self.common(heads, &step, &lists, pass);
        let mut params = self.gradient_params(heads, &step, &common, buffers, params);
        let inverse = Lists::new(self.call, &step, &lists);
        let mut arguments = self.inverse(heads, &step, &common, &inverse, buffers);
        arguments.flags = KEY_TILE_RESUME;
        // SAFETY: the caller's contract.
        unsafe { self.keys_gradient(&arguments, None, &mut params) }
    }

    /// What a backward kernel needs besides the tiles of keys. Orders and sums are those of `heads` only, while it
    /// counts heads from the first.
    fn gradient_params(
        &self,
        heads: &Range<usize>,
        step: &Step,
        common: &mirror::PassTiles,
        buffers: &Buffers,
        params: &BackwardParams,
    ) -> BackwardParams {
        let problem = &self.call.problem;
        let earlier = [heads.start * problem.group * problem.n_q, heads.start * problem.n_k];
        let mut own = *params;
        own.attend.tile_count = tile_count(common) as u32;
        own.attend.tiles = self.buffers.tiles;
        own.attend.segments = self.buffers.segments;
        own.attend.positions = self.buffers.positions;
        let orders = self.orders(heads, step);
        own.attend.query_order = orders[0].before(earlier[0]);
        own.attend.key_order = orders[1].before(earlier[1]);
        own.attend.listed_rows = self.buffers.listed_rows.unwrap_or(Pointer::NULL);
        own.attend.state_accumulated = buffers.query_sums.queries.before(earlier[0] * problem.head_dim);
        own.key_tiles = buffers.tiles;
        own.query_segments = buffers.segments;
        own.hidden = buffers.hidden;
        own.key_sums_type = key_sums_type(self.queue.device, params);
        let size = if own.key_sums_type == element_type(DType::F32) { 4 } else { 2 };
        own.key_sums = buffers.key_sums.bytes().before(earlier[1] * problem.head_dim * size);
        own.value_sums = buffers.value_sums.bytes().before(earlier[1] * problem.value_dim * size);
        own.key_stored = buffers.key_stored.before(earlier[1]);
        own.key_partials = buffers.key_partials;
        own.value_partials = buffers.value_partials;
        own
    }

    /// What the kernels that write the inverse lists need.
    fn inverse(
        &self,
        heads: &Range<usize>,
        step: &Step,
        common: &mirror::PassTiles,
        lists: &Lists,
        buffers: &Buffers,
    ) -> mirror::BackwardPaperParams {
        let (plan, problem) = (&self.buffers.plan, &self.call.problem);
        let is_first = self.buffers.steps.first().is_some_and(|(first, ..)| first == step);
        // Samples that are met apart have been added to the sums before.
        let resumes = !is_first || (common.sample_size > 0 && lists.sample_tiles == 0);
        let when = |wanted: bool, flag: u32| if wanted { flag } else { 0 };
        let of_samples = (lists.chunks * lists.sample_tiles).max(1);
        mirror::BackwardPaperParams {
            common: *common,
            tiles: buffers.tiles,
            segments: buffers.segments,
            hidden: buffers.hidden,
            positions: self.buffers.positions,
            key_order: self.orders(heads, step)[1],
            exact: u32::from(!step.estimated),
            limited: u32::from(problem.mask != Mask::None),
            visible: self.call.visible(),
            block_size: self.call.params.block_size,
            sorted: if step.estimated && plan.sorted { SEGMENT_SORTED } else { 0 },
            flags: when(!finishes(plan, step), KEY_TILE_STORE) | when(resumes, KEY_TILE_RESUME),
            key_tiles: lists.key_tiles as u32,
            sample_tiles: lists.sample_tiles as u32,
            // The tiles of samples, which take longer, all begin before half of the others have.
            sample_period: 1 + (lists.key_tiles / 2 / of_samples) as u32,
            chunks: lists.chunks as u32,
            chunk_queries: CHUNK_QUERIES as u32,
            n_k: problem.n_k as u32,
            section: 1,
            adds_to_gradients: u32::from(finishes(plan, step)),
        }
    }
}
