//! Summaries of blocks of neighbouring keys: the means of their keys and values, the key farthest from the mean,
//! which may be heavy where the mean is not, and how many keys that is about.

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

/// Summaries begin at multiples of this, those of a cache line.
const ALIGNED: usize = 16;

/// Numbers of the summary of a block: mean key, mean value, outlier, the count of keys, padding.
pub(crate) fn width(problem: &Problem) -> usize {
    (count_at(problem) + 1).next_multiple_of(ALIGNED)
}

/// Place of the count of keys in a summary.
fn count_at(problem: &Problem) -> usize {
    outlier_at(problem) + problem.head_dim
}

/// Keys that take part in a summary.
pub(crate) fn count(problem: &Problem, summary: &[f32]) -> f32 {
    summary[count_at(problem)]
}

/// Place of the outlier in a summary.
fn outlier_at(problem: &Problem) -> usize {
    problem.head_dim + problem.value_dim
}

/// Numbers of the summaries of one KV head, `[blocks][width]`.
pub(crate) fn summaries_len(problem: &Problem) -> usize {
    problem.n_k.div_ceil(BLOCK) * width(problem)
}

/// Words of one tile of packed summaries.
pub(crate) fn packed_tile_len(keys_len: usize) -> usize {
    2 * keys_len + 2 * KEY_TILE
}

/// Words of the packed summaries of one KV head.
pub(crate) fn packed_len(problem: &Problem, keys_len: usize) -> usize {
    problem.n_k.div_ceil(BLOCK).div_ceil(KEY_TILE) * packed_tile_len(keys_len)
}

/// A tile of packed summaries.
pub(crate) struct PackedSummaries<'p> {
    /// Mean keys, packed.
    pub(crate) means: &'p [u32],
    /// Outliers, packed.
    pub(crate) outliers: &'p [u32],
    /// Bits of the counts of keys, and of their base-2 logarithms.
    counts: &'p [u32],
    log2_counts: &'p [u32],
}

impl<'p> PackedSummaries<'p> {
    /// Tile `index` of a head's.
    pub(crate) fn new(packed: &'p [u32], keys_len: usize, index: usize) -> Self {
        let tile = &packed[index * packed_tile_len(keys_len)..][..packed_tile_len(keys_len)];
        let (means, rest) = tile.split_at(keys_len);
        let (outliers, rest) = rest.split_at(keys_len);
        let (counts, log2_counts) = rest.split_at(KEY_TILE);
        PackedSummaries { means, outliers, counts, log2_counts }
    }

    /// Keys of each block.
    pub(crate) fn counts(&self) -> impl Iterator<Item = f32> {
        self.counts.iter().map(|&bits| f32::from_bits(bits))
    }

    /// Their base-2 logarithms, -inf for a block without any.
    pub(crate) fn log2_counts(&self) -> impl Iterator<Item = f32> + Clone {
        self.log2_counts.iter().map(|&bits| f32::from_bits(bits))
    }
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
        let (mean, rest) = summary.split_at_mut(outlier_at(problem));
        let (outlier, rest) = rest.split_at_mut(head_dim);
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
        rest[0] = count as f32;
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

/// Packs the summaries of the KV heads `kv_heads`, see [`PackedSummaries`].
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
    let tiles = blocks.div_ceil(KEY_TILE);
    let tile_len = packed_tile_len(shape.keys_len());
    let packed = &mut packed[..kv_heads.len() * tiles * tile_len];
    for_each_chunk(executor, lanes, packed, tile_len, &|scratch, index, tile| {
        let of_head = &summaries[index / tiles * blocks * width..][..blocks * width];
        let first = index % tiles * KEY_TILE;
        let rows: [u32; KEY_TILE] = core::array::from_fn(|slot| (first + slot) as u32);
        let count = KEY_TILE.min(blocks - first);
        let mut scratch = PackScratch::carve(call.kernels, problem, &mut Carver::new(scratch));
        let (keys, counts) = tile.split_at_mut(2 * shape.keys_len());
        for (start, to) in [0, outlier_at(problem)].into_iter().zip(keys.chunks_mut(shape.keys_len())) {
            let view = TensorRef::of_rows(of_head, width, start..start + problem.head_dim);
            call.packer(0).pack_keys(&view, 0, &rows[..count], &mut scratch, to);
        }
        let (counts, log2_counts) = counts.split_at_mut(KEY_TILE);
        for (slot, (count, log2_count)) in counts.iter_mut().zip(log2_counts).enumerate() {
            let keys = of_head.get((first + slot) * width + count_at(problem)).copied().unwrap_or(0.0);
            let log2 = if keys > 0.0 { crate::math::log2(keys) } else { f32::NEG_INFINITY };
            (*count, *log2_count) = (keys.to_bits(), log2.to_bits());
        }
    })
}
