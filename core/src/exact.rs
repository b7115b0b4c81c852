//! Exact softmax attention over rectangles of queries and keys, under the problem's mask.

use core::ops::Range;

use crate::error::Result;
use crate::exec::{Executor, for_each_item};
use crate::pass::Pass;
use crate::scratch::{Carver, Lanes};
use crate::tile::{Call, KeyOrder, Tile};
use crate::tiling::HeadTiling;

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
