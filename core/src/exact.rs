//! Exact softmax attention over rectangles of queries and keys, under the problem's mask.

use core::ops::Range;

use crate::error::Result;
use crate::exec::{Executor, for_each_chunk, for_each_item};
use crate::pack::PackScratch;
use crate::pass::Pass;
use crate::scratch::{Carver, Lanes};
use crate::simd::KEY_TILE;
use crate::tile::{Call, KeyOrder, Tile};
use crate::tiling::{HeadSet, HeadTiling};

/// Keys from which on a rectangle's keys are packed before its queries are attended to. Shorter ones would
/// leave much of the last tile empty.
const PACKED_KEYS: usize = 4 * KEY_TILE;

/// Tiles in which the keys of one KV head are packed once for all tasks that read them: those of `count`
/// rectangles of at most `queries` and `keys`. None when a single task reads them.
pub(crate) fn packed_tiles(heads: &HeadSet, count: usize, queries: usize, keys: usize) -> usize {
    let tiling = HeadTiling::new(heads, true);
    let shared = tiling.chunks(queries) * tiling.parts > 1 && keys >= PACKED_KEYS;
    if shared { count.saturating_mul(keys.div_ceil(KEY_TILE)) } else { 0 }
}

/// Packed keys, perhaps with their values: `[KV heads][rectangles][tiles]`.
#[derive(Clone, Copy)]
pub(crate) struct PackedKeys<'p> {
    words: &'p [u32],
    first_kv_head: usize,
    head_len: usize,
    rectangle_len: usize,
    /// Whether values are in the tiles too.
    pub(crate) values: bool,
}

impl<'p> PackedKeys<'p> {
    /// The tiles of rectangle `index`.
    pub(crate) fn tiles(&self, kv_head: usize, index: usize) -> &'p [u32] {
        &self.words[(kv_head - self.first_kv_head) * self.head_len + index * self.rectangle_len..]
    }

    /// [`Self::tiles`] where there are values in them.
    pub(crate) fn whole_tiles(&self, kv_head: usize, index: usize) -> Option<&'p [u32]> {
        self.values.then(|| self.tiles(kv_head, index))
    }
}

/// Computes every rectangle of `pass` for `heads` of the batch items `batches`.
///
/// Where `packed` holds [`packed_tiles`] for every KV head of the (single) batch item, its keys and values are
/// packed there first.
pub(crate) fn run_pass(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    batches: Range<usize>,
    heads: &HeadSet,
    pass: &Pass<'_>,
    packed: &mut [u32],
) -> Result<()> {
    let head_len =
        packed_tiles(heads, pass.count, pass.most_queries(), pass.most_keys()) * call.shape.tile_len();
    let packed = if head_len > 0 && packed.len() >= head_len * heads.kv.len() && batches.len() == 1 {
        Some(pack(call, executor, lanes, (batches.start, heads.kv.clone()), pass, (packed, true))?)
    } else {
        None
    };
    attend(call, executor, lanes, batches, heads, pass, packed.as_ref())
}

/// [`run_pass`] with what [`pack`] made, if anything.
pub(crate) fn attend(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    batches: Range<usize>,
    heads: &HeadSet,
    pass: &Pass<'_>,
    packed: Option<&PackedKeys<'_>>,
) -> Result<()> {
    let problem = &call.problem;
    let tiling = HeadTiling::new(heads, true);
    let chunks = tiling.chunks(pass.most_queries());
    let per_head = chunks * pass.count;
    let per_batch = per_head * tiling.parts * heads.kv.len();
    for_each_item(executor, lanes, per_batch * batches.len(), &|scratch, item| {
        let batch = batches.start + item / per_batch;
        let (kv_head, part) = {
            let group = item % per_batch / per_head;
            (heads.kv.start + group / tiling.parts, group % tiling.parts)
        };
        // Later rows see more keys under a causal mask: start with the long tasks.
        let place = per_head - 1 - item % per_head;
        let index = place / chunks;
        let Some(rectangle) = (pass.rectangle)(index) else { return };
        let queries = HeadTiling::chunk_of(&rectangle.queries, place % chunks, chunks);
        if queries.is_empty() {
            return;
        }
        let mut tile = Tile::carve(call, &mut Carver::new(scratch));
        for head in tiling.heads_of(kv_head, part) {
            for row in queries.clone() {
                tile.push(head, row, problem.visible_keys(row));
            }
        }
        tile.load_queries(batch);
        pass.resume(&mut tile);
        let packed = packed.and_then(|packed| packed.whole_tiles(kv_head, index));
        tile.attend_visible(KeyOrder { batch, kv_head, order: None }, rectangle.keys, packed);
        pass.complete(&mut tile, batch);
    })
}

/// Packs the keys, and the values if they are wanted, that the rectangles of `pass` meet, for `kv_heads` of one batch
/// item.
pub(crate) fn pack<'p>(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    (batch, kv_heads): (usize, Range<usize>),
    pass: &Pass<'_>,
    (packed, values): (&'p mut [u32], bool),
) -> Result<PackedKeys<'p>> {
    let (shape, problem, tensors) = (&call.shape, &call.problem, call.tensors);
    let tiles = pass.most_keys().div_ceil(KEY_TILE);
    let tile_len = shape.len_of(values);
    let (rectangle_len, first_kv_head) = (tiles * tile_len, kv_heads.start);
    let head_len = rectangle_len * pass.count;
    let packed = &mut packed[..head_len * kv_heads.len()];
    for_each_chunk(executor, lanes, &mut *packed, tile_len, &|scratch, index, tile| {
        let kv_head = first_kv_head + index / (tiles * pass.count);
        let index = index % (tiles * pass.count);
        let Some(rectangle) = (pass.rectangle)(index / tiles) else { return };
        let start = rectangle.keys.start + index % tiles * KEY_TILE;
        if start >= rectangle.keys.end {
            return;
        }
        let count = KEY_TILE.min(rectangle.keys.end - start);
        let rows: [u32; KEY_TILE] = core::array::from_fn(|slot| (start + slot) as u32);
        let mut scratch = PackScratch::carve(call.kernels, problem, &mut Carver::new(scratch));
        let (keys, packed_values) = tile.split_at_mut(shape.keys_len());
        let packer = call.packer(batch);
        packer.pack_keys(&tensors.k, kv_head, &rows[..count], &mut scratch, keys);
        if values {
            packer.pack_values(&tensors.v, kv_head, &rows[..count], None, &mut scratch, packed_values);
        }
    })?;
    Ok(PackedKeys { words: packed, first_kv_head, head_len, rectangle_len, values })
}
