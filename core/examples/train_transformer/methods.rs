//! The methods that are trained with: options so small that the estimators estimate at a few hundred tokens.

use hyperattn_core::{DType, Layouts, Mask, Method, Params, Result, TensorLayout, stages};

/// Exact attention.
pub fn exact() -> Params {
    Params { method: Method::Exact, mask: Mask::CausalBottomRight, ..Params::default() }
}

/// A name and options for each.
pub fn all() -> [(&'static str, Params); 3] {
    let base = exact();
    let paper = Params { method: Method::Paper, min_seq_len: 32, block_size: 16, sample_size: 16, ..base };
    let refined = Params {
        method: Method::Refined,
        min_seq_len: 64,
        budget: 64,
        band: 16,
        num_first_keys: 4,
        // Every head keeps to the budget, however large its error.
        target_error: 0.0,
        ..base
    };
    [("exact", base), ("paper", paper), ("refined", refined)]
}

/// Keys and samples that a query meets with each, on average; `shape` is batch, tokens, heads and head_dim.
pub fn keys_per_query(shape: [usize; 4]) -> Result<[f64; 3]> {
    let [batch, tokens, heads, head_dim] = shape.map(|extent| extent as i64);
    let tensor = TensorLayout::contiguous(DType::F32, [batch, heads, tokens, head_dim]);
    let layouts = Layouts {
        q: tensor,
        k: tensor,
        v: tensor,
        out: tensor,
        lse: None,
        block_mask: None,
        error: None,
        keys_per_query: None,
        mask: None,
    };
    let mut keys = [0.0; 3];
    for ((_, params), keys) in all().iter().zip(&mut keys) {
        *keys = stages::keys_per_query(params, &layouts)?;
    }
    Ok(keys)
}
