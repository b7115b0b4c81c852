//! The inputs of one head.

use std::ops::Range;

/// Queries, keys and values of one (batch, head), row-major, and the softmax scale: the Q, K, V of
/// arXiv 2310.05869, section 2, with A = exp(scale Q K^T), or exp(scale Q K^T + mask).
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    query: &'a [f64],
    key: &'a [f64],
    value: &'a [f64],
    head_dim: usize,
    value_dim: usize,
    scale: f64,
    mask: Option<AdditiveMask<'a>>,
    first_key: usize,
}

/// What is added to the logits, row-major: query i and key j have entry i * row_len + j.
#[derive(Clone, Copy, Debug)]
struct AdditiveMask<'a> {
    entries: &'a [f64],
    row_len: usize,
}

impl<'a> Problem<'a> {
    /// Rows of `head_dim` queries and keys and of `value_dim` values; the sequence extents follow from the
    /// slices' lengths. Panics when they do not fit together.
    pub fn new(
        query: &'a [f64],
        key: &'a [f64],
        value: &'a [f64],
        head_dim: usize,
        value_dim: usize,
        scale: f64,
    ) -> Self {
        assert!(query.len().is_multiple_of(head_dim), "query is not a whole number of rows");
        assert!(key.len().is_multiple_of(head_dim), "key is not a whole number of rows");
        assert_eq!(value.len(), key.len() / head_dim * value_dim, "value has not one row per key");
        Problem { query, key, value, head_dim, value_dim, scale, mask: None, first_key: 0 }
    }

    /// The same with `mask`, n_q x n_k, added to scale Q K^T.
    pub fn masked(self, mask: &'a [f64]) -> Self {
        assert_eq!(mask.len(), self.num_queries() * self.num_keys(), "mask has not one entry per logit");
        Problem { mask: Some(AdditiveMask { entries: mask, row_len: self.num_keys() }), ..self }
    }

    /// n_q.
    pub fn num_queries(&self) -> usize {
        self.query.len() / self.head_dim
    }

    /// n_k.
    pub fn num_keys(&self) -> usize {
        self.key.len() / self.head_dim
    }

    /// d.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// d_v.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// The entry (i, j) of the mask.
    fn added(&self, i: usize, j: usize) -> f64 {
        self.mask.map_or(0.0, |mask| mask.entries[i * mask.row_len + j])
    }

    /// Whether the mask hides key j from query i, whatever they hold.
    pub fn hides(&self, i: usize, j: usize) -> bool {
        self.added(i, j) == f64::NEG_INFINITY
    }

    /// The entry (i, j) of scale Q K^T and the mask, the logarithm of A_ij.
    pub fn logit(&self, i: usize, j: usize) -> f64 {
        self.scale * self.query_row(i).iter().zip(self.key_row(j)).map(|(a, b)| a * b).sum::<f64>()
            + self.added(i, j)
    }

    /// The factor on Q K^T.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The key of the whole problem that is key 0 of this one.
    pub fn first_key(&self) -> usize {
        self.first_key
    }

    /// Row i of Q.
    pub fn query_row(&self, i: usize) -> &'a [f64] {
        &self.query[i * self.head_dim..][..self.head_dim]
    }

    /// Row j of K.
    pub fn key_row(&self, j: usize) -> &'a [f64] {
        &self.key[j * self.head_dim..][..self.head_dim]
    }

    /// Row j of V.
    pub fn value_row(&self, j: usize) -> &'a [f64] {
        &self.value[j * self.value_dim..][..self.value_dim]
    }

    /// The sub-problem of these queries and keys, indexed from 0: a node of Algorithm 4.
    pub fn slice(&self, queries: Range<usize>, keys: Range<usize>) -> Self {
        let mask = self.mask.map(|mask| AdditiveMask {
            entries: &mask.entries[(queries.start * mask.row_len + keys.start).min(mask.entries.len())..],
            ..mask
        });
        Problem {
            mask,
            first_key: self.first_key + keys.start,
            query: &self.query[queries.start * self.head_dim..queries.end * self.head_dim],
            key: &self.key[keys.start * self.head_dim..keys.end * self.head_dim],
            value: &self.value[keys.start * self.value_dim..keys.end * self.value_dim],
            ..*self
        }
    }
}
