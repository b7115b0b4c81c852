//! The tile of the backward pass: some query rows, what is known of their outputs, the sum of their gradients, and one
//! tile of keys and values at a time. Executes what selection lists, as [`crate::tile`] does in the forward.

use core::ops::Range;

use crate::gradients::Gradients;
use crate::math::LOG2_E;
use crate::problem::Problem;
use crate::residual::Column;
use crate::scratch::Carver;
use crate::simd::{GradientStep, KEY_TILE, Kernels};
use crate::tile::{Call, ExtraColumn, KeyOrder, OptionMemory, Part, TileOptions};
use crate::tiling::TILE_ROWS;
use crate::view::{Rows, words_of};

/// What every task of a backward call reads.
#[derive(Clone, Copy)]
pub(crate) struct GradientCall<'a> {
    pub(crate) call: &'a Call<'a>,
    pub(crate) gradients: &'a Gradients<'a>,
}

/// The row lengths of keys and values in a [`GradientStep`]: whole vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Strides {
    pub(crate) key: usize,
    pub(crate) value: usize,
}

impl Strides {
    pub(crate) fn new(kernels: &Kernels, problem: &Problem) -> Self {
        let lanes = kernels.lanes();
        Strides {
            key: problem.head_dim.next_multiple_of(lanes),
            value: problem.value_dim.next_multiple_of(lanes),
        }
    }
}

/// Sums of gradients of all rows of one batch item, `[heads][rows]`, each row a whole stride.
pub(crate) struct GradientSums<'a> {
    pub(crate) query: Rows<'a>,
    pub(crate) key: Rows<'a>,
    pub(crate) value: Rows<'a>,
}

impl GradientSums<'_> {
    /// The sums of keys and values.
    pub(crate) fn keys(&self) -> KeySums<'_> {
        KeySums { key: &self.key, value: &self.value, first: 0 }
    }
}

/// Sums of gradients of keys and values, from number `first` on.
#[derive(Clone, Copy)]
pub(crate) struct KeySums<'r> {
    pub(crate) key: &'r Rows<'r>,
    pub(crate) value: &'r Rows<'r>,
    pub(crate) first: usize,
}

impl KeySums<'_> {
    /// Adds to the gradients of a key and of its value.
    ///
    /// # Safety
    /// While this runs nobody else uses these rows.
    pub(crate) unsafe fn add(&self, index: usize, key: &[f32], value: &[f32]) {
        // SAFETY: the caller's contract.
        unsafe {
            add(self.key.row(self.first + index), key);
            add(self.value.row(self.first + index), value);
        }
    }
}

/// Adds `terms` to `sums`.
pub(crate) fn add(sums: &mut [f32], terms: &[f32]) {
    sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
}

/// A key that rows meet: where its gradient goes, its row, and its base-2 log weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Met {
    pub(crate) place: usize,
    pub(crate) row: usize,
    pub(crate) log_weight: f32,
}

impl Met {
    /// A column of the estimator whose gradient goes to `place`.
    pub(crate) fn column(keys: KeyOrder<'_>, column: Column, place: usize) -> Self {
        Met { place, row: keys.row(column.position), log_weight: column.log_weight }
    }
}

/// The scratch memory of a tile.
struct Memory<'a> {
    head_of: &'a mut [u32],
    row_of: &'a mut [u32],
    visible: &'a mut [u32],
    visible_in_tile: &'a mut [u32],
    /// The mask tensor's part, `[rows][KEY_TILE]`.
    mask: &'a mut [f32],
    query: &'a mut [f32],
    output_gradient: &'a mut [f32],
    log2_sum: &'a mut [f32],
    delta: &'a mut [f32],
    cap: &'a mut [f32],
    query_gradient: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    key_panels: &'a mut [u32],
    value_panels: &'a mut [u32],
    log_weight: &'a mut [f32],
    key_gradient: &'a mut [f32],
    value_gradient: &'a mut [f32],
    weights: &'a mut [f32],
    logit_gradients: &'a mut [f32],
}

/// See the module.
pub(crate) struct GradientTile<'a> {
    of: GradientCall<'a>,
    strides: Strides,
    rows: usize,
    memory: Memory<'a>,
}

impl<'a> GradientTile<'a> {
    /// Counts its scratch.
    pub(crate) fn measure(kernels: &Kernels, problem: &Problem, carver: &mut Carver<'a>) {
        Memory::carve(kernels, problem, carver);
    }

    /// An empty tile in scratch from `carver`.
    pub(crate) fn carve(of: &GradientCall<'a>, carver: &mut Carver<'a>) -> Self {
        let Call { kernels, problem, .. } = of.call;
        let memory = Memory::carve(kernels, problem, carver);
        GradientTile { of: *of, strides: Strides::new(kernels, problem), rows: 0, memory }
    }

    pub(crate) fn problem(&self) -> &Problem {
        &self.of.call.problem
    }

    pub(crate) fn strides(&self) -> Strides {
        self.strides
    }

    /// Takes all rows away.
    pub(crate) fn clear(&mut self) {
        self.rows = 0;
    }

    /// Adds query `row` of query head `head`, which sees the first `visible` keys of a range.
    pub(crate) fn push(&mut self, head: usize, row: usize, visible: usize) {
        self.memory.head_of[self.rows] = head as u32;
        self.memory.row_of[self.rows] = row as u32;
        self.memory.visible[self.rows] = visible as u32;
        self.rows += 1;
    }

    /// Upper bounds on the rows' logits beyond which terms of capped lists are constants (base 2).
    pub(crate) fn caps(&mut self) -> &mut [f32] {
        &mut self.memory.cap[..self.rows]
    }

    /// Reads the pushed rows of batch item `batch`, and empties their gradients.
    pub(crate) fn load(&mut self, batch: usize) {
        let GradientCall { call, gradients } = self.of;
        let Call { kernels, problem, tensors, .. } = call;
        let (strides, memory) = (self.strides, &mut self.memory);
        let out = tensors.out.reborrow();
        let lse = tensors.lse.as_ref().expect("backward has checked that it is there").reborrow();
        for r in 0..self.rows {
            let (head, row) = (memory.head_of[r] as usize, memory.row_of[r] as usize);
            let query = &mut memory.query[r * strides.key..][..strides.key];
            tensors.q.read_row(kernels, batch, head, row, &mut query[..problem.head_dim]);
            query[problem.head_dim..].fill(0.0);
            let output_gradient = &mut memory.output_gradient[r * strides.value..][..strides.value];
            let (output_gradient, padding) = output_gradient.split_at_mut(problem.value_dim);
            gradients.dout.read_row(kernels, batch, head, row, output_gradient);
            padding.fill(0.0);
            let mut of_row = [0.0];
            lse.read_row(kernels, batch, head, row, &mut of_row);
            memory.log2_sum[r] = of_row[0] * LOG2_E;
            let output = &mut memory.values[..problem.value_dim];
            out.read_row(kernels, batch, head, row, output);
            let mut delta = output.iter().zip(&*output_gradient).map(|(x, y)| x * y).sum::<f32>();
            if let Some(dlse) = &gradients.dlse {
                dlse.read_row(kernels, batch, head, row, &mut of_row);
                delta -= of_row[0];
            }
            memory.delta[r] = delta;
        }
        memory.query_gradient[..self.rows * strides.key].fill(0.0);
    }

    /// Attends to listed keys, which every row sees, the last of which may be `extra`, in no tensor: `add` gets the place
    /// of each, in order, and the gradients of key and value. The place of `extra` is [`usize::MAX`].
    pub(crate) fn attend_listed(
        &mut self,
        keys: KeyOrder<'_>,
        mut listed: impl Iterator<Item = Met>,
        mut extra: Option<ExtraColumn<'_>>,
        (part, capped): (Part, bool),
        mut add: impl FnMut(usize, &[f32], &[f32]),
    ) {
        loop {
            let mut places = [usize::MAX; KEY_TILE];
            let mut count = 0;
            for (slot, met) in listed.by_ref().take(KEY_TILE).enumerate() {
                self.read_key(keys, met.row, slot);
                self.memory.log_weight[slot] = met.log_weight;
                places[slot] = met.place;
                count += 1;
            }
            // A tile that is not full is the last.
            let last = count < KEY_TILE;
            if let Some(extra) = extra.take_if(|_| last) {
                self.set_key(&extra, count);
                self.memory.log_weight[count] = extra.log_weight;
                count += 1;
            }
            if count > 0 {
                // One weight for all is cheaper than one for each.
                let log_weights = &self.memory.log_weight[..count];
                let first = log_weights[0];
                let alike = log_weights.iter().all(|&log_weight| log_weight == first);
                let (shift, weighted) = if alike { (first, false) } else { (0.0, true) };
                self.step(count, TileOptions { shift, weighted, capped, ..TileOptions::plain(part) });
                let Strides { key, value } = self.strides;
                let gradients = self
                    .memory
                    .key_gradient
                    .chunks_exact(key)
                    .zip(self.memory.value_gradient.chunks_exact(value));
                for (&place, (key, value)) in places[..count].iter().zip(gradients) {
                    add(place, key, value);
                }
            }
            if last {
                return;
            }
        }
    }

    /// Attends to the keys at `positions` of a key order, which every row sees.
    ///
    /// # Safety
    /// While this runs nobody else uses the sums of these keys.
    pub(crate) unsafe fn attend_range(
        &mut self,
        keys: KeyOrder<'_>,
        positions: Range<usize>,
        sums: KeySums<'_>,
    ) {
        let first = keys.kv_head * self.of.call.problem.n_k;
        let listed = positions.map(|position| {
            let row = keys.row(position);
            Met { place: first + row, row, log_weight: 0.0 }
        });
        self.attend_listed(keys, listed, None, (Part::Both, false), |place, key, value| {
            // SAFETY: the caller's contract.
            unsafe { sums.add(place, key, value) };
        });
    }

    /// Attends to the keys at `positions` of the order in memory, each row to those below the number it was pushed with
    /// that the mask tensor shows it.
    ///
    /// # Safety
    /// As for [`Self::attend_range`].
    pub(crate) unsafe fn attend_visible(
        &mut self,
        keys: KeyOrder<'_>,
        positions: Range<usize>,
        sums: KeySums<'_>,
    ) {
        let visible = &self.memory.visible[..self.rows];
        let most = visible.iter().fold(0, |most, &visible| most.max(visible as usize));
        let least = visible.iter().fold(most, |least, &visible| least.min(visible as usize));
        let first_place = keys.kv_head * self.of.call.problem.n_k;
        let end = positions.end.min(most);
        for first in (positions.start..end).step_by(KEY_TILE) {
            let count = KEY_TILE.min(end - first);
            // A tile that every row sees needs no limits.
            let limited = least < first + count;
            let memory = &mut self.memory;
            for (in_tile, &visible) in memory.visible_in_tile.iter_mut().zip(&memory.visible[..self.rows]) {
                *in_tile = visible.saturating_sub(first as u32).min(count as u32);
            }
            let mask_offset = self.read_mask(keys.batch, first..first + count).then_some(0);
            (0..count).for_each(|slot| self.read_key(keys, first + slot, slot));
            self.step(count, TileOptions { limited, mask_offset, ..TileOptions::plain(Part::Both) });
            let Strides { key, value } = self.strides;
            for slot in 0..count {
                let key = &self.memory.key_gradient[slot * key..][..key];
                let value = &self.memory.value_gradient[slot * value..][..value];
                // SAFETY: the caller's contract.
                unsafe { sums.add(first_place + first + slot, key, value) };
            }
        }
    }

    /// Adds the gradients of the rows to `sums`.
    ///
    /// # Safety
    /// While this runs nobody else uses the sums of these rows.
    pub(crate) unsafe fn add_queries(&self, sums: &GradientSums<'_>) {
        let (n_q, stride) = (self.of.call.problem.n_q, self.strides.key);
        for r in 0..self.rows {
            let index = self.memory.head_of[r] as usize * n_q + self.memory.row_of[r] as usize;
            // SAFETY: the caller's contract.
            unsafe { add(sums.query.row(index), &self.memory.query_gradient[r * stride..][..stride]) };
        }
    }

    /// Reads one key and its value as number `slot` of the tile.
    fn read_key(&mut self, keys: KeyOrder<'_>, row: usize, slot: usize) {
        let Call { kernels, problem, tensors, .. } = self.of.call;
        let (key, padding) =
            self.memory.keys[slot * self.strides.key..][..self.strides.key].split_at_mut(problem.head_dim);
        tensors.k.read_row(kernels, keys.batch, keys.kv_head, row, key);
        padding.fill(0.0);
        let value = &mut self.memory.values[slot * self.strides.value..][..problem.value_dim];
        tensors.v.read_row(kernels, keys.batch, keys.kv_head, row, value);
    }

    /// Makes a column that is in no tensor number `slot` of the tile.
    fn set_key(&mut self, extra: &ExtraColumn<'_>, slot: usize) {
        let (key, padding) =
            self.memory.keys[slot * self.strides.key..][..self.strides.key].split_at_mut(extra.key.len());
        key.copy_from_slice(extra.key);
        padding.fill(0.0);
        self.memory.values[slot * self.strides.value..][..extra.value.len()].copy_from_slice(extra.value);
    }

    /// Reads the rows' part of the mask tensor, if there is one.
    fn read_mask(&mut self, batch: usize, keys: Range<usize>) -> bool {
        let Call { kernels, mask, .. } = self.of.call;
        let Some(mask) = mask else { return false };
        for r in 0..self.rows {
            let place = (batch, self.memory.head_of[r] as usize, self.memory.row_of[r] as usize);
            let to = &mut self.memory.mask[r * KEY_TILE..][..keys.len()];
            mask.read_part(kernels, place, keys.start, to);
        }
        true
    }

    /// Attends to the first `key_count` keys of the tile; their gradients are in the tile's memory then.
    fn step(&mut self, key_count: usize, options: TileOptions) {
        let Call { kernels, problem, .. } = self.of.call;
        let (rows, strides, memory) = (self.rows, self.strides, &mut self.memory);
        // Panels are filled by whole vectors of keys; those beyond the last are not looked at.
        let filled = key_count.next_multiple_of(kernels.lanes()).min(KEY_TILE);
        to_panels(kernels, problem.head_dim, &memory.keys[..filled * strides.key], memory.key_panels);
        to_panels(kernels, problem.value_dim, &memory.values[..filled * strides.value], memory.value_panels);
        memory.key_gradient[..key_count * strides.key].fill(0.0);
        memory.value_gradient[..key_count * strides.value].fill(0.0);
        kernels.attend_gradient(&mut GradientStep {
            head_dim: problem.head_dim,
            value_dim: problem.value_dim,
            scale_log2: problem.scale_log2,
            query: memory.query,
            output_gradient: memory.output_gradient,
            keys: memory.keys,
            key_panels: memory.key_panels,
            value_panels: memory.value_panels,
            options: options.of(
                key_count,
                OptionMemory {
                    log_weight: memory.log_weight,
                    visible: memory.visible_in_tile,
                    mask: (memory.mask, KEY_TILE),
                    cap: memory.cap,
                },
            ),
            log2_sum: memory.log2_sum,
            delta: &memory.delta[..rows],
            query_gradient: memory.query_gradient,
            key_gradient: memory.key_gradient,
            value_gradient: memory.value_gradient,
            weights: memory.weights,
            logit_gradients: memory.logit_gradients,
        });
    }
}

/// Lanes that any table has, at most.
const MOST_LANES: usize = 16;

/// Transposes `rows`, each a whole stride of which `width` elements count, into panels of keys.
fn to_panels(kernels: &Kernels, width: usize, rows: &[f32], to: &mut [u32]) {
    let (lanes, panel) = (kernels.lanes(), kernels.panel());
    let stride = width.next_multiple_of(lanes);
    let words: &[u32] = words_of(rows);
    for (group, words) in words.chunks_exact(lanes * stride).enumerate() {
        let mut rows: [&[u32]; MOST_LANES] = [&[]; MOST_LANES];
        rows.iter_mut().zip(words.chunks_exact(stride)).for_each(|(to, row)| *to = row);
        let slot = group * lanes;
        kernels.transpose(&rows[..lanes], width, &mut to[slot / panel * panel * width + slot % panel..]);
    }
}

impl<'a> Memory<'a> {
    fn carve(kernels: &Kernels, problem: &Problem, carver: &mut Carver<'a>) -> Self {
        let rows = TILE_ROWS.min(problem.n_q.max(1).saturating_mul(problem.group));
        let strides = Strides::new(kernels, problem);
        Memory {
            head_of: carver.take(rows),
            row_of: carver.take(rows),
            visible: carver.take(rows),
            visible_in_tile: carver.take(rows),
            mask: carver.take(if problem.has_mask_tensor { rows * KEY_TILE } else { 0 }),
            query: carver.take(rows * strides.key),
            output_gradient: carver.take(rows * strides.value),
            log2_sum: carver.take(rows),
            delta: carver.take(rows),
            cap: carver.take(rows),
            query_gradient: carver.take(rows * strides.key),
            keys: carver.take(KEY_TILE * strides.key),
            values: carver.take(KEY_TILE * strides.value),
            key_panels: carver.take(KEY_TILE * problem.head_dim),
            value_panels: carver.take(KEY_TILE * problem.value_dim),
            log_weight: carver.take(KEY_TILE),
            key_gradient: carver.take(KEY_TILE * strides.key),
            value_gradient: carver.take(KEY_TILE * strides.value),
            weights: carver.take(rows * KEY_TILE),
            logit_gradients: carver.take(rows * KEY_TILE),
        }
    }
}
