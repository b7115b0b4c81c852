//! How the rows of query heads are spread over tiles.

use core::ops::Range;

use crate::problem::Problem;

/// Query rows in one tile (over all query heads that share its keys): enough to pay for packing the
/// keys, few enough for their state to stay in the second-level cache.
pub(crate) const TILE_ROWS: usize = 256;

/// Rows of one tile of probe rows.
pub(crate) const PROBE_ROWS: usize = 4;

/// Query heads of one batch item that are worked on together, and the KV heads that they read: whole groups, or
/// part of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadSet {
    /// Query heads.
    pub query: Range<usize>,
    /// KV heads.
    pub kv: Range<usize>,
}

impl HeadSet {
    pub(crate) fn all(problem: &Problem) -> Self {
        HeadSet { query: 0..problem.heads_q, kv: 0..problem.heads_kv }
    }

    /// The heads in sets of at most `at_once` (at least 1) query heads, in order.
    pub(crate) fn divide(problem: &Problem, at_once: usize) -> impl Iterator<Item = HeadSet> {
        let group = problem.group;
        let (groups, heads) = if at_once >= group { (at_once / group, group) } else { (1, at_once) };
        (0..problem.heads_kv).step_by(groups).flat_map(move |kv| {
            let kv = kv..(kv + groups).min(problem.heads_kv);
            let end = kv.end * group;
            (kv.start * group..end).step_by(groups * heads).map(move |first| HeadSet {
                query: first..(first + groups * heads).min((first / group + kv.len()) * group),
                kv: kv.clone(),
            })
        })
    }

    /// The run of heads from `first` on that are `alike`: as many whole groups as there are, else neighbours of one KV
    /// head.
    pub(crate) fn run(group: usize, heads_q: usize, first: usize, alike: impl Fn(usize) -> bool) -> Self {
        let kv_head = first / group;
        let whole = |kv_head: usize| (kv_head * group..(kv_head + 1) * group).all(&alike);
        if first.is_multiple_of(group) && whole(kv_head) {
            let kv_heads = heads_q / group;
            let end = (kv_head..kv_heads).find(|&kv_head| !whole(kv_head)).unwrap_or(kv_heads);
            return HeadSet { query: first..end * group, kv: kv_head..end };
        }
        let end = (kv_head + 1) * group;
        let end = (first..end).find(|&head| !alike(head)).unwrap_or(end);
        HeadSet { query: first..end, kv: kv_head..kv_head + 1 }
    }

    /// Query heads per KV head.
    fn group(&self) -> usize {
        self.query.len() / self.kv.len()
    }
}

/// How query heads that share a KV head are spread over tiles.
#[derive(Debug, Clone)]
pub(crate) struct HeadTiling {
    set: HeadSet,
    /// Query heads in one tile.
    heads: usize,
    /// Tiles needed for the query heads of one KV head.
    pub(crate) parts: usize,
    /// Rows of each head in one tile, at most.
    rows: usize,
}

impl HeadTiling {
    /// Query heads in one tile, at most.
    pub(crate) const MOST_HEADS: usize = TILE_ROWS / 8;

    /// `shared`: all query heads of a group meet the same keys, so they can share a packed tile.
    pub(crate) fn new(set: &HeadSet, shared: bool) -> Self {
        let heads = if shared { set.group().min(Self::MOST_HEADS) } else { 1 };
        HeadTiling { set: set.clone(), heads, parts: set.group().div_ceil(heads), rows: Self::rows_of(heads) }
    }

    /// Rows of each of `heads` heads in one tile, at most.
    pub(crate) fn rows_of(heads: usize) -> usize {
        TILE_ROWS / heads
    }

    /// Query heads of one part of the group of KV head `kv_head`.
    pub(crate) fn heads_of(&self, kv_head: usize, part: usize) -> Range<usize> {
        let first = self.set.query.start + (kv_head - self.set.kv.start) * self.set.group();
        let start = first + part * self.heads;
        start..(start + self.heads).min(first + self.set.group())
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

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::params::Mask;
    use crate::problem::one_head;
    use std::vec::Vec;

    #[test]
    fn sets_cover_every_head_once_and_read_the_right_keys() {
        for (heads_kv, group) in [(1, 1), (1, 7), (3, 4), (5, 1), (2, 8)] {
            let heads_q = heads_kv * group;
            let problem = Problem { heads_q, heads_kv, group, ..one_head(Mask::None, 1, 1) };
            for at_once in 1..=heads_q {
                let sets: Vec<HeadSet> = HeadSet::divide(&problem, at_once).collect();
                let heads: Vec<usize> = sets.iter().flat_map(|set| set.query.clone()).collect();
                assert!(heads.iter().copied().eq(0..heads_q), "{heads_kv} {group} {at_once}: {sets:?}");
                for set in &sets {
                    assert!(set.query.len() <= at_once && set.query.len().is_multiple_of(set.kv.len()));
                    assert_eq!(set.kv, set.query.start / group..(set.query.end - 1) / group + 1);
                    for shared in [true, false] {
                        let tiling = HeadTiling::new(set, shared);
                        let parts =
                            set.kv.clone().flat_map(|kv| (0..tiling.parts).map(move |part| (kv, part)));
                        let heads: Vec<usize> =
                            parts.flat_map(|(kv, part)| tiling.heads_of(kv, part)).collect();
                        assert!(heads.iter().copied().eq(set.query.clone()), "{set:?}");
                    }
                }
            }
        }
    }
}
