//! Summaries of blocks of neighbouring keys: the means of their keys and values.

use core::ops::Range;

use crate::error::Result;
use crate::exec::{Executor, for_each_chunk};
use crate::pack::PackScratch;
use crate::represent::is_finite;
use crate::scratch::{Carver, Lanes};
use crate::simd::KEY_TILE;
use crate::tile::Call;
use crate::view::TensorRef;

/// Keys in a block: those of a packed tile.
pub(crate) const BLOCK: usize = KEY_TILE;

/// Numbers of the means of one KV head, `[blocks][head_dim + value_dim]`.
pub(crate) fn means_len(n_k: usize, head_dim: usize, value_dim: usize) -> usize {
    n_k.div_ceil(BLOCK) * (head_dim + value_dim)
}

/// Tiles that hold the mean keys of one KV head as if they were keys.
pub(crate) fn packed_tiles(n_k: usize) -> usize {
    n_k.div_ceil(BLOCK).div_ceil(KEY_TILE)
}

/// Fills `means` for every KV head of one batch item.
///
/// A key with an element that is not finite, or whose value has one, does not take part.
pub(crate) fn average(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    batch: usize,
    means: &mut [f32],
) -> Result<()> {
    let (problem, tensors) = (&call.problem, call.tensors);
    let (head_dim, width) = (problem.head_dim, problem.head_dim + problem.value_dim);
    let blocks = problem.n_k.div_ceil(BLOCK);
    for_each_chunk(executor, lanes, means, width, &|scratch, index, mean| {
        let (kv_head, block) = (index / blocks, index % blocks);
        let row = Carver::new(scratch).take::<f32>(width);
        let (key, value) = row.split_at_mut(head_dim);
        let keys = block * BLOCK..problem.n_k.min((block + 1) * BLOCK);
        mean.fill(0.0);
        let mut count = 0.0;
        for position in keys {
            tensors.k.read_row(call.kernels, batch, kv_head, position, key);
            tensors.v.read_row(call.kernels, batch, kv_head, position, value);
            if is_finite(key) && is_finite(value) {
                add(mean, key, value);
                count += 1.0;
            }
        }
        let factor = if count > 0.0 { 1.0 / count } else { 0.0 };
        mean.iter_mut().for_each(|x| *x *= factor);
    })
}

fn add(mean: &mut [f32], key: &[f32], value: &[f32]) {
    let (mean_key, mean_value) = mean.split_at_mut(key.len());
    mean_key.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
    mean_value.iter_mut().zip(value).for_each(|(sum, x)| *sum += x);
}

/// Packs the mean keys of the KV heads `kv_heads`, `[heads][packed_tiles]`.
pub(crate) fn pack(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    kv_heads: Range<usize>,
    means: &[f32],
    packed: &mut [u32],
) -> Result<()> {
    let (shape, problem) = (&call.shape, &call.problem);
    let width = problem.head_dim + problem.value_dim;
    let (blocks, tiles) = (problem.n_k.div_ceil(BLOCK), packed_tiles(problem.n_k));
    let packed = &mut packed[..kv_heads.len() * tiles * shape.keys_len()];
    for_each_chunk(executor, lanes, packed, shape.keys_len(), &|scratch, index, tile| {
        let of_head = &means[index / tiles * blocks * width..][..blocks * width];
        let view = TensorRef::of_rows(of_head, width, problem.head_dim);
        let first = index % tiles * KEY_TILE;
        let rows: [u32; KEY_TILE] = core::array::from_fn(|slot| (first + slot) as u32);
        let count = KEY_TILE.min(blocks - first);
        let mut scratch = PackScratch::carve(call.kernels, problem, &mut Carver::new(scratch));
        call.packer(0).pack_keys(&view, 0, &rows[..count], &mut scratch, tile);
    })
}
