//! Probe rows: a few queries of each head that are computed exactly besides, to estimate the error of an estimator.

use core::ops::Range;

use crate::error::Result;
use crate::exact::PackedKeys;
use crate::exec::{Executor, for_each_chunk};
use crate::params::Params;
use crate::problem::{MAX_HEAD_DIM, Problem};
use crate::query_tiles::QueryTiles;
use crate::represent::Representatives;
use crate::rng::{Purpose, Stream, below};
use crate::scratch::{Carver, Lanes};
use crate::tile::{Call, KeyOrder, Tile};
use crate::tiling::{PROBE_ROWS, TILE_ROWS};
use crate::view::Rows;

/// Tiles with probe rows in a head, at least and at most.
const TILES: [usize; 2] = [16, 64];

/// Keys that probe rows may meet for each that the estimator meets.
const KEYS_PER_KEY: f64 = 0.075;

/// The part of the queries that may be probe rows: with all that is done for them they take 3 % of exact attention's time.
const MOST: f64 = 0.02;

/// The probe rows of a call: [`PROBE_ROWS`] of each of some tiles of queries, which are drawn in equal parts of the sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probes {
    seed: u64,
    offset: u64,
    first_head: usize,
    n_q: usize,
    query_tiles: QueryTiles,
    /// Tiles before it are exact.
    pub(crate) first_tile: usize,
    /// Tiles with probe rows.
    pub(crate) tiles: usize,
}

impl Probes {
    /// As many as [`KEYS_PER_KEY`] and [`MOST`] allow beside an estimator that meets `budget` keys, within [`TILES`], among the
    /// queries that see more than `exact_keys` keys.
    pub(crate) fn new(params: &Params, problem: &Problem, budget: usize, exact_keys: usize) -> Self {
        let n_q = problem.n_q;
        let share = KEYS_PER_KEY * budget as f64 / problem.mean_visible_keys().max(1.0);
        let affordable = share.min(MOST) * n_q as f64;
        let query_tiles = QueryTiles::new(problem);
        let count = query_tiles.count();
        let last_row = |tile: usize| query_tiles.queries(tile).end - 1;
        let exact = (0..count).take_while(|&tile| problem.visible_keys(last_row(tile)) <= exact_keys).count();
        let first_tile = exact.min(count - 1);
        let tiles =
            ((affordable / PROBE_ROWS as f64) as usize).clamp(TILES[0], TILES[1]).min(count - first_tile);
        Probes {
            seed: params.seed,
            offset: params.offset,
            first_head: problem.first_head,
            n_q,
            query_tiles,
            first_tile,
            tiles,
        }
    }

    /// Probe rows of a head.
    pub(crate) fn rows_of_a_head(&self) -> usize {
        self.tiles * PROBE_ROWS
    }

    /// Numbers that the outputs of all probe rows of a batch item are.
    pub(crate) fn outputs_len(&self, problem: &Problem) -> Option<usize> {
        problem.heads_q.checked_mul(self.rows_of_a_head())?.checked_mul(problem.value_dim)
    }

    /// Numbers of the groups of [`PROBE_ROWS`] rows of one head among those of all, `[KV heads][tiles][group]`.
    pub(crate) fn rows_of(&self, head: usize, problem: &Problem) -> impl Iterator<Item = usize> + use<> {
        let group = problem.group;
        let first = head / group * self.tiles * group + head % group;
        (0..self.tiles).map(move |tile| first + tile * group)
    }

    /// KV head, probe tile and query head of group `item` of [`PROBE_ROWS`] rows.
    pub(crate) fn place(&self, item: usize, problem: &Problem) -> (usize, usize, usize) {
        let (kv_head, within) = (item / (self.tiles * problem.group), item % (self.tiles * problem.group));
        (kv_head, within / problem.group, kv_head * problem.group + within % problem.group)
    }

    /// All queries over those that probe rows stand for.
    pub(crate) fn whole_over_probed(&self) -> f64 {
        self.n_q as f64 / (self.n_q - self.query_tiles.queries(self.first_tile).start) as f64
    }

    /// A number in 0..len for probe tile `index` of `head`.
    fn draw(&self, head: usize, index: usize, number: usize, len: usize) -> usize {
        let stream = Stream::new(self.seed, self.offset, self.first_head + head, Purpose::ProbeRow);
        below(stream.uniform(index, self.tiles, number), len)
    }

    /// The queries of probe tile `index` of `head`.
    pub(crate) fn queries(&self, head: usize, index: usize) -> Range<usize> {
        let tiles = self.query_tiles.count() - self.first_tile;
        let part = index * tiles / self.tiles..(index + 1) * tiles / self.tiles;
        self.query_tiles.queries(self.first_tile + part.start + self.draw(head, index, 0, part.len()))
    }
}

/// The probe rows of all heads of a batch item, and their exact outputs, in the order of [`Probes::rows_of`].
pub(crate) struct Probed<'a> {
    pub(crate) rows: &'a mut [u32],
    /// How many rows of its tile each stands for.
    pub(crate) weights: &'a mut [f32],
    pub(crate) outputs: &'a mut [f32],
}

/// Draws [`PROBE_ROWS`] of each probe tile. A query that is far from its neighbours' mean is drawn more often: it looks where
/// the others do not, and there most of the error is.
pub(crate) fn draw(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    batch: usize,
    probes: &Probes,
    probed: &mut Probed<'_>,
) -> Result<()> {
    let rows = Rows::new(probed.weights, PROBE_ROWS);
    for_each_chunk(executor, lanes, probed.rows, PROBE_ROWS, &|scratch, item, to| {
        let (_, index, head) = probes.place(item, &call.problem);
        let queries = probes.queries(head, index);
        let mut representatives = Representatives::carve(&call.problem, &mut Carver::new(scratch));
        let distances = representatives.distances(call, (batch, head), &queries);
        // SAFETY: every item has its own row.
        let weights = unsafe { rows.row(item) };
        let phase = probes.draw(head, index, 1, 1 << 20) as f32 / (1 << 20) as f32;
        draw_rows(distances, phase, to, weights);
        to.iter_mut().for_each(|row| *row += queries.start as u32);
    })
}

/// Draws rows in proportion to the cubes of their distances, plus a tenth of the mean; `phase` is in [0, 1). All of
/// them, once, where they are no more than `rows`.
fn draw_rows(squared_distances: &[f32], phase: f32, rows: &mut [u32], weights: &mut [f32]) {
    if squared_distances.len() <= rows.len() {
        for (i, (row, weight)) in rows.iter_mut().zip(weights).enumerate() {
            let last = squared_distances.len() - 1;
            (*row, *weight) = (i.min(last) as u32, if i <= last { 1.0 } else { 0.0 });
        }
        return;
    }
    let cube = |squared: f32| f64::from(squared) * libm::sqrt(f64::from(squared));
    let len = squared_distances.len() as f64;
    let mut mean = squared_distances.iter().map(|&squared| cube(squared)).sum::<f64>() / len;
    if !(mean > 0.0 && mean.is_finite()) {
        mean = 1.0;
    }
    let share = |squared: f32| {
        let cube = cube(squared).min(mean * len);
        (cube + 0.1 * mean) / mean
    };
    let total: f64 = squared_distances.iter().map(|&squared| share(squared)).sum();
    let count = rows.len() as f64;
    let (mut row, mut reached) = (0, share(squared_distances[0]));
    for (i, (to, weight)) in rows.iter_mut().zip(weights).enumerate() {
        let target = (i as f64 + f64::from(phase)) / count * total;
        while reached <= target && row + 1 < squared_distances.len() {
            row += 1;
            reached += share(squared_distances[row]);
        }
        *to = row as u32;
        *weight = (total / (count * share(squared_distances[row]))) as f32;
    }
}

/// Exact outputs of the rows drawn; `packed` are the keys of the batch item, if they are packed.
pub(crate) fn attend(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    (batch, packed): (usize, Option<&PackedKeys<'_>>),
    probes: &Probes,
    probed: &mut Probed<'_>,
) -> Result<()> {
    let (rows, outputs) = (&*probed.rows, &mut *probed.outputs);
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
            for (number, &row) in rows.iter().enumerate().skip(first).take(count) {
                let (_, _, head) = probes.place(number / PROBE_ROWS, problem);
                let row = row as usize;
                tile.push(head, row, problem.visible_keys(row));
            }
            tile.load_queries(batch);
            let order = KeyOrder { batch, kv_head, order: None };
            tile.attend_visible(
                order,
                0..problem.n_k,
                packed.and_then(|packed| packed.whole_tiles(kv_head, 0)),
            );
            tile.finish_into(&mut to[done * value_dim..(done + count) * value_dim]);
            done += count;
        }
    })
}

/// Writes the error tensor, if there is one, for batch item `batch` whose output is complete: 0 where `is_exact`, else
/// the relative error of the output's probe rows.
pub(crate) fn write_errors(
    call: &Call<'_>,
    batch: usize,
    probes: Option<&Probes>,
    probed: &Probed<'_>,
    is_exact: impl Fn(usize) -> bool,
) {
    let (problem, tensors) = (&call.problem, call.tensors);
    let Some(to) = &tensors.error else { return };
    for head in 0..problem.heads_q {
        let mut error = 0.0;
        if let (Some(probes), false) = (probes, is_exact(head)) {
            let mut norms = Norms::new(probes);
            for group in probes.rows_of(head, problem) {
                let rows = group * PROBE_ROWS..(group + 1) * PROBE_ROWS;
                let mut outputs = [[0.0; MAX_HEAD_DIM as usize]; PROBE_ROWS];
                for (to, &row) in outputs.iter_mut().zip(&probed.rows[rows]) {
                    let to = &mut to[..problem.value_dim];
                    tensors.out.reborrow().read_row(call.kernels, batch, head, row as usize, to);
                }
                norms.add_group(outputs.iter().map(|row| &row[..problem.value_dim]), probed, group);
            }
            error = norms.relative_error();
        }
        // SAFETY: this tensor is written here only, by one thread.
        unsafe { to.write_row(batch, head, 0, &[error]) };
    }
}

/// Squared Frobenius norms of a difference and of what it is relative to, summed over groups of rows.
#[derive(Debug)]
pub(crate) struct Norms {
    difference: f64,
    /// Sums of the squares and of the cubes of the groups' shares of `difference`.
    squares: f64,
    cubes: f64,
    whole: f64,
    groups: f64,
    /// All rows over those that are sampled; the others have no error.
    whole_over_probed: f64,
}

impl Norms {
    pub(crate) fn new(probes: &Probes) -> Self {
        let whole_over_probed = probes.whole_over_probed();
        Norms { difference: 0.0, squares: 0.0, cubes: 0.0, whole: 0.0, groups: 0.0, whole_over_probed }
    }

    /// Adds group `group` of the rows drawn, whose outputs by the estimator are `estimates`.
    pub(crate) fn add_group<'e>(
        &mut self,
        estimates: impl Iterator<Item = &'e [f32]>,
        probed: &Probed<'_>,
        group: usize,
    ) {
        let value_dim = probed.outputs.len() / probed.rows.len();
        let mut difference = 0.0;
        for (row, estimate) in (group * PROBE_ROWS..).zip(estimates) {
            let weight = f64::from(probed.weights[row]);
            let exact = &probed.outputs[row * value_dim..][..value_dim];
            let (mut of_row, mut whole) = (0.0, 0.0);
            for (&estimate, &exact) in estimate.iter().zip(exact) {
                let (estimate, exact) = (f64::from(estimate), f64::from(exact));
                of_row += (estimate - exact) * (estimate - exact);
                whole += exact * exact;
            }
            difference += weight * of_row;
            self.whole += weight * whole;
        }
        self.difference += difference;
        self.squares += difference * difference;
        self.cubes += difference * difference * difference;
        self.groups += 1.0;
    }

    /// 0 where there is no difference, whatever it is relative to.
    ///
    /// Few rows have most of a head's error, so that a sum over some of them is more often too small than too large.
    /// The third moment over six times the variance makes up for that (N. J. Johnson, "Modified t tests and
    /// confidence intervals for asymmetrical populations", 1978).
    pub(crate) fn relative_error(&self) -> f32 {
        let [mean, squares, cubes] = [self.difference, self.squares, self.cubes].map(|sum| sum / self.groups);
        let variance = squares - mean * mean;
        let third = cubes - mean * (3.0 * squares - 2.0 * mean * mean);
        let correction = if variance > 0.0 { (third / (6.0 * variance)).max(0.0) } else { 0.0 };
        self.relative(self.difference + correction)
    }

    /// The relative error if the difference were larger by twice the standard error of its sum over the groups.
    pub(crate) fn upper_relative_error(&self) -> f32 {
        let variance = self.squares - self.difference * self.difference / self.groups;
        self.relative(self.difference + 2.0 * libm::sqrt(variance.max(0.0)))
    }

    fn relative(&self, difference: f64) -> f32 {
        if difference == 0.0 {
            return 0.0;
        }
        libm::sqrt(difference / (self.whole * self.whole_over_probed)) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Mask;
    use crate::problem::one_head;

    #[test]
    fn tiles_spread_over_the_rows_that_are_estimated() {
        for mask in [Mask::None, Mask::CausalBottomRight] {
            for n_q in [1, 3, 127, 129, 5000, 100_000] {
                let problem = one_head(mask, n_q, 100_000);
                let probes = Probes::new(&Params::default(), &problem, 1024, 1024);
                assert!(probes.tiles >= 1);
                let mut last = None;
                for index in 0..probes.tiles {
                    let queries = probes.queries(0, index);
                    assert!(last.is_none_or(|last| last < queries.start), "{n_q}");
                    assert!(!queries.is_empty() && queries.end <= n_q);
                    assert!(problem.visible_keys(queries.end - 1) > 1024);
                    last = Some(queries.start);
                }
            }
        }
    }

    /// Averaged over all phases, the weights of the rows drawn add up to the rows, and so do weighted sums.
    #[test]
    fn weighted_rows_stand_for_all() {
        let squared: [f32; 128] = core::array::from_fn(|i| if i == 77 { 400.0 } else { (i % 5) as f32 });
        let of_row = |row: u32| f64::from(row) + if row == 77 { 5000.0 } else { 0.0 };
        let (mut count, mut sum) = (0.0, 0.0);
        let phases = 200_000;
        for phase in 0..phases {
            let (mut rows, mut weights) = ([0; PROBE_ROWS], [0.0; PROBE_ROWS]);
            draw_rows(&squared, phase as f32 / phases as f32, &mut rows, &mut weights);
            for (row, weight) in rows.into_iter().zip(weights) {
                count += f64::from(weight) / f64::from(phases);
                sum += f64::from(weight) * of_row(row) / f64::from(phases);
            }
        }
        assert!((count - 128.0).abs() < 0.05, "{count}");
        assert!((sum - (127.0 * 64.0 + 5000.0)).abs() < 5.0, "{sum}");
    }

    #[test]
    fn without_distances_all_rows_weigh_alike() {
        for squared in [[0.0f32; 2 * PROBE_ROWS], [f32::INFINITY; 2 * PROBE_ROWS]] {
            let (mut rows, mut weights) = ([0; PROBE_ROWS], [0.0; PROBE_ROWS]);
            draw_rows(&squared, 0.5, &mut rows, &mut weights);
            assert_eq!(weights, [2.0; PROBE_ROWS]);
            assert!(rows.windows(2).all(|pair| (1..=3).contains(&(pair[1] - pair[0]))), "{rows:?}");
        }
        let (mut rows, mut weights) = ([9; PROBE_ROWS], [9.0; PROBE_ROWS]);
        draw_rows(&[1.0, 5.0, 2.0], 0.3, &mut rows, &mut weights);
        assert_eq!((&rows[..3], &weights[..3]), (&[0, 1, 2][..], &[1.0; 3][..]));
        assert_eq!(weights[3..], [0.0; PROBE_ROWS - 3]);
    }
}
