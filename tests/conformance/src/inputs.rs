//! Seeded problems.

use std::ops::Range;

use hyperattn_core::DType;
use hyperattn_reference::Generator;

use crate::storage::Storage;

/// Queries, keys, block size and sample size: lengths that are no multiple of anything, more queries than keys and fewer,
/// blocks larger than a tile.
pub const UNEVEN_LENGTHS: [(usize, usize, u32, u32); 11] = [
    (257, 257, 32, 16),
    (509, 509, 64, 64),
    (1009, 1009, 300, 100),
    (128, 128, 64, 32),
    (101, 701, 64, 33),
    (701, 101, 16, 40),
    (1, 333, 32, 16),
    (2, 97, 1, 1),
    (333, 2, 1, 3),
    (1009, 67, 66, 5),
    (3, 500, 500, 9),
];

/// The extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Batch items.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Key and value heads.
    pub heads_kv: usize,
    /// Queries.
    pub n_q: usize,
    /// Keys.
    pub n_k: usize,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
}

impl Shape {
    /// One head of `n_q` queries and `n_k` keys, head_dim and value_dim 16.
    pub fn single(n_q: usize, n_k: usize) -> Self {
        Shape { batch: 1, heads_q: 1, heads_kv: 1, n_q, n_k, head_dim: 16, value_dim: 16 }
    }

    /// Extents of q.
    pub fn q(&self) -> [i64; 4] {
        [self.batch, self.heads_q, self.n_q, self.head_dim].map(|extent| extent as i64)
    }

    /// Extents of k.
    pub fn k(&self) -> [i64; 4] {
        [self.batch, self.heads_kv, self.n_k, self.head_dim].map(|extent| extent as i64)
    }

    /// Extents of v.
    pub fn v(&self) -> [i64; 4] {
        [self.batch, self.heads_kv, self.n_k, self.value_dim].map(|extent| extent as i64)
    }

    /// Extents of out.
    pub fn out(&self) -> [i64; 4] {
        [self.batch, self.heads_q, self.n_q, self.value_dim].map(|extent| extent as i64)
    }

    /// Extents of lse.
    pub fn lse(&self) -> [i64; 4] {
        [self.batch, self.heads_q, self.n_q, 1].map(|extent| extent as i64)
    }

    /// Extents of what each query head has one number of.
    pub fn of_heads(&self) -> [i64; 4] {
        [self.batch as i64, self.heads_q as i64, 1, 1]
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads_q / self.heads_kv
    }
}

/// Element types of one call's inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DTypes {
    /// Of the queries.
    pub q: DType,
    /// Of the keys and values.
    pub kv: DType,
}

impl DTypes {
    /// Every legal combination.
    pub const ALL: [DTypes; 5] = [
        DTypes { q: DType::F32, kv: DType::F32 },
        DTypes { q: DType::F16, kv: DType::F16 },
        DTypes { q: DType::BF16, kv: DType::BF16 },
        DTypes { q: DType::F32, kv: DType::F16 },
        DTypes { q: DType::F32, kv: DType::BF16 },
    ];
}

impl From<DType> for DTypes {
    fn from(dtype: DType) -> Self {
        DTypes { q: dtype, kv: dtype }
    }
}

/// Q, K and V in packed order, as f32 numbers that are exact in their element types.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Extents.
    pub shape: Shape,
    /// The element types in which the call receives them.
    pub dtypes: DTypes,
    /// `[batch, heads_q, n_q, head_dim]`
    pub q: Vec<f32>,
    /// `[batch, heads_kv, n_k, head_dim]`
    pub k: Vec<f32>,
    /// `[batch, heads_kv, n_k, value_dim]`
    pub v: Vec<f32>,
}

fn narrow(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|x| x as f32).collect()
}

impl Inputs {
    /// Independent standard normal numbers.
    pub fn normal(shape: Shape, seed: u64) -> Self {
        println!("normal inputs {shape:?}, seed {seed}");
        let mut generator = Generator::new(seed);
        let Shape { batch, heads_q, heads_kv, n_q, n_k, head_dim, value_dim } = shape;
        Inputs {
            shape,
            dtypes: DType::F32.into(),
            q: narrow(generator.normal_matrix(batch * heads_q * n_q, head_dim)),
            k: narrow(generator.normal_matrix(batch * heads_kv * n_k, head_dim)),
            v: narrow(generator.normal_matrix(batch * heads_kv * n_k, value_dim)),
        }
    }

    /// Queries and keys near common centres, and values of very different norms: inputs on which the hash,
    /// the row norms and the cap all matter.
    pub fn clustered(shape: Shape, seed: u64) -> Self {
        println!("clustered inputs {shape:?}, seed {seed}");
        let mut generator = Generator::new(seed);
        let Shape { batch, heads_kv, n_q, n_k, head_dim, value_dim, .. } = shape;
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..batch * heads_kv {
            let queries = shape.group() * n_q;
            let rows = generator.clustered_matrix(queries + n_k, head_dim, 12, 0.4);
            let (queries, keys) = rows.split_at(queries * head_dim);
            q.extend_from_slice(queries);
            k.extend_from_slice(keys);
            for _ in 0..n_k {
                let norm = 4.0f64.powf(generator.normal());
                v.extend((0..value_dim).map(|_| norm * generator.normal()));
            }
        }
        Inputs { shape, dtypes: DType::F32.into(), q: narrow(q), k: narrow(k), v: narrow(v) }
    }

    /// The same inputs rounded to one element type or two.
    pub fn rounded(self, dtypes: impl Into<DTypes>) -> Self {
        let dtypes = dtypes.into();
        let round = |values: &[f32], dtype| Storage::new(values, dtype).widened();
        Inputs {
            dtypes,
            q: round(&self.q, dtypes.q),
            k: round(&self.k, dtypes.kv),
            v: round(&self.v, dtypes.kv),
            shape: self.shape,
        }
    }

    /// Batch item `batch` alone.
    pub fn batch_item(&self, batch: usize) -> Self {
        let part = |values: &[f32]| {
            let len = values.len() / self.shape.batch;
            values[batch * len..][..len].to_vec()
        };
        Inputs {
            shape: Shape { batch: 1, ..self.shape },
            dtypes: self.dtypes,
            q: part(&self.q),
            k: part(&self.k),
            v: part(&self.v),
        }
    }

    /// The rows `queries` and `keys` of batch item 0 alone.
    pub fn rows(&self, queries: Range<usize>, keys: Range<usize>) -> Self {
        let Shape { heads_q, heads_kv, head_dim, value_dim, .. } = self.shape;
        let part = |values: &[f32], heads: usize, rows: usize, dim: usize, range: &Range<usize>| {
            let heads = values.chunks(rows * dim).take(heads);
            heads.flat_map(|head| head[range.start * dim..range.end * dim].to_vec()).collect()
        };
        let (n_q, n_k) = (self.shape.n_q, self.shape.n_k);
        Inputs {
            shape: Shape { batch: 1, n_q: queries.len(), n_k: keys.len(), ..self.shape },
            dtypes: self.dtypes,
            q: part(&self.q, heads_q, n_q, head_dim, &queries),
            k: part(&self.k, heads_kv, n_k, head_dim, &keys),
            v: part(&self.v, heads_kv, n_k, value_dim, &keys),
        }
    }

    /// The queries of one head.
    pub fn query_head(&self, batch: usize, head: usize) -> &[f32] {
        let len = self.shape.n_q * self.shape.head_dim;
        &self.q[(batch * self.shape.heads_q + head) * len..][..len]
    }

    /// The keys of one KV head.
    pub fn key_head(&self, batch: usize, kv_head: usize) -> &[f32] {
        let len = self.shape.n_k * self.shape.head_dim;
        &self.k[(batch * self.shape.heads_kv + kv_head) * len..][..len]
    }

    /// The values of one KV head.
    pub fn value_head(&self, batch: usize, kv_head: usize) -> &[f32] {
        let len = self.shape.n_k * self.shape.value_dim;
        &self.v[(batch * self.shape.heads_kv + kv_head) * len..][..len]
    }
}
