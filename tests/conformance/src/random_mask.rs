//! Block masks of the caller, drawn at random.

use hyperattn_core::BlockMask;
use hyperattn_reference::Generator;

/// The memory behind a [`BlockMask`].
#[derive(Clone, Debug)]
pub struct OwnedMask {
    query_block: usize,
    key_block: usize,
    num_query_blocks: usize,
    num_key_blocks: usize,
    row_offsets: Vec<i64>,
    columns: Vec<i32>,
    head_stride: usize,
}

impl OwnedMask {
    /// `patterns` patterns (1: shared by all heads) over `[n_q, n_k]`; a block is set with probability
    /// `density`.
    pub fn random(
        [n_q, n_k]: [usize; 2],
        [query_block, key_block]: [usize; 2],
        patterns: usize,
        density: f64,
        seed: u64,
    ) -> Self {
        let mut generator = Generator::new(seed);
        let (num_query_blocks, num_key_blocks) = (n_q.div_ceil(query_block), n_k.div_ceil(key_block));
        let (mut row_offsets, mut columns) = (Vec::new(), Vec::new());
        for _ in 0..patterns {
            row_offsets.push(columns.len() as i64);
            for _ in 0..num_query_blocks {
                columns.extend((0..num_key_blocks as i32).filter(|_| generator.uniform() < density));
                row_offsets.push(columns.len() as i64);
            }
        }
        let head_stride = if patterns == 1 { 0 } else { num_query_blocks + 1 };
        OwnedMask {
            query_block,
            key_block,
            num_query_blocks,
            num_key_blocks,
            row_offsets,
            columns,
            head_stride,
        }
    }

    /// The mask as a call receives it.
    pub fn view(&self) -> BlockMask<'_> {
        BlockMask {
            query_block: self.query_block,
            key_block: self.key_block,
            num_query_blocks: self.num_query_blocks,
            num_key_blocks: self.num_key_blocks,
            row_offsets: &self.row_offsets,
            columns: &self.columns,
            head_stride: self.head_stride,
        }
    }
}

/// Whether `mask` names the entry (query `i`, key `j`) of pattern `batch * heads_q + head`.
pub fn names(mask: &BlockMask<'_>, pattern: usize, i: usize, j: usize) -> bool {
    let at = pattern * mask.head_stride + i / mask.query_block;
    let row = mask.row_offsets[at] as usize..mask.row_offsets[at + 1] as usize;
    mask.columns[row].contains(&((j / mask.key_block) as i32))
}
