// All device code in one source: nvcc compiles it at build time, NVRTC at run time.
#include "hyperattn/types.cuh"
#include "hyperattn/work.cuh"

#include "hyperattn/exact_tiles.cuh"
#include "hyperattn/fill_heads.cuh"
#include "hyperattn/parts.cuh"

#include "hyperattn/block_mask_tiles.cuh"
#include "hyperattn/bucket_sort.cuh"
#include "hyperattn/hash.cuh"
#include "hyperattn/paper_tiles.cuh"
#include "hyperattn/projections.cuh"
#include "hyperattn/row_norm.cuh"
#include "hyperattn/sample.cuh"

#include "hyperattn/budget.cuh"
#include "hyperattn/probe.cuh"
#include "hyperattn/refine.cuh"
#include "hyperattn/refined_tiles.cuh"
#include "hyperattn/represent.cuh"
#include "hyperattn/summary.cuh"
#include "hyperattn/weigh.cuh"
#include "hyperattn/weigh_f32.cuh"

#include "hyperattn/attend_any.cuh"
#include "hyperattn/attend_mma.cuh"
#include "hyperattn/attend_wgmma.cuh"

#include "hyperattn/backward_add_parts.cuh"
#include "hyperattn/backward_any.cuh"
#include "hyperattn/backward_block_mask_tiles.cuh"
#include "hyperattn/backward_exact_tiles.cuh"
#include "hyperattn/backward_fused.cuh"
#include "hyperattn/backward_fused_queries.cuh"
#include "hyperattn/backward_mma.cuh"
#include "hyperattn/backward_paper_tiles.cuh"
#include "hyperattn/backward_refined_finish.cuh"
#include "hyperattn/backward_refined_rest.cuh"
#include "hyperattn/backward_refined_tiles.cuh"
#include "hyperattn/backward_rows.cuh"
#include "hyperattn/backward_samples.cuh"
#include "hyperattn/backward_wgmma.cuh"

// The host's mirrors in cuda/src/abi.rs count on these.
static_assert(sizeof(hyperattn::View) == 32, "View");
static_assert(sizeof(hyperattn::Segment) == 24, "Segment");
static_assert(sizeof(hyperattn::Tile) == 32, "Tile");
static_assert(sizeof(hyperattn::AttendParams) == 328, "AttendParams");
static_assert(sizeof(hyperattn::RowTerms) == 8, "RowTerms");
static_assert(sizeof(hyperattn::KeyTile) == 48, "KeyTile");
static_assert(sizeof(hyperattn::BackwardParams) == 520, "BackwardParams");
static_assert(sizeof(hyperattn::backward_fused::FusedParams) == 768, "FusedParams");

// The launches in cuda/src/attend.rs count on these; a test there compares the numbers.
static_assert(hyperattn::hopper::THREADS == 384, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<64>::KEYS == 128, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<96>::KEYS == 128, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<128>::KEYS == 128, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<192>::KEYS == 96, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<256>::KEYS == 64, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<64>::SHARED_BYTES == 172688, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<96>::SHARED_BYTES == 203312, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<128>::SHARED_BYTES == 203312, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<192>::SHARED_BYTES == 202112, "attend_wgmma");
static_assert(hyperattn::hopper::Shape<256>::SHARED_BYTES == 201600, "attend_wgmma");
static_assert(hyperattn::mma::Shape<64>::THREADS == 128, "attend_mma");
static_assert(hyperattn::mma::Shape<96>::THREADS == 128, "attend_mma");
static_assert(hyperattn::mma::Shape<128>::THREADS == 128, "attend_mma");
static_assert(hyperattn::mma::Shape<192>::THREADS == 256, "attend_mma");
static_assert(hyperattn::mma::Shape<256>::THREADS == 256, "attend_mma");
static_assert(hyperattn::mma::Shape<64>::SHARED_BYTES == 34976, "attend_mma");
static_assert(hyperattn::mma::Shape<96>::SHARED_BYTES == 51360, "attend_mma");
static_assert(hyperattn::mma::Shape<128>::SHARED_BYTES == 67744, "attend_mma");
static_assert(hyperattn::mma::Shape<192>::SHARED_BYTES == 100512, "attend_mma");
static_assert(hyperattn::mma::Shape<256>::SHARED_BYTES == 100000, "attend_mma");
static_assert(hyperattn::simt::THREADS == 256, "attend_any");
static_assert(hyperattn::simt::Shape<64>::SHARED_BYTES == 85152, "attend_any");
static_assert(hyperattn::simt::Shape<128>::SHARED_BYTES == 85152, "attend_any");
static_assert(hyperattn::simt::Shape<256>::SHARED_BYTES == 48288, "attend_any");

// The launches in cuda/src/backward/launch.rs count on these; a test there compares the numbers.
static_assert(hyperattn::backward_hopper::THREADS == 384, "backward_wgmma");
static_assert(hyperattn::backward_hopper::Shape<64>::SHARED_BYTES == 176944, "backward_wgmma");
static_assert(hyperattn::backward_hopper::Shape<128>::SHARED_BYTES == 206640, "backward_wgmma");
static_assert(hyperattn::backward_mma::Shape<64>::THREADS == 256, "backward_mma");
static_assert(hyperattn::backward_mma::Shape<64>::SHARED_BYTES == 69296, "backward_mma");
static_assert(hyperattn::backward_mma::Shape<128>::SHARED_BYTES == 134832, "backward_mma");
static_assert(hyperattn::backward_mma::Shape<256>::SHARED_BYTES == 166576, "backward_mma");
static_assert(hyperattn::backward_simt::THREADS == 256, "backward_any");
static_assert(hyperattn::backward_simt::Shape<64>::SHARED_BYTES == 72368, "backward_any");
static_assert(hyperattn::backward_simt::Shape<128>::SHARED_BYTES == 79536, "backward_any");
static_assert(hyperattn::backward_simt::Shape<256>::SHARED_BYTES == 71344, "backward_any");
static_assert(hyperattn::backward_simt::Shape<64>::ROWS == 64, "backward_samples");
static_assert(hyperattn::backward_simt::Shape<128>::ROWS == 32, "backward_samples");
static_assert(hyperattn::backward_simt::Shape<256>::ROWS == 16, "backward_samples");
static_assert(hyperattn::backward_fused::THREADS == 384, "backward_fused");
static_assert(hyperattn::backward_fused::Shape<64>::QUERIES == 128, "backward_fused");
static_assert(hyperattn::backward_fused::Shape<128>::QUERIES == 64, "backward_fused");
static_assert(hyperattn::backward_fused::Shape<64>::SHARED_BYTES == 199984, "backward_fused");
static_assert(hyperattn::backward_fused::Shape<128>::SHARED_BYTES == 215344, "backward_fused");
static_assert(hyperattn::FUSED_QUERIES_THREADS == 256, "backward_fused_queries");
static_assert(hyperattn::BACKWARD_SAMPLES_THREADS == 128, "backward_paper_add_samples");
static_assert(hyperattn::BACKWARD_ROWS_THREADS == 256 && hyperattn::BACKWARD_ROWS == 64, "backward_rows");
