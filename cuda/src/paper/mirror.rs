//! Mirrors of the structs in the kernels' levels, projections, hash, bucket_sort, sample, exact_blocks, paper_tiles,
//! block_mask_tiles, row_norm, backward_paper_tiles and backward_samples.cuh, which say what the fields mean.

use crate::abi::{AttendParams, BackwardParams, KeyTile, Segment, Tile, View};
use crate::launch::Argument;
use crate::workspace::Pointer;

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rectangle {
    pub(crate) query_start: u32,
    pub(crate) query_end: u32,
    pub(crate) key_start: u32,
    pub(crate) key_end: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Square {
    pub(crate) query_start: u32,
    pub(crate) key_start: u32,
    pub(crate) len: u32,
    pub(crate) leaf: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pass {
    pub(crate) kind: u32,
    pub(crate) level: u32,
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) one: Rectangle,
    pub(crate) square: Square,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ProjectionParams {
    pub(crate) seed: u64,
    pub(crate) offset: u64,
    pub(crate) projections: Pointer<f32>,
    pub(crate) heads_kv: u32,
    pub(crate) head_dim: u32,
    pub(crate) num_projs: u32,
    pub(crate) width: u32,
    pub(crate) first_stream_head: u32,
    pub(crate) reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HashSide {
    pub(crate) rows: View,
    pub(crate) ranks: Pointer<u32>,
    pub(crate) element: u32,
    pub(crate) heads: u32,
    pub(crate) heads_per_projection: u32,
    pub(crate) first_head: u32,
    pub(crate) set_heads: u32,
    pub(crate) count: u32,
    pub(crate) unit: u32,
    pub(crate) blocks: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HashParams {
    pub(crate) query: HashSide,
    pub(crate) key: HashSide,
    pub(crate) projections: Pointer<f32>,
    pub(crate) head_dim: u32,
    pub(crate) reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SortSide {
    pub(crate) ranks: Pointer<u32>,
    pub(crate) from: Pointer<u32>,
    pub(crate) to: Pointer<u32>,
    pub(crate) rows: u32,
    pub(crate) heads: u32,
    pub(crate) rest_start: u32,
    pub(crate) rest_end: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SortParams {
    pub(crate) square: Square,
    pub(crate) query: SortSide,
    pub(crate) key: SortSide,
    pub(crate) counts: Pointer<u32>,
    pub(crate) places: Pointer<u32>,
    pub(crate) levels: u32,
    pub(crate) orders: u32,
    pub(crate) leaf_cells: u32,
    pub(crate) square_cells: u32,
    pub(crate) cells: u32,
    pub(crate) shift: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SampleParams {
    pub(crate) pass: Pass,
    pub(crate) seed: u64,
    pub(crate) offset: u64,
    pub(crate) positions: Pointer<u32>,
    pub(crate) heads_kv: u32,
    pub(crate) first_head: u32,
    pub(crate) set_heads: u32,
    pub(crate) sample_size: u32,
    pub(crate) key_order: Pointer<u32>,
    pub(crate) listed_rows: Pointer<u32>,
    pub(crate) n_k: u32,
    pub(crate) first_stream_head: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PassTiles {
    pub(crate) pass: Pass,
    pub(crate) tiles: Pointer<Tile>,
    pub(crate) segments: Pointer<Segment>,
    pub(crate) heads_q: u32,
    pub(crate) group: u32,
    pub(crate) first_kv_head: u32,
    pub(crate) kv_heads: u32,
    pub(crate) blocks: u32,
    pub(crate) tiles_per_block: u32,
    pub(crate) flags: u32,
    pub(crate) later_flags: u32,
    pub(crate) sample_size: u32,
    pub(crate) most_keys: u32,
    pub(crate) log_weight: f32,
    pub(crate) log_weight_less: f32,
    pub(crate) first_segment: u32,
    pub(crate) first_position: u32,
    pub(crate) levels: u32,
    pub(crate) merges_one: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PaperTileParams {
    pub(crate) common: PassTiles,
    pub(crate) exact: u32,
    pub(crate) limited: u32,
    pub(crate) visible: i32,
    pub(crate) block_size: u32,
    pub(crate) sorted: u32,
    pub(crate) segments_per_block: u32,
}

/// Of up to [`PASSES_AT_ONCE`] passes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Passes<T> {
    pub(crate) passes: [T; PASSES_AT_ONCE],
    pub(crate) end_block: [u32; PASSES_AT_ONCE],
}

/// Passes that one launch works for.
pub(crate) const PASSES_AT_ONCE: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BlockMaskTileParams {
    pub(crate) common: PassTiles,
    pub(crate) seed: u64,
    pub(crate) offset: u64,
    pub(crate) row_offsets: u64,
    pub(crate) columns: u64,
    pub(crate) head_stride: u64,
    pub(crate) positions: Pointer<u32>,
    pub(crate) heads_kv: u32,
    pub(crate) per_head: u32,
    pub(crate) query_block: u32,
    pub(crate) key_block: u32,
    pub(crate) segments_per_block: u32,
    pub(crate) first_stream_head: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ExactBlocks {
    pub(crate) row_offsets: u64,
    pub(crate) columns: u64,
    pub(crate) head_stride: u64,
    pub(crate) query_block: u32,
    pub(crate) key_block: u32,
    pub(crate) block_size: u32,
    pub(crate) sorted: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RowNormParams {
    pub(crate) common: PassTiles,
    pub(crate) attend: AttendParams,
    pub(crate) seed: u64,
    pub(crate) offset: u64,
    pub(crate) exact_max: Pointer<f32>,
    pub(crate) exact_sum: Pointer<f32>,
    pub(crate) exact_accumulated: Pointer<f32>,
    pub(crate) norms: Pointer<f32>,
    pub(crate) prefix: Pointer<f64>,
    pub(crate) positions: Pointer<u32>,
    pub(crate) norm_positions: Pointer<u32>,
    pub(crate) norm_weights: Pointer<f32>,
    pub(crate) tau: Pointer<u32>,
    pub(crate) blocks: ExactBlocks,
    pub(crate) bounds: Pointer<f32>,
    pub(crate) sample_size: u32,
    pub(crate) log2_kappa: f32,
    pub(crate) log2_cap: f32,
    pub(crate) log2_cap_less: f32,
    pub(crate) first_stream_head: u32,
    pub(crate) first_stream_kv_head: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BackwardPaperParams {
    pub(crate) common: PassTiles,
    pub(crate) tiles: Pointer<KeyTile>,
    pub(crate) segments: Pointer<Segment>,
    pub(crate) hidden: Pointer<u32>,
    pub(crate) positions: Pointer<u32>,
    pub(crate) key_order: Pointer<u32>,
    pub(crate) exact: u32,
    pub(crate) limited: u32,
    pub(crate) visible: i32,
    pub(crate) block_size: u32,
    pub(crate) sorted: u32,
    pub(crate) flags: u32,
    pub(crate) key_tiles: u32,
    pub(crate) sample_tiles: u32,
    pub(crate) sample_period: u32,
    pub(crate) chunks: u32,
    pub(crate) chunk_queries: u32,
    pub(crate) n_k: u32,
    pub(crate) section: u32,
    pub(crate) adds_to_gradients: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BackwardSamplesParams {
    pub(crate) backward: BackwardParams,
    pub(crate) common: PassTiles,
    pub(crate) blocks: ExactBlocks,
    pub(crate) positions: Pointer<u32>,
    pub(crate) log_weights: Pointer<f32>,
    pub(crate) bounds: Pointer<f32>,
    pub(crate) covered: Pointer<u32>,
    pub(crate) key_partials: Pointer<f32>,
    pub(crate) value_partials: Pointer<f32>,
    pub(crate) part: u32,
    pub(crate) lists_per_kv_head: u32,
    pub(crate) covered_words: u32,
    pub(crate) chunks: u32,
    pub(crate) chunk_queries: u32,
    pub(crate) reserved: u32,
}

// What the .cuh files state too.
const _: () = assert!(size_of::<ExactBlocks>() == 40);
const _: () = assert!(size_of::<BackwardSamplesParams>() == 240 + size_of::<BackwardParams>());
const _: () = assert!(size_of::<BackwardPaperParams>() == 224);
const _: () = assert!(size_of::<Pass>() == 48 && size_of::<ProjectionParams>() == 48);
const _: () = assert!(size_of::<HashSide>() == 72 && size_of::<HashParams>() == 160);
const _: () = assert!(size_of::<SortParams>() == 136 && size_of::<SampleParams>() == 112);
const _: () = assert!(size_of::<PassTiles>() == 128 && size_of::<PaperTileParams>() == 152);
const _: () = assert!(size_of::<BlockMaskTileParams>() == 200);
const _: () = assert!(size_of::<Passes<PaperTileParams>>() == 1248);
const _: () = assert!(size_of::<Passes<SampleParams>>() == 928);
const _: () = assert!(size_of::<RowNormParams>() == 288 + size_of::<AttendParams>());

// SAFETY: a mirror of the struct of that name.
unsafe impl Argument for ProjectionParams {}
// SAFETY: as above.
unsafe impl Argument for HashParams {}
// SAFETY: as above.
unsafe impl Argument for SortParams {}
// SAFETY: as above.
unsafe impl Argument for Passes<SampleParams> {}
// SAFETY: as above.
unsafe impl Argument for Passes<PaperTileParams> {}
// SAFETY: as above.
unsafe impl Argument for BlockMaskTileParams {}
// SAFETY: as above.
unsafe impl Argument for RowNormParams {}
// SAFETY: as above.
unsafe impl Argument for BackwardPaperParams {}
// SAFETY: as above.
unsafe impl Argument for ExactBlocks {}
// SAFETY: as above.
unsafe impl Argument for BackwardSamplesParams {}
