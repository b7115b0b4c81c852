//! Summaries of blocks of neighbouring keys: the means of their keys and values, and the key farthest from the mean,
//! which may be heavy where the mean is not.

use core::ops::Range;

use crate::error::Result;
use crate::exec::{Executor, for_each_chunk};
use crate::pack::PackScratch;
use crate::problem::Problem;
use crate::represent::is_finite;
use crate::scratch::{Carver, Lanes};
use crate::simd::KEY_TILE;
use crate::tile::Call;
use crate::view::TensorRef;

/// Keys in a block: those of a packed tile.
pub(crate) const BLOCK: usize = KEY_TILE;

/// Numbers of the summary of a block: mean key, mean value, outlier.
pub(crate) fn width(problem: &Problem) -> usize {
    2 * problem.head_dim + problem.value_dim
}

/// Numbers of the summaries of one KV head, `[blocks][width]`.
pub(crate) fn summaries_len(problem: &Problem) -> usize {
    problem.n_k.div_ceil(BLOCK) * width(problem)
}

/// Words of the packed summaries of one KV head: tiles of mean keys, each followed by one of the outliers of the same
/// blocks.
pub(crate) fn packed_len(problem: &Problem, keys_len: usize) -> usize {
    problem.n_k.div_ceil(BLOCK).div_ceil(KEY_TILE) * 2 * keys_len
}

/// Scratch of the summary of one block.
pub(crate) struct SummaryScratch<'a> {
    keys: &'a mut [f32],
    value: &'a mut [f32],
}

impl<'a> SummaryScratch<'a> {
    pub(crate) fn carve(problem: &Problem, carver: &mut Carver<'a>) -> Self {
        SummaryScratch { keys: carver.take(BLOCK * problem.head_dim), value: carver.take(problem.value_dim) }
    }
}

/// Fills `summaries` for every KV head of one batch item.
///
/// A key with an element that is not finite, or whose value has one, does not take part.
pub(crate) fn summarise(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    batch: usize,
    summaries: &mut [f32],
) -> Result<()> {
    let (problem, tensors) = (&call.problem, call.tensors);
    let head_dim = problem.head_dim;
    let blocks = problem.n_k.div_ceil(BLOCK);
    for_each_chunk(executor, lanes, summaries, width(problem), &|scratch, index, summary| {
        let (kv_head, block) = (index / blocks, index % blocks);
        let SummaryScratch { keys, value } = SummaryScratch::carve(problem, &mut Carver::new(scratch));
        summary.fill(0.0);
        let (mean, outlier) = summary.split_at_mut(head_dim + problem.value_dim);
        let mut count = 0;
        for position in block * BLOCK..problem.n_k.min((block + 1) * BLOCK) {
            let key = &mut keys[count * head_dim..][..head_dim];
            tensors.k.read_row(call.kernels, batch, kv_head, position, key);
            tensors.v.read_row(call.kernels, batch, kv_head, position, value);
            if is_finite(key) && is_finite(value) {
                add(mean, key, value);
                count += 1;
            }
        }
        if count == 0 {
            return;
        }
        mean.iter_mut().for_each(|x| *x /= count as f32);
        let mut distances = [0.0; BLOCK];
        call.kernels.squared_distances(&keys[..count * head_dim], &mean[..head_dim], &mut distances[..count]);
        let mut farthest = 0;
        for (slot, &distance) in distances[..count].iter().enumerate() {
            if distance > distances[farthest] {
                farthest = slot;
            }
        }
        outlier.copy_from_slice(&keys[farthest * head_dim..][..head_dim]);
    })
}

fn add(mean: &mut [f32], key: &[f32], value: &[f32]) {
    let (mean_key, mean_value) = mean.split_at_mut(key.len());
    mean_key.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
    mean_value.iter_mut().zip(value).for_each(|(sum, x)| *sum += x);
}

/// Packs the mean keys and the outliers of the KV heads `kv_heads`, see [`packed_len`].
pub(crate) fn pack(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    kv_heads: Range<usize>,
    summaries: &[f32],
    packed: &mut [u32],
) -> Result<()> {
    let (shape, problem) = (&call.shape, &call.problem);
    let (width, blocks) = (width(problem), problem.n_k.div_ceil(BLOCK));
    let tiles = 2 * blocks.div_ceil(KEY_TILE);
    let packed = &mut packed[..kv_heads.len() * tiles * shape.keys_len()];
    for_each_chunk(executor, lanes, packed, shape.keys_len(), &|scratch, index, tile| {
        let of_head = &summaries[index / tiles * blocks * width..][..blocks * width];
        let columns =
            if index.is_multiple_of(2) { 0..problem.head_dim } else { width - problem.head_dim..width };
        let view = TensorRef::of_rows(of_head, width, columns);
        let first = index % tiles / 2 * KEY_TILE;
        let rows: [u32; KEY_TILE] = core::array::from_fn(|slot| (first + slot) as u32);
        let count = KEY_TILE.min(blocks - first);
        let mut scratch = PackScratch::carve(call.kernels, problem, &mut Carver::new(scratch));
        call.packer(0).pack_keys(&view, 0, &rows[..count], &mut scratch, tile);
    })
}
