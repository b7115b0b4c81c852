//! The tiles of queries of METHOD_REFINED, each of which shares one list of keys.

use core::ops::Range;

use crate::params::Mask;
use crate::problem::Problem;
use crate::tiling::TILE_ROWS;

/// Keys above which selection is made cheaper.
pub(crate) const LONG: usize = 32_768;

/// The latest queries under a causal mask have a tile of their own. A question at the end of a long text reads the text
/// for the answer, and wants other keys than the text before it.
const LATEST: usize = 32;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueryTiles {
    n_q: usize,
    /// Queries of all but the last tiles.
    pub(crate) rows: usize,
    /// Queries before the tile of the latest, all of them where there is none.
    pub(crate) earlier: usize,
}

impl QueryTiles {
    /// Selection costs a tile the more, the more keys there are; fewer queries are represented better.
    pub(crate) fn new(problem: &Problem) -> Self {
        let n_q = problem.n_q;
        let rows = if problem.n_k <= LONG { TILE_ROWS / 2 } else { TILE_ROWS };
        let latest = problem.mask != Mask::None && (n_q.max(1) - 1) % rows >= LATEST;
        QueryTiles { n_q, rows, earlier: if latest { n_q - LATEST } else { n_q } }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.earlier.div_ceil(self.rows) + usize::from(self.earlier < self.n_q)
    }

    /// The queries of tile `index`.
    pub(crate) fn queries(&self, index: usize) -> Range<usize> {
        let start = index * self.rows;
        if start >= self.earlier {
            self.earlier..self.n_q
        } else {
            start..self.earlier.min(start + self.rows)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::one_head;

    #[test]
    fn tiles_cover_every_query_once() {
        for mask in [Mask::None, Mask::CausalTopLeft, Mask::CausalBottomRight] {
            for n_k in [100, 100_000] {
                for n_q in (1..700).chain([32_768, 32_769, 32_800, 32_801]) {
                    let tiles = QueryTiles::new(&one_head(mask, n_q, n_k));
                    let mut next = 0;
                    for index in 0..tiles.count() {
                        let queries = tiles.queries(index);
                        assert!(queries.start == next && !queries.is_empty() && queries.len() <= TILE_ROWS);
                        next = queries.end;
                    }
                    assert_eq!(next, n_q);
                    let last = tiles.queries(tiles.count() - 1).len();
                    assert!(mask == Mask::None || last <= LATEST, "{n_q}: {last}");
                }
            }
        }
    }
}
