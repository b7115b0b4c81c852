//! Mask tensors.

use std::ops::Range;

use hyperattn_core::DType;
use hyperattn_reference::Generator;

use crate::inputs::Shape;
use crate::storage::{Arrangement, Storage, Tensor};

/// Hides a key.
pub const HIDDEN: f32 = f32::NEG_INFINITY;

/// A mask tensor, as f32 numbers that are exact in its element type.
#[derive(Clone, Debug)]
pub struct AdditiveMask {
    /// Extents: of the batch, heads and queries, or 1, and of the keys.
    pub shape: [usize; 4],
    /// The element type in which the call receives it.
    pub dtype: DType,
    /// How it lies in memory.
    pub arrangement: Arrangement,
    /// In packed order.
    pub entries: Vec<f32>,
}

impl AdditiveMask {
    /// A packed one of these extents, with `entry(batch, head, query, key)` rounded to `dtype`.
    pub fn new(
        shape: [usize; 4],
        dtype: DType,
        mut entry: impl FnMut(usize, usize, usize, usize) -> f32,
    ) -> Self {
        let [batch, heads, queries, keys] = shape;
        let mut entries = Vec::with_capacity(batch * heads * queries * keys);
        for row in 0..batch * heads * queries {
            let (b, h, i) = (row / (heads * queries), row / queries % heads, row % queries);
            entries.extend((0..keys).map(|j| entry(b, h, i, j)));
        }
        let entries = Storage::new(&entries, dtype).widened();
        AdditiveMask { shape, dtype, arrangement: Arrangement::Packed, entries }
    }

    /// One for all heads and batch items of `shape`.
    pub fn shared(shape: &Shape, dtype: DType, mut entry: impl FnMut(usize, usize) -> f32) -> Self {
        Self::new([1, 1, shape.n_q, shape.n_k], dtype, |_, _, i, j| entry(i, j))
    }

    /// A part of everything that a mask may be to a tile: blocks of queries and keys in which it is 0, hides all keys, hides
    /// the last keys of each row, hides some keys, or is any number.
    pub fn random(shape: [usize; 4], dtype: DType, seed: u64) -> Self {
        println!("random mask {shape:?} {dtype:?}, seed {seed}");
        let mut generator = Generator::new(seed);
        let [_, _, queries, keys] = shape;
        let (block_rows, block_keys) = (1 + generator.below(200), 1 + generator.below(150));
        let blocks = keys.div_ceil(block_keys) * queries.div_ceil(block_rows);
        let kinds: Vec<usize> = (0..shape[0] * shape[1] * blocks).map(|_| generator.below(6)).collect();
        Self::new(shape, dtype, |b, h, i, j| {
            let block = i / block_rows * keys.div_ceil(block_keys) + j / block_keys;
            match kinds[(b * shape[1] + h) * blocks + block] {
                0 | 1 => 0.0,
                2 => HIDDEN,
                3 if j % block_keys > i * 7 % block_keys => HIDDEN,
                3 => 0.0,
                4 => [0.0, HIDDEN][generator.below(2)],
                _ => 2.0 * generator.normal() as f32,
            }
        })
    }

    /// What it adds to the logits of one head, `[n_q, n_k]`.
    pub fn of_head(&self, shape: &Shape, batch: usize, head: usize) -> Vec<f64> {
        let [batches, heads, queries, keys] = self.shape;
        let matrix = batch.min(batches - 1) * heads + head.min(heads - 1);
        let row = |i: usize| &self.entries[(matrix * queries + i.min(queries - 1)) * keys..][..keys];
        let row = |i: usize| row(i).iter().map(|&x| if x <= -2.0f32.powi(127) { HIDDEN } else { x });
        (0..shape.n_q).flat_map(row).map(f64::from).collect()
    }

    /// The same mask with all extents of `shape`.
    pub fn expanded(&self, shape: &Shape) -> Self {
        let Shape { batch, heads_q, n_q, n_k, .. } = *shape;
        let heads = (0..batch * heads_q).map(|head| self.of_head(shape, head / heads_q, head % heads_q));
        let entries = heads.flatten().map(|x| x as f32).collect();
        AdditiveMask { shape: [batch, heads_q, n_q, n_k], entries, ..self.clone() }
    }

    /// Its part for some queries and keys.
    pub fn rows(&self, queries: Range<usize>, keys: Range<usize>) -> Self {
        let [batch, heads, of_queries, of_keys] = self.shape;
        let queries = if of_queries == 1 { 0..1 } else { queries };
        let matrices = self.entries.chunks(of_queries * of_keys);
        let rows = matrices.flat_map(|matrix| matrix.chunks(of_keys).skip(queries.start).take(queries.len()));
        let entries = rows.flat_map(|row| &row[keys.clone()]).copied().collect();
        AdditiveMask { shape: [batch, heads, queries.len(), keys.len()], entries, ..self.clone() }
    }

    /// As the call receives it; between its elements are NaN.
    pub fn tensor(&self) -> Tensor {
        let shape = self.shape.map(|extent| extent as i64);
        Tensor::new(&self.entries, shape, self.dtype, self.arrangement, f32::NAN)
    }
}
