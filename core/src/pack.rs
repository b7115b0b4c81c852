//! Packing: rows of keys and values, wherever they lie in the tensors, into the tiles that kernels read.

use crate::problem::Problem;
use crate::scratch::Carver;
use crate::simd::{HASH_ROWS, KEY_TILE, Kernels, Packing};
use crate::view::TensorRef;

/// Sizes of packed queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedShape {
    pub(crate) packing: Packing,
    /// Words of a query or a key.
    pub(crate) key_words: usize,
    /// value_dim rounded up to whole vectors.
    pub(crate) value_dim: usize,
}

impl PackedShape {
    pub(crate) fn new(kernels: &Kernels, problem: &Problem) -> Self {
        let packing = problem.shared_dtype.map_or(Packing::F32, |dtype| kernels.packing(dtype));
        PackedShape {
            packing,
            key_words: problem.head_dim.div_ceil(packing.depth()),
            value_dim: problem.value_dim.next_multiple_of(kernels.lanes()),
        }
    }

    /// Words of the keys of a tile.
    pub(crate) fn keys_len(&self) -> usize {
        KEY_TILE * self.key_words
    }

    /// Words of the values of a tile.
    pub(crate) fn values_len(&self) -> usize {
        KEY_TILE / self.packing.depth() * self.value_dim
    }

    /// Words of a packed tile: keys, then values.
    pub(crate) fn tile_len(&self) -> usize {
        self.keys_len() + self.values_len()
    }

    /// Words of a packed tile, which may lack the values.
    pub(crate) fn len_of(&self, values: bool) -> usize {
        if values { self.tile_len() } else { self.keys_len() }
    }
}

/// Rows that any table packs at once, at most.
const MOST_ROWS: usize = 16;

/// Scratch for rows that are not packed from where they are.
pub(crate) struct PackScratch<'a> {
    /// As many queries or keys as are packed at once.
    rows: &'a mut [u32],
    stride: usize,
    /// One row of values, as words.
    value: &'a mut [u32],
    /// Two widened rows.
    wide: &'a mut [f32],
}

impl<'a> PackScratch<'a> {
    pub(crate) fn carve(kernels: &Kernels, problem: &Problem, carver: &mut Carver<'a>) -> Self {
        let stride = problem.head_dim.next_multiple_of(kernels.lanes());
        PackScratch {
            rows: carver.take(kernels.lanes().max(kernels.query_rows()).max(HASH_ROWS) * stride),
            stride,
            value: carver.take(problem.value_dim),
            wide: carver.take(2 * problem.head_dim.max(problem.value_dim)),
        }
    }
}

/// Packs rows of one batch item.
pub(crate) struct Packer<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) packing: Packing,
    pub(crate) batch: usize,
}

impl Packer<'_> {
    /// Widens one row, and narrows it to words of the packing; `to` has as many.
    fn read_words(
        &self,
        view: &TensorRef<'_>,
        (head, row): (usize, usize),
        wide: &mut [f32],
        to: &mut [u32],
    ) {
        let wide = &mut wide[..view.row_len()];
        view.read_row(self.kernels, self.batch, head, row, wide);
        self.write_words(wide, to.iter_mut());
    }

    /// Writes elements, which are what packing makes of them, as words.
    fn write_words<'w>(&self, elements: &[f32], to: impl Iterator<Item = &'w mut u32>) {
        match self.packing {
            Packing::F32 => to.zip(elements).for_each(|(word, x)| *word = x.to_bits()),
            Packing::Bf16Pairs => to.zip(elements.chunks(2)).for_each(|(word, pair)| {
                *word = bf16_pair(pair[0], pair.get(1).copied().unwrap_or(0.0));
            }),
        }
    }

    /// `count` rows of `view` as words, in place where they are words already, else in `scratch`. `place` gives
    /// the head and the row of each.
    pub(crate) fn rows<'r>(
        &self,
        view: &'r TensorRef<'_>,
        count: usize,
        place: impl Fn(usize) -> (usize, usize),
        scratch: &'r mut PackScratch<'_>,
    ) -> [&'r [u32]; MOST_ROWS] {
        let words = view.row_len().div_ceil(self.packing.depth());
        let mut rows: [&[u32]; MOST_ROWS] = [&[]; MOST_ROWS];
        let mut in_place = words.is_multiple_of(self.kernels.lanes());
        for (i, to) in rows[..count].iter_mut().enumerate() {
            let (head, row) = place(i);
            match view.words(self.packing, self.batch, head, row) {
                Some(words) if in_place => *to = words,
                _ => in_place = false,
            }
        }
        if !in_place {
            for (i, to) in scratch.rows.chunks_exact_mut(scratch.stride).take(count).enumerate() {
                self.read_words(view, place(i), scratch.wide, &mut to[..words]);
            }
            for (to, row) in rows.iter_mut().zip(scratch.rows.chunks_exact(scratch.stride)).take(count) {
                *to = row;
            }
        }
        rows
    }

    /// Packs a group of queries, given by head and row; `scale` is applied where queries carry it.
    pub(crate) fn pack_queries(
        &self,
        view: &TensorRef<'_>,
        place: impl Fn(usize) -> (usize, usize),
        scale: f32,
        scratch: &mut PackScratch<'_>,
        to: &mut [u32],
    ) {
        let (count, words) = (self.kernels.query_rows(), view.row_len().div_ceil(self.packing.depth()));
        let scale = (self.packing == Packing::F32).then_some(scale);
        let rows = self.rows(view, count, place, scratch);
        self.kernels.pack_queries(&rows[..count], words, scale, to);
    }

    /// Packs the keys at `rows` (one to [`KEY_TILE`]) of `head` of `view`.
    pub(crate) fn pack_keys(
        &self,
        view: &TensorRef<'_>,
        head: usize,
        rows: &[u32],
        scratch: &mut PackScratch<'_>,
        to: &mut [u32],
    ) {
        let words = view.row_len().div_ceil(self.packing.depth());
        let (panel, lanes) = (self.kernels.panel(), self.kernels.lanes());
        for (vector, rows) in rows.chunks(lanes).enumerate() {
            // Lanes beyond the last key repeat it: nobody looks at them.
            let place = |lane: usize| (head, rows[lane.min(rows.len() - 1)] as usize);
            let sources = self.rows(view, lanes, place, scratch);
            let first = vector * lanes;
            let at = first / panel * panel * words + first % panel;
            self.kernels.transpose(&sources[..lanes], words, &mut to[at..]);
        }
    }

    /// Packs `key`, whose elements are what packing makes of them, as number `slot` of a tile.
    pub(crate) fn pack_key(&self, key: &[f32], slot: usize, to: &mut [u32]) {
        let (depth, panel) = (self.packing.depth(), self.kernels.panel());
        let first = slot / panel * panel * key.len().div_ceil(depth) + slot % panel;
        self.write_words(key, to[first..].iter_mut().step_by(panel));
    }

    /// Packs the values at `rows` of `head` of `view`, and `extra` behind them: at most [`KEY_TILE`].
    pub(crate) fn pack_values(
        &self,
        view: &TensorRef<'_>,
        head: usize,
        rows: &[u32],
        extra: Option<&[f32]>,
        scratch: &mut PackScratch<'_>,
        to: &mut [u32],
    ) {
        let (depth, width) = (self.packing.depth(), view.row_len());
        let slots = KEY_TILE / depth;
        let value = &mut scratch.value[..width];
        let pairs = rows.chunks_exact(depth);
        let odd = pairs.remainder().first();
        for (slot, rows) in pairs.enumerate() {
            let row = rows[0] as usize;
            match self.packing {
                Packing::F32 => match view.words(self.packing, self.batch, head, row) {
                    Some(words) => {
                        self.kernels.place(words, slot, slots, to);
                        continue;
                    }
                    None => self.read_words(view, (head, row), scratch.wide, value),
                },
                Packing::Bf16Pairs => {
                    let (first, second) = scratch.wide.split_at_mut(width);
                    let second = &mut second[..width];
                    view.read_row(self.kernels, self.batch, head, row, first);
                    view.read_row(self.kernels, self.batch, head, rows[1] as usize, second);
                    write_pairs(first, second, value);
                }
            }
            self.kernels.place(value, slot, slots, to);
        }
        let (first, second) = scratch.wide.split_at_mut(width);
        let second = &mut second[..width];
        match (odd, extra) {
            (None, None) => return,
            (Some(&row), extra) => {
                view.read_row(self.kernels, self.batch, head, row as usize, first);
                match extra {
                    Some(extra) => second.copy_from_slice(extra),
                    None => second.fill(0.0),
                }
                write_pairs(first, second, value);
            }
            (None, Some(extra)) => match self.packing {
                Packing::F32 => self.write_words(extra, value.iter_mut()),
                Packing::Bf16Pairs => {
                    second.fill(0.0);
                    write_pairs(extra, second, value);
                }
            },
        }
        self.kernels.place(value, rows.len() / depth, slots, to);
    }
}

/// Writes one column of the values of two keys a word.
fn write_pairs(first: &[f32], second: &[f32], to: &mut [u32]) {
    for (word, (a, b)) in to.iter_mut().zip(first.iter().zip(second)) {
        *word = bf16_pair(*a, *b);
    }
}

/// Two numbers that are bf16 already.
pub(crate) fn bf16_pair(first: f32, second: f32) -> u32 {
    first.to_bits() >> 16 | (second.to_bits() & 0xffff_0000)
}
