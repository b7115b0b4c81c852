//! A part of a call's tensors, which is computed as a call of its own.

use core::ops::Range;

use crate::params::BlockMask;
use crate::problem::{Layouts, Problem, Tensors};
use crate::tiling::HeadSet;

/// Where a part lies.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) batches: Range<usize>,
    /// All of them, or some of a single batch item.
    pub(crate) heads: HeadSet,
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
    /// Batch items of the tensors that have one number for each head, if the part writes them.
    pub(crate) of_heads: Option<Range<usize>>,
    /// Whether the caller's blocks, if there are any, are the part's too.
    pub(crate) masked: bool,
}

impl Place {
    /// Number of the first head's pattern of a block mask among those of `heads_q` heads of each batch item.
    fn first_pattern(&self, heads_q: usize) -> usize {
        self.batches.start * heads_q + self.heads.query.start
    }
}

impl Problem {
    /// The part's sizes. Random numbers stay those of the same heads.
    pub(crate) fn part(&self, place: &Place) -> Self {
        let HeadSet { query, kv } = &place.heads;
        Problem {
            batch: place.batches.len(),
            heads_q: query.len(),
            heads_kv: kv.len(),
            group: query.len() / kv.len(),
            first_head: self.first_head + query.start,
            first_kv_head: self.first_kv_head + kv.start,
            n_q: place.queries.len(),
            n_k: place.keys.len(),
            ..*self
        }
    }
}

impl<'a> BlockMask<'a> {
    /// The patterns from number `first` on.
    pub(crate) fn from_pattern(&self, first: usize) -> Self {
        BlockMask { row_offsets: &self.row_offsets[first * self.head_stride..], ..*self }
    }
}

impl<'a> Layouts<'a> {
    pub(crate) fn part(&self, place: &Place) -> Self {
        let Place { batches, heads, queries, keys, .. } = place;
        let heads_q = self.q.extents()[1];
        let of_heads = |layout: &crate::view::TensorLayout| {
            place.of_heads.as_ref().map(|items| layout.part(items, &heads.query, &(0..1)))
        };
        Layouts {
            q: self.q.part(batches, &heads.query, queries),
            k: self.k.part(batches, &heads.kv, keys),
            v: self.v.part(batches, &heads.kv, keys),
            out: self.out.part(batches, &heads.query, queries),
            lse: self.lse.map(|lse| lse.part(batches, &heads.query, queries)),
            block_mask: self
                .block_mask
                .filter(|_| place.masked)
                .map(|mask| mask.from_pattern(place.first_pattern(heads_q))),
            error: self.error.as_ref().and_then(of_heads),
            keys_per_query: self.keys_per_query.as_ref().and_then(of_heads),
        }
    }
}

impl<'a> Tensors<'a> {
    /// # Safety
    /// While the part lives nobody else reads or writes the rows of the outputs that are written through it.
    pub(crate) unsafe fn part<'p>(&'p self, place: &Place) -> Tensors<'p> {
        let Place { batches, heads, queries, keys, .. } = place;
        let heads_q = self.q.layout().extents()[1];
        let of_heads = |view: &'p crate::view::TensorMut<'a>| {
            // SAFETY: the caller's contract.
            place.of_heads.as_ref().map(|items| unsafe { view.part(items, &heads.query, &(0..1)) })
        };
        Tensors {
            q: self.q.part(batches, &heads.query, queries),
            k: self.k.part(batches, &heads.kv, keys),
            v: self.v.part(batches, &heads.kv, keys),
            // SAFETY: as above.
            out: unsafe { self.out.part(batches, &heads.query, queries) },
            // SAFETY: as above.
            lse: self.lse.as_ref().map(|lse| unsafe { lse.part(batches, &heads.query, queries) }),
            block_mask: self
                .block_mask
                .filter(|_| place.masked)
                .map(|mask| mask.from_pattern(place.first_pattern(heads_q))),
            error: self.error.as_ref().and_then(of_heads),
            keys_per_query: self.keys_per_query.as_ref().and_then(of_heads),
        }
    }
}
