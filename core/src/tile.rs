//! The tile: some query rows, the state of their online softmax, and one packed tile of keys and values
//! at a time. Executes what selection lists, whatever the estimator.

use core::ops::Range;

use crate::known_mask::{KnownMask, LOADED_KEYS, Seen};
use crate::math;
use crate::pack::{PackScratch, PackedShape, Packer};
use crate::params::Params;
use crate::problem::{Problem, Tensors};
use crate::residual::Column;
use crate::scratch::Carver;
use crate::simd::{KEY_TILE, Kernels, Step, StepOptions, Weighing};
use crate::tiling::{PROBE_ROWS, TILE_ROWS};
use crate::unmet::Unmet;
use crate::view::{Rows, TensorRef};

/// What every task of a call reads.
pub(crate) struct Call<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) params: &'a Params,
    pub(crate) problem: Problem,
    pub(crate) tensors: &'a Tensors<'a>,
    /// The mask tensor, expanded to `[batch, heads_q, n_q, n_k]`.
    pub(crate) mask: Option<TensorRef<'a>>,
    pub(crate) shape: PackedShape,
    /// Where keys that sampled rows do not meet are noted, when that is wanted.
    pub(crate) unmet: Option<&'a Unmet<'a>>,
}

impl Call<'_> {
    pub(crate) fn packer(&self, batch: usize) -> Packer<'_> {
        Packer { kernels: self.kernels, packing: self.shape.packing, batch }
    }
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

/// A column of the estimator that is in no tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExtraColumn<'a> {
    pub(crate) key: &'a [f32],
    pub(crate) value: &'a [f32],
    /// Base-2 log of the weight.
    pub(crate) log_weight: f32,
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

/// The scratch memory of a tile.
pub(crate) struct TileMemory<'a> {
    pub(crate) head_of: &'a mut [u32],
    pub(crate) row_of: &'a mut [u32],
    pub(crate) visible: &'a mut [u32],
    pub(crate) visible_in_tile: &'a mut [u32],
    /// A part of the mask tensor, `[rows][LOADED_KEYS]`.
    pub(crate) mask: &'a mut [f32],
    query: &'a mut [u32],
    /// What each row's weights are relative to, a base-2 logit.
    pub(crate) max: &'a mut [f32],
    /// Running sums of each row's weights, one per lane, relative to the maximum.
    sum: &'a mut [f32],
    pub(crate) accumulated: &'a mut [f32],
    /// Upper bounds on each row's logits, for the passes that are capped.
    pub(crate) cap: &'a mut [f32],
    /// Second (max, sum) pair, for estimators that keep two sums.
    other_max: &'a mut [f32],
    other_sum: &'a mut [f32],
    keys: &'a mut [u32],
    values: &'a mut [u32],
    log_weight: &'a mut [f32],
    logits: &'a mut [f32],
    weights: &'a mut [u32],
    pack: PackScratch<'a>,
}

impl<'a> TileMemory<'a> {
    /// Scratch from `carver`; with a measuring carver it is only counted.
    pub(crate) fn carve(
        kernels: &Kernels,
        problem: &Problem,
        shape: &PackedShape,
        carver: &mut Carver<'a>,
    ) -> Self {
        // Where there are fewer queries than probe rows of a tile, some are probed more than once.
        let most = problem.n_q.max(PROBE_ROWS).saturating_mul(problem.group);
        let rows = TILE_ROWS.min(most).next_multiple_of(kernels.row_multiple());
        TileMemory {
            head_of: carver.take(rows),
            row_of: carver.take(rows),
            visible: carver.take(rows),
            visible_in_tile: carver.take(rows),
            mask: carver.take(if problem.has_mask_tensor { rows * LOADED_KEYS } else { 0 }),
            query: carver
                .take(rows.next_multiple_of(kernels.query_rows()) * shape.key_words + kernels.lanes()),
            max: carver.take(rows),
            sum: carver.take(rows * kernels.lanes()),
            accumulated: carver.take(rows * shape.value_dim),
            cap: carver.take(rows),
            other_max: carver.take(rows),
            other_sum: carver.take(rows * kernels.lanes()),
            keys: carver.take(shape.keys_len()),
            values: carver.take(shape.values_len()),
            log_weight: carver.take(KEY_TILE),
            logits: carver.take(kernels.query_rows() * kernels.panel()),
            weights: carver.take(kernels.query_rows() * KEY_TILE / shape.packing.depth()),
            pack: PackScratch::carve(kernels, problem, carver),
        }
    }
}

/// States and outputs are asked for this many rows before they are used: sorted rows lie far apart.
pub(crate) const ROWS_AHEAD: usize = 16;

/// What one step of a tile does besides attending to its keys.
#[derive(Clone, Copy)]
pub(crate) struct TileOptions {
    /// Whether each row sees only as many leading keys as the tile's memory says.
    pub(crate) limited: bool,
    /// From which element of its rows on the mask in the tile's memory is added to the logits, if at all.
    pub(crate) mask_offset: Option<usize>,
    /// Added to all logits.
    pub(crate) shift: f32,
    /// Whether each key has a weight of its own besides.
    pub(crate) weighted: bool,
    pub(crate) capped: bool,
    pub(crate) part: Part,
}

/// What a tile's memory holds for the options of a step.
pub(crate) struct OptionMemory<'a> {
    pub(crate) log_weight: &'a [f32],
    pub(crate) visible: &'a [u32],
    /// With the length of a row.
    pub(crate) mask: (&'a [f32], usize),
    pub(crate) cap: &'a [f32],
}

impl TileOptions {
    /// Every row sees every key, and nothing is done to the logits.
    pub(crate) fn plain(part: Part) -> Self {
        TileOptions { limited: false, mask_offset: None, shift: 0.0, weighted: false, capped: false, part }
    }

    /// The kernel's options for the first `key_count` keys.
    pub(crate) fn of<'a>(&self, key_count: usize, memory: OptionMemory<'a>) -> StepOptions<'a> {
        let (mask, stride) = memory.mask;
        StepOptions {
            key_count,
            shift: self.shift,
            log_weight: self.weighted.then_some(memory.log_weight),
            visible: self.limited.then_some(memory.visible),
            mask: self.mask_offset.map(|offset| (&mask[offset..], stride)),
            cap: self.capped.then_some(memory.cap),
            use_sum: self.part != Part::Values,
            use_values: self.part != Part::Sum,
        }
    }
}

/// See the module.
pub(crate) struct Tile<'a> {
    pub(crate) call: &'a Call<'a>,
    rows: usize,
    pub(crate) known_mask: KnownMask,
    pub(crate) memory: TileMemory<'a>,
}

impl<'a> Tile<'a> {
    /// An empty tile in scratch from `carver`.
    pub(crate) fn carve(call: &'a Call<'a>, carver: &mut Carver<'a>) -> Self {
        let memory = TileMemory::carve(call.kernels, &call.problem, &call.shape, carver);
        Tile { call, rows: 0, known_mask: KnownMask::NOTHING, memory }
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

    /// Rows rounded up to what kernels take.
    pub(crate) fn padded_rows(&self) -> usize {
        self.rows.next_multiple_of(self.call.kernels.row_multiple())
    }

    /// Takes all rows away.
    pub(crate) fn clear(&mut self) {
        self.rows = 0;
    }

    /// Packs the pushed queries of batch item `batch` and empties their state.
    pub(crate) fn load_queries(&mut self, batch: usize) {
        self.load_rows(&self.call.tensors.q, batch);
    }

    /// [`Self::load_queries`] of another tensor.
    pub(crate) fn load_rows(&mut self, view: &TensorRef<'_>, batch: usize) {
        let Call { kernels, problem, shape, .. } = self.call;
        let (group, words) = (kernels.query_rows(), shape.key_words);
        let (rows, memory) = (self.padded_rows(), &mut self.memory);
        let packer = self.call.packer(batch);
        let last = self.rows - 1;
        // Rows beyond the last repeat it: their results are not looked at.
        let place = |r: usize| (memory.head_of[r.min(last)] as usize, memory.row_of[r.min(last)] as usize);
        for first in (0..rows).step_by(group) {
            for ahead in first + group..first + 2 * group {
                let (head, row) = place(ahead);
                view.prefetch_row(batch, head, row);
            }
            let to = &mut memory.query[first * words..];
            packer.pack_queries(view, |r| place(first + r), problem.scale_log2, &mut memory.pack, to);
        }
        self.known_mask = KnownMask::NOTHING;
        let visible = memory.visible[last];
        memory.visible[last..rows].fill(visible);
        memory.cap[..rows].fill(f32::INFINITY);
        memory.max[..rows].fill(f32::NEG_INFINITY);
        memory.sum[..rows * kernels.lanes()].fill(0.0);
        memory.accumulated[..rows * shape.value_dim].fill(0.0);
    }

    /// Packs the keys and values at `rows` into the tile's own memory, and those of `extra` behind them: at most a
    /// tile in all.
    fn pack(&mut self, keys: KeyOrder<'_>, rows: &[u32], extra: Option<ExtraColumn<'_>>, part: Part) {
        let (packer, memory) = (self.call.packer(keys.batch), &mut self.memory);
        let tensors = self.call.tensors;
        packer.pack_keys(&tensors.k, keys.kv_head, rows, &mut memory.pack, memory.keys);
        if let Some(extra) = extra {
            packer.pack_key(extra.key, rows.len(), memory.keys);
        }
        if part != Part::Sum {
            let extra = extra.map(|extra| extra.value);
            packer.pack_values(&tensors.v, keys.kv_head, rows, extra, &mut memory.pack, memory.values);
        }
    }

    /// Attends to `key_count` packed keys: those of `packed`, a tile of keys and then values, or those in the
    /// tile's own memory.
    fn step(&mut self, packed: Option<&[u32]>, key_count: usize, options: TileOptions) {
        let rows = self.padded_rows();
        let Call { kernels, problem, shape, .. } = self.call;
        let memory = &mut self.memory;
        let (keys, values) = match packed {
            // Without the product with the values there need not be any.
            Some(keys) if options.part == Part::Sum => (keys, &*memory.values),
            Some(tile) => tile.split_at(shape.keys_len()),
            None => (&*memory.keys, &*memory.values),
        };
        kernels.attend(&mut Step {
            packing: shape.packing,
            head_dim: problem.head_dim,
            value_dim: shape.value_dim,
            scale: problem.scale_log2,
            query: memory.query,
            keys,
            values,
            options: options.of(
                key_count,
                OptionMemory {
                    log_weight: memory.log_weight,
                    visible: memory.visible_in_tile,
                    mask: (memory.mask, LOADED_KEYS),
                    cap: memory.cap,
                },
            ),
            max: &mut memory.max[..rows],
            sum: memory.sum,
            accumulated: memory.accumulated,
            logits: memory.logits,
            weights: memory.weights,
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
        let options = TileOptions { capped, ..TileOptions::plain(part) };
        let mut rows = [0; KEY_TILE];
        for first in positions.clone().step_by(KEY_TILE) {
            let count = KEY_TILE.min(positions.end - first);
            for (slot, row) in rows[..count].iter_mut().enumerate() {
                *row = keys.row(first + slot) as u32;
            }
            self.pack(keys, &rows[..count], None, part);
            let next = first + count..positions.end.min(first + count + KEY_TILE);
            self.prefetch(keys, next.map(|position| keys.row(position)), part);
            self.step(None, count, options);
        }
    }

    /// Asks for the keys and values of the first tile at `positions`.
    pub(crate) fn prefetch_range(&self, keys: KeyOrder<'_>, positions: Range<usize>) {
        self.prefetch(keys, positions.take(KEY_TILE).map(|position| keys.row(position)), Part::Both);
    }

    /// Asks for the keys and values at `rows` while others are attended to.
    fn prefetch(&self, keys: KeyOrder<'_>, rows: impl Iterator<Item = usize>, part: Part) {
        let tensors = self.call.tensors;
        for row in rows {
            tensors.k.prefetch_row(keys.batch, keys.kv_head, row);
            if part != Part::Sum {
                tensors.v.prefetch_row(keys.batch, keys.kv_head, row);
            }
        }
    }

    /// Attends to the keys at `positions` of the order in memory, each row to those below the number
    /// it was pushed with. `packed` holds their tiles, the first of which begins at `positions.start`; without
    /// it they are packed here.
    pub(crate) fn attend_visible(
        &mut self,
        keys: KeyOrder<'_>,
        positions: Range<usize>,
        packed: Option<&[u32]>,
    ) {
        let visible = &self.memory.visible[..self.rows];
        let most = visible.iter().fold(0, |most, &visible| most.max(visible as usize));
        let least = visible.iter().fold(most, |least, &visible| least.min(visible as usize));
        let end = positions.end.min(most);
        let mut rows = [0; KEY_TILE];
        for (index, first) in (positions.start..end).step_by(KEY_TILE).enumerate() {
            let count = KEY_TILE.min(end - first);
            // A tile that every row sees needs no limits.
            let seen = self.look(keys.batch, first..end, least < first + count);
            if seen == Seen::Nothing {
                continue;
            }
            let tile = packed.map(|packed| &packed[index * self.call.shape.tile_len()..]);
            if tile.is_none() {
                for (slot, row) in rows[..count].iter_mut().enumerate() {
                    *row = (first + slot) as u32;
                }
                self.pack(keys, &rows[..count], None, Part::Both);
            }
            let (limited, mask_offset) = match seen {
                Seen::Nothing | Seen::Everything => (false, None),
                Seen::Leading => (true, None),
                Seen::Masked { limited, offset } => (limited, Some(offset)),
            };
            self.step(tile, count, TileOptions { limited, mask_offset, ..TileOptions::plain(Part::Both) });
        }
    }

    /// Adds the first `key_count` keys of a packed tile to every row's sum, with `log_weights` added to their logits.
    pub(crate) fn sum_keys(
        &mut self,
        keys: &[u32],
        key_count: usize,
        log_weights: impl Iterator<Item = f32> + Clone,
    ) {
        let (shift, weighted) = self.set_log_weights(log_weights.take(key_count));
        let options = TileOptions { shift, weighted, ..TileOptions::plain(Part::Sum) };
        self.step(Some(keys), key_count, options);
    }

    /// Prepares the weights of the next step's keys: returns its shift, and whether each key has a weight of its own
    /// besides. One weight for all is cheaper than one for each.
    fn set_log_weights(&mut self, mut log_weights: impl Iterator<Item = f32> + Clone) -> (f32, bool) {
        let mut rest = log_weights.clone();
        let first = rest.next().unwrap_or(0.0);
        if rest.all(|log_weight| log_weight == first) {
            return (first, false);
        }
        self.memory.log_weight.fill_with(|| log_weights.next().unwrap_or(0.0));
        (0.0, true)
    }

    /// How much weight the packed queries give to each of some packed keys, see [`Weighing`].
    pub(crate) fn weigh(
        &mut self,
        query: &[u32],
        (keys, key_count): (&[u32], usize),
        start: &[f32],
        weights: &mut [f32],
    ) {
        let Call { kernels, problem, shape, .. } = self.call;
        kernels.weigh(&mut Weighing {
            packing: shape.packing,
            head_dim: problem.head_dim,
            scale: problem.scale_log2,
            query,
            keys,
            key_count,
            start,
            logits: self.memory.logits,
            weights,
        });
    }

    /// Attends to weighted columns in the same online softmax, the last of which may be `extra`, in no tensor.
    pub(crate) fn attend_columns(
        &mut self,
        keys: KeyOrder<'_>,
        columns: impl Iterator<Item = Column>,
        mut extra: Option<ExtraColumn<'_>>,
        capped: bool,
        part: Part,
    ) {
        let mut columns = columns.map(|column| (keys.row(column.position) as u32, column.log_weight));
        let mut take = |tile: &mut [(u32, f32); KEY_TILE]| {
            let mut count = 0;
            for (slot, column) in tile.iter_mut().zip(&mut columns) {
                *slot = column;
                count += 1;
            }
            count
        };
        let mut tile = [(0, 0.0); KEY_TILE];
        let mut next = tile;
        let mut count = take(&mut tile);
        while count > 0 || extra.is_some() {
            let rows = tile.map(|(row, _)| row);
            // A tile that is not full is the last.
            let extra = if count < KEY_TILE { extra.take() } else { None };
            self.pack(keys, &rows[..count], extra, part);
            if let (Some(extra), Some(slot)) = (extra, tile.get_mut(count)) {
                slot.1 = extra.log_weight;
                count += 1;
            }
            let (shift, weighted) =
                self.set_log_weights(tile[..count].iter().map(|&(_, log_weight)| log_weight));
            let next_count = take(&mut next);
            self.prefetch(keys, next[..next_count].iter().map(|&(row, _)| row as usize), part);
            self.step(None, count, TileOptions { shift, weighted, capped, ..TileOptions::plain(part) });
            (tile, count) = (next, next_count);
        }
    }

    /// The sum of `row`'s weights, relative to its maximum.
    pub(crate) fn sum_of(&self, row: usize) -> f32 {
        let lanes = self.call.kernels.lanes();
        let sums = &self.memory.sum[row * lanes..][..lanes];
        // In halves: as a chain the additions would wait for one another.
        let (low, high) = sums.split_at(lanes / 2);
        low.iter().zip(high).map(|(a, b)| a + b).sum()
    }

    /// Makes `sum`, relative to `max`, the sum of `row`.
    pub(crate) fn set_sum(&mut self, row: usize, max: f32, sum: f32) {
        let lanes = self.call.kernels.lanes();
        let sums = &mut self.memory.sum[row * lanes..][..lanes];
        sums.fill(0.0);
        sums[0] = sum;
        self.memory.max[row] = max;
    }

    /// Base-2 log of each row's sum, -inf for an empty row.
    pub(crate) fn log2_sum(&self, row: usize) -> f32 {
        log2_of(self.memory.max[row], self.sum_of(row))
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

    /// Empties the second (max, sum) pair.
    pub(crate) fn empty_other_sums(&mut self) {
        self.memory.other_max.fill(f32::NEG_INFINITY);
        self.memory.other_sum.fill(0.0);
    }

    /// Multiplies what `row` has accumulated.
    pub(crate) fn scale_accumulated(&mut self, row: usize, factor: f32) {
        let width = self.call.shape.value_dim;
        self.memory.accumulated[row * width..][..width].iter_mut().for_each(|x| *x *= factor);
    }

    /// Normalises the rows and copies them to `to`, one after the other: 0 for a row that saw no key.
    pub(crate) fn finish_into(&mut self, to: &mut [f32]) {
        let (width, value_dim) = (self.call.shape.value_dim, self.call.problem.value_dim);
        for (r, to) in to.chunks_exact_mut(value_dim).take(self.rows).enumerate() {
            self.normalise(r);
            to.copy_from_slice(&self.memory.accumulated[r * width..][..value_dim]);
        }
    }

    /// Divides what `row` has accumulated by its sum, which is returned.
    fn normalise(&mut self, row: usize) -> f32 {
        let sum = self.sum_of(row);
        self.scale_accumulated(row, if sum == 0.0 { 0.0 } else { 1.0 / sum });
        sum
    }

    /// Normalises the rows and writes them to the outputs: (0, -inf) for a row that saw no key.
    ///
    /// # Safety
    /// While this runs nobody else uses these rows of the outputs.
    pub(crate) unsafe fn finish(&mut self, batch: usize) {
        let Call { problem, tensors, .. } = self.call;
        for r in 0..self.rows {
            let ahead = (r + ROWS_AHEAD).min(self.rows - 1);
            tensors.out.prefetch_row(
                batch,
                self.memory.head_of[ahead] as usize,
                self.memory.row_of[ahead] as usize,
            );
            let (head, row) = (self.memory.head_of[r] as usize, self.memory.row_of[r] as usize);
            let sum = self.normalise(r);
            let from = &self.memory.accumulated[r * self.call.shape.value_dim..][..problem.value_dim];
            // SAFETY: the rows are this tile's own (contract).
            unsafe {
                tensors.out.write_row(batch, head, row, from);
                if let Some(to) = &tensors.lse {
                    let lse = log2_of(self.memory.max[r], sum) * core::f32::consts::LN_2;
                    to.write_row(batch, head, row, &[lse]);
                }
            }
        }
    }
}

/// Base-2 log of a sum relative to `max`.
fn log2_of(max: f32, sum: f32) -> f32 {
    if sum == 0.0 { f32::NEG_INFINITY } else { max + math::log2(sum) }
}
