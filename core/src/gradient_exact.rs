//! The backward pass of exact rectangles.
//!
//! Queries and keys are cut into as many chunks; in phase `p` chunk `t` of the keys meets chunk `t + p` of the queries. So
//! the tasks of a phase have rows and keys of their own, each pair is computed once, and the order in which a row's
//! terms are added depends on the shapes alone.

use core::ops::Range;

use crate::error::Result;
use crate::exec::{Executor, for_each_item};
use crate::gradient_tile::{GradientCall, GradientSums, GradientTile};
use crate::pass::Pass;
use crate::scratch::{Carver, Lanes};
use crate::tile::KeyOrder;
use crate::tiling::{HeadSet, HeadTiling};

/// Tasks of a phase, if there are rows enough.
const TASKS: usize = 64;

/// Rows of a chunk at least.
const CHUNK_ROWS: usize = 256;

/// How many chunks the rectangles of a pass are cut into, for so many KV heads.
pub(crate) fn chunks(pass: &Pass<'_>, kv_heads: usize) -> usize {
    let longest = pass.most_queries().max(pass.most_keys());
    (TASKS / (kv_heads * pass.count).max(1)).min(longest.div_ceil(CHUNK_ROWS)).max(1)
}

/// Adds the gradients of every rectangle of `pass` for `heads` of batch item `batch`, under the problem's mask.
pub(crate) fn run_pass(
    of: &GradientCall<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    (batch, heads): (usize, &HeadSet),
    pass: &Pass<'_>,
    sums: &GradientSums<'_>,
) -> Result<()> {
    let problem = &of.call.problem;
    let chunks = chunks(pass, heads.kv.len());
    let tiling = HeadTiling::new(heads, true);
    for phase in 0..chunks {
        for_each_item(executor, lanes, heads.kv.len() * pass.count * chunks, &|scratch, item| {
            let kv_head = heads.kv.start + item / (pass.count * chunks);
            let Some(rectangle) = (pass.rectangle)(item / chunks % pass.count) else { return };
            let chunk = item % chunks;
            let keys = HeadTiling::chunk_of(&rectangle.keys, chunk, chunks);
            let queries = HeadTiling::chunk_of(&rectangle.queries, (chunk + phase) % chunks, chunks);
            let sees_some =
                queries.clone().next_back().is_some_and(|last| problem.visible_keys(last) > keys.start);
            if keys.is_empty() || !sees_some {
                return;
            }
            let mut tile = GradientTile::carve(of, &mut Carver::new(scratch));
            for part in 0..tiling.parts {
                // SAFETY: the chunks of a phase have queries and keys of their own, and those of a KV head are one
                // task's.
                unsafe {
                    attend(
                        &mut tile,
                        of,
                        (batch, kv_head),
                        tiling.heads_of(kv_head, part),
                        (&queries, &keys),
                        sums,
                    )
                };
            }
        })?;
    }
    Ok(())
}

/// Attends to `keys`, for the `queries` of `heads`, which fill tiles together.
///
/// # Safety
/// While this runs nobody else uses the sums of these queries and keys.
unsafe fn attend(
    tile: &mut GradientTile<'_>,
    of: &GradientCall<'_>,
    (batch, kv_head): (usize, usize),
    heads: Range<usize>,
    (queries, keys): (&Range<usize>, &Range<usize>),
    sums: &GradientSums<'_>,
) {
    let problem = &of.call.problem;
    let rows_at_once = HeadTiling::rows_of(heads.len());
    for first in queries.clone().step_by(rows_at_once) {
        let rows = first..queries.end.min(first + rows_at_once);
        if problem.visible_keys(rows.end - 1) <= keys.start {
            continue;
        }
        tile.clear();
        for head in heads.clone() {
            rows.clone().for_each(|row| tile.push(head, row, problem.visible_keys(row)));
        }
        tile.load(batch);
        // SAFETY: the caller's contract.
        unsafe {
            tile.attend_visible(KeyOrder { batch, kv_head, order: None }, keys.clone(), sums.keys());
            tile.add_queries(sums);
        }
    }
}
