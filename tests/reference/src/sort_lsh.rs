//! Algorithm 1 (sortLSH) of arXiv 2310.05869, given the projections.

/// The hash of one row: bit j is set when its product with column j of `projections` (head_dim x
/// `num_projections`, row-major) is greater than 0. In f32, because the sign of a sum near 0 depends on
/// rounding: fused multiply-adds from 0 in ascending order of the head_dim index.
pub fn lsh_code(row: &[f32], projections: &[f32], num_projections: usize) -> u32 {
    assert_eq!(projections.len(), row.len() * num_projections, "projections are not head_dim x r");
    let mut code = 0;
    for j in 0..num_projections {
        let mut product = 0.0f32;
        for (i, x) in row.iter().enumerate() {
            product = x.mul_add(projections[i * num_projections + j], product);
        }
        code |= u32::from(product > 0.0) << j;
    }
    code
}

/// The rows in sorted order: by rank, equal ranks by position. Element p is the row at sorted position p.
pub fn sorted_order(ranks: &[u32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_by_key(|&position| (ranks[position], position));
    order
}

/// The block of the key at sorted position p: p / b.
pub fn key_block(position: usize, block_size: usize) -> usize {
    position / block_size
}

/// The block of the query at sorted position p: floor(p n_k / (n_q b)), so that the queries spread over the
/// ceil(n_k / b) blocks of keys in proportion; with n_q = n_k the same as [`key_block`].
pub fn query_block(position: usize, num_queries: usize, num_keys: usize, block_size: usize) -> usize {
    (position as u128 * num_keys as u128 / (num_queries as u128 * block_size as u128)) as usize
}

/// The mask M of Algorithm 1: which block every query and every key is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SortedBlocks {
    query_blocks: Vec<usize>,
    key_blocks: Vec<usize>,
    block_size: usize,
}

impl SortedBlocks {
    /// Sorts queries and keys by the ranks of their codes and cuts both orders into blocks. The ranks of a
    /// sub-problem are slices of the head's ranks. `block_size` 0 means no blocks.
    pub fn new(query_ranks: &[u32], key_ranks: &[u32], block_size: usize) -> Self {
        let (num_queries, num_keys) = (query_ranks.len(), key_ranks.len());
        let (mut query_blocks, mut key_blocks) = (vec![0; num_queries], vec![0; num_keys]);
        if block_size > 0 {
            for (position, i) in sorted_order(query_ranks).into_iter().enumerate() {
                query_blocks[i] = query_block(position, num_queries, num_keys, block_size);
            }
            for (position, j) in sorted_order(key_ranks).into_iter().enumerate() {
                key_blocks[j] = key_block(position, block_size);
            }
        }
        SortedBlocks { query_blocks, key_blocks, block_size }
    }

    /// M_ij: whether query i and key j are in the same block.
    pub fn covered(&self, i: usize, j: usize) -> bool {
        self.block_size > 0 && self.query_blocks[i] == self.key_blocks[j]
    }
}
