//! What to compute: the options of one call.

use crate::error::{Result, invalid};

/// Which keys a query may see. `i` counts queries, `j` keys, both from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mask {
    /// Every query sees every key.
    #[default]
    None,
    /// Key `j` is visible to query `i` when `j <= i + (n_k - n_q)`: the last query sees the last key.
    CausalBottomRight,
    /// Key `j` is visible to query `i` when `j <= i`: the first query sees the first key.
    CausalTopLeft,
}

/// How the output is computed. The numbers are those of the C interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Method {
    /// Exact while that is the faster choice for the shape, else [`Method::Refined`]; [`Method::Paper`] where a block mask
    /// is given.
    #[default]
    Auto = 0,
    /// Softmax attention without approximation, any length. Cost n_q * n_k.
    Exact = 1,
    /// HyperAttention as published (arXiv 2310.05869): sortLSH blocks and a sampled residual.
    Paper = 2,
    /// Exact over the first keys, a local band and the keys that a tile of queries weighs most, with one column for
    /// all that is left; and an estimate of the error, which can raise the number of keys or ask for exact attention.
    Refined = 3,
}

/// How [`Method::Paper`] treats what the exact blocks do not cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residual {
    /// One uniform sample of keys serves the row sums and the product with V (the paper's section 4).
    #[default]
    Uniform,
    /// Algorithms 2 and 3: capped row-sum estimate, and columns sampled by the row norms of V. With the default
    /// constants the cap cuts most of the sum away on diffuse inputs.
    RowNorm,
    /// Blocks only: the rest is dropped.
    None,
}

/// The options of one call. Start from [`Params::default`] and override.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    /// How the output is computed.
    pub method: Method,
    /// Which keys a query may see.
    pub mask: Mask,
    /// Factor on the logits; 0 means `1 / sqrt(head_dim)`. Must be finite.
    pub scale: f32,
    /// How the estimator treats what the blocks do not cover.
    pub residual: Residual,
    /// Hyperplanes of the angular hash, 0..=24; 0 leaves queries and keys in their order (section 2.1: r).
    pub lsh_num_projs: u32,
    /// Keys per sorted block (b); 0 means residual only.
    pub block_size: u32,
    /// Sampled keys per sub-problem (m); 0 means blocks only.
    pub sample_size: u32,
    /// Sub-problems with at most this many keys are computed exactly.
    pub min_seq_len: usize,
    /// Key of the counter-based generator: the same seed gives the same bits.
    pub seed: u64,
    /// Stream of the generator, for example the layer number.
    pub offset: u64,
    /// Epsilon of Algorithm 2, positive; used by [`Residual::RowNorm`] only.
    pub approx_d_epsilon: f32,
    /// Kappa of Algorithm 2, positive; used by [`Residual::RowNorm`] only.
    pub approx_d_kappa: f32,
    /// Keys that a query meets under [`Method::Refined`], at least [`Params::LEAST_BUDGET`].
    pub budget: u32,
    /// Leading keys that every query meets under [`Method::Refined`].
    pub num_first_keys: u32,
    /// Latest keys that every query meets under [`Method::Refined`] and a causal mask.
    pub band: u32,
    /// Relative output error per head beyond which [`Method::Refined`] raises the head's budget and finally computes
    /// it exactly; 0 never does.
    pub target_error: f32,
    /// Whether a call with the same arguments gives the same bits each time. Without it sums of gradients may be added
    /// in any order where that is faster, which is on CUDA only; all else stays as it is.
    pub deterministic: bool,
}

impl Params {
    /// Largest accepted `lsh_num_projs`.
    pub const MAX_PROJECTIONS: u32 = 24;
    /// Smallest accepted `budget`.
    pub const LEAST_BUDGET: u32 = 64;
}

impl Default for Params {
    fn default() -> Self {
        Params {
            method: Method::Auto,
            mask: Mask::None,
            scale: 0.0,
            residual: Residual::Uniform,
            lsh_num_projs: 7,
            block_size: 256,
            sample_size: 256,
            min_seq_len: 4096,
            seed: 0,
            offset: 0,
            approx_d_epsilon: 0.5,
            approx_d_kappa: 1e4,
            budget: 1024,
            num_first_keys: 16,
            band: 128,
            target_error: 0.05,
            deterministic: true,
        }
    }
}

/// Exact blocks chosen by the caller instead of by sortLSH: the paper's predefined mask (Algorithm 3).
///
/// Compressed rows over blocks of `query_block` queries; a row lists its key blocks, ascending and unique.
/// The pattern of (batch, query head) starts at
/// `row_offsets[(batch * heads_q + head) * head_stride]` and has `num_query_blocks + 1` offsets into `columns`.
#[derive(Debug, Clone, Copy)]
pub struct BlockMask<'a> {
    /// Queries per block, at least 1.
    pub query_block: usize,
    /// Keys per block, at least 1.
    pub key_block: usize,
    /// `ceil(n_q / query_block)`.
    pub num_query_blocks: usize,
    /// `ceil(n_k / key_block)`.
    pub num_key_blocks: usize,
    /// Offsets into `columns`, ascending.
    pub row_offsets: &'a [i64],
    /// Key-block indices.
    pub columns: &'a [i32],
    /// Distance in `row_offsets` from one head's pattern to the next; 0 shares one pattern.
    pub head_stride: usize,
}

impl BlockMask<'_> {
    /// The numbers of blocks fit `n_q` queries and `n_k` keys.
    pub fn check_counts(&self, n_q: i64, n_k: i64) -> Result<()> {
        for (name, block, count, n, of) in [
            ("query", self.query_block, self.num_query_blocks, n_q as usize, "n_q"),
            ("key", self.key_block, self.num_key_blocks, n_k as usize, "n_k"),
        ] {
            if block == 0 {
                invalid!("block_mask.{name}_block = 0 must be at least 1");
            }
            if count != n.div_ceil(block) {
                invalid!(
                    "block_mask.num_{name}_blocks = {count} but {of} = {n} in blocks of {block} gives {}",
                    n.div_ceil(block)
                );
            }
        }
        Ok(())
    }

    /// Keys that a query meets exactly, on average over the first pattern.
    pub(crate) fn keys_per_query(&self) -> f64 {
        let offsets = &self.row_offsets[..self.num_query_blocks + 1];
        let blocks = offsets[self.num_query_blocks] - offsets[0];
        blocks as f64 * self.key_block as f64 / self.num_query_blocks.max(1) as f64
    }

    /// The key blocks of one query block of `pattern` (batch * heads_q + head).
    pub(crate) fn row(&self, pattern: usize, query_block: usize) -> &[i32] {
        let at = pattern * self.head_stride + query_block;
        &self.columns[self.row_offsets[at] as usize..self.row_offsets[at + 1] as usize]
    }
}
