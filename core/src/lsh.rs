//! Algorithm 1, first half: angular hashing by hyperplanes and the Gray order of the buckets.

use crate::pack::{PackScratch, Packer};
use crate::rng::{Purpose, Stream};
use crate::simd::{HASH_ROWS, Kernels};
use crate::view::TensorRef;

/// Number of columns of a stored projection matrix: `num_projs` rounded up to the table's vectors.
pub fn projection_width(kernels: &Kernels, num_projs: usize) -> usize {
    num_projs.next_multiple_of(kernels.lanes())
}

/// Fills `to` (`[head_dim][width]`) with the normals of one head's hyperplanes; columns from
/// `num_projs` on are 0 and never give a positive projection. Normal (i, j) is draw `j * head_dim + i`.
pub fn fill_projections(
    stream_of: (u64, u64, usize),
    head_dim: usize,
    num_projs: usize,
    width: usize,
    to: &mut [f32],
) {
    let (seed, offset, head) = stream_of;
    let stream = Stream::new(seed, offset, head, Purpose::Projection);
    for (i, row) in to.chunks_exact_mut(width).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = if j < num_projs { stream.normal(j * head_dim + i) } else { 0.0 };
        }
    }
}

/// Position of `code` in the binary-reflected Gray sequence, in which neighbours differ in one bit.
pub fn gray_rank(code: u32) -> u32 {
    let mut rank = code;
    for shift in [1, 2, 4, 8, 16] {
        rank ^= rank >> shift;
    }
    rank
}

/// Rows are asked for this many groups before they are hashed: several rows at once are not the one stream that
/// processors foresee.
const GROUPS_AHEAD: usize = 4;

/// Gray ranks of the buckets of rows `first..first + ranks.len()` of one head. `packer` makes words of f32.
pub(crate) fn rank_rows(
    packer: &Packer<'_>,
    view: &TensorRef<'_>,
    (head, first): (usize, usize),
    (projections, width): (&[f32], usize),
    scratch: &mut PackScratch<'_>,
    ranks: &mut [u32],
) {
    let end = first + ranks.len();
    for (group, ranks) in ranks.chunks_mut(HASH_ROWS).enumerate() {
        let ahead = first + (group + GROUPS_AHEAD) * HASH_ROWS;
        (ahead..end.min(ahead + HASH_ROWS)).for_each(|row| view.prefetch_row(packer.batch, head, row));
        let rows = packer.rows(view, ranks.len(), |r| (head, first + group * HASH_ROWS + r), scratch);
        packer.kernels.hash(&rows[..ranks.len()], projections, width, ranks);
        ranks.iter_mut().for_each(|code| *code = gray_rank(*code));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_ranks_differ_in_one_bit() {
        let mut code_at = [0u32; 1 << 12];
        for code in 0..1 << 12 {
            code_at[gray_rank(code) as usize] = code;
        }
        assert!(code_at.windows(2).all(|pair| (pair[0] ^ pair[1]).count_ones() == 1));
        assert_eq!(code_at[0], 0);
    }

    #[test]
    fn rank_keeps_24_bits() {
        assert!((0..24).all(|bit| gray_rank(1 << bit) == (2 << bit) - 1));
    }
}
