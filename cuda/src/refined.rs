//! METHOD_REFINED: summaries of the keys, the error of each head at its budget, then all tiles of queries. Selection runs in
//! chunks whose scratch memory is bounded; what it leaves for attention in passes, most often one.

pub(crate) mod gradient;
mod probing;
mod shape;

use std::ffi::CStr;
use std::ops::Range;

use hyperattn_core::device::RefinedPlan;
use hyperattn_core::{DType, Result};

use crate::abi::{AttendParams, Segment, Tile};
use crate::attend::attend;
use crate::call::Call;
use crate::launch::{Queue, args};
use crate::workspace::{Carver, Pointer};
pub(crate) use probing::Probing;
use shape::{
    GROUP_TILES, KEY_BLOCK, REFINED_REST, REPRESENTATIVES, RefinedParams, narrow, operand_type, parts_of,
    shape_params,
};

// More numbers of kernels/hyperattn/refined_params.cuh.
const MOST_RANGES: usize = 8;
const RECORDS_OF_TILE: usize = 2;
const SEGMENTS_OF_TILE: usize = RECORDS_OF_TILE + 2;

// Threads of the kernels' blocks.
const SUMMARY_THREADS: u32 = 128;
const REPRESENT_THREADS: u32 = 256;
const WEIGH_BLOCKS_THREADS: u32 = 256;
const WEIGH_KEYS_THREADS: u32 = 128;
const WEIGH_F32_THREADS: u32 = 128;
const SELECT_THREADS: u32 = 256;
const SUM_THREADS: u32 = 128;
const SUM_COLUMNS: u32 = 256;
const REFINED_TILES_THREADS: u32 = 512;
const NORM_THREADS: u32 = 1024;

/// Elements of a row that represent.cuh keeps in one chunk.
const REPRESENT_CHUNK: usize = 64;

/// Shared memory that a candidate block takes where its keys are chosen (CANDIDATE_BYTES), and that all of a tile take.
const CANDIDATE_BYTES: usize = size_of::<f32>() * KEY_BLOCK + size_of::<u32>();
const MOST_CANDIDATE_BYTES: usize = 64 << 10;

/// Scratch memory of a chunk: enough tiles to keep a large device busy, to the end of every kernel.
const CHUNK_BYTES: usize = 256 << 20;

/// Operands are read so many rows at a time, beyond the last if need be.
const OPERAND_ROWS: usize = 16;

/// Memory of what attention reads of a pass.
const PASS_BYTES: usize = 512 << 20;

/// Rows of a grid, at most.
const MOST_GRID_ROWS: usize = 65_535;

/// Slices of the blocks of keys, over all groups of a chunk, that thread blocks weigh: enough to keep a large device busy;
/// and the blocks of a slice, at least.
const WEIGHED_SLICES: u32 = 1024;
/// See [`WEIGHED_SLICES`].
const LEAST_SLICE: u32 = 128;

/// Thread blocks that weigh keys for probe tiles, about: enough to keep a large device busy.
const PROBED_BLOCKS: u32 = 4096;

/// Names of a kernel of weigh.cuh for each of [`shape::PARTS`], of f16 and of bf16.
macro_rules! names {
    ($kernel:literal) => {
        [names!($kernel, "_f16"), names!($kernel, "_bf16")]
    };
    ($kernel:literal, $element:literal) => {
        [
            names!($kernel, $element, "_2"),
            names!($kernel, $element, "_3"),
            names!($kernel, $element, "_4"),
            names!($kernel, $element, "_6"),
            names!($kernel, $element, "_8"),
        ]
    };
    ($kernel:literal, $element:literal, $parts:literal) => {
        match CStr::from_bytes_with_nul(concat!($kernel, $element, $parts, "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("a name has one 0, at its end"),
        }
    };
}

const TOTAL_WEIGHTS: [[&CStr; 5]; 2] = names!("total_weights");
const WEIGH_BLOCKS: [[&CStr; 5]; 2] = names!("weigh_blocks");
const WEIGH_KEYS: [[&CStr; 5]; 2] = names!("weigh_keys");

/// Kernels that read tiles of queries: for any type, and for f16 and bf16 in shared memory.
const REPRESENT: [&CStr; 3] = [c"represent_queries", c"represent_queries_f16", c"represent_queries_bf16"];
/// See [`REPRESENT`].
const DRAW: [&CStr; 3] = [c"draw_probes", c"draw_probes_f16", c"draw_probes_bf16"];

/// The one of [`REPRESENT`] or [`DRAW`] for the call's queries, and its dynamic shared memory.
fn of_queries([any, f16, bf16]: [&'static CStr; 3], call: &Call<'_>) -> (&'static CStr, u32) {
    let chunks = call.problem.head_dim.div_ceil(REPRESENT_CHUNK);
    let shared_bytes = (chunks * REPRESENT_THREADS as usize * REPRESENT_CHUNK * 2) as u32;
    match call.tensors.q.layout.dtype {
        DType::F16 if chunks <= 2 => (f16, shared_bytes),
        DType::BF16 if chunks <= 2 => (bf16, shared_bytes),
        _ => (any, 0),
    }
}

/// The parts of the workspace.
pub(crate) struct Buffers {
    /// Of all tiles of queries.
    whole: Selection,
    /// Of the probe tiles, at each budget that heads may have on their way up.
    rounds: Vec<Selection>,
    probing: Option<Probing>,
    budgets: Pointer<u32>,
    next_tile: Pointer<u32>,
}

/// As many groups as `bytes` hold, whole heads where more than one fits.
fn groups_in(bytes: usize, of_a_place: usize, groups_of_head: usize, most: usize) -> usize {
    let groups = (bytes / (GROUP_TILES * of_a_place)).clamp(1, most.clamp(1, MOST_GRID_ROWS));
    if groups >= groups_of_head { groups / groups_of_head * groups_of_head } else { groups }
}

/// Runs of `of_a_part` numbers that `count` numbers from `first` on have a part in.
fn parts_of_range(first: u32, count: u32, of_a_part: u32) -> u32 {
    (first + count - 1) / of_a_part - first / of_a_part + 1
}

/// The groups of a chunk: those of as many heads in each, about.
fn groups_of_chunk(most: usize, groups_of_head: usize, of_pass: usize) -> usize {
    if most < groups_of_head {
        return most;
    }
    let heads = of_pass.div_ceil(groups_of_head);
    let chunks = heads.div_ceil(most / groups_of_head);
    heads.div_ceil(chunks) * groups_of_head
}

/// Ranges of a head's blocks that the rest's sums are made of.
fn ranges(blocks: usize) -> usize {
    blocks.div_ceil(blocks.div_ceil(MOST_RANGES * KEY_BLOCK).max(1) * KEY_BLOCK)
}

/// Selection for tiles of queries, and the memory that it takes turns in with others.
struct Selection {
    shape: RefinedParams,
    /// Groups of a pass and of a chunk, at most.
    pass_groups: usize,
    chunk_groups: usize,
}

impl Selection {
    /// For the tiles of `shape`, within its bounds, of so many query heads at most in a pass.
    fn new(call: &Call<'_>, shape: RefinedParams, heads: usize) -> Result<Self> {
        let (key_bytes, value_bytes) = Self::extra_bytes(call);
        let positions = shape.most_positions as usize;
        let records_bytes =
            SEGMENTS_OF_TILE * size_of::<Segment>() + RECORDS_OF_TILE * size_of::<Tile>() + size_of::<u32>();
        let of_pass = positions * size_of::<u32>() + key_bytes + value_bytes + records_bytes;
        let (blocks, candidates) = (shape.blocks as usize, shape.most_candidates as usize);
        let words = 2 * REPRESENTATIVES + blocks + candidates + 1 + Self::shared_words(&shape);
        let of_chunk = size_of::<u32>() * (words + ranges(blocks) + 2 * blocks.div_ceil(32));
        narrow("listed keys", positions.checked_mul(GROUP_TILES))?;
        // Positions are counted in 32 bits.
        let most_places = (u32::MAX as usize / positions.max(1)).min(PASS_BYTES / of_pass).max(GROUP_TILES);
        let groups_of_head = shape.groups_of_head as usize;
        let groups = heads * groups_of_head;
        let pass_groups = groups_in(most_places * of_pass, of_pass, groups_of_head, groups);
        let chunk_groups = groups_in(CHUNK_BYTES, of_chunk, groups_of_head, pass_groups);
        let chunk_groups = groups_of_chunk(chunk_groups, groups_of_head, pass_groups);
        Ok(Selection { shape, pass_groups, chunk_groups })
    }

    /// Bytes of the key and of the value of a tile's extra column.
    fn extra_bytes(call: &Call<'_>) -> (usize, usize) {
        (call.problem.head_dim * call.kv_size(), call.problem.value_dim * call.kv_size())
    }

    /// One after the other in the same memory: the blocks' weights with outliers, the keys' weights, the rest's sums.
    fn shared_words(shape: &RefinedParams) -> usize {
        let (blocks, candidates) = (shape.blocks as usize, shape.most_candidates as usize);
        let width = (shape.head_dim + shape.value_dim) as usize;
        (candidates * KEY_BLOCK).max(blocks).max(ranges(blocks) * width)
    }

    /// Takes its memory.
    fn carve(&mut self, call: &Call<'_>, carver: &mut Carver) {
        let shape = &mut self.shape;
        let (blocks, candidates) = (shape.blocks as usize, shape.most_candidates as usize);
        let (words, ranges) = (blocks.div_ceil(32), ranges(blocks));

        let places = self.chunk_groups * GROUP_TILES;
        shape.totals = carver.take(places * REPRESENTATIVES);
        shape.starts = carver.take(places * REPRESENTATIVES);
        shape.block_weights = carver.take(places * blocks);
        shape.candidates = carver.take(places * candidates);
        shape.candidate_count = carver.take(places);
        shape.key_weights = carver.take(places * Self::shared_words(shape));
        shape.outlier_weights = shape.key_weights;
        shape.column_sums = shape.key_weights;
        shape.weight_sums = carver.take(places * ranges);
        shape.candidate_bits = carver.take(places * words);
        shape.candidate_ranks = carver.take(places * words);

        let (key_bytes, value_bytes) = Self::extra_bytes(call);
        let places = self.pass_groups * GROUP_TILES;
        shape.positions = carver.take(places * shape.most_positions as usize);
        shape.chosen = carver.take(places);
        shape.extra_keys = carver.take(places * key_bytes);
        shape.extra_values = carver.take(places * value_bytes);
        shape.segments = carver.take(places * SEGMENTS_OF_TILE);
        shape.tiles = carver.take(places * RECORDS_OF_TILE);
    }
}

/// The call's part of the workspace.
pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    carve_for(call, call.problem.batch * call.problem.heads_q, carver)
}

/// [`carve`] for passes over the tiles of so many query heads at most.
fn carve_for(call: &Call<'_>, heads_of_pass: usize, carver: &mut Carver) -> Result<Buffers> {
    let problem = &call.problem;
    let plan = RefinedPlan::new(call.params, problem, call.tensors.error.is_some());
    let mut shape = shape_params(call, &plan)?;
    let heads = problem.batch * problem.heads_q;
    let kv_heads = problem.batch * problem.heads_kv;
    let blocks = shape.blocks as usize;
    let operand_bytes = shape.width as usize * operand_type(call).size();

    shape.summaries = carver.take(kv_heads * blocks * (problem.head_dim + problem.value_dim));
    let operand_rows = kv_heads * blocks + OPERAND_ROWS;
    shape.key_counts = carver.take(operand_rows);
    shape.mean_keys = carver.take(operand_rows * operand_bytes);
    shape.outliers = carver.take(operand_rows * operand_bytes);
    shape.representatives = carver.take(heads * plan.query_tiles * REPRESENTATIVES * operand_bytes);
    shape.represented = carver.take(heads * plan.query_tiles * REPRESENTATIVES);
    let budgets = carver.take(heads);
    shape.budgets = budgets;

    let probing = match &plan.probes {
        Some(probes) => {
            let mut probing = Probing::carve(call, &plan, probes, carver)?;
            probing.params.budgets = budgets;
            if call.params.target_error > 0.0 {
                let outputs = heads.saturating_mul(probing.rows_of_head()).saturating_mul(problem.value_dim);
                probing.params.settled = carver.take(heads);
                probing.params.estimate = carver.take(outputs);
            }
            Some(probing)
        }
        None => None,
    };
    let mut whole = Selection::new(call, shape, heads_of_pass)?;
    let mut rounds = Vec::new();
    if let (Some(probing), true) = (&probing, call.params.target_error > 0.0) {
        // As many as a head may need. All heads that a round is for have the same budget.
        let budgets = std::iter::successors(Some(plan.least_budget), |budget| budget.checked_mul(2));
        for budget in budgets.take_while(|&budget| budget <= plan.most_budget) {
            rounds.push(Selection::new(call, probing.shape_of_round(&shape, budget), heads)?);
        }
    }
    // They take turns.
    let mut bytes = 0;
    for selection in rounds.iter_mut().chain([&mut whole]) {
        let mut measuring = Carver::measuring();
        selection.carve(call, &mut measuring);
        bytes = measuring.used().unwrap_or(usize::MAX).max(bytes);
    }
    let scratch = carver.take::<u8>(bytes);
    for selection in rounds.iter_mut().chain([&mut whole]) {
        selection.carve(call, &mut Carver::new(scratch.address()));
    }
    Ok(Buffers { whole, rounds, probing, budgets, next_tile: carver.take(1) })
}

/// Selection for the groups of a pass. What attention needs is in the pass's part of the workspace afterwards.
/// `each_chunk` runs after every chunk, whose scratch memory is there still.
///
/// # Safety
/// The call's tensors and the workspace are there; `pass` has the groups of a pass of `selection`.
unsafe fn select(
    queue: &Queue<'_>,
    call: &Call<'_>,
    selection: &Selection,
    pass: &RefinedParams,
    each_chunk: &dyn Fn(&RefinedParams) -> Result<()>,
) -> Result<()> {
    let operands = operand_type(call);
    let parts = parts_of(call.problem.head_dim);
    let end = pass.pass_first + pass.pass_groups;
    for first in (pass.pass_first..end).step_by(selection.chunk_groups) {
        let mut chunk = *pass;
        chunk.chunk_first = first;
        chunk.chunk_groups = (end - first).min(selection.chunk_groups as u32);
        let places = [chunk.chunk_groups * GROUP_TILES as u32, 1, 1];
        let groups = [chunk.chunk_groups, 1, 1];
        let most_slices = chunk.blocks.div_ceil(LEAST_SLICE);
        let weighed = [chunk.chunk_groups, WEIGHED_SLICES.div_ceil(chunk.chunk_groups).min(most_slices), 1];
        let candidate_bytes =
            (chunk.most_candidates as usize * CANDIDATE_BYTES).min(MOST_CANDIDATE_BYTES) as u32;
        let slices = (chunk.head_dim + chunk.value_dim).div_ceil(SUM_COLUMNS);
        let sums = [chunk.chunk_groups, ranges(chunk.blocks as usize) as u32, slices];
        // Heads that the chunk has a part of.
        let heads = parts_of_range(first, chunk.chunk_groups, chunk.groups_of_head);
        // Few probe tiles look into a block of keys, none where the head is settled: a thread block has several.
        let keys = match chunk.settled.address() {
            0 => chunk.blocks,
            _ => chunk.blocks.min((PROBED_BLOCKS / heads).max(1)),
        };
        // SAFETY: these are the kernels' parameters, of this workspace and call.
        unsafe {
            if operands == DType::F32 {
                queue.launch(c"weigh_blocks_f32", places, WEIGH_F32_THREADS, 0, args![chunk])?;
            } else {
                let type_index = usize::from(operands == DType::BF16);
                queue.launch(
                    TOTAL_WEIGHTS[type_index][parts],
                    groups,
                    WEIGH_BLOCKS_THREADS,
                    0,
                    args![chunk],
                )?;
                queue.launch(
                    WEIGH_BLOCKS[type_index][parts],
                    weighed,
                    WEIGH_BLOCKS_THREADS,
                    0,
                    args![chunk],
                )?;
            }
            queue.launch(c"choose_blocks", places, SELECT_THREADS, 0, args![chunk])?;
            if operands == DType::F32 {
                queue.launch(c"weigh_keys_f32", places, WEIGH_F32_THREADS, 0, args![chunk])?;
            } else {
                let name = WEIGH_KEYS[usize::from(operands == DType::BF16)][parts];
                queue.launch(name, [keys, heads, 1], WEIGH_KEYS_THREADS, 0, args![chunk])?;
            }
            queue.launch(c"choose_keys", places, SELECT_THREADS, candidate_bytes, args![chunk])?;
            if chunk.flags & REFINED_REST != 0 {
                queue.launch(c"sum_summaries", sums, SUM_THREADS, 0, args![chunk])?;
            }
            queue.launch(c"refined_tiles", groups, REFINED_TILES_THREADS, 0, args![chunk])?;
        }
        each_chunk(&chunk)?;
    }
    Ok(())
}

/// The passes over the groups of `heads`, numbered over all batch items.
fn passes(selection: &Selection, heads: Range<usize>) -> impl Iterator<Item = RefinedParams> {
    let (shape, most) = (selection.shape, selection.pass_groups as u32);
    let [first, end] = [heads.start, heads.end].map(|head| head as u32 * shape.groups_of_head);
    (first..end).step_by(selection.pass_groups).map(move |first| {
        let mut pass = shape;
        pass.pass_first = first;
        pass.pass_groups = (end - first).min(most);
        pass
    })
}

/// Runs `each` for the passes over all groups of a selection, after their keys have been selected.
///
/// # Safety
/// As for [`run`].
unsafe fn for_each_pass(
    queue: &Queue<'_>,
    call: &Call<'_>,
    selection: &Selection,
    each: impl Fn(&RefinedParams) -> Result<()>,
) -> Result<()> {
    let heads = call.problem.batch * call.problem.heads_q;
    passes(selection, 0..heads).try_for_each(|pass| {
        // SAFETY: the caller's contract.
        unsafe { select(queue, call, selection, &pass, &|_| Ok(())) }?;
        each(&pass)
    })
}

/// What attention meets after the selection of a pass over all tiles.
fn take_lists(attention: &mut AttendParams, pass: &RefinedParams) {
    attention.tiles = pass.tiles;
    attention.tile_count = pass.pass_groups * (GROUP_TILES * RECORDS_OF_TILE) as u32;
    attention.segments = pass.segments;
    attention.positions = pass.positions;
    attention.extra_keys = pass.extra_keys;
    attention.extra_values = pass.extra_values;
}

/// Raises the budget of every head until the error of its probe rows is within the target, or the head is exact.
///
/// # Safety
/// As for [`run`].
unsafe fn settle_budgets(
    queue: &Queue<'_>,
    call: &Call<'_>,
    buffers: &Buffers,
    probing: &Probing,
) -> Result<()> {
    let heads = probing.heads;
    // SAFETY: these are words of the workspace.
    unsafe {
        queue.fill(buffers.budgets.address(), buffers.whole.shape.least_budget, heads)?;
        queue.zero(probing.params.settled.address(), heads)?;
    }
    // A head that is settled is passed over.
    for round in &buffers.rounds {
        // SAFETY: the caller's contract.
        unsafe {
            for_each_pass(queue, call, round, |pass| probing.estimate(queue, call, pass))?;
            queue.launch(
                c"settle_budgets",
                [heads as u32, 1, 1],
                NORM_THREADS,
                0,
                args![round.shape, probing.params],
            )?;
        }
    }
    Ok(())
}

/// Summaries, representatives, and the budgets of all heads.
///
/// # Safety
/// As for [`run`].
unsafe fn prepare(queue: &Queue<'_>, call: &Call<'_>, buffers: &Buffers) -> Result<()> {
    let (problem, shape) = (&call.problem, &buffers.whole.shape);
    let heads = (problem.batch * problem.heads_q) as u32;
    let kv_heads = (problem.batch * problem.heads_kv) as u32;
    // SAFETY: these are the kernels' parameters, of this workspace and call.
    unsafe {
        queue.launch(
            c"summarise_keys",
            [kv_heads * shape.blocks, 1, 1],
            SUMMARY_THREADS,
            0,
            args![*shape],
        )?;
        let tiles = [heads * shape.query_tiles, 1, 1];
        let (represent, shared_bytes) = of_queries(REPRESENT, call);
        queue.launch(represent, tiles, REPRESENT_THREADS, shared_bytes, args![*shape])?;
        queue.fill(buffers.budgets.address(), call.params.budget, heads as usize)?;
    }
    if let Some(probing) = &buffers.probing {
        // SAFETY: the caller's contract.
        unsafe { probing.draw(queue, call) }?;
        if call.params.target_error > 0.0 {
            // SAFETY: as above.
            unsafe { settle_budgets(queue, call, buffers, probing) }?;
        }
    }
    Ok(())
}

/// METHOD_REFINED of the whole call.
///
/// # Safety
/// The call's tensors and the buffers are there, see [`crate::forward`].
pub(crate) unsafe fn run(queue: &Queue<'_>, call: &Call<'_>, buffers: &Buffers) -> Result<()> {
    let (problem, shape) = (&call.problem, &buffers.whole.shape);
    // SAFETY: the caller's contract; attention reads what selection wrote.
    unsafe {
        prepare(queue, call, buffers)?;
        for_each_pass(queue, call, &buffers.whole, |pass| {
            let mut attention = call.attend_params();
            attention.next_tile = buffers.next_tile;
            take_lists(&mut attention, pass);
            attend(queue, call, &attention)
        })
    }?;
    if let Some(keys) = &call.tensors.keys_per_query {
        let grid = [(problem.batch * problem.heads_q) as u32, 1, 1];
        // SAFETY: as above.
        unsafe {
            queue.launch(c"refined_keys_per_query", grid, NORM_THREADS, 0, args![*shape, keys.view()])
        }?;
    }
    match &buffers.probing {
        // SAFETY: the caller's contract.
        Some(probing) => unsafe { probing.write_errors(queue) },
        None => Ok(()),
    }
}
