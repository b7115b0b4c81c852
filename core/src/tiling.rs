//! How the rows of query heads are spread over tiles.

use core::ops::Range;

use crate::problem::Problem;

/// Query rows in one tile (over all query heads that share its keys): enough to pay for packing the
/// keys, few enough for their state to stay in the second-level cache.
pub(crate) const TILE_ROWS: usize = 256;

/// How the query heads that share a KV head are spread over tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadTiling {
    /// Query heads in one tile.
    pub(crate) heads: usize,
    /// Tiles needed for one group.
    pub(crate) parts: usize,
    /// Rows of each head in one tile, at most.
    pub(crate) rows: usize,
}

impl HeadTiling {
    /// Query heads in one tile, at most.
    pub(crate) const MOST_HEADS: usize = TILE_ROWS / 8;

    /// `shared`: all query heads of a group meet the same keys, so they can share a packed tile.
    pub(crate) fn new(problem: &Problem, shared: bool) -> Self {
        let heads = if shared { problem.group.min(Self::MOST_HEADS) } else { 1 };
        HeadTiling { heads, parts: problem.group.div_ceil(heads), rows: TILE_ROWS / heads }
    }

    /// Query heads of one part of one group.
    pub(crate) fn heads_of(&self, problem: &Problem, kv_head: usize, part: usize) -> Range<usize> {
        let start = kv_head * problem.group + part * self.heads;
        start..(start + self.heads).min((kv_head + 1) * problem.group)
    }

    /// Chunks that `rows` rows of each head are cut into.
    pub(crate) fn chunks(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows)
    }

    /// Chunk `chunk` of `chunks` equal parts of `range`, the last ones possibly shorter or empty.
    pub(crate) fn chunk_of(range: &Range<usize>, chunk: usize, chunks: usize) -> Range<usize> {
        let length = range.len().div_ceil(chunks.max(1));
        let start = (range.start + chunk * length).min(range.end);
        start..(start + length).min(range.end)
    }
}
