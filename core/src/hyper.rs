//! Algorithm 3 (HyperAttention without a mask): exact blocks, and a residual for what they leave out.

use core::ops::Range;

use crate::approx_d;
use crate::error::Result;
use crate::exec::{Executor, for_each_item};
use crate::params::{BlockMask, Params, Residual};
use crate::pass::Pass;
use crate::residual::{Column, row_norm_columns, row_norm_stream, uniform_columns, uniform_stream};
use crate::scratch::{Carver, Lanes};
use crate::select::{Blocks, Rectangle, Selection};
use crate::tile::{Call, KeyOrder, Part, Tile};
use crate::tiling::{HeadSet, HeadTiling, TILE_ROWS};
use crate::view::Rows;

/// What selection prepared for some heads of one batch item.
pub(crate) struct Prepared<'a> {
    pub(crate) batch: usize,
    pub(crate) heads: &'a HeadSet,
    /// Sorted rows `[query heads][n_q]`; absent means the order in memory.
    pub(crate) query_order: Option<&'a [u32]>,
    /// Sorted rows `[KV heads][n_k]`.
    pub(crate) key_order: Option<&'a [u32]>,
    /// Running sums of |v|^2 over each sub-problem's keys, in key order `[KV heads][n_k]`;
    /// [`Residual::RowNorm`] only.
    pub(crate) norm_prefix: &'a [f64],
}

impl<'a> Prepared<'a> {
    pub(crate) fn query_row(&self, n_q: usize, head: usize, position: usize) -> usize {
        self.query_order
            .map_or(position, |order| order[(head - self.heads.query.start) * n_q + position] as usize)
    }

    pub(crate) fn keys(&self, n_k: usize, kv_head: usize) -> KeyOrder<'a> {
        let order = self.key_order.map(|order| &order[(kv_head - self.heads.kv.start) * n_k..][..n_k]);
        KeyOrder { batch: self.batch, kv_head, order }
    }
}

/// Where the exact blocks of query head `head` come from.
pub(crate) fn blocks<'a>(
    params: &Params,
    mask: Option<BlockMask<'a>>,
    (batch, head): (usize, usize),
    heads_q: usize,
) -> Blocks<'a> {
    match mask {
        Some(mask) => Blocks::Given { mask, pattern: batch * heads_q + head },
        None if params.block_size == 0 => Blocks::Absent,
        None => Blocks::Sorted { block_size: params.block_size as usize },
    }
}

/// The residual that is computed: none when there are no samples.
pub fn effective_residual(params: &Params) -> Residual {
    if params.sample_size == 0 { Residual::None } else { params.residual }
}

/// Estimates every rectangle of `pass` for the heads that were prepared.
pub(crate) fn run_pass(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    prepared: &Prepared<'_>,
    log2_row_sums: &mut [f32],
    pass: &Pass<'_>,
) -> Result<()> {
    let Call { params, problem, tensors, .. } = call;
    let mask = tensors.block_mask;
    let shared = mask.is_none_or(|mask| mask.head_stride == 0);
    let heads = prepared.heads;
    let tiling = HeadTiling::new(heads, shared);
    let select = |rectangle: Rectangle, head: usize| Selection {
        rectangle,
        blocks: blocks(params, mask, (prepared.batch, head), problem.heads_q),
    };
    let log2_row_sums = Rows::new(log2_row_sums, 1);
    if effective_residual(params) == Residual::RowNorm {
        run_tau(call, executor, lanes, prepared, &log2_row_sums, pass, &select)?;
    }

    let bounds = pass.rectangles().map(|rectangle| {
        let selection = select(rectangle, 0);
        (selection.block_count(), tiling.chunks(selection.most_queries()))
    });
    let (most_blocks, chunks) = bounds.fold((0, 0), |most, next| (most.0.max(next.0), most.1.max(next.1)));
    let per_head = pass.count * most_blocks * chunks;
    let items = per_head * tiling.parts * heads.kv.len();
    for_each_item(executor, lanes, items, &|scratch, item| {
        let kv_head = heads.kv.start + item / per_head / tiling.parts;
        let part = item / per_head % tiling.parts;
        let place = item % per_head;
        let Some(rectangle) = (pass.rectangle)(place / chunks / most_blocks) else { return };
        let heads = tiling.heads_of(kv_head, part);
        let selection = select(rectangle, heads.start);
        let block = place / chunks % most_blocks;
        if block >= selection.block_count() {
            return;
        }
        let queries = HeadTiling::chunk_of(&selection.queries_of(block), place % chunks, chunks);
        if queries.is_empty() {
            return;
        }
        let mut tile = Tile::carve(call, &mut Carver::new(scratch));
        for head in heads.clone() {
            for position in queries.clone() {
                tile.push(head, prepared.query_row(problem.n_q, head, position), 0);
            }
        }
        let keys = prepared.keys(problem.n_k, kv_head);
        if let Some(unmet) = call.unmet {
            for (head, position) in heads.clone().flat_map(|head| queries.clone().map(move |p| (head, p))) {
                let row = prepared.query_row(problem.n_q, head, position);
                let left_out = selection.left_out(block).flatten().map(|position| keys.row(position));
                unmet.add([prepared.batch, head], row, left_out);
            }
        }
        if let Some(range) = selection.ranges(block).next() {
            tile.prefetch_range(keys, range);
        }
        tile.load_queries(prepared.batch);
        // The row-norm residual has sums of its own for every sub-problem.
        let separate = effective_residual(params) == Residual::RowNorm;
        if !separate {
            pass.resume(&mut tile);
        }
        let mut log2_taus = [f32::NEG_INFINITY; HeadTiling::MOST_HEADS];
        for (tau, head) in log2_taus.iter_mut().zip(heads) {
            *tau = tau_of(call, &log2_row_sums, &selection, head - prepared.heads.query.start);
        }
        let log2_tau_of = |row: usize| log2_taus[row / queries.len()];
        estimate(&mut tile, call, prepared, &selection, block, kv_head, log2_tau_of);
        if separate {
            pass.join(&mut tile);
        }
        pass.complete(&mut tile, prepared.batch);
    })
}

/// Executes one tile's lists: the exact ranges, then the residual's columns.
fn estimate(
    tile: &mut Tile<'_>,
    call: &Call<'_>,
    prepared: &Prepared<'_>,
    selection: &Selection<'_>,
    block: usize,
    kv_head: usize,
    log2_tau_of: impl Fn(usize) -> f32,
) {
    let Call { params, problem, .. } = call;
    let keys = prepared.keys(problem.n_k, kv_head);
    let positions = selection.rectangle.keys.clone();
    for range in selection.ranges(block) {
        tile.attend_range(keys, range, false, Part::Both);
    }
    let covered = |column: &Column| selection.covers(block, column.position);
    let sample_size = params.sample_size as usize;
    match effective_residual(params) {
        Residual::None => {}
        Residual::Uniform => {
            let stream = uniform_stream(params.seed, params.offset, problem.first_kv_head + kv_head);
            let columns = uniform_columns(stream, positions, sample_size);
            tile.attend_columns(keys, columns.filter(|column| !covered(column)), None, false, Part::Both);
        }
        Residual::RowNorm => {
            let prefix = (kv_head - prepared.heads.kv.start) * problem.n_k;
            let prefix = &prepared.norm_prefix[prefix..][positions.clone()];
            let stream = row_norm_stream(params.seed, params.offset, problem.first_kv_head + kv_head);
            approx_d::estimate_row_sums(tile, call, keys, positions.clone(), log2_tau_of, covered);
            let columns = row_norm_columns(stream, positions, sample_size, prefix);
            tile.attend_columns(keys, columns.filter(|column| !covered(column)), None, false, Part::Values);
            approx_d::apply_row_sums(tile);
        }
    }
}

/// Line 1 of Algorithm 2 for every query head and rectangle: the tau rows' unmasked sums, kept at the
/// first query positions of the rectangle.
pub(crate) fn run_tau<'s>(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    prepared: &Prepared<'_>,
    log2_row_sums: &Rows<'_>,
    pass: &Pass<'_>,
    select: &(dyn Fn(Rectangle, usize) -> Selection<'s> + Sync),
) -> Result<()> {
    let Call { params, problem, .. } = call;
    let most = pass.rectangles().map(|r| approx_d::tau_rows(params, r.queries.len())).max().unwrap_or(0);
    // Small tiles: there are few rows, and each meets every key.
    let rows_at_once = TILE_ROWS / 4;
    let chunks = most.div_ceil(rows_at_once);
    let items = prepared.heads.query.len() * pass.count * chunks;
    for_each_item(executor, lanes, items, &|scratch, item| {
        let (index, chunk) = (item / chunks / pass.count, item % chunks);
        let head = prepared.heads.query.start + index;
        let Some(rectangle) = (pass.rectangle)(item / chunks % pass.count) else { return };
        let rows = rectangle_rows(params, &rectangle, chunk, rows_at_once);
        if rows.is_empty() {
            return;
        }
        let first = index * problem.n_q + rectangle.queries.start;
        let selection = select(rectangle, head);
        let keys = prepared.keys(problem.n_k, head / problem.group);
        let mut tile = Tile::carve(call, &mut Carver::new(scratch));
        let row_at = |position: usize| prepared.query_row(problem.n_q, head, position);
        approx_d::unmasked_row_sums(&mut tile, call, &selection, keys, head, row_at, rows.clone());
        // SAFETY: rectangles have disjoint queries and every task its own rows of one.
        unsafe { tile.store_log2_sums(log2_row_sums, first + rows.start) };
    })
}

/// Chunk `chunk` of the tau rows of a rectangle.
fn rectangle_rows(params: &Params, rectangle: &Rectangle, chunk: usize, length: usize) -> Range<usize> {
    let rows = approx_d::tau_rows(params, rectangle.queries.len());
    (chunk * length).min(rows)..((chunk + 1) * length).min(rows)
}

/// log2 tau of a rectangle of the `index`-th head, -inf when the residual does not use it.
pub(crate) fn tau_of(call: &Call<'_>, sums: &Rows<'_>, selection: &Selection<'_>, index: usize) -> f32 {
    let Call { params, problem, .. } = call;
    if effective_residual(params) != Residual::RowNorm {
        return f32::NEG_INFINITY;
    }
    let queries = &selection.rectangle.queries;
    let first = index * problem.n_q + queries.start;
    // SAFETY: the pass that wrote the sums is over, and nothing writes them during this one.
    let sum = |i| unsafe { sums.row(first + i)[0] };
    approx_d::log2_tau((0..approx_d::tau_rows(params, queries.len())).map(sum))
}
