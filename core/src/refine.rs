//! Selection of METHOD_REFINED: which keys one tile of queries meets, and what stands for the others.
//!
//! A few representatives of the tile's queries weigh the mean keys of all blocks, then
//! the keys of the heaviest blocks one by one. The heaviest keys are met exactly; all others become one column,
//! their weighted mean: the tangent of the logarithm of their sum at the representatives.

use core::iter;
use core::ops::Range;

use crate::pack::PackedShape;
use crate::params::{Mask, Params, Residual};
use crate::problem::Problem;
use crate::query_tiles::{LONG, QueryTiles};
use crate::represent::{Representatives, rounded};
use crate::residual::Column;
use crate::scratch::Carver;
use crate::simd::{KEY_TILE, WEIGHING_QUERIES, prefetch};
use crate::summary::{self, BLOCK, PackedSummaries};
use crate::tile::{Call, ExtraColumn, KeyOrder, Part, Tile};
use crate::unmet::without;
use crate::view::TensorRef;

/// The budget of a head that is computed exactly.
pub(crate) const EXACT: u32 = u32::MAX;

/// Keys are chosen among this many times as many, those of the heaviest blocks.
pub(crate) fn candidates_per_key(n_k: usize) -> usize {
    if n_k <= LONG { 4 } else { 3 }
}

/// Blocks that are looked into at least, however few keys are chosen.
const LEAST_BLOCKS: usize = 8;

/// One key in so many of the budget is chosen even where the first keys and the band fill it.
const LEAST_CHOSEN: usize = 8;

/// The keys of one KV head of one batch item.
#[derive(Clone, Copy)]
pub(crate) struct HeadKeys<'r> {
    pub(crate) batch: usize,
    pub(crate) kv_head: usize,
    /// Packed tiles of keys, one for each block.
    pub(crate) packed: &'r [u32],
    /// Whether values are in the tiles too.
    pub(crate) values: bool,
    /// One of each block, [`crate::summary`].
    pub(crate) summaries: &'r [f32],
    /// Packed tiles of their mean keys and outliers.
    pub(crate) packed_summaries: &'r [u32],
}

impl<'r> HeadKeys<'r> {
    /// The packed keys of a block.
    fn of_block(&self, shape: &PackedShape, block: usize) -> &'r [u32] {
        &self.packed[block * shape.len_of(self.values)..][..shape.keys_len()]
    }

    /// The packed tiles from `block` on, where there are values in them.
    fn whole_tiles(&self, shape: &PackedShape, block: usize) -> Option<&'r [u32]> {
        self.values.then(|| &self.packed[block * shape.tile_len()..])
    }
}

/// The tiles that hold `len` summaries: the number of each, and how many are in it.
fn tiles_of(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len.div_ceil(KEY_TILE)).map(move |index| (index, KEY_TILE.min(len - index * KEY_TILE)))
}

/// What a tile of queries meets.
pub(crate) enum Choice<'s> {
    /// Every key that it sees.
    Everything,
    /// Some.
    Some {
        /// Leading keys.
        first: usize,
        /// From here on every key that a row sees.
        near: usize,
        /// Keys between them, ascending.
        columns: &'s [u32],
        /// What stands for the others.
        rest: Option<Rest<'s>>,
    },
}

/// The column that stands for keys that are not met, and what it is made of.
#[derive(Clone, Copy)]
pub(crate) struct Rest<'s> {
    pub(crate) column: ExtraColumn<'s>,
    /// The first block whose mean has a share in it.
    pub(crate) first_block: usize,
    /// The weights of the means of the blocks from there on, and their sum.
    pub(crate) weights: &'s [f32],
    pub(crate) weight: f32,
}

impl Choice<'_> {
    /// Attends to it, for the loaded rows of `tile`.
    pub(crate) fn attend(&self, tile: &mut Tile<'_>, call: &Call<'_>, keys: &HeadKeys<'_>) {
        let order = KeyOrder { batch: keys.batch, kv_head: keys.kv_head, order: None };
        let n_k = call.problem.n_k;
        match *self {
            Choice::Everything => tile.attend_visible(order, 0..n_k, keys.whole_tiles(&call.shape, 0)),
            Choice::Some { first, near, columns, rest } => {
                tile.attend_visible(order, near..n_k, keys.whole_tiles(&call.shape, near / BLOCK));
                let positions = (0..first).chain(columns.iter().map(|&position| position as usize));
                let columns = positions.map(|position| Column { position, log_weight: 0.0 });
                tile.attend_columns(order, columns, rest.map(|rest| rest.column), false, Part::Both);
            }
        }
    }

    /// Keys that are not met, though all queries see them.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = usize> {
        match *self {
            Choice::Everything => without(0..0, &[]),
            Choice::Some { first, near, columns, .. } => without(first..near, columns),
        }
    }
}

/// Keys and columns that a query meets on average when each meets `budget`.
pub(crate) fn keys_per_query(params: &Params, problem: &Problem, budget: usize) -> f64 {
    let tiles = QueryTiles::new(problem);
    let pairs: usize = (0..tiles.count())
        .map(|index| tiles.queries(index))
        .map(|rows| {
            let visible: usize = rows.clone().map(|row| problem.visible_keys(row)).sum();
            match Frame::new(params, problem, &rows, budget) {
                Some(frame) => {
                    visible + rows.len() * (frame.first + frame.wanted + 1) - rows.len() * frame.near
                }
                None => visible,
            }
        })
        .sum();
    pairs as f64 / problem.n_q.max(1) as f64
}

/// Where the keys that are met without being chosen lie for some queries, and how many are chosen.
struct Frame {
    /// Leading keys, met by all.
    first: usize,
    /// Start of the keys that each query meets as far as it sees, at a block.
    near: usize,
    /// Keys that every query sees.
    seen_by_all: usize,
    /// Keys to choose.
    wanted: usize,
}

impl Frame {
    /// None when the budget holds all that the queries see.
    fn new(params: &Params, problem: &Problem, rows: &Range<usize>, budget: usize) -> Option<Self> {
        let (least, most) = (problem.visible_keys(rows.start), problem.visible_keys(rows.end - 1));
        if most <= budget {
            return None;
        }
        let far_end = match problem.mask {
            Mask::None => least,
            _ => least.saturating_sub(params.band as usize),
        };
        let near = far_end / BLOCK * BLOCK;
        let first = (params.num_first_keys as usize).min(near);
        let visible: usize = rows.clone().map(|row| problem.visible_keys(row)).sum();
        let met = first + (visible / rows.len() - near);
        let wanted = budget.saturating_sub(met + 1).max(budget / LEAST_CHOSEN);
        (near - first > wanted).then_some(Frame { first, near, seen_by_all: least, wanted })
    }
}

/// Scratch of one selection.
pub(crate) struct RefineScratch<'a> {
    representatives: Representatives<'a>,
    /// Weights of the mean keys of blocks, and of their outliers.
    block_weights: &'a mut [f32],
    outlier_weights: &'a mut [f32],
    candidates: &'a mut [u32],
    key_weights: &'a mut [f32],
    /// Room to find the m-th largest of some weights.
    ranked: &'a mut [u32],
    columns: &'a mut [u32],
    rest: &'a mut [f32],
}

/// Blocks whose keys are looked at one by one for `wanted` keys of `n_k`.
pub fn candidate_blocks(n_k: usize, wanted: usize) -> usize {
    // One more: the block that the first keys cut is always among them.
    (candidates_per_key(n_k) * wanted).div_ceil(BLOCK).max(LEAST_BLOCKS) + 1
}

impl<'a> RefineScratch<'a> {
    /// For budgets up to `budget`.
    pub(crate) fn carve(problem: &Problem, budget: usize, carver: &mut Carver<'a>) -> Self {
        let blocks = problem.n_k.div_ceil(BLOCK).next_multiple_of(KEY_TILE);
        let candidates = candidate_blocks(problem.n_k, budget).min(blocks);
        let width = problem.head_dim + problem.value_dim;
        RefineScratch {
            representatives: Representatives::carve(problem, carver),
            block_weights: carver.take(blocks),
            outlier_weights: carver.take(blocks),
            candidates: carver.take(candidates),
            key_weights: carver.take(candidates * BLOCK),
            ranked: carver.take(blocks.max(candidates * BLOCK)),
            // One more: a key is written before it is known whether it is taken.
            columns: carver.take(budget.min(problem.n_k) + 1),
            rest: carver.take(width),
        }
    }
}

/// Chooses what the queries `rows` of query head `head` meet, at most about `budget` keys each. Uses `tile`, which is
/// empty afterwards.
pub(crate) fn choose<'s>(
    call: &Call<'_>,
    keys: &HeadKeys<'_>,
    (head, rows): (usize, &Range<usize>),
    budget: usize,
    tile: &mut Tile<'_>,
    scratch: &'s mut RefineScratch<'_>,
) -> Choice<'s> {
    let problem = &call.problem;
    let Some(frame) = Frame::new(call.params, problem, rows, budget) else { return Choice::Everything };
    let representatives = &mut scratch.representatives;
    representatives.find(call, (keys.batch, head), rows);
    if representatives.len == 0 {
        return Choice::Everything;
    }
    let totals = totals(call, keys, &frame, tile, representatives);
    // Each weighs as much as the queries that it stands for.
    let mut start = [f32::INFINITY; WEIGHING_QUERIES];
    let queries: f32 = representatives.counts[..representatives.len].iter().sum();
    for ((start, total), count) in
        start.iter_mut().zip(totals).zip(representatives.counts).take(representatives.len)
    {
        // One that may weigh no key has no share in anything.
        if total > f32::NEG_INFINITY {
            *start = total + crate::math::log2(queries / count);
        }
    }
    let blocks = frame.first / BLOCK..frame.near / BLOCK;
    for (index, count) in tiles_of(blocks.end) {
        let summaries = PackedSummaries::new(keys.packed_summaries, call.shape.keys_len(), index);
        let (means, outliers) = (
            &mut scratch.block_weights[index * KEY_TILE..],
            &mut scratch.outlier_weights[index * KEY_TILE..],
        );
        tile.weigh(representatives.packed, (summaries.means, count), &start, means);
        tile.weigh(representatives.packed, (summaries.outliers, count), &start, outliers);
        for ((mean, outlier), keys) in means.iter_mut().zip(outliers).zip(summaries.counts()) {
            *mean *= keys;
            *outlier = *outlier * keys.min(1.0) + *mean;
        }
    }
    let (block_weights, outlier_weights) = (&mut *scratch.block_weights, &mut *scratch.outlier_weights);
    if !frame.first.is_multiple_of(BLOCK) {
        outlier_weights[blocks.start] = f32::MAX;
    }
    let candidates = {
        let wanted = candidate_blocks(problem.n_k, frame.wanted).min(blocks.len());
        let heaviest = Heaviest::new(&outlier_weights[blocks.clone()], wanted, scratch.ranked);
        let mut taken = heaviest.taker();
        let mut found = 0;
        for block in blocks.clone() {
            if taken(outlier_weights[block]) {
                scratch.candidates[found] = block as u32;
                found += 1;
            }
        }
        &scratch.candidates[..found]
    };
    let key_weights = &mut scratch.key_weights[..candidates.len() * BLOCK];
    let packed_keys = |block: u32| keys.of_block(&call.shape, block as usize);
    for (index, weights) in key_weights.chunks_mut(BLOCK).enumerate() {
        let block = candidates[index];
        if let Some(&next) = candidates.get(index + 1) {
            let next = packed_keys(next);
            prefetch(next.as_ptr().cast(), size_of_val(next));
        }
        tile.weigh(representatives.packed, (packed_keys(block), BLOCK), &start, weights);
        let met = frame.first.saturating_sub(block as usize * BLOCK).min(BLOCK);
        weights[..met].fill(0.0);
    }
    let mut found = 0;
    {
        let heaviest = Heaviest::new(key_weights, frame.wanted, scratch.ranked);
        let mut taken = heaviest.taker();
        for (&block, weights) in candidates.iter().zip(key_weights.chunks(BLOCK)) {
            let met = frame.first.saturating_sub(block as usize * BLOCK).min(BLOCK);
            let mut left = 0.0;
            // Whether a key is taken is not foreseeable: nothing branches on it.
            for (slot, &weight) in weights.iter().enumerate().skip(met) {
                let takes = taken(weight);
                scratch.columns[found] = block * BLOCK as u32 + slot as u32;
                found += usize::from(takes);
                left += if takes { 0.0 } else { weight };
            }
            block_weights[block as usize] = left;
        }
    }
    let weights = &scratch.block_weights[blocks.clone()];
    let rest = match call.params.residual {
        Residual::None => None,
        _ => rest(call, keys, (blocks.start, weights), &totals, representatives, scratch.rest),
    };
    Choice::Some { first: frame.first, near: frame.near, columns: &scratch.columns[..found], rest }
}

/// What each representative gives to all keys together, estimated from the mean keys (base 2).
fn totals(
    call: &Call<'_>,
    keys: &HeadKeys<'_>,
    frame: &Frame,
    tile: &mut Tile<'_>,
    representatives: &Representatives<'_>,
) -> [f32; WEIGHING_QUERIES] {
    let (shape, head_dim) = (&call.shape, call.problem.head_dim);
    tile.clear();
    (0..representatives.len).for_each(|row| tile.push(0, row, 0));
    tile.load_rows(&TensorRef::of_rows(representatives.means(), head_dim, 0..head_dim), 0);
    for met in [0..frame.first, frame.near..frame.seen_by_all] {
        for block in (met.start / BLOCK)..met.end.div_ceil(BLOCK) {
            let count = (met.end - block * BLOCK).min(BLOCK);
            tile.sum_keys(keys.of_block(shape, block), count, iter::repeat(0.0));
        }
    }
    for (index, count) in tiles_of(frame.near / BLOCK) {
        let summaries = PackedSummaries::new(keys.packed_summaries, shape.keys_len(), index);
        tile.sum_keys(summaries.means, count, summaries.log2_counts());
    }
    let totals = core::array::from_fn(|row| if row < representatives.len { tile.log2_sum(row) } else { 0.0 });
    tile.clear();
    totals
}

/// The largest of some weights.
struct Heaviest {
    /// Bits of the smallest of them. The bits of numbers that are not negative are ordered as these.
    threshold: u32,
    /// How many as small as that belong to them.
    ties: usize,
}

impl Heaviest {
    fn new(weights: &[f32], wanted: usize, ranked: &mut [u32]) -> Self {
        if wanted == 0 {
            return Heaviest { threshold: u32::MAX, ties: 0 };
        }
        if wanted >= weights.len() {
            return Heaviest { threshold: 0, ties: weights.len() };
        }
        let ranked = &mut ranked[..weights.len()];
        for (bits, weight) in ranked.iter_mut().zip(weights) {
            *bits = weight.to_bits();
        }
        let index = weights.len() - wanted;
        let (_, &mut threshold, above) = ranked.select_nth_unstable(index);
        let equal_above = above.iter().filter(|&&bits| bits == threshold).count();
        Heaviest { threshold, ties: equal_above + 1 }
    }

    /// Tells of one weight after the other whether it is among them.
    fn taker(&self) -> impl FnMut(f32) -> bool {
        let (threshold, mut ties) = (self.threshold, self.ties);
        move |weight| {
            let bits = weight.to_bits();
            let tie = bits == threshold && ties > 0;
            ties -= usize::from(tie);
            bits > threshold || tie
        }
    }
}

/// The weighted mean of the keys that are not met, each taken for the mean of its block: a key and a value in `to`, with the
/// log weight that gives them the weight of what they stand for, on average over the queries. None when there is
/// nothing. `weights` are those of the blocks from the first on.
fn rest<'s>(
    call: &Call<'_>,
    keys: &HeadKeys<'_>,
    (first_block, weights): (usize, &'s [f32]),
    totals: &[f32; WEIGHING_QUERIES],
    representatives: &Representatives<'_>,
    to: &'s mut [f32],
) -> Option<Rest<'s>> {
    let weight: f32 = weights.iter().sum();
    if weight == 0.0 {
        return None;
    }
    let width = summary::width(&call.problem);
    to.fill(0.0);
    call.kernels.add_weighted(&keys.summaries[first_block * width..], width, weights, to);
    to.iter_mut().for_each(|x| *x = rounded(call, *x / weight));
    let (key, value) = to.split_at(call.problem.head_dim);
    let (mut queries, mut mean) = (0.0, 0.0);
    let means = representatives.means().chunks(key.len());
    for ((query, &count), &total) in means.zip(&representatives.counts).zip(totals) {
        let logit = query.iter().zip(key).map(|(x, y)| x * y).sum::<f32>() * call.problem.scale_log2;
        queries += count;
        mean += count * (total - logit);
    }
    let log_weight = crate::math::log2(weight) + mean / queries;
    // Nothing has weight, or a NaN that every row sees is among the keys: rows are as the exact part makes them.
    log_weight.is_finite().then_some(Rest {
        column: ExtraColumn { key, value, log_weight },
        first_block,
        weights,
        weight,
    })
}
