//! Selection: which keys a tile of queries meets exactly, as ranges of a key order.
//!
//! A sub-problem lists, for every block of queries, exact key ranges and weighted columns
//! ([`crate::residual`]); the tile kernel ([`crate::tile`]) executes both in one online softmax.

use core::ops::Range;

use crate::params::BlockMask;

/// Every query of one interval against every key of another, none masked. The intervals count
/// positions in the query order and in the key order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rectangle {
    /// Positions of the queries.
    pub queries: Range<usize>,
    /// Positions of the keys.
    pub keys: Range<usize>,
}

/// Where the exact blocks come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Blocks<'a> {
    /// Equal blocks of the sorted keys (Algorithm 1).
    Sorted { block_size: usize },
    /// The caller's mask; `pattern` is batch * heads_q + head.
    Given { mask: BlockMask<'a>, pattern: usize },
    /// No exact block: residual only.
    Absent,
}

/// Query blocks of this many rows when there are no exact blocks.
const ROWS_WITHOUT_BLOCKS: usize = 256;

/// The exact part of one sub-problem.
#[derive(Debug, Clone)]
pub(crate) struct Selection<'a> {
    pub(crate) rectangle: Rectangle,
    pub(crate) blocks: Blocks<'a>,
}

impl Selection<'_> {
    /// Number of query blocks.
    pub(crate) fn block_count(&self) -> usize {
        let Rectangle { queries, keys } = &self.rectangle;
        match &self.blocks {
            Blocks::Sorted { block_size } => keys.len().div_ceil(*block_size),
            Blocks::Given { mask, .. } if !queries.is_empty() => {
                (queries.end - 1) / mask.query_block - queries.start / mask.query_block + 1
            }
            Blocks::Given { .. } => 0,
            Blocks::Absent => queries.len().div_ceil(ROWS_WITHOUT_BLOCKS),
        }
    }

    /// Query positions of one block. Sorted queries are divided in proportion: the query at position
    /// p meets the key block that position p * n_k / n_q falls in, which for n_q = n_k is its own.
    pub(crate) fn queries_of(&self, block: usize) -> Range<usize> {
        let Rectangle { queries, keys } = &self.rectangle;
        let range = match &self.blocks {
            Blocks::Sorted { block_size } => {
                let bound = |block: usize| {
                    let scaled = (block * block_size) as u128 * queries.len() as u128;
                    scaled.div_ceil(keys.len() as u128) as usize
                };
                queries.start + bound(block)..queries.start + bound(block + 1)
            }
            Blocks::Given { mask, .. } => {
                let first = queries.start / mask.query_block + block;
                first * mask.query_block..(first + 1) * mask.query_block
            }
            Blocks::Absent => {
                let start = queries.start + block * ROWS_WITHOUT_BLOCKS;
                start..start + ROWS_WITHOUT_BLOCKS
            }
        };
        range.start.clamp(queries.start, queries.end)..range.end.clamp(queries.start, queries.end)
    }

    /// An upper bound on the length of [`Self::queries_of`].
    pub(crate) fn most_queries(&self) -> usize {
        let Rectangle { queries, keys } = &self.rectangle;
        match &self.blocks {
            Blocks::Sorted { block_size } => {
                let scaled = *block_size as u128 * queries.len() as u128;
                (scaled.div_ceil(keys.len().max(1) as u128) as usize).min(queries.len())
            }
            Blocks::Given { mask, .. } => mask.query_block.min(queries.len()),
            Blocks::Absent => ROWS_WITHOUT_BLOCKS.min(queries.len()),
        }
    }

    /// The block of the query at `position`.
    pub(crate) fn block_of(&self, position: usize) -> usize {
        let Rectangle { queries, keys } = &self.rectangle;
        match &self.blocks {
            Blocks::Sorted { block_size } => {
                let scaled = (position - queries.start) as u128 * keys.len() as u128;
                (scaled / queries.len() as u128) as usize / block_size
            }
            Blocks::Given { mask, .. } => position / mask.query_block - queries.start / mask.query_block,
            Blocks::Absent => (position - queries.start) / ROWS_WITHOUT_BLOCKS,
        }
    }

    /// The caller's key blocks of one query block.
    fn given_row<'m>(&self, mask: &'m BlockMask<'_>, pattern: usize, block: usize) -> &'m [i32] {
        mask.row(pattern, self.rectangle.queries.start / mask.query_block + block)
    }

    /// Key ranges that the queries of `block` meet exactly, ascending and disjoint.
    pub(crate) fn ranges(&self, block: usize) -> impl Iterator<Item = Range<usize>> {
        let keys = self.rectangle.keys.clone();
        let (row, single, length): (&[i32], Option<usize>, usize) = match &self.blocks {
            Blocks::Sorted { block_size } => (&[], Some(keys.start + block * block_size), *block_size),
            Blocks::Given { mask, pattern } => (self.given_row(mask, *pattern, block), None, mask.key_block),
            Blocks::Absent => (&[], None, 0),
        };
        let starts = single.into_iter().chain(row.iter().map(move |&column| column as usize * length));
        starts
            .map(move |start| start.max(keys.start)..(start + length).min(keys.end))
            .filter(|range| !range.is_empty())
    }

    /// Whether the queries of `block` meet the key at `position` exactly (M_ij = 1).
    pub(crate) fn covers(&self, block: usize, position: usize) -> bool {
        match &self.blocks {
            Blocks::Sorted { block_size } => (position - self.rectangle.keys.start) / block_size == block,
            Blocks::Given { mask, pattern } => {
                let column = (position / mask.key_block) as i32;
                self.given_row(mask, *pattern, block).binary_search(&column).is_ok()
            }
            Blocks::Absent => false,
        }
    }

    /// Consecutive key ranges that [`Self::covers`] answers alike for all positions of, whatever the block.
    pub(crate) fn key_runs(&self) -> impl Iterator<Item = Range<usize>> {
        let keys = self.rectangle.keys.clone();
        let (length, first) = match &self.blocks {
            Blocks::Sorted { block_size } => (*block_size, keys.start),
            Blocks::Given { mask, .. } => (mask.key_block, keys.start / mask.key_block * mask.key_block),
            Blocks::Absent => (keys.len().max(1), keys.start),
        };
        let end = keys.end;
        (first..end).step_by(length).map(move |start| start.max(keys.start)..(start + length).min(end))
    }

    /// Key ranges that the queries of `block` do not meet exactly.
    pub(crate) fn left_out(&self, block: usize) -> impl Iterator<Item = Range<usize>> {
        self.key_runs().filter(move |run| !self.covers(block, run.start))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    /// Invariants that execution relies on: every query is in one block, ranges and `covers` agree.
    fn check(selection: &Selection<'_>) {
        let Rectangle { queries, keys } = selection.rectangle.clone();
        let mut seen: Vec<usize> = Vec::new();
        for block in 0..selection.block_count() {
            let rows = selection.queries_of(block);
            assert!(rows.len() <= selection.most_queries());
            assert!(rows.clone().all(|position| selection.block_of(position) == block));
            seen.extend(rows);
            let exact: Vec<usize> = selection.ranges(block).flatten().collect();
            let covered: Vec<usize> = keys.clone().filter(|&key| selection.covers(block, key)).collect();
            assert_eq!(exact, covered);
            let left_out: Vec<usize> = selection.left_out(block).flatten().collect();
            assert!(left_out.iter().copied().eq(keys.clone().filter(|key| !exact.contains(key))));
        }
        assert_eq!(seen, queries.collect::<Vec<_>>());
        assert_eq!(selection.key_runs().flatten().collect::<Vec<_>>(), keys.collect::<Vec<_>>());
    }

    #[test]
    fn sorted_blocks_partition_queries_and_keys() {
        for (n_q, n_k, block_size) in [
            (10, 10, 4),
            (1000, 1000, 256),
            (7, 1000, 64),
            (1000, 7, 3),
            (13, 29, 29),
            (5, 8, 100),
            (1, 1, 1),
        ] {
            check(&Selection {
                rectangle: Rectangle { queries: 3..3 + n_q, keys: 5..5 + n_k },
                blocks: Blocks::Sorted { block_size },
            });
        }
    }

    #[test]
    fn given_blocks_are_clipped_to_the_rectangle() {
        let mask = BlockMask {
            query_block: 4,
            key_block: 3,
            num_query_blocks: 4,
            num_key_blocks: 6,
            row_offsets: &[0, 2, 2, 5, 6],
            columns: &[0, 3, 1, 2, 5, 4],
            head_stride: 0,
        };
        for (queries, keys) in [(0..15, 0..17), (3..9, 2..11), (5..5, 0..17), (6..15, 0..8)] {
            check(&Selection {
                rectangle: Rectangle { queries, keys },
                blocks: Blocks::Given { mask, pattern: 2 },
            });
        }
    }

    #[test]
    fn without_blocks_nothing_is_covered() {
        check(&Selection { rectangle: Rectangle { queries: 0..700, keys: 0..10 }, blocks: Blocks::Absent });
    }
}
