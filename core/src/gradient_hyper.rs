//! The backward pass of what METHOD_PAPER estimates: blocks, and sampled columns.
//!
//! Sorted blocks have queries and keys of their own. Sampled columns are met by all queries: chunks of blocks add up their
//! gradients apart, and the chunks' sums are added in order afterwards.

use core::ops::Range;

use crate::approx_d;
use crate::error::Result;
use crate::exec::{Executor, for_each_item};
use crate::gradient_exact;
use crate::gradient_tile::{GradientCall, GradientSums, GradientTile, Met, Strides, add};
use crate::hyper::{self, Prepared, effective_residual};
use crate::params::{BlockMask, Params, Residual};
use crate::pass::Pass;
use crate::problem::Problem;
use crate::residual::{Column, row_norm_columns, row_norm_stream, uniform_columns, uniform_stream};
use crate::scratch::{Carver, Lanes};
use crate::select::{Blocks, Rectangle, Selection};
use crate::tile::{Call, KeyOrder, Part, Tile};
use crate::tiling::HeadTiling;
use crate::view::Rows;

/// Chunks with sums of their own, over all KV heads.
const CHUNKS: usize = 64;

/// Chunks with sums of their own for each KV head.
fn chunks_at_once(kv_heads: usize) -> usize {
    (CHUNKS / kv_heads.max(1)).clamp(8, CHUNKS)
}

/// Columns that a query of a rectangle may meet.
fn columns(params: &Params) -> usize {
    match effective_residual(params) {
        Residual::None => 0,
        Residual::Uniform => params.sample_size as usize,
        Residual::RowNorm => 2 * params.sample_size as usize,
    }
}

/// Numbers that the sums of all chunks' columns are.
pub(crate) fn partial_len(params: &Params, problem: &Problem, strides: Strides) -> Option<usize> {
    let of_chunk = columns(params).checked_mul(strides.key + strides.value)?;
    of_chunk.checked_mul(problem.heads_kv)?.checked_mul(chunks_at_once(problem.heads_kv))
}

/// A pass over estimated rectangles, for the heads that were prepared.
pub(crate) struct Estimated<'r, 'a> {
    pub(crate) of: &'r GradientCall<'a>,
    pub(crate) prepared: &'r Prepared<'r>,
    pub(crate) pass: &'r Pass<'r>,
    pub(crate) sums: &'r GradientSums<'r>,
    pub(crate) log2_row_sums: &'r Rows<'r>,
}

/// Adds the gradients of every rectangle of `pass`.
pub(crate) fn run_pass(
    estimated: &Estimated<'_, '_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    partial: &mut [f32],
) -> Result<()> {
    let Estimated { of, prepared, pass, .. } = estimated;
    let call = of.call;
    if effective_residual(call.params) == Residual::RowNorm {
        let select = |rectangle: Rectangle, head: usize| estimated.select(rectangle, head);
        hyper::run_tau(call, executor, lanes, prepared, estimated.log2_row_sums, pass, &select)?;
    }
    if let Some(mask) = &call.tensors.block_mask {
        estimated.run_given_blocks(executor, lanes, mask)?;
    }
    let kv_heads = prepared.heads.kv.clone();
    let chunks_at_once = chunks_at_once(call.problem.heads_kv);
    let rectangles_at_once = chunks_at_once.min(pass.count);
    let chunks = chunks_at_once / rectangles_at_once;
    let columns = columns(call.params);
    let strides = Strides::new(call.kernels, &call.problem);
    let partial = Rows::new(partial, columns * (strides.key + strides.value));
    for first in (0..pass.count).step_by(rectangles_at_once) {
        let at_once = rectangles_at_once.min(pass.count - first);
        let sums_of = |kv_head: usize, rectangle: usize, chunk: usize| -> &mut [f32] {
            if columns == 0 {
                return &mut [];
            }
            let index = ((kv_head - kv_heads.start) * rectangles_at_once + rectangle) * chunks + chunk;
            // SAFETY: every task of this loop has its own chunk, or all chunks of its own rectangle.
            unsafe { partial.row(index) }
        };
        for_each_item(executor, lanes, kv_heads.len() * at_once * chunks, &|scratch, item| {
            let (kv_head, rectangle) = (kv_heads.start + item / chunks / at_once, item / chunks % at_once);
            let sums = sums_of(kv_head, rectangle, item % chunks);
            sums.fill(0.0);
            if let Some(rectangle) = (pass.rectangle)(first + rectangle) {
                let mut sums = ColumnSums::new(sums, columns, strides);
                estimated.run_chunk(scratch, &rectangle, (item % chunks, chunks), kv_head, &mut sums);
            }
        })?;
        if columns == 0 {
            continue;
        }
        for_each_item(executor, lanes, kv_heads.len() * at_once, &|_, item| {
            let (kv_head, rectangle) = (kv_heads.start + item / at_once, item % at_once);
            let Some(whole) = (pass.rectangle)(first + rectangle) else { return };
            let sums = sums_of(kv_head, rectangle, 0);
            (1..chunks).for_each(|chunk| add(sums, sums_of(kv_head, rectangle, chunk)));
            let sums = ColumnSums::new(sums, columns, strides);
            // SAFETY: rectangles have keys of their own.
            unsafe { estimated.add_columns(&whole, kv_head, &sums) };
        })?;
    }
    Ok(())
}

impl Estimated<'_, '_> {
    fn select(&self, rectangle: Rectangle, head: usize) -> Selection<'_> {
        let Call { params, problem, tensors, .. } = self.of.call;
        let blocks = hyper::blocks(params, tensors.block_mask, (self.prepared.batch, head), problem.heads_q);
        Selection { rectangle, blocks }
    }

    /// How the heads that share their blocks share tiles.
    fn tiling(&self) -> HeadTiling {
        let shared = self.of.call.tensors.block_mask.is_none_or(|mask| mask.head_stride == 0);
        HeadTiling::new(self.prepared.heads, shared)
    }

    fn keys(&self, kv_head: usize) -> KeyOrder<'_> {
        self.prepared.keys(self.of.call.problem.n_k, kv_head)
    }

    /// Calls `attend` for tiles of the queries at `queries` of `heads`, with the tile loaded.
    ///
    /// # Safety
    /// While this runs nobody else uses the sums of these queries.
    unsafe fn for_each_tile(
        &self,
        tile: &mut GradientTile<'_>,
        heads: &Range<usize>,
        queries: Range<usize>,
        mut attend: impl FnMut(&mut GradientTile<'_>, Range<usize>),
    ) {
        let n_q = self.of.call.problem.n_q;
        let rows_at_once = HeadTiling::rows_of(heads.len());
        for first in queries.clone().step_by(rows_at_once) {
            let positions = first..queries.end.min(first + rows_at_once);
            tile.clear();
            for head in heads.clone() {
                for position in positions.clone() {
                    tile.push(head, self.prepared.query_row(n_q, head, position), 0);
                }
            }
            tile.load(self.prepared.batch);
            attend(tile, positions);
            // SAFETY: the caller's contract.
            unsafe { tile.add_queries(self.sums) };
        }
    }

    /// The caller's blocks, in the phases of [`gradient_exact`].
    fn run_given_blocks(
        &self,
        executor: &dyn Executor,
        lanes: &mut Lanes<'_>,
        mask: &BlockMask<'_>,
    ) -> Result<()> {
        let Estimated { of, prepared, pass, .. } = self;
        let kv_heads = &prepared.heads.kv;
        let chunks = gradient_exact::chunks(pass, kv_heads.len());
        let tiling = self.tiling();
        for phase in 0..chunks {
            for_each_item(executor, lanes, kv_heads.len() * pass.count * chunks, &|scratch, item| {
                let kv_head = kv_heads.start + item / (pass.count * chunks);
                let Some(rectangle) = (pass.rectangle)(item / chunks % pass.count) else { return };
                if rectangle.keys.is_empty() {
                    return;
                }
                let chunk = item % chunks;
                let key_blocks =
                    rectangle.keys.start / mask.key_block..(rectangle.keys.end - 1) / mask.key_block + 1;
                let key_blocks = HeadTiling::chunk_of(&key_blocks, chunk, chunks);
                let positions = key_blocks.start * mask.key_block..key_blocks.end * mask.key_block;
                let mut tile = GradientTile::carve(of, &mut Carver::new(scratch));
                for part in 0..tiling.parts {
                    let heads = tiling.heads_of(kv_head, part);
                    let selection = self.select(rectangle.clone(), heads.start);
                    let blocks = 0..selection.block_count();
                    for block in HeadTiling::chunk_of(&blocks, (chunk + phase) % chunks, chunks) {
                        let ranges = || {
                            let clipped = selection
                                .ranges(block)
                                .map(|range| range.start.max(positions.start)..range.end.min(positions.end));
                            clipped.filter(|range| !range.is_empty())
                        };
                        if ranges().next().is_none() {
                            continue;
                        }
                        let attend = |tile: &mut GradientTile<'_>, _| {
                            for range in ranges() {
                                // SAFETY: as in `gradient_exact`.
                                unsafe { tile.attend_range(self.keys(kv_head), range, self.sums.keys()) };
                            }
                        };
                        // SAFETY: as in `gradient_exact`.
                        unsafe { self.for_each_tile(&mut tile, &heads, selection.queries_of(block), attend) };
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Chunk `chunk.0` of the `chunk.1` chunks of a rectangle's blocks: sorted blocks, and all columns.
    fn run_chunk(
        &self,
        scratch: &mut [u8],
        rectangle: &Rectangle,
        chunk: (usize, usize),
        kv_head: usize,
        sums: &mut ColumnSums<'_>,
    ) {
        let Call { params, problem, .. } = self.of.call;
        let tiling = self.tiling();
        let mut carver = Carver::new(scratch);
        let mut tile = GradientTile::carve(self.of, &mut carver);
        // Its sums are what the bounds of the row-norm residual depend on.
        let mut forward_tile =
            (effective_residual(params) == Residual::RowNorm).then(|| Tile::carve(self.of.call, &mut carver));
        let keys = self.keys(kv_head);
        for part in 0..tiling.parts {
            let heads = tiling.heads_of(kv_head, part);
            let selection = self.select(rectangle.clone(), heads.start);
            let given = matches!(selection.blocks, Blocks::Given { .. });
            if given && effective_residual(params) == Residual::None {
                continue;
            }
            let mut log2_taus = [f32::NEG_INFINITY; HeadTiling::MOST_HEADS];
            for (tau, head) in log2_taus.iter_mut().zip(heads.clone()) {
                let index = head - self.prepared.heads.query.start;
                *tau = hyper::tau_of(self.of.call, self.log2_row_sums, &selection, index);
            }
            for block in HeadTiling::chunk_of(&(0..selection.block_count()), chunk.0, chunk.1) {
                let covered = |column: &Column| selection.covers(block, column.position);
                let attend = |tile: &mut GradientTile<'_>, positions: Range<usize>| {
                    if !given {
                        for range in selection.ranges(block) {
                            // SAFETY: sorted blocks have queries and keys of their own.
                            unsafe { tile.attend_range(keys, range, self.sums.keys()) };
                        }
                    }
                    if let Some(forward) = &mut forward_tile {
                        forward.clear();
                        for head in heads.clone() {
                            for position in positions.clone() {
                                forward.push(head, self.prepared.query_row(problem.n_q, head, position), 0);
                            }
                        }
                        forward.load_queries(keys.batch);
                        for range in selection.ranges(block) {
                            forward.attend_range(keys, range, false, Part::Sum);
                        }
                        approx_d::bound_terms(
                            forward,
                            self.of.call,
                            keys,
                            rectangle.keys.clone(),
                            |row| log2_taus[row / positions.len()],
                            covered,
                            tile.caps(),
                        );
                    }
                    self.attend_columns(tile, rectangle, kv_head, covered, sums);
                };
                // SAFETY: every block of a rectangle is in one chunk, and has queries of its own.
                unsafe { self.for_each_tile(&mut tile, &heads, selection.queries_of(block), attend) };
            }
        }
    }

    /// The columns of a rectangle, with their numbers, and what they contribute to.
    fn columns(
        &self,
        rectangle: &Rectangle,
        kv_head: usize,
    ) -> [Option<(impl Iterator<Item = (usize, Column)>, Part)>; 2] {
        let Call { params, problem, .. } = self.of.call;
        let (positions, sample_size) = (rectangle.keys.clone(), params.sample_size as usize);
        let numbered = problem.first_kv_head + kv_head;
        let uniform = || {
            let stream = uniform_stream(params.seed, params.offset, numbered);
            uniform_columns(stream, positions.clone(), sample_size)
        };
        let by_norm = || {
            let first = (kv_head - self.prepared.heads.kv.start) * problem.n_k;
            let prefix = &self.prepared.norm_prefix[first..][positions.clone()];
            let stream = row_norm_stream(params.seed, params.offset, numbered);
            row_norm_columns(stream, positions.clone(), sample_size, prefix)
        };
        let number = |first: usize, uniform, by_norm| {
            let columns = Option::into_iter(uniform).flatten().chain(Option::into_iter(by_norm).flatten());
            columns.enumerate().map(move |(index, column)| (first + index, column))
        };
        match effective_residual(params) {
            Residual::None => [None, None],
            Residual::Uniform => [Some((number(0, Some(uniform()), None), Part::Both)), None],
            Residual::RowNorm => [
                Some((number(0, Some(uniform()), None), Part::Sum)),
                Some((number(sample_size, None, Some(by_norm())), Part::Values)),
            ],
        }
    }

    fn attend_columns(
        &self,
        tile: &mut GradientTile<'_>,
        rectangle: &Rectangle,
        kv_head: usize,
        covered: impl Fn(&Column) -> bool,
        sums: &mut ColumnSums<'_>,
    ) {
        let keys = self.keys(kv_head);
        for (columns, part) in self.columns(rectangle, kv_head).into_iter().flatten() {
            let columns = columns.filter(|(_, column)| !covered(column));
            let columns = columns.map(|(place, column)| Met::column(keys, column, place));
            let capped = part == Part::Sum;
            tile.attend_listed(keys, columns, None, (part, capped), |place, key, value| {
                let (key_sum, value_sum) = sums.of(place);
                add(key_sum, key);
                add(value_sum, value);
            });
        }
    }

    /// Adds the gradients of the columns of a rectangle to those of their keys.
    ///
    /// # Safety
    /// While this runs nobody else uses the sums of the rectangle's keys.
    unsafe fn add_columns(&self, rectangle: &Rectangle, kv_head: usize, sums: &ColumnSums<'_>) {
        let keys = self.keys(kv_head);
        for (columns, _) in self.columns(rectangle, kv_head).into_iter().flatten() {
            for (place, column) in columns {
                let index = kv_head * self.of.call.problem.n_k + keys.row(column.position);
                let (key, value) = sums.at(place);
                // SAFETY: the caller's contract.
                unsafe { self.sums.keys().add(index, key, value) };
            }
        }
    }
}

/// Sums of the gradients of columns.
struct ColumnSums<'s> {
    keys: &'s mut [f32],
    values: &'s mut [f32],
    strides: Strides,
}

impl<'s> ColumnSums<'s> {
    fn new(sums: &'s mut [f32], columns: usize, strides: Strides) -> Self {
        let (keys, values) = sums.split_at_mut(columns * strides.key);
        ColumnSums { keys, values, strides }
    }

    fn of(&mut self, place: usize) -> (&mut [f32], &mut [f32]) {
        let Strides { key, value } = self.strides;
        (&mut self.keys[place * key..][..key], &mut self.values[place * value..][..value])
    }

    fn at(&self, place: usize) -> (&[f32], &[f32]) {
        let Strides { key, value } = self.strides;
        (&self.keys[place * key..][..key], &self.values[place * value..][..value])
    }
}
