//! One pass over query rows: several of them visit a row under a causal mask.

use crate::select::Rectangle;
use crate::states::States;
use crate::tile::Tile;

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

    /// Queries of the longest rectangle.
    pub(crate) fn most_queries(&self) -> usize {
        self.rectangles().map(|rectangle| rectangle.queries.len()).max().unwrap_or(0)
    }

    /// Keys of the longest rectangle.
    pub(crate) fn most_keys(&self) -> usize {
        self.rectangles().map(|rectangle| rectangle.keys.len()).max().unwrap_or(0)
    }

    /// Lets the rows of `tile`, which has met no key, go on from what earlier passes stored.
    pub(crate) fn resume(&self, tile: &mut Tile<'_>) {
        if let Some(states) = self.states {
            // SAFETY: as in `complete`.
            unsafe { tile.resume(states) };
        }
    }

    /// Joins what earlier passes stored, for a tile that did not resume from it.
    pub(crate) fn join(&self, tile: &mut Tile<'_>) {
        if let Some(states) = self.states {
            // SAFETY: as in `complete`.
            unsafe { tile.absorb(states) };
        }
    }

    /// Stores or writes the rows of `tile`.
    pub(crate) fn complete(&self, tile: &mut Tile<'_>, batch: usize) {
        // SAFETY: the sub-problems of a pass have disjoint queries, every task has its own rows of one
        // of them, and the next pass starts when all tasks have returned.
        unsafe {
            match self.states {
                Some(states) if !self.last => tile.store(states),
                _ => tile.finish(batch),
            }
        }
    }
}
