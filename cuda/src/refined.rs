//! METHOD_REFINED: summaries of the keys, the error of each head at its budget, then all tiles of queries. Selection runs in
//! chunks whose scratch memory is bounded; what it leaves for attention in passes, most often one.

use std::ffi::CStr;

use hyperattn_core::device::{ProbePlan, RefinedPlan};
use hyperattn_core::{DType, Error, ErrorKind, Mask, Residual, Result};

use crate::abi::{Segment, TILE_ROWS, Tile, View, element_type};
use crate::attend::attend;
use crate::call::{Call, DeviceTensor};
use crate::launch::{Argument, Queue, args};
use crate::workspace::{Carver, Pointer};

// The numbers of kernels/hyperattn/refined_params.cuh.
const KEY_BLOCK: usize = 64;
const REPRESENTATIVES: usize = 8;
const GROUP_TILES: usize = 16;
const MOST_RANGES: usize = 8;
const RECORDS_OF_TILE: usize = 2;
const SEGMENTS_OF_TILE: usize = RECORDS_OF_TILE + 2;
const WIDTH_UNIT: usize = 32;
const REFINED_CAUSAL: u32 = 1;
const REFINED_REST: u32 = 2;
const REFINED_ALIGNED: [u32; 3] = [4, 8, 16];

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
const NORM_THREADS: u32 = 256;

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

/// Mirror of RefinedParams in refined_params.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RefinedParams {
    q: View,
    k: View,
    v: View,
    q_type: u32,
    kv_type: u32,
    operand_type: u32,
    width: u32,
    batch: u32,
    heads_q: u32,
    group: u32,
    n_q: u32,
    n_k: u32,
    head_dim: u32,
    value_dim: u32,
    visible: i32,
    scale_log2: f32,
    flags: u32,
    num_first_keys: u32,
    band: u32,
    candidates_per_key: u32,
    least_budget: u32,
    tile_rows: u32,
    earlier_queries: u32,
    query_tiles: u32,
    blocks: u32,
    most_candidates: u32,
    most_positions: u32,
    tiles_of_head: u32,
    groups_of_head: u32,
    pass_first: u32,
    pass_groups: u32,
    chunk_first: u32,
    chunk_groups: u32,
    tile_list: Pointer<u32>,
    budgets: Pointer<u32>,
    settled: Pointer<u32>,
    probe_rows: Pointer<u32>,
    summaries: Pointer<f32>,
    key_counts: Pointer<f32>,
    mean_keys: Pointer<u8>,
    outliers: Pointer<u8>,
    representatives: Pointer<u8>,
    represented: Pointer<f32>,
    totals: Pointer<f32>,
    starts: Pointer<f32>,
    block_weights: Pointer<f32>,
    outlier_weights: Pointer<f32>,
    candidates: Pointer<u32>,
    candidate_count: Pointer<u32>,
    key_weights: Pointer<f32>,
    column_sums: Pointer<f32>,
    weight_sums: Pointer<f32>,
    candidate_bits: Pointer<u32>,
    candidate_ranks: Pointer<u32>,
    positions: Pointer<u32>,
    chosen: Pointer<u32>,
    extra_keys: Pointer<u8>,
    extra_values: Pointer<u8>,
    segments: Pointer<Segment>,
    tiles: Pointer<Tile>,
}

/// Mirror of ProbeParams in probe.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ProbeParams {
    seed: u64,
    offset: u64,
    whole_over_probed: f64,
    first_tile: u32,
    tiles: u32,
    target_error: f32,
    callers_budget: u32,
    most_budget: u32,
    out_type: u32,
    out: View,
    error: View,
    tile_list: Pointer<u32>,
    rows: Pointer<u32>,
    weights: Pointer<f32>,
    exact: Pointer<f32>,
    estimate: Pointer<f32>,
    budgets: Pointer<u32>,
    settled: Pointer<u32>,
    probe_records: Pointer<Tile>,
    probe_segments: Pointer<Segment>,
    records_of_head: u32,
}

// What the .cuh state too.
const _: () = assert!(size_of::<RefinedParams>() == 432 && size_of::<ProbeParams>() == 192);

// SAFETY: mirrors of the kernels' parameters, see above.
unsafe impl Argument for RefinedParams {}
// SAFETY: as above.
unsafe impl Argument for ProbeParams {}

/// Parts of [`WIDTH_UNIT`] elements of a row that kernels are made for.
const PARTS: [usize; 5] = [2, 3, 4, 6, 8];

/// Names of a kernel of weigh.cuh for each of [`PARTS`], of f16 and of bf16.
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

const WEIGH_BLOCKS: [[&CStr; 5]; 2] = names!("weigh_blocks");
const WEIGH_KEYS: [[&CStr; 5]; 2] = names!("weigh_keys");

/// Index of the smallest of [`PARTS`] that holds a row of `head_dim` elements.
fn parts_of(head_dim: usize) -> usize {
    PARTS.iter().position(|parts| head_dim <= parts * WIDTH_UNIT).unwrap_or(PARTS.len() - 1)
}

/// The kernel of represent.cuh for queries of a type, and its dynamic shared memory.
fn represent_kernel(dtype: DType, head_dim: usize) -> (&'static CStr, u32) {
    let chunks = head_dim.div_ceil(REPRESENT_CHUNK);
    let shared_bytes = (chunks * REPRESENT_THREADS as usize * REPRESENT_CHUNK * 2) as u32;
    match dtype {
        DType::F16 if chunks <= 2 => (c"represent_queries_f16", shared_bytes),
        DType::BF16 if chunks <= 2 => (c"represent_queries_bf16", shared_bytes),
        _ => (c"represent_queries", 0),
    }
}

/// The element type that tensor cores multiply, if they do.
fn operand_type(call: &Call<'_>) -> DType {
    call.problem.shared_dtype.unwrap_or(DType::F32)
}

/// Rows that 16 bytes at a time can be read from.
fn aligned(tensor: &DeviceTensor, dim: usize) -> bool {
    let view = tensor.view();
    let strides = [view.batch_stride, view.head_stride, view.row_stride];
    dim.is_multiple_of(8) && view.data.is_multiple_of(16) && strides.iter().all(|stride| stride % 16 == 0)
}

/// As a kernel's number.
fn narrow(what: &str, number: Option<usize>) -> Result<u32> {
    // Grids have fewer than 2^31 blocks.
    number.and_then(|number| i32::try_from(number).ok()).map(|number| number as u32).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format_args!("METHOD_REFINED on CUDA counts 2^31 {what} at most; split the batch"),
        )
    })
}

/// The parameters that follow from the call alone; what is in the workspace is missing.
fn shape_params(call: &Call<'_>, plan: &RefinedPlan) -> Result<RefinedParams> {
    let (problem, params, tensors) = (&call.problem, call.params, &call.tensors);
    let heads = problem.batch * problem.heads_q;
    let blocks = problem.n_k.div_ceil(KEY_BLOCK);
    narrow("tiles of queries", heads.checked_mul(plan.query_tiles.next_multiple_of(GROUP_TILES)))?;
    narrow("blocks of keys", heads.checked_mul(blocks))?;
    let most_first = (params.num_first_keys as usize).min(problem.n_k);
    let causal = problem.mask != Mask::None;
    let rows = [
        aligned(&tensors.q, problem.head_dim),
        aligned(&tensors.k, problem.head_dim),
        aligned(&tensors.v, problem.value_dim),
    ];
    let mut flags = if causal { REFINED_CAUSAL } else { 0 };
    if params.residual != Residual::None {
        flags |= REFINED_REST;
    }
    for (aligned, flag) in rows.into_iter().zip(REFINED_ALIGNED) {
        flags |= if aligned { flag } else { 0 };
    }
    Ok(RefinedParams {
        q: tensors.q.view(),
        k: tensors.k.view(),
        v: tensors.v.view(),
        q_type: element_type(tensors.q.layout.dtype),
        kv_type: element_type(tensors.k.layout.dtype),
        operand_type: element_type(operand_type(call)),
        width: (PARTS[parts_of(problem.head_dim)] * WIDTH_UNIT) as u32,
        batch: problem.batch as u32,
        heads_q: problem.heads_q as u32,
        group: problem.group as u32,
        n_q: problem.n_q as u32,
        n_k: problem.n_k as u32,
        head_dim: problem.head_dim as u32,
        value_dim: problem.value_dim as u32,
        visible: if causal { call.visible() } else { problem.n_k as i32 },
        scale_log2: problem.scale_log2,
        flags,
        num_first_keys: params.num_first_keys,
        band: params.band,
        candidates_per_key: plan.candidates_per_key as u32,
        least_budget: plan.least_budget as u32,
        tile_rows: plan.tile_rows as u32,
        earlier_queries: plan.earlier_queries as u32,
        query_tiles: plan.query_tiles as u32,
        blocks: blocks as u32,
        most_candidates: plan.most_candidates.min(blocks) as u32,
        // Either the budget holds them all, or the first keys fill it and an eighth of it comes besides.
        most_positions: plan.most_budget.max(most_first + plan.most_budget / 8).min(problem.n_k) as u32,
        tiles_of_head: plan.query_tiles as u32,
        groups_of_head: plan.query_tiles.div_ceil(GROUP_TILES) as u32,
        pass_first: 0,
        pass_groups: 0,
        chunk_first: 0,
        chunk_groups: 0,
        tile_list: Pointer::NULL,
        budgets: Pointer::NULL,
        settled: Pointer::NULL,
        probe_rows: Pointer::NULL,
        summaries: Pointer::NULL,
        key_counts: Pointer::NULL,
        mean_keys: Pointer::NULL,
        outliers: Pointer::NULL,
        representatives: Pointer::NULL,
        represented: Pointer::NULL,
        totals: Pointer::NULL,
        starts: Pointer::NULL,
        block_weights: Pointer::NULL,
        outlier_weights: Pointer::NULL,
        candidates: Pointer::NULL,
        candidate_count: Pointer::NULL,
        key_weights: Pointer::NULL,
        column_sums: Pointer::NULL,
        weight_sums: Pointer::NULL,
        candidate_bits: Pointer::NULL,
        candidate_ranks: Pointer::NULL,
        positions: Pointer::NULL,
        chosen: Pointer::NULL,
        extra_keys: Pointer::NULL,
        extra_values: Pointer::NULL,
        segments: Pointer::NULL,
        tiles: Pointer::NULL,
    })
}

/// The error estimate of any method: probe rows, and their exact outputs.
pub(crate) struct Probing {
    shape: RefinedParams,
    params: ProbeParams,
    heads: usize,
    next_tile: Pointer<u32>,
}

impl Probing {
    /// The probe rows of `probes` among the query tiles of `plan`.
    pub(crate) fn carve(
        call: &Call<'_>,
        plan: &RefinedPlan,
        probes: &ProbePlan,
        carver: &mut Carver,
    ) -> Result<Self> {
        let shape = shape_params(call, plan)?;
        let heads = call.problem.batch * call.problem.heads_q;
        let rows = probes.tiles * probes.rows_of_a_tile;
        let records = rows.div_ceil(TILE_ROWS);
        let outputs = heads.saturating_mul(rows).saturating_mul(call.problem.value_dim);
        let params = ProbeParams {
            seed: call.params.seed,
            offset: call.params.offset,
            whole_over_probed: probes.whole_over_probed,
            first_tile: probes.first_tile as u32,
            tiles: probes.tiles as u32,
            target_error: call.params.target_error,
            callers_budget: call.params.budget,
            most_budget: plan.most_budget as u32,
            out_type: element_type(call.tensors.out.layout.dtype),
            out: call.tensors.out.view(),
            error: call.tensors.error.map_or(View::NULL, |error| error.view()),
            tile_list: carver.take(heads * probes.tiles),
            rows: carver.take(heads * rows),
            weights: carver.take(heads * rows),
            exact: carver.take(outputs),
            estimate: Pointer::NULL,
            budgets: Pointer::NULL,
            settled: Pointer::NULL,
            probe_records: carver.take(heads * records),
            probe_segments: carver.take(heads * records),
            records_of_head: records as u32,
        };
        Ok(Probing { shape, params, heads, next_tile: carver.take(1) })
    }

    /// Probe rows of a head.
    fn rows_of_head(&self) -> usize {
        self.params.tiles as usize * 4
    }

    /// A view of outputs of all probe rows.
    fn outputs(&self, outputs: Pointer<f32>) -> View {
        let row = self.shape.value_dim as i64 * size_of::<f32>() as i64;
        let head = row * self.rows_of_head() as i64;
        View {
            data: outputs.address(),
            batch_stride: head * i64::from(self.shape.heads_q),
            head_stride: head,
            row_stride: row,
        }
    }

    /// Lets listed rows attend, `tiles` of them written before, with outputs one after the other.
    ///
    /// # Safety
    /// As for [`attend`].
    unsafe fn attend(
        &self,
        queue: &Queue<'_>,
        call: &Call<'_>,
        outputs: Pointer<f32>,
        lists: (Pointer<Tile>, Pointer<Segment>, u32),
        of_pass: Option<&RefinedParams>,
    ) -> Result<()> {
        let mut attention = call.attend_params();
        attention.out = self.outputs(outputs);
        attention.out_type = element_type(DType::F32);
        attention.lse = View::NULL;
        // The list of rows has so many for each head.
        attention.n_q = self.rows_of_head() as u32;
        attention.query_order = self.params.rows;
        (attention.tiles, attention.segments, attention.tile_count) = lists;
        attention.next_tile = self.next_tile;
        if let Some(pass) = of_pass {
            attention.positions = pass.positions;
            attention.extra_keys = pass.extra_keys;
            attention.extra_values = pass.extra_values;
        }
        // SAFETY: the caller's contract.
        unsafe { attend(queue, call, &attention) }
    }

    /// Draws the rows and computes them exactly.
    ///
    /// # Safety
    /// The call's tensors and the workspace are there, see [`crate::forward`].
    pub(crate) unsafe fn draw(&self, queue: &Queue<'_>, call: &Call<'_>) -> Result<()> {
        let (heads, tiles) = (self.heads as u32, self.params.tiles);
        // SAFETY: these are the kernels' parameters, of this workspace and call.
        unsafe {
            queue.launch(
                c"draw_probes",
                [heads * tiles, 1, 1],
                REPRESENT_THREADS,
                0,
                args![self.shape, self.params],
            )?;
            queue.launch(c"probe_tiles", [heads, 1, 1], 32, 0, args![self.shape, self.params])?;
            let count = heads * self.params.records_of_head;
            let lists = (self.params.probe_records, self.params.probe_segments, count);
            self.attend(queue, call, self.params.exact, lists, None)
        }
    }

    /// Writes the error tensor, if there is one; the output is complete.
    ///
    /// # Safety
    /// As for [`Self::draw`].
    pub(crate) unsafe fn write_errors(&self, queue: &Queue<'_>) -> Result<()> {
        if self.params.error.data == 0 {
            return Ok(());
        }
        let grid = [self.heads as u32, 1, 1];
        // SAFETY: as for `draw`.
        unsafe { queue.launch(c"probe_errors", grid, NORM_THREADS, 0, args![self.shape, self.params]) }
    }
}

/// The parts of the workspace.
pub(crate) struct Buffers {
    shape: RefinedParams,
    probing: Option<Probing>,
    /// Groups of a pass and of a chunk, at most.
    pass_groups: usize,
    chunk_groups: usize,
    /// Budgets that heads may have on their way up.
    rounds: usize,
    budgets: Pointer<u32>,
    next_tile: Pointer<u32>,
}

/// As many groups as `bytes` hold, whole heads where more than one fits.
fn groups_in(bytes: usize, of_a_place: usize, groups_of_head: usize, most: usize) -> usize {
    let groups = (bytes / (GROUP_TILES * of_a_place)).clamp(1, most.max(1));
    if groups >= groups_of_head { groups / groups_of_head * groups_of_head } else { groups }
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

/// The call's part of the workspace.
pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    let problem = &call.problem;
    let plan = RefinedPlan::new(call.params, problem, call.tensors.error.is_some());
    let mut shape = shape_params(call, &plan)?;
    let heads = problem.batch * problem.heads_q;
    let kv_heads = problem.batch * problem.heads_kv;
    let (blocks, width) = (shape.blocks as usize, shape.width as usize);
    let operand_bytes = width * operand_type(call).size();
    let (candidates, positions) = (shape.most_candidates as usize, shape.most_positions as usize);
    let words = blocks.div_ceil(32);

    let groups_of_head = plan.query_tiles.div_ceil(GROUP_TILES);
    let key_bytes = problem.head_dim * call.kv_size();
    let value_bytes = problem.value_dim * call.kv_size();
    let records_bytes =
        SEGMENTS_OF_TILE * size_of::<Segment>() + RECORDS_OF_TILE * size_of::<Tile>() + size_of::<u32>();
    let of_pass = positions * size_of::<u32>() + key_bytes + value_bytes + records_bytes;
    let ranges = ranges(blocks);
    // One after the other in the same memory: the blocks' weights with outliers, the keys' weights, the rest's sums.
    let shared = (candidates * KEY_BLOCK).max(blocks).max(ranges * (problem.head_dim + problem.value_dim));
    let of_chunk =
        size_of::<u32>() * (2 * REPRESENTATIVES + blocks + candidates + 1 + shared + ranges + 2 * words);
    narrow("listed keys", positions.checked_mul(GROUP_TILES))?;
    // Positions are counted in 32 bits.
    let most_places = (u32::MAX as usize / positions.max(1)).min(PASS_BYTES / of_pass).max(GROUP_TILES);
    let pass_groups = groups_in(most_places * of_pass, of_pass, groups_of_head, heads * groups_of_head);
    let chunk_groups = groups_in(CHUNK_BYTES, of_chunk, groups_of_head, pass_groups);
    let chunk_groups = groups_of_chunk(chunk_groups, groups_of_head, pass_groups);

    shape.summaries = carver.take(kv_heads * blocks * (problem.head_dim + problem.value_dim));
    let operand_rows = kv_heads * blocks + OPERAND_ROWS;
    shape.key_counts = carver.take(operand_rows);
    shape.mean_keys = carver.take(operand_rows * operand_bytes);
    shape.outliers = carver.take(operand_rows * operand_bytes);
    shape.representatives = carver.take(heads * plan.query_tiles * REPRESENTATIVES * operand_bytes);
    shape.represented = carver.take(heads * plan.query_tiles * REPRESENTATIVES);
    let budgets = carver.take(heads);
    shape.budgets = budgets;

    let places = chunk_groups * GROUP_TILES;
    shape.totals = carver.take(places * REPRESENTATIVES);
    shape.starts = carver.take(places * REPRESENTATIVES);
    shape.block_weights = carver.take(places * blocks);
    shape.candidates = carver.take(places * candidates);
    shape.candidate_count = carver.take(places);
    shape.key_weights = carver.take(places * shared);
    shape.outlier_weights = shape.key_weights;
    shape.column_sums = shape.key_weights;
    shape.weight_sums = carver.take(places * ranges);
    shape.candidate_bits = carver.take(places * words);
    shape.candidate_ranks = carver.take(places * words);

    let places = pass_groups * GROUP_TILES;
    shape.positions = carver.take(places * positions);
    shape.chosen = carver.take(places);
    shape.extra_keys = carver.take(places * key_bytes);
    shape.extra_values = carver.take(places * value_bytes);
    shape.segments = carver.take(places * SEGMENTS_OF_TILE);
    shape.tiles = carver.take(places * RECORDS_OF_TILE);

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
    let rounds = std::iter::successors(Some(plan.least_budget), |budget| budget.checked_mul(2))
        .take_while(|&budget| budget <= plan.most_budget)
        .count();
    Ok(Buffers { shape, probing, pass_groups, chunk_groups, rounds, budgets, next_tile: carver.take(1) })
}

/// Selection for the groups of a pass. What attention needs is in the pass's part of the workspace afterwards.
///
/// # Safety
/// The call's tensors and the workspace are there; `pass` has the groups of a pass.
unsafe fn select(queue: &Queue<'_>, call: &Call<'_>, buffers: &Buffers, pass: &RefinedParams) -> Result<()> {
    let operands = operand_type(call);
    let parts = parts_of(call.problem.head_dim);
    let end = pass.pass_first + pass.pass_groups;
    for first in (pass.pass_first..end).step_by(buffers.chunk_groups) {
        let mut chunk = *pass;
        chunk.chunk_first = first;
        chunk.chunk_groups = (end - first).min(buffers.chunk_groups as u32);
        let places = [chunk.chunk_groups * GROUP_TILES as u32, 1, 1];
        let groups = [chunk.chunk_groups, 1, 1];
        let candidate_bytes =
            (chunk.most_candidates as usize * CANDIDATE_BYTES).min(MOST_CANDIDATE_BYTES) as u32;
        let slices = (chunk.head_dim + chunk.value_dim).div_ceil(SUM_COLUMNS);
        let sums = [chunk.chunk_groups, ranges(chunk.blocks as usize) as u32, slices];
        // Heads that the chunk has a part of.
        let heads =
            (first + chunk.chunk_groups - 1) / chunk.groups_of_head - first / chunk.groups_of_head + 1;
        // SAFETY: these are the kernels' parameters, of this workspace and call.
        unsafe {
            if operands == DType::F32 {
                queue.launch(c"weigh_blocks_f32", places, WEIGH_F32_THREADS, 0, args![chunk])?;
            } else {
                let name = WEIGH_BLOCKS[usize::from(operands == DType::BF16)][parts];
                queue.launch(name, groups, WEIGH_BLOCKS_THREADS, 0, args![chunk])?;
            }
            queue.launch(c"choose_blocks", places, SELECT_THREADS, 0, args![chunk])?;
            if operands == DType::F32 {
                queue.launch(c"weigh_keys_f32", places, WEIGH_F32_THREADS, 0, args![chunk])?;
            } else {
                let name = WEIGH_KEYS[usize::from(operands == DType::BF16)][parts];
                queue.launch(name, [heads * chunk.blocks, 1, 1], WEIGH_KEYS_THREADS, 0, args![chunk])?;
            }
            queue.launch(c"choose_keys", places, SELECT_THREADS, candidate_bytes, args![chunk])?;
            if chunk.flags & REFINED_REST != 0 {
                queue.launch(c"sum_summaries", sums, SUM_THREADS, 0, args![chunk])?;
            }
            queue.launch(c"refined_tiles", groups, REFINED_TILES_THREADS, 0, args![chunk])?;
        }
    }
    Ok(())
}

/// Runs `each` for the passes over all groups of `shape`, after their selection.
///
/// # Safety
/// As for [`run`].
unsafe fn for_each_pass(
    queue: &Queue<'_>,
    call: &Call<'_>,
    buffers: &Buffers,
    shape: &RefinedParams,
    mut each: impl FnMut(&RefinedParams) -> Result<()>,
) -> Result<()> {
    let groups = shape.batch * shape.heads_q * shape.groups_of_head;
    for first in (0..groups).step_by(buffers.pass_groups) {
        let mut pass = *shape;
        pass.pass_first = first;
        pass.pass_groups = (groups - first).min(buffers.pass_groups as u32);
        // SAFETY: the caller's contract.
        unsafe { select(queue, call, buffers, &pass) }?;
        each(&pass)?;
    }
    Ok(())
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
        queue.fill(buffers.budgets.address(), buffers.shape.least_budget, heads)?;
        queue.zero(probing.params.settled.address(), heads)?;
    }
    let mut shape = buffers.shape;
    shape.tile_list = probing.params.tile_list;
    shape.probe_rows = probing.params.rows;
    shape.settled = probing.params.settled;
    shape.tiles_of_head = probing.params.tiles;
    shape.groups_of_head = probing.params.tiles.div_ceil(GROUP_TILES as u32);
    // As many as a head may need; one that is settled is passed over.
    for _ in 0..buffers.rounds {
        // SAFETY: the caller's contract; the pass's lists have one record for each place.
        unsafe {
            for_each_pass(queue, call, buffers, &shape, |pass| {
                let lists = (pass.tiles, pass.segments, pass.pass_groups * GROUP_TILES as u32);
                probing.attend(queue, call, probing.params.estimate, lists, Some(pass))
            })?;
            queue.launch(
                c"settle_budgets",
                [heads as u32, 1, 1],
                NORM_THREADS,
                0,
                args![shape, probing.params],
            )?;
        }
    }
    Ok(())
}

/// METHOD_REFINED of the whole call.
///
/// # Safety
/// The call's tensors and the buffers are there, see [`crate::forward`].
pub(crate) unsafe fn run(queue: &Queue<'_>, call: &Call<'_>, buffers: &Buffers) -> Result<()> {
    let (problem, shape) = (&call.problem, &buffers.shape);
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
        let (represent, shared_bytes) = represent_kernel(call.tensors.q.layout.dtype, problem.head_dim);
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
    // SAFETY: the caller's contract; attention reads what selection wrote.
    unsafe {
        for_each_pass(queue, call, buffers, shape, |pass| {
            let mut attention = call.attend_params();
            attention.tiles = pass.tiles;
            attention.tile_count = pass.pass_groups * (GROUP_TILES * RECORDS_OF_TILE) as u32;
            attention.segments = pass.segments;
            attention.positions = pass.positions;
            attention.extra_keys = pass.extra_keys;
            attention.extra_values = pass.extra_values;
            attention.next_tile = buffers.next_tile;
            attend(queue, call, &attention)
        })
    }?;
    if let Some(keys) = &call.tensors.keys_per_query {
        let grid = [heads, 1, 1];
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
