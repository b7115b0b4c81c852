//! A part of a call's tensors, which is computed as a call of its own.

use core::ops::Range;

use crate::params::BlockMask;
use crate::problem::{Layouts, Problem, Tensors};
use crate::tiling::HeadSet;
use crate::view::{TensorLayout, TensorMut};

/// Where a part of a call lies in its tensors.
#[derive(Debug, Clone)]
pub struct Section {
    /// Batch items.
    pub batches: Range<usize>,
    /// All of them, or some of a single batch item.
    pub heads: HeadSet,
    /// Rows of the queries.
    pub queries: Range<usize>,
    /// Rows of the keys and values.
    pub keys: Range<usize>,
    /// Batch items of the tensors that have one number for each head, if the part writes them.
    pub of_heads: Option<Range<usize>>,
    /// Whether the caller's blocks, if there are any, are the part's too.
    pub masked: bool,
}

impl Section {
    /// Number of the first head's pattern of a block mask among those of `heads_q` heads of each batch item.
    pub fn first_pattern(&self, heads_q: usize) -> usize {
        self.batches.start * heads_q + self.heads.query.start
    }
}

impl Problem {
    /// The part's sizes. Random numbers stay those of the same heads.
    pub fn part(&self, section: &Section) -> Self {
        let HeadSet { query, kv } = &section.heads;
        Problem {
            batch: section.batches.len(),
            heads_q: query.len(),
            heads_kv: kv.len(),
            group: query.len() / kv.len(),
            first_head: self.first_head + query.start,
            first_kv_head: self.first_kv_head + kv.start,
            n_q: section.queries.len(),
            n_k: section.keys.len(),
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
    pub(crate) fn part(&self, section: &Section) -> Self {
        let Section { batches, heads, queries, keys, .. } = section;
        let heads_q = self.q.extents()[1];
        let part = |layout: &TensorLayout, heads: &Range<usize>, rows: &Range<usize>| {
            layout.part(batches, heads, rows).0
        };
        let of_heads = |layout: &TensorLayout| {
            section.of_heads.as_ref().map(|items| layout.part(items, &heads.query, &(0..1)).0)
        };
        Layouts {
            q: part(&self.q, &heads.query, queries),
            k: part(&self.k, &heads.kv, keys),
            v: part(&self.v, &heads.kv, keys),
            out: part(&self.out, &heads.query, queries),
            lse: self.lse.map(|lse| part(&lse, &heads.query, queries)),
            block_mask: self
                .block_mask
                .filter(|_| section.masked)
                .map(|mask| mask.from_pattern(section.first_pattern(heads_q))),
            error: self.error.as_ref().and_then(of_heads),
            keys_per_query: self.keys_per_query.as_ref().and_then(of_heads),
        }
    }
}

impl<'a> Tensors<'a> {
    /// # Safety
    /// While the part lives nobody else reads or writes the rows of the outputs that are written through it.
    pub(crate) unsafe fn part<'p>(&'p self, section: &Section) -> Tensors<'p> {
        let Section { batches, heads, queries, keys, .. } = section;
        let heads_q = self.q.layout().extents()[1];
        let of_heads = |view: &'p TensorMut<'a>| {
            // SAFETY: the caller's contract.
            section.of_heads.as_ref().map(|items| unsafe { view.part(items, &heads.query, &(0..1)) })
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
                .filter(|_| section.masked)
                .map(|mask| mask.from_pattern(section.first_pattern(heads_q))),
            error: self.error.as_ref().and_then(of_heads),
            keys_per_query: self.keys_per_query.as_ref().and_then(of_heads),
        }
    }
}
