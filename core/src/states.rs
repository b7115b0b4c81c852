//! Partial results of query rows, kept between the passes that meet their keys.

use crate::merge::merge_factors;
use crate::tile::{ROWS_AHEAD, Tile};
use crate::view::Rows;

/// Unnormalised partial results of all query rows of some heads of one batch item, kept between passes.
pub(crate) struct States<'a> {
    pub(crate) first_head: usize,
    pub(crate) max: Rows<'a>,
    pub(crate) sum: Rows<'a>,
    pub(crate) accumulated: Rows<'a>,
}

impl States<'_> {
    /// Number of the state of row `row` of the tile.
    fn index(&self, tile: &Tile<'_>, row: usize) -> usize {
        let (head, query) = (tile.memory.head_of[row] as usize, tile.memory.row_of[row] as usize);
        (head - self.first_head) * tile.call.problem.n_q + query
    }
}

impl Tile<'_> {
    /// The stored partial results of the tile's row `row` (maximum, sum, accumulated), if it has any; those of
    /// later rows are asked for.
    ///
    /// # Safety
    /// While the result lives nobody else uses the states of these rows.
    unsafe fn stored<'s>(&self, states: &'s States<'_>, row: usize) -> Option<(f32, f32, &'s [f32])> {
        states.accumulated.prefetch(states.index(self, (row + ROWS_AHEAD).min(self.rows() - 1)));
        let index = states.index(self, row);
        let [max, sum, accumulated] = [&states.max, &states.sum, &states.accumulated].map(|rows| {
            // SAFETY: the rows are this tile's own (contract).
            unsafe { &*rows.row(index) }
        });
        // An empty state's accumulated values were never written.
        (sum[0] != 0.0 || max[0] != f32::NEG_INFINITY).then_some((max[0], sum[0], accumulated))
    }

    /// Makes the stored partial results of the rows those of the tile, which has met no key: what comes now
    /// continues the same online softmax.
    ///
    /// # Safety
    /// While this runs nobody else uses the states of these rows.
    pub(crate) unsafe fn resume(&mut self, states: &States<'_>) {
        let (width, value_dim) = (self.call.shape.value_dim, self.call.problem.value_dim);
        for r in 0..self.rows() {
            // SAFETY: the rows are this tile's own (contract).
            let Some((max, sum, accumulated)) = (unsafe { self.stored(states, r) }) else { continue };
            self.set_sum(r, max, sum);
            self.memory.accumulated[r * width..][..value_dim].copy_from_slice(accumulated);
        }
    }

    /// Adds the stored partial results of the tile's rows, over keys that the tile has not met.
    ///
    /// # Safety
    /// As for [`Self::resume`].
    pub(crate) unsafe fn absorb(&mut self, states: &States<'_>) {
        let (width, value_dim) = (self.call.shape.value_dim, self.call.problem.value_dim);
        for r in 0..self.rows() {
            // SAFETY: the rows are this tile's own (contract).
            let Some((max, sum, accumulated)) = (unsafe { self.stored(states, r) }) else { continue };
            let [mine, stored] = merge_factors(self.memory.max[r], max);
            let joined = self.sum_of(r) * mine + sum * stored;
            self.set_sum(r, self.memory.max[r].max(max), joined);
            for (x, y) in self.memory.accumulated[r * width..][..value_dim].iter_mut().zip(accumulated) {
                *x = *x * mine + *y * stored;
            }
        }
    }

    /// Stores the partial results of the tile's rows.
    ///
    /// # Safety
    /// As for [`Self::resume`].
    pub(crate) unsafe fn store(&self, states: &States<'_>) {
        let (width, value_dim) = (self.call.shape.value_dim, self.call.problem.value_dim);
        for r in 0..self.rows() {
            let index = states.index(self, r);
            // SAFETY: the rows are this tile's own (contract).
            unsafe {
                states.max.row(index)[0] = self.memory.max[r];
                states.sum.row(index)[0] = self.sum_of(r);
                states
                    .accumulated
                    .row(index)
                    .copy_from_slice(&self.memory.accumulated[r * width..][..value_dim]);
            }
        }
    }
}
