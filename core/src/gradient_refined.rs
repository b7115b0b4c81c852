//! The backward pass of METHOD_REFINED.
//!
//! Any tile of queries may meet any key: the tiles of a KV head's queries are dealt out to a few tasks that add up
//! gradients of all keys apart, and their sums are added in order afterwards.

use crate::error::Result;
use crate::exec::{Executor, for_each_item};
use crate::gradient_tile::{GradientCall, GradientSums, GradientTile, KeySums, Met, Strides, add};
use crate::problem::{MAX_HEAD_DIM, Problem};
use crate::query_tiles::QueryTiles;
use crate::refine::{self, Choice, EXACT, RefineScratch};
use crate::represent::is_finite;
use crate::scratch::{Carver, Lanes};
use crate::summarised_keys::SummarisedKeys;
use crate::summary::{self, BLOCK};
use crate::tile::{KeyOrder, Part, Tile};
use crate::view::Rows;

/// Tasks at least, over all KV heads.
const TASKS: usize = 8;

/// Tasks that the tiles of a KV head's queries are dealt out to.
fn splits(problem: &Problem) -> usize {
    (TASKS / problem.heads_kv).max(1)
}

/// Sums of the gradients of keys by the tasks after the first of each KV head, and of the means of blocks by all.
pub(crate) struct SplitSums<'a> {
    /// `[splits - 1][heads_kv][n_k]` rows.
    key: &'a mut [f32],
    value: &'a mut [f32],
    /// `[splits][heads_kv][blocks]` rows of key and value.
    blocks: &'a mut [f32],
}

impl<'a> SplitSums<'a> {
    pub(crate) fn carve(problem: &Problem, strides: Strides, carver: &mut Carver<'a>) -> Self {
        let splits = splits(problem);
        let rows = (splits - 1).saturating_mul(problem.heads_kv).saturating_mul(problem.n_k);
        let blocks = (splits * problem.heads_kv).saturating_mul(problem.n_k.div_ceil(BLOCK));
        SplitSums {
            key: carver.take(rows.saturating_mul(strides.key)),
            value: carver.take(rows.saturating_mul(strides.value)),
            blocks: carver.take(blocks.saturating_mul(strides.key + strides.value)),
        }
    }

    /// Without any.
    pub(crate) fn none() -> Self {
        SplitSums { key: &mut [], value: &mut [], blocks: &mut [] }
    }
}

/// Adds the gradients of every head whose budget is not [`EXACT`].
pub(crate) fn attend(
    of: &GradientCall<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    keys: &SummarisedKeys<'_>,
    budgets: &[u32],
    (sums, split_sums): (&GradientSums<'_>, &mut SplitSums<'_>),
) -> Result<()> {
    let call = of.call;
    let problem = &call.problem;
    let strides = Strides::new(call.kernels, problem);
    let (splits, blocks) = (splits(problem), problem.n_k.div_ceil(BLOCK));
    let rows = problem.heads_kv * problem.n_k;
    split_sums.key.fill(0.0);
    split_sums.value.fill(0.0);
    split_sums.blocks.fill(0.0);
    let (key, value) = (Rows::new(split_sums.key, strides.key), Rows::new(split_sums.value, strides.value));
    let block_sums = Rows::new(split_sums.blocks, strides.key + strides.value);
    let sums_of = |split: usize| match split.checked_sub(1) {
        None => sums.keys(),
        Some(index) => KeySums { key: &key, value: &value, first: index * rows },
    };

    let query_tiles = QueryTiles::new(problem);
    let tiles = query_tiles.count();
    for_each_item(executor, lanes, splits * problem.heads_kv, &|scratch, item| {
        let (kv_head, split) = (item / splits, item % splits);
        let first_block = (split * problem.heads_kv + kv_head) * blocks;
        let of_head = keys.of_head(call, kv_head);
        let order = KeyOrder { batch: keys.batch, kv_head, order: None };
        let mut carver = Carver::new(scratch);
        let mut tile = Tile::carve(call, &mut carver);
        let mut gradient_tile = GradientTile::carve(of, &mut carver);
        let mut scratch = RefineScratch::carve(problem, keys.plan.most_budget, &mut carver);
        let heads = kv_head * problem.group..(kv_head + 1) * problem.group;
        for (head, &budget) in heads.clone().zip(&budgets[heads]).filter(|&(_, &budget)| budget != EXACT) {
            let budget = budget as usize;
            for queries in (split..tiles).step_by(splits).map(|index| query_tiles.queries(index)) {
                let choice =
                    refine::choose(call, &of_head, (head, &queries), budget, &mut tile, &mut scratch);
                gradient_tile.clear();
                queries.clone().for_each(|row| gradient_tile.push(head, row, problem.visible_keys(row)));
                gradient_tile.load(keys.batch);
                // SAFETY: each task has sums of its own for keys and blocks, and its own queries.
                unsafe {
                    attend_choice(
                        &mut gradient_tile,
                        order,
                        &choice,
                        sums_of(split),
                        (&block_sums, first_block),
                    );
                    gradient_tile.add_queries(sums);
                }
            }
        }
    })?;

    let width = summary::width(problem);
    let summaries_len = summary::summaries_len(problem);
    for_each_item(executor, lanes, problem.heads_kv * blocks, &|scratch, item| {
        let (kv_head, block) = (item / blocks, item % blocks);
        let positions = block * BLOCK..problem.n_k.min((block + 1) * BLOCK);
        let of_block = |split: usize| {
            let index = (split * problem.heads_kv + kv_head) * blocks + block;
            // SAFETY: each task has its own block of keys.
            unsafe { block_sums.row(index) }
        };
        let mean = of_block(0);
        (1..splits).for_each(|split| add(mean, of_block(split)));
        let summary = &keys.summaries[kv_head * summaries_len + block * width..][..width];
        let count = summary::count(problem, summary);
        mean.iter_mut().for_each(|x| *x /= count.max(1.0));
        let (mean_key, mean_value) = mean.split_at(strides.key);
        let mut carver = Carver::new(scratch);
        let (a_key, a_value) = (carver.take(problem.head_dim), carver.take(problem.value_dim));
        for position in positions.clone() {
            let index = kv_head * problem.n_k + position;
            for split in 1..splits {
                let from = sums_of(split);
                // SAFETY: as above.
                unsafe {
                    sums.keys().add(
                        index,
                        from.key.row(from.first + index),
                        from.value.row(from.first + index),
                    )
                };
            }
            let in_mean = count as usize == positions.len() || {
                call.tensors.k.read_row(call.kernels, keys.batch, kv_head, position, a_key);
                call.tensors.v.read_row(call.kernels, keys.batch, kv_head, position, a_value);
                is_finite(a_key) && is_finite(a_value)
            };
            if in_mean {
                // SAFETY: as above.
                unsafe { sums.keys().add(index, mean_key, mean_value) };
            }
        }
    })
}

/// Attends to what was chosen for the loaded rows; the gradient of the rest goes to the sums of its blocks.
///
/// # Safety
/// While this runs nobody else uses `sums`, nor the sums of blocks from `blocks.1` on.
unsafe fn attend_choice(
    tile: &mut GradientTile<'_>,
    keys: KeyOrder<'_>,
    choice: &Choice<'_>,
    sums: KeySums<'_>,
    blocks: (&Rows<'_>, usize),
) {
    let n_k = tile.problem().n_k;
    let (first, near, columns, rest) = match *choice {
        // SAFETY: the caller's contract.
        Choice::Everything => return unsafe { tile.attend_visible(keys, 0..n_k, sums) },
        Choice::Some { first, near, columns, rest } => (first, near, columns, rest),
    };
    // SAFETY: the caller's contract.
    unsafe { tile.attend_visible(keys, near..n_k, sums) };
    let positions = (0..first).chain(columns.iter().map(|&position| position as usize));
    let listed = positions.map(|row| Met { place: keys.kv_head * n_k + row, row, log_weight: 0.0 });
    let mut of_rest = [[0.0; MAX_HEAD_DIM as usize]; 2];
    let column = rest.map(|rest| rest.column);
    tile.attend_listed(keys, listed, column, (Part::Both, false), |place, key, value| {
        if place == usize::MAX {
            of_rest[0][..key.len()].copy_from_slice(key);
            of_rest[1][..value.len()].copy_from_slice(value);
        } else {
            // SAFETY: the caller's contract.
            unsafe { sums.add(place, key, value) };
        }
    });
    let Some(rest) = rest else { return };
    for (block, &weight) in (rest.first_block..).zip(rest.weights) {
        if weight == 0.0 {
            continue;
        }
        let share = weight / rest.weight;
        // SAFETY: the caller's contract.
        let (key, value) = unsafe { blocks.0.row(blocks.1 + block) }.split_at_mut(tile.strides().key);
        for (sums, gradient) in [(key, &of_rest[0]), (value, &of_rest[1])] {
            sums.iter_mut().zip(gradient).for_each(|(sum, x)| *sum += share * x);
        }
    }
}
