//! Exact softmax attention over rectangles of queries and keys, under the problem's mask.

use core::ops::Range;

use crate::error::Result;
use crate::exec::{Executor, for_each_item};
use crate::scratch::{Carver, Lanes};
use crate::select::Rectangle;
use crate::tile::{Call, HeadTiling, KeyOrder, States, Tile};

/// One pass over disjoint sets of query rows, and what happens to their results.
pub(crate) struct Pass<'a> {
    /// Sub-problem number `i`, if there is one.
    pub(crate) rectangle: &'a (dyn Fn(usize) -> Option<Rectangle> + Sync),
    /// Numbers to ask for.
    pub(crate) count: usize,
    /// Where partial results of these rows are kept; absent when this pass is all there is.
    pub(crate) states: Option<&'a States<'a>>,
    /// Whether this is the last pass over these rows.
    pub(crate) last: bool,
}

impl Pass<'_> {
    /// The sub-problems, numbered.
    pub(crate) fn rectangles(&self) -> impl Iterator<Item = Rectangle> {
        (0..self.count).filter_map(self.rectangle)
    }

    /// Joins what earlier passes stored, then stores or writes the rows of `tile`.
    pub(crate) fn complete(&self, tile: &mut Tile<'_>, batch: usize) {
        // SAFETY: the sub-problems of a pass have disjoint queries, every task has its own rows of one
        // of them, and the next pass starts when all tasks have returned.
        unsafe {
            if let Some(states) = self.states {
                tile.absorb(states);
            }
            match self.states {
                Some(states) if !self.last => tile.store(states),
                _ => tile.finish(batch),
            }
        }
    }
}

/// Computes every rectangle of `pass` for the batch items `batches`.
pub(crate) fn run_pass(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    batches: Range<usize>,
    pass: &Pass<'_>,
) -> Result<()> {
    let problem = &call.problem;
    let tiling = HeadTiling::new(problem, true);
    let most_rows = pass.rectangles().map(|rectangle| rectangle.queries.len()).max().unwrap_or(0);
    let chunks = tiling.chunks(most_rows);
    let per_head = chunks * pass.count;
    let per_batch = per_head * tiling.parts * problem.heads_kv;
    for_each_item(executor, lanes, per_batch * batches.len(), &|scratch, item| {
        let batch = batches.start + item / per_batch;
        let (kv_head, part) = {
            let group = item % per_batch / per_head;
            (group / tiling.parts, group % tiling.parts)
        };
        // Later rows see more keys under a causal mask: start with the long tasks.
        let place = per_head - 1 - item % per_head;
        let Some(rectangle) = (pass.rectangle)(place / chunks) else { return };
        let queries = HeadTiling::chunk_of(&rectangle.queries, place % chunks, chunks);
        if queries.is_empty() {
            return;
        }
        let mut tile = Tile::carve(call, &mut Carver::new(scratch));
        for head in tiling.heads_of(problem, kv_head, part) {
            for row in queries.clone() {
                tile.push(head, row, problem.visible_keys(row));
            }
        }
        tile.load_queries(batch);
        tile.attend_visible(KeyOrder { batch, kv_head, order: None }, rectangle.keys);
        pass.complete(&mut tile, batch);
    })
}
