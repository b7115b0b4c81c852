//! Probe rows: a few queries of each head that are computed exactly besides, to estimate the error of an estimator.

use core::ops::Range;

use crate::error::Result;
use crate::exact::PackedKeys;
use crate::exec::{Executor, for_each_chunk};
use crate::problem::{MAX_HEAD_DIM, Problem};
use crate::refine::query_tile;
use crate::rng::{Purpose, Stream, below};
use crate::scratch::{Carver, Lanes};
use crate::tile::{Call, KeyOrder, Tile};
use crate::tiling::TILE_ROWS;

/// Rows of one tile.
pub(crate) const ROWS: usize = 8;

/// Tiles with probe rows in a head, at least and at most.
const TILES: [usize; 2] = [8, 16];

/// Part of the estimator's time that exact probe rows may cost, when the time of a pair of the estimator, selection
/// included, is that of 1.6 exact pairs.
const COST: f64 = 0.03 * 1.6;

/// The probe rows of a call: [`ROWS`] of each of some tiles of queries, drawn in equal parts of
/// the sequence. The query heads of a KV head share them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probes {
    seed: u64,
    offset: u64,
    n_q: usize,
    /// Queries of a tile.
    tile_rows: usize,
    /// Tiles with probe rows.
    pub(crate) tiles: usize,
}

impl Probes {
    /// As many as cost [`COST`] of an estimator that meets `budget` keys, within [`TILES`].
    pub(crate) fn new(seed: u64, offset: u64, problem: &Problem, budget: usize) -> Self {
        let n_q = problem.n_q;
        let affordable = COST * budget as f64 * n_q as f64 / problem.mean_visible_keys().max(1.0);
        let tiles = ((affordable / ROWS as f64) as usize).clamp(TILES[0], TILES[1]);
        let tile_rows = query_tile(problem.n_k);
        Probes { seed, offset, n_q, tile_rows, tiles: tiles.min(n_q.div_ceil(tile_rows)) }
    }

    /// Probe rows of a head.
    pub(crate) fn rows_of_a_head(&self) -> usize {
        self.tiles * ROWS
    }

    /// Numbers that the outputs of all probe rows of a batch item are.
    pub(crate) fn outputs_len(&self, problem: &Problem) -> Option<usize> {
        problem.heads_q.checked_mul(self.rows_of_a_head())?.checked_mul(problem.value_dim)
    }

    /// Where the outputs of one head's probe rows are among all, `[KV heads][tiles][group][ROWS][value_dim]`.
    pub(crate) fn rows_of(&self, head: usize, problem: &Problem) -> impl Iterator<Item = Range<usize>> {
        let (group, len) = (problem.group, ROWS * problem.value_dim);
        let first = head / group * self.tiles * group + head % group;
        (0..self.tiles).map(move |tile| (first + tile * group) * len..(first + tile * group + 1) * len)
    }

    /// KV head, probe tile and query head of the `item`-th group of [`ROWS`] rows in that order.
    pub(crate) fn place(&self, item: usize, problem: &Problem) -> (usize, usize, usize) {
        let (kv_head, within) = (item / (self.tiles * problem.group), item % (self.tiles * problem.group));
        (kv_head, within / problem.group, kv_head * problem.group + within % problem.group)
    }

    /// The queries of probe tile `index` of KV head `kv_head`, and the probe rows among them.
    pub(crate) fn tile(&self, kv_head: usize, index: usize) -> (Range<usize>, [usize; ROWS]) {
        let stream = Stream::new(self.seed, self.offset, kv_head, Purpose::ProbeRow);
        let draw = |number, len| below(stream.uniform(index, self.tiles, number), len);
        let tiles = self.n_q.div_ceil(self.tile_rows);
        let part = index * tiles / self.tiles..(index + 1) * tiles / self.tiles;
        let tile = part.start + draw(ROWS, part.len());
        let queries = tile * self.tile_rows..self.n_q.min((tile + 1) * self.tile_rows);
        let rows = core::array::from_fn(|row| {
            let [start, end] = [row, row + 1].map(|bound| bound * queries.len() / ROWS);
            // A tile of fewer queries than rows repeats some.
            (queries.start + start + draw(row, (end - start).max(1))).min(queries.end - 1)
        });
        (queries, rows)
    }
}

/// Exact outputs of the probe rows of batch item `batch`, in the order of [`Probes::rows_of`]; `packed` are its keys, if they are packed.
pub(crate) fn attend(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    (batch, packed): (usize, Option<&PackedKeys<'_>>),
    probes: &Probes,
    outputs: &mut [f32],
) -> Result<()> {
    let problem = &call.problem;
    let (value_dim, of_kv_head) = (problem.value_dim, probes.rows_of_a_head() * problem.group);
    for_each_chunk(executor, lanes, outputs, TILE_ROWS * value_dim, &|scratch, chunk, to| {
        let mut tile = Tile::carve(call, &mut Carver::new(scratch));
        let mut done = 0;
        // A chunk may end one KV head and begin the next.
        while done < to.len() / value_dim {
            let first = chunk * TILE_ROWS + done;
            let kv_head = first / of_kv_head;
            let count = ((kv_head + 1) * of_kv_head - first).min(to.len() / value_dim - done);
            tile.clear();
            for number in first..first + count {
                let (_, index, head) = probes.place(number / ROWS, problem);
                let row = probes.tile(kv_head, index).1[number % ROWS];
                tile.push(head, row, problem.visible_keys(row));
            }
            tile.load_queries(batch);
            let order = KeyOrder { batch, kv_head, order: None };
            tile.attend_visible(order, 0..problem.n_k, packed.map(|packed| packed.tiles(kv_head, 0)));
            tile.finish_into(&mut to[done * value_dim..(done + count) * value_dim]);
            done += count;
        }
    })
}

/// Writes the error tensor, if there is one, for batch item `batch` whose output is complete: 0 where `is_exact`, else
/// the relative error of the output's probe rows against `outputs`.
pub(crate) fn write_errors(
    call: &Call<'_>,
    batch: usize,
    probes: Option<&Probes>,
    outputs: &[f32],
    is_exact: impl Fn(usize) -> bool,
) {
    let (problem, tensors) = (&call.problem, call.tensors);
    let Some(to) = &tensors.error else { return };
    let mut row_of_out = [0.0; MAX_HEAD_DIM as usize];
    let row_of_out = &mut row_of_out[..problem.value_dim];
    for head in 0..problem.heads_q {
        let mut error = 0.0;
        if let (Some(probes), false) = (probes, is_exact(head)) {
            let mut norms = Norms::default();
            for (index, place) in probes.rows_of(head, problem).enumerate() {
                let rows = probes.tile(head / problem.group, index).1;
                for (row, exact) in rows.into_iter().zip(outputs[place].chunks(problem.value_dim)) {
                    tensors.out.reborrow().read_row(call.kernels, batch, head, row, row_of_out);
                    norms.add_group(row_of_out, exact);
                }
            }
            error = norms.relative_error();
        }
        // SAFETY: this tensor is written here only, by one thread.
        unsafe { to.write_row(batch, head, 0, &[error]) };
    }
}

/// Squared Frobenius norms of a difference and of what it is relative to, summed over groups of rows.
#[derive(Debug, Default)]
pub(crate) struct Norms {
    difference: f64,
    /// Sum of the squares of the groups' shares of `difference`.
    squares: f64,
    whole: f64,
    groups: f64,
}

impl Norms {
    /// Adds rows that were drawn together.
    pub(crate) fn add_group(&mut self, estimate: &[f32], exact: &[f32]) {
        let mut difference = 0.0;
        for (&estimate, &exact) in estimate.iter().zip(exact) {
            let (estimate, exact) = (f64::from(estimate), f64::from(exact));
            difference += (estimate - exact) * (estimate - exact);
            self.whole += exact * exact;
        }
        self.difference += difference;
        self.squares += difference * difference;
        self.groups += 1.0;
    }

    /// 0 where there is no difference, whatever it is relative to.
    pub(crate) fn relative_error(&self) -> f32 {
        self.relative(self.difference)
    }

    /// The relative error if the difference were larger by twice the standard error of its sum over the groups.
    pub(crate) fn upper_relative_error(&self) -> f32 {
        let variance = self.squares - self.difference * self.difference / self.groups;
        self.relative(self.difference + 2.0 * libm::sqrt(variance.max(0.0)))
    }

    fn relative(&self, difference: f64) -> f32 {
        if difference == 0.0 { 0.0 } else { libm::sqrt(difference / self.whole) as f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Mask;
    use crate::problem::one_head;

    #[test]
    fn rows_lie_in_their_tiles_and_tiles_spread_over_the_sequence() {
        for n_q in [1, 3, 127, 129, 5000, 100_000] {
            let probes = Probes::new(1, 2, &one_head(Mask::None, n_q, 100_000), 1024);
            assert!(probes.tiles >= 1);
            let mut last = None;
            for index in 0..probes.tiles {
                let (queries, rows) = probes.tile(0, index);
                assert!(last.is_none_or(|last| last < queries.start), "{n_q}");
                assert!(queries.end <= n_q && rows.iter().all(|row| queries.contains(row)), "{n_q} {rows:?}");
                last = Some(queries.start);
            }
        }
    }

    #[test]
    fn nothing_is_no_error() {
        let error = |estimate: &[f32], exact: &[f32]| {
            let mut norms = Norms::default();
            norms.add_group(estimate, exact);
            norms.relative_error()
        };
        assert_eq!(error(&[0.0], &[0.0]), 0.0);
        assert_eq!(error(&[1.5, 0.0], &[1.0, 0.0]), 0.5);
        assert!(error(&[f32::NAN], &[1.0]).is_nan());
    }
}
