//! Which keys of a tile its queries see: by their position, and by the mask tensor.

use core::ops::Range;

use crate::known_mask::{KnownMask, LOADED_KEYS, SURVEYED_TILES, Seen};
use crate::simd::{KEY_TILE, MaskSurvey};
use crate::tile::Tile;
use crate::view::TensorRef;

/// Rows that are looked at together.
const SURVEYED_ROWS: usize = 8;

impl Tile<'_> {
    /// Finds out what the rows see of the first of `keys`, at most a tile; the next calls are about the others. `limited`:
    /// rows see only as many leading positions as they were pushed with.
    ///
    /// Most masks hold nothing but 0 and -inf, in the shape of a staircase. They need not be added to logits: keys
    /// that no row sees are left out, and others are limited as under a causal mask.
    pub(crate) fn look(&mut self, batch: usize, keys: Range<usize>, limited: bool) -> Seen {
        if limited {
            self.limit(keys.start);
        }
        let by_position = if limited { Seen::Leading } else { Seen::Everything };
        let Some(mask) = self.call.mask else { return by_position };
        let first = keys.start;
        if !self.known_mask.surveyed.contains(&first) {
            self.survey_mask(&mask, batch, first..keys.end.min(first + SURVEYED_TILES * KEY_TILE));
        }
        let KnownMask { surveyed, surveys, .. } = &self.known_mask;
        let MaskSurvey { all_zero, all_hidden } = surveys[(first - surveyed.start) / KEY_TILE];
        if all_hidden {
            return Seen::Nothing;
        }
        if all_zero {
            return by_position;
        }
        self.limit(first);
        if let Some(most) = self.limit_to_zeros(&mask, batch, first..keys.end.min(first + KEY_TILE)) {
            return if most == 0 { Seen::Nothing } else { Seen::Leading };
        }
        self.limit(first);
        if !self.known_mask.loaded.contains(&first) {
            self.load_mask(&mask, batch, first..keys.end.min(first + LOADED_KEYS));
        }
        Seen::Masked { limited, offset: first - self.known_mask.loaded.start }
    }

    /// Limits each row to the positions that it was pushed with, in a tile of keys that begins at `first`.
    fn limit(&mut self, first: usize) {
        let (rows, memory) = (self.padded_rows(), &mut self.memory);
        for (in_tile, &visible) in memory.visible_in_tile.iter_mut().zip(&memory.visible[..rows]) {
            *in_tile = visible.saturating_sub(first as u32).min(KEY_TILE as u32);
        }
    }

    /// Head and query of row `row`.
    fn place(&self, row: usize) -> (usize, usize) {
        (self.memory.head_of[row] as usize, self.memory.row_of[row] as usize)
    }

    /// The rows as heads and queries that follow one another, without those whose mask is that of others.
    fn distinct_queries(&self, mask: &TensorRef<'_>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let [_, head_stride, row_stride, _] = mask.layout().stride;
        let mut next = 0;
        let mut first_queries = None;
        core::iter::from_fn(move || {
            while next < self.rows() {
                let (head, start) = self.place(next);
                let rest = next..self.rows();
                let count = rest.take_while(|&row| self.place(row) == (head, start + row - next)).count();
                next += count;
                let queries = start..start + if row_stride == 0 { 1 } else { count };
                if head_stride != 0 || first_queries.as_ref() != Some(&queries) {
                    first_queries.get_or_insert(queries.clone());
                    return Some((head, queries));
                }
            }
            None
        })
    }

    /// Looks at the rows' part of the mask for `keys`, tile by tile.
    fn survey_mask(&mut self, mask: &TensorRef<'_>, batch: usize, keys: Range<usize>) {
        let mut surveys = [MaskSurvey::OF_NOTHING; SURVEYED_TILES];
        for (head, queries) in self.distinct_queries(mask) {
            for first in queries.clone().step_by(SURVEYED_ROWS) {
                let queries = first..queries.end.min(first + SURVEYED_ROWS);
                for (survey, first) in surveys.iter_mut().zip(keys.clone().step_by(KEY_TILE)) {
                    if survey.all_zero || survey.all_hidden {
                        let keys = first..keys.end.min(first + KEY_TILE);
                        let found = mask.survey_mask(self.call.kernels, (batch, head), queries.clone(), keys);
                        survey.all_zero &= found.all_zero;
                        survey.all_hidden &= found.all_hidden;
                    }
                }
            }
        }
        (self.known_mask.surveyed, self.known_mask.surveys) = (keys, surveys);
    }

    /// Limits each row further to the keys before the first that its mask hides, where it has no other effect.
    /// Returns the most that a row sees then.
    fn limit_to_zeros(&mut self, mask: &TensorRef<'_>, batch: usize, keys: Range<usize>) -> Option<u32> {
        let mut most = 0;
        for row in 0..self.rows() {
            let (head, query) = self.place(row);
            let seen = keys.len().min(self.memory.visible_in_tile[row] as usize);
            let zeros = mask.leading_zeros((batch, head, query), keys.start..keys.start + seen)? as u32;
            self.memory.visible_in_tile[row] = zeros;
            most = most.max(zeros);
        }
        // Rows beyond the last repeat it.
        let rows = self.rows()..self.padded_rows();
        let seen = self.memory.visible_in_tile[rows.start - 1];
        self.memory.visible_in_tile[rows].fill(seen);
        Some(most)
    }

    /// Widens the rows' part of the mask for `keys` into the tile's memory.
    fn load_mask(&mut self, mask: &TensorRef<'_>, batch: usize, keys: Range<usize>) {
        let (rows, padded) = (self.rows(), self.padded_rows());
        for row in 0..rows {
            let (head, query) = self.place(row);
            let to = &mut self.memory.mask[row * LOADED_KEYS..][..keys.len()];
            mask.read_part(self.call.kernels, (batch, head, query), keys.start, to);
        }
        self.memory.mask[rows * LOADED_KEYS..padded * LOADED_KEYS].fill(0.0);
        self.known_mask.loaded = keys;
    }
}
