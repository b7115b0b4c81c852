//! How many keys a query meets.

use hyperattn_core::{Kernels, Layouts, Mask, Method, Params, Residual, Result, Serial, forward_workspace};

/// Keys and sampled keys that a query meets, on average over the queries. A sample counts also where it
/// lies in the query's own block.
///
/// # Errors
/// Those of the call itself.
pub fn keys_per_query(params: &Params, layouts: &Layouts<'_>) -> Result<f64> {
    let [n_q, n_k] = [layouts.q.shape[2], layouts.k.shape[2]].map(|extent| extent as usize);
    let block = params.block_size as usize;
    let sampled = match params.residual {
        Residual::None => 0,
        Residual::Uniform => params.sample_size as usize,
        // One sample for the row sums and one for the product with V.
        Residual::RowNorm => 2 * params.sample_size as usize,
    };
    let leaf = if is_exact(params, layouts)? { usize::MAX } else { params.min_seq_len.max(block).max(1) };
    let estimated = |keys: usize| if keys <= block { keys } else { block + sampled };
    let square = if params.mask == Mask::None { 0 } else { n_q.min(n_k) };
    let past = n_k - square;
    let dense = n_q * if past <= leaf { past } else { estimated(past) };
    Ok((dense as f64 + pairs_of_square(square, leaf, &estimated)) / n_q as f64)
}

/// Whether the method is exact attention: AUTO asks for the workspace of the method it takes.
fn is_exact(params: &Params, layouts: &Layouts<'_>) -> Result<bool> {
    let workspace =
        |method| forward_workspace(&Params { method, ..*params }, layouts, Kernels::scalar(), &Serial);
    Ok(match params.method {
        Method::Exact => true,
        Method::Auto => workspace(Method::Auto)? == workspace(Method::Exact)?,
        _ => false,
    })
}

/// Pairs of a causal square of `len` queries under Algorithm 4.
fn pairs_of_square(len: usize, leaf: usize, estimated: &dyn Fn(usize) -> usize) -> f64 {
    if len <= leaf {
        return len as f64 * (len as f64 + 1.0) / 2.0;
    }
    let first = len.div_ceil(2);
    let second = len - first;
    let diagonal = pairs_of_square(first, leaf, estimated) + pairs_of_square(second, leaf, estimated);
    diagonal + second as f64 * estimated(first) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperattn_core::{DType, TensorLayout};

    fn count(method: Method, mask: Mask, [n_q, n_k]: [i64; 2], min_seq_len: usize) -> f64 {
        let layout = |rows| TensorLayout::contiguous(DType::F32, [1, 1, rows, 64]);
        let layouts = Layouts {
            q: layout(n_q),
            k: layout(n_k),
            v: layout(n_k),
            out: layout(n_q),
            lse: None,
            block_mask: None,
        };
        keys_per_query(&Params { method, mask, min_seq_len, ..Params::default() }, &layouts).unwrap()
    }

    #[test]
    fn exact_attention_meets_what_is_visible() {
        assert_eq!(count(Method::Exact, Mask::None, [10, 30], 1), 30.0);
        assert_eq!(count(Method::Exact, Mask::CausalBottomRight, [10, 10], 1), 5.5);
        assert_eq!(count(Method::Exact, Mask::CausalBottomRight, [10, 30], 1), 25.5);
        // The first 20 queries see nothing.
        assert_eq!(count(Method::Exact, Mask::CausalBottomRight, [30, 10], 1), 55.0 / 30.0);
    }

    #[test]
    fn the_estimator_meets_a_block_and_a_sample() {
        assert_eq!(count(Method::Paper, Mask::None, [8192, 8192], 4096), 512.0);
        assert_eq!(count(Method::Paper, Mask::None, [4096, 4096], 4096), 4096.0);
        // Both halves are exact, and the second meets 512 keys of the first.
        assert_eq!(count(Method::Paper, Mask::CausalBottomRight, [8192, 8192], 4096), 2048.5 + 256.0);
    }

    #[test]
    fn auto_counts_the_method_it_takes() {
        assert_eq!(count(Method::Auto, Mask::None, [600, 600], 512), 600.0);
        assert_eq!(count(Method::Auto, Mask::None, [65_536, 65_536], 512), 512.0);
    }
}
