//! The tile: some query rows, the state of their online softmax, and one packed tile of keys and values
//! at a time. Executes what selection lists, whatever the estimator.

use core::ops::Range;

use crate::math;
use crate::params::Params;
use crate::problem::{Problem, Tensors};
use crate::residual::Column;
use crate::scratch::Carver;
use crate::simd::{KEY_TILE, Kernels, Step};
use crate::tiling::{HeadTiling, TILE_ROWS};
use crate::view::Rows;

/// What every task of a call reads.
pub(crate) struct Call<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) params: &'a Params,
    pub(crate) problem: Problem,
    pub(crate) tensors: &'a Tensors<'a>,
}

/// The keys and values of one KV head in some order.
#[derive(Clone, Copy)]
pub(crate) struct KeyOrder<'a> {
    pub(crate) batch: usize,
    pub(crate) kv_head: usize,
    /// Row at each position; absent means the order in memory.
    pub(crate) order: Option<&'a [u32]>,
}

impl KeyOrder<'_> {
    pub(crate) fn row(&self, position: usize) -> usize {
        self.order.map_or(position, |order| order[position] as usize)
    }
}

/// What a run of keys contributes to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The row sums and the product with the values.
    Both,
    /// The row sums only.
    Sum,
    /// The product with the values only.
    Values,
}

/// Unnormalised partial results of all query rows of one batch item, kept between passes.
pub(crate) struct States<'a> {
    pub(crate) max: Rows<'a>,
    pub(crate) sum: Rows<'a>,
    pub(crate) accumulated: Rows<'a>,
}

/// The scratch memory of a tile.
pub(crate) struct TileMemory<'a> {
    head_of: &'a mut [u32],
    row_of: &'a mut [u32],
    visible: &'a mut [u32],
    visible_in_tile: &'a mut [u32],
    query: &'a mut [f32],
    /// Running maximum of each row's base-2 logits.
    pub(crate) max: &'a mut [f32],
    /// Running sum of each row's weights, relative to the maximum.
    pub(crate) sum: &'a mut [f32],
    accumulated: &'a mut [f32],
    /// Upper bounds on each row's logits, for the passes that are capped.
    pub(crate) cap: &'a mut [f32],
    /// Second (max, sum) pair, for estimators that keep two sums.
    pub(crate) other_max: &'a mut [f32],
    pub(crate) other_sum: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    log_weight: &'a mut [f32],
    scores: &'a mut [f32],
    /// One widened row.
    wide: &'a mut [f32],
    /// Widened keys that are not packed yet.
    rows_to_pack: &'a mut [f32],
}

impl<'a> TileMemory<'a> {
    /// Scratch from `carver`; with a measuring carver it is only counted.
    pub(crate) fn carve(kernels: &Kernels, problem: &Problem, carver: &mut Carver<'a>) -> Self {
        let most = problem.n_q.saturating_mul(problem.group.min(HeadTiling::MOST_HEADS));
        let rows = TILE_ROWS.min(most).next_multiple_of(kernels.query_rows());
        let value_dim = padded_value_dim(kernels, problem);
        TileMemory {
            head_of: carver.take(rows),
            row_of: carver.take(rows),
            visible: carver.take(rows),
            visible_in_tile: carver.take(rows),
            query: carver.take(rows * problem.head_dim),
            max: carver.take(rows),
            sum: carver.take(rows),
            accumulated: carver.take(rows * value_dim),
            cap: carver.take(rows),
            other_max: carver.take(rows),
            other_sum: carver.take(rows),
            keys: carver.take(KEY_TILE * problem.head_dim),
            values: carver.take(KEY_TILE * value_dim),
            log_weight: carver.take(KEY_TILE),
            scores: carver.take(kernels.query_rows() * KEY_TILE),
            wide: carver.take(problem.head_dim.max(problem.value_dim)),
            rows_to_pack: carver.take(kernels.lanes() * packing_stride(kernels, problem)),
        }
    }
}

/// value_dim rounded up to the kernels' panel.
fn padded_value_dim(kernels: &Kernels, problem: &Problem) -> usize {
    problem.value_dim.next_multiple_of(kernels.panel())
}

/// Distance of the keys in `rows_to_pack`: head_dim rounded up to whole vectors.
fn packing_stride(kernels: &Kernels, problem: &Problem) -> usize {
    problem.head_dim.next_multiple_of(kernels.lanes())
}

/// See the module.
pub(crate) struct Tile<'a> {
    call: &'a Call<'a>,
    padded_value_dim: usize,
    rows: usize,
    pub(crate) memory: TileMemory<'a>,
}

impl<'a> Tile<'a> {
    /// An empty tile in scratch from `carver`.
    pub(crate) fn carve(call: &'a Call<'a>, carver: &mut Carver<'a>) -> Self {
        let memory = TileMemory::carve(call.kernels, &call.problem, carver);
        Tile { call, padded_value_dim: padded_value_dim(call.kernels, &call.problem), rows: 0, memory }
    }

    /// Number of query rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Adds query `row` of query head `head`, which sees the first `visible` keys of a range.
    pub(crate) fn push(&mut self, head: usize, row: usize, visible: usize) {
        self.memory.head_of[self.rows] = head as u32;
        self.memory.row_of[self.rows] = row as u32;
        self.memory.visible[self.rows] = visible as u32;
        self.rows += 1;
    }

    /// Rows rounded up to whole register tiles.
    fn padded_rows(&self) -> usize {
        self.rows.next_multiple_of(self.call.kernels.query_rows())
    }

    /// Packs the pushed queries of batch item `batch`, scaled, and empties their state.
    pub(crate) fn load_queries(&mut self, batch: usize) {
        let Call { kernels, problem, tensors, .. } = self.call;
        let (group, d) = (kernels.query_rows(), problem.head_dim);
        let rows = self.padded_rows();
        self.memory.query[..rows * d].fill(0.0);
        for r in 0..self.rows {
            let wide = &mut self.memory.wide[..d];
            tensors.q.read_row(
                kernels,
                batch,
                self.memory.head_of[r] as usize,
                self.memory.row_of[r] as usize,
                wide,
            );
            let panel = &mut self.memory.query[r / group * group * d..];
            for (i, x) in wide.iter().enumerate() {
                panel[i * group + r % group] = x * problem.scale_log2;
            }
        }
        self.memory.visible[self.rows..rows].fill(0);
        self.memory.cap[..rows].fill(f32::INFINITY);
        self.memory.max[..rows].fill(f32::NEG_INFINITY);
        self.memory.sum[..rows].fill(0.0);
        self.memory.accumulated[..rows * self.padded_value_dim].fill(0.0);
        // The columns beyond value_dim are multiplied and never looked at: they must only not be slow.
        let panel = kernels.panel();
        let last = self.padded_value_dim - panel;
        self.memory.values[last * KEY_TILE..][..panel * KEY_TILE].fill(0.0);
    }

    /// Packs the key and the value at `row` as number `slot` of the tile.
    fn pack(&mut self, keys: KeyOrder<'_>, slot: usize, row: usize, with_values: bool) {
        let Call { kernels, problem, tensors, .. } = self.call;
        let (panel, lanes) = (kernels.panel(), kernels.lanes());
        let stride = packing_stride(kernels, problem);
        let key = &mut self.memory.rows_to_pack[slot % lanes * stride..][..problem.head_dim];
        tensors.k.read_row(kernels, keys.batch, keys.kv_head, row, key);
        if (slot + 1).is_multiple_of(lanes) {
            self.pack_keys(slot + 1);
        }
        if with_values {
            let wide = &mut self.memory.wide[..problem.value_dim];
            tensors.v.read_row(kernels, keys.batch, keys.kv_head, row, wide);
            for (p, piece) in wide.chunks(panel).enumerate() {
                self.memory.values[(p * KEY_TILE + slot) * panel..][..piece.len()].copy_from_slice(piece);
            }
        }
    }

    /// Packs the keys read since the last whole vector, up to number `count` of the tile.
    fn pack_keys(&mut self, count: usize) {
        let Call { kernels, problem, .. } = self.call;
        let (panel, lanes) = (kernels.panel(), kernels.lanes());
        let first = (count - 1) / lanes * lanes;
        let to = &mut self.memory.keys[first / panel * panel * problem.head_dim + first % panel..];
        let stride = packing_stride(kernels, problem);
        kernels.transpose(self.memory.rows_to_pack, stride, problem.head_dim, to);
    }

    /// Attends to the packed keys. `first` is the position of the first, when each row sees only as
    /// many leading positions as it was pushed with.
    fn step(&mut self, key_count: usize, first: Option<usize>, weighted: bool, capped: bool, part: Part) {
        let rows = self.padded_rows();
        if !key_count.is_multiple_of(self.call.kernels.lanes()) {
            self.pack_keys(key_count);
        }
        if let Some(first) = first {
            for (in_tile, &visible) in
                self.memory.visible_in_tile.iter_mut().zip(&self.memory.visible[..rows])
            {
                *in_tile = visible.saturating_sub(first as u32).min(KEY_TILE as u32);
            }
        }
        self.call.kernels.attend(&mut Step {
            head_dim: self.call.problem.head_dim,
            value_dim: self.padded_value_dim,
            query: self.memory.query,
            keys: self.memory.keys,
            values: self.memory.values,
            key_count,
            log_weight: weighted.then_some(&*self.memory.log_weight),
            visible: first.is_some().then_some(&*self.memory.visible_in_tile),
            cap: capped.then_some(&*self.memory.cap),
            use_sum: part != Part::Values,
            use_values: part != Part::Sum,
            max: &mut self.memory.max[..rows],
            sum: &mut self.memory.sum[..rows],
            accumulated: self.memory.accumulated,
            scores: self.memory.scores,
        });
    }

    /// Attends to the keys at `positions`, which every row sees; `capped` bounds each row's logits
    /// by the tile's cap.
    pub(crate) fn attend_range(
        &mut self,
        keys: KeyOrder<'_>,
        positions: Range<usize>,
        capped: bool,
        part: Part,
    ) {
        self.attend_tiles(keys, positions, false, capped, part);
    }

    /// Attends to the keys at `positions` of the order in memory, each row to those below the number
    /// it was pushed with.
    pub(crate) fn attend_visible(&mut self, keys: KeyOrder<'_>, positions: Range<usize>) {
        let most =
            self.memory.visible[..self.rows].iter().fold(0, |most, &visible| most.max(visible as usize));
        let least =
            self.memory.visible[..self.rows].iter().fold(most, |least, &visible| least.min(visible as usize));
        let end = positions.end.min(most);
        // Whole tiles that every row sees need no limits.
        let common = least.clamp(positions.start, end.max(positions.start));
        let aligned = positions.start + (common - positions.start) / KEY_TILE * KEY_TILE;
        self.attend_tiles(keys, positions.start..aligned, false, false, Part::Both);
        self.attend_tiles(keys, aligned..end, true, false, Part::Both);
    }

    fn attend_tiles(
        &mut self,
        keys: KeyOrder<'_>,
        positions: Range<usize>,
        limited: bool,
        capped: bool,
        part: Part,
    ) {
        let mut start = positions.start;
        while start < positions.end {
            let count = KEY_TILE.min(positions.end - start);
            for slot in 0..count {
                self.pack(keys, slot, keys.row(start + slot), part != Part::Sum);
            }
            self.step(count, limited.then_some(start), false, capped, part);
            start += count;
        }
    }

    /// Attends to weighted columns in the same online softmax.
    pub(crate) fn attend_columns(
        &mut self,
        keys: KeyOrder<'_>,
        columns: impl Iterator<Item = Column>,
        capped: bool,
        part: Part,
    ) {
        let mut count = 0;
        for column in columns {
            self.pack(keys, count, keys.row(column.position), part != Part::Sum);
            self.memory.log_weight[count] = column.log_weight;
            count += 1;
            if count == KEY_TILE {
                self.step(count, None, true, capped, part);
                count = 0;
            }
        }
        if count > 0 {
            self.step(count, None, true, capped, part);
        }
    }

    /// Base-2 log of each row's sum, -inf for an empty row.
    pub(crate) fn log2_sum(&self, row: usize) -> f32 {
        if self.memory.sum[row] == 0.0 {
            f32::NEG_INFINITY
        } else {
            self.memory.max[row] + math::log2(self.memory.sum[row])
        }
    }

    /// Writes the base-2 logs of the rows' sums to consecutive rows of `to`.
    ///
    /// # Safety
    /// While this runs nobody else uses these rows of `to`.
    pub(crate) unsafe fn store_log2_sums(&self, to: &Rows<'_>, first: usize) {
        for r in 0..self.rows {
            // SAFETY: the rows are this tile's own (contract).
            unsafe { to.row(first + r)[0] = self.log2_sum(r) };
        }
    }

    /// Swaps the two (max, sum) pairs.
    pub(crate) fn swap_sums(&mut self) {
        core::mem::swap(&mut self.memory.max, &mut self.memory.other_max);
        core::mem::swap(&mut self.memory.sum, &mut self.memory.other_sum);
    }

    /// Multiplies what `row` has accumulated.
    pub(crate) fn scale_accumulated(&mut self, row: usize, factor: f32) {
        let width = self.padded_value_dim;
        self.memory.accumulated[row * width..][..width].iter_mut().for_each(|x| *x *= factor);
    }

    /// Adds the stored partial results of the tile's rows, over keys that the tile has not met.
    ///
    /// # Safety
    /// While this runs nobody else uses the states of these rows.
    pub(crate) unsafe fn absorb(&mut self, states: &States<'_>) {
        let (width, value_dim) = (self.padded_value_dim, self.call.problem.value_dim);
        for r in 0..self.rows {
            let index =
                self.memory.head_of[r] as usize * self.call.problem.n_q + self.memory.row_of[r] as usize;
            // SAFETY: the rows are this tile's own (contract).
            let (max, sum, accumulated) = unsafe {
                (states.max.row(index)[0], states.sum.row(index)[0], &*states.accumulated.row(index))
            };
            // An empty state's accumulated values were never written.
            if sum == 0.0 && max == f32::NEG_INFINITY {
                continue;
            }
            let [mine, stored] = crate::merge::merge_factors(self.memory.max[r], max);
            self.memory.max[r] = self.memory.max[r].max(max);
            self.memory.sum[r] = self.memory.sum[r] * mine + sum * stored;
            for (x, y) in self.memory.accumulated[r * width..][..value_dim].iter_mut().zip(accumulated) {
                *x = *x * mine + *y * stored;
            }
        }
    }

    /// Stores the partial results of the tile's rows.
    ///
    /// # Safety
    /// As for [`Self::absorb`].
    pub(crate) unsafe fn store(&self, states: &States<'_>) {
        let (width, value_dim) = (self.padded_value_dim, self.call.problem.value_dim);
        for r in 0..self.rows {
            let index =
                self.memory.head_of[r] as usize * self.call.problem.n_q + self.memory.row_of[r] as usize;
            // SAFETY: the rows are this tile's own (contract).
            unsafe {
                states.max.row(index)[0] = self.memory.max[r];
                states.sum.row(index)[0] = self.memory.sum[r];
                states
                    .accumulated
                    .row(index)
                    .copy_from_slice(&self.memory.accumulated[r * width..][..value_dim]);
            }
        }
    }

    /// Normalises the rows and writes them to the outputs: (0, -inf) for a row that saw no key.
    ///
    /// # Safety
    /// While this runs nobody else uses these rows of the outputs.
    pub(crate) unsafe fn finish(&mut self, batch: usize) {
        let Call { problem, tensors, .. } = self.call;
        for r in 0..self.rows {
            let (head, row) = (self.memory.head_of[r] as usize, self.memory.row_of[r] as usize);
            let lse = self.log2_sum(r) * core::f32::consts::LN_2;
            let factor = if self.memory.sum[r] == 0.0 { 0.0 } else { 1.0 / self.memory.sum[r] };
            self.scale_accumulated(r, factor);
            let from = &self.memory.accumulated[r * self.padded_value_dim..][..problem.value_dim];
            // SAFETY: the rows are this tile's own (contract).
            unsafe {
                tensors.out.write_row(batch, head, row, from);
                if let Some(to) = &tensors.lse {
                    to.write_row(batch, head, row, &[lse]);
                }
            }
        }
    }
}
