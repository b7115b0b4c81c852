// What sampled keys add to the gradients where they are not met like other keys: those that count in the rows' sums
// alone or in their values alone, and those that the caller's blocks hide. f32 arithmetic for every element type,
// dimension and alignment.
//
// With the share p of a pair, and dp and delta as in backward_work.cuh:
//     in sums and values   dv += p dout        ds = p (dp - delta)
//     in sums alone                            ds = - p delta
//     in values alone      dv += p dout        ds = p dp
#pragma once

#include "backward_any.cuh"
#include "exact_blocks.cuh"
#include "paper_tiles.cuh"

namespace hyperattn {

enum SamplesPart : u32 { SAMPLES_BOTH = 0, SAMPLES_SUMS = 1, SAMPLES_VALUES = 2 };

struct BackwardSamplesParams {
    // Stored sums of queries are gone on from; those of keys are not used.
    BackwardParams backward;
    // Its tiles are of exact blocks; `flags` say whether the sums of queries are stored.
    PassTiles common;
    ExactBlocks blocks;
    // Of the keys: [KV heads of the set][rectangles][sample_size].
    const u32 *positions;
    // Base-2 log weights in the places of positions, -inf for a sample that is none; null for PassTiles::weight.
    const float *log_weights;
    // Base-2 logits beyond which a row's terms are constants, [batch][heads_q][n_q]; null for none.
    const float *bounds;
    // A bit for every sample that a block's queries meet exactly, covered_words for every list; null where there are no
    // blocks.
    u32 *covered;
    // Sums of the samples' chunks: [KV heads of the set][rectangles][chunks][sample_size][head_dim or value_dim].
    float *key_partials;
    float *value_partials;
    u32 part;
    // Lists of blocks: as many as query heads of a KV head where each has blocks of its own, else 1.
    u32 lists_per_kv_head;
    u32 covered_words;
    // Chunks of the longest rectangle, and the queries of a chunk.
    u32 chunks;
    u32 chunk_queries;
    u32 reserved;

    // The bits of a block's list, null where there are none.
    __device__ __forceinline__ const u32 *covered_of(u32 set_kv_head, u32 member, u32 index, u32 block) const
    {
        if (covered == nullptr)
            return nullptr;
        u64 head = set_kv_head * lists_per_kv_head + (lists_per_kv_head == 1 ? 0 : member);
        return covered + ((head * common.pass.count + index) * common.blocks + block) * covered_words;
    }

    // Number of the first sample of a rectangle.
    __device__ __forceinline__ u64 first_sample(u32 set_kv_head, u32 index) const
    {
        return ((u64)set_kv_head * common.pass.count + index) * common.sample_size;
    }

    __device__ __forceinline__ u32 key_row(u32 flat_kv_head, u32 position) const
    {
        const AttendParams &attend = backward.attend;
        return blocks.sorted ? attend.key_order[(u64)flat_kv_head * attend.n_k + position] : position;
    }

    __device__ __forceinline__ float log_weight(const Rectangle &rectangle, u64 sample) const
    {
        return log_weights ? log_weights[sample] : common.weight(rectangle);
    }

    // The share of a pair and the slope of its logit, from the products of its query and key, and of its output
    // gradient and value.
    __device__ __forceinline__ void pair(float product, float dp, float log_weight, const RowTerms &terms, float bound,
                                         float &share, float &slope) const
    {
        using namespace online_softmax;
        float exponent = fmaf(product, backward.attend.scale_log2, log_weight - terms.lse);
        // A NaN stays one.
        share = exp2_approximate(exponent > 127.0f ? 127.0f : exponent);
        if (bound < product * backward.attend.scale_log2)
            share = 0.0f;
        slope = share * ((part == SAMPLES_SUMS ? 0.0f : dp) - (part == SAMPLES_VALUES ? 0.0f : terms.delta));
    }
};

static_assert(sizeof(BackwardSamplesParams) == 240 + sizeof(BackwardParams),
              "the host's mirror of this struct counts on it");

namespace backward_simt {

template <u32 DIM> struct SamplesOfQueries {
    u32 query_rows[Shape<DIM>::ROWS];
    u32 key_rows[Shape<DIM>::COLUMNS];
    float log_weights[Shape<DIM>::COLUMNS];
};

template <u32 DIM> struct SamplesOfKeys {
    RowTerms terms[Shape<DIM>::COLUMNS];
    float bounds[Shape<DIM>::COLUMNS];
    u32 query_rows[Shape<DIM>::COLUMNS];
    // Bits of the rows that a column meets exactly.
    u32 covered[2][Shape<DIM>::COLUMNS];
    u32 key_rows[Shape<DIM>::ROWS];
    float log_weights[Shape<DIM>::ROWS];
};

// What the samples add to dq. Thread block: some rows of a tile.
template <u32 DIM> __device__ __forceinline__ void samples_of_queries(const BackwardSamplesParams &params)
{
    using S = Shape<DIM>;
    constexpr u32 COLUMNS = S::COLUMNS, PARTS = TILE_ROWS / S::ROWS;
    static_assert(sizeof(SamplesOfQueries<DIM>) <= S::MEMORY_BYTES, "it takes the place of the other tiles' memory");
    const BackwardParams &backward = params.backward;
    const AttendParams &p = backward.attend;
    const PassTiles &common = params.common;
    Memory<DIM> shared;
    SamplesOfQueries<DIM> &memory = *(SamplesOfQueries<DIM> *)shared.tile;
    const u32 own_row = threadIdx.x / (DIM / 4) * 4, own_column = threadIdx.x % (DIM / 4) * 4;
    const u32 number = blockIdx.x / PARTS, first_row = blockIdx.x % PARTS * S::ROWS;
    const Tile tile = common.tiles[number];
    if (first_row >= tile.rows)
        return;
    const u32 block_number = number / common.tiles_per_block / common.group;
    const u32 member = number / common.tiles_per_block % common.group;
    const u32 block = block_number % common.blocks, index = block_number / common.blocks % common.pass.count;
    const u32 set_kv_head = block_number / common.blocks / common.pass.count, kv_head = p.kv_head(tile);
    const u64 head_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
    Rectangle rectangle;
    common.rectangle(index, rectangle);
    const u64 first_sample = params.first_sample(set_kv_head, index);
    const u32 *covered = params.covered_of(set_kv_head, member, index, block);

    if (threadIdx.x < S::ROWS) {
        u32 i = first_row + threadIdx.x;
        memory.query_rows[threadIdx.x] = i < tile.rows ? p.query_row(tile, i) : NO_KEY;
    }
    __syncthreads();
    copy_rows<DIM, S::ROWS>(shared.first_rows, vectors(p.q, tile.batch, tile.head, p.head_dim, p.q_type),
                            memory.query_rows);
    if (params.part != SAMPLES_SUMS)
        copy_rows<DIM, S::ROWS>(shared.second_rows,
                                vectors(backward.dout, tile.batch, tile.head, p.value_dim, backward.dout_type),
                                memory.query_rows);
    RowTerms terms[S::THREAD_ROWS];
    float bounds[S::THREAD_ROWS];
#pragma unroll
    for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
        u32 row = memory.query_rows[shared.thread_row + i * SIDE];
        terms[i] = {-negative_infinity(), 0.0f};
        bounds[i] = -negative_infinity();
        if (row == NO_KEY)
            continue;
        terms[i] = backward.row_terms[head_row + row];
        if (params.bounds)
            bounds[i] = params.bounds[head_row + row];
    }
    float sums[4][4] = {};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 row = memory.query_rows[own_row + i];
        if (row != NO_KEY)
            load_sums(sums[i], p.state_accumulated + (head_row + row) * p.head_dim, own_column, p.head_dim);
    }

    for (u32 at = 0; at < common.sample_size; at += COLUMNS) {
        const u32 left = common.sample_size - at, count = left < COLUMNS ? left : COLUMNS;
        if (threadIdx.x < COLUMNS) {
            u32 sample = at + threadIdx.x, row = NO_KEY;
            float log_weight = negative_infinity();
            if (threadIdx.x < count && !(covered && covered[sample / 32] >> sample % 32 & 1)) {
                log_weight = params.log_weight(rectangle, first_sample + sample);
                if (log_weight != negative_infinity())
                    row = params.key_row(tile.batch * p.heads_kv() + kv_head, params.positions[first_sample + sample]);
            }
            memory.key_rows[threadIdx.x] = row;
            memory.log_weights[threadIdx.x] = log_weight;
        }
        __syncthreads();
        copy_rows<DIM, COLUMNS>(shared.first_columns, vectors(p.k, tile.batch, kv_head, p.head_dim, p.kv_type),
                                memory.key_rows);
        if (params.part != SAMPLES_SUMS)
            copy_rows<DIM, COLUMNS>(shared.second_columns, vectors(p.v, tile.batch, kv_head, p.value_dim, p.kv_type),
                                    memory.key_rows);
        __syncthreads();
        float s[S::THREAD_ROWS][S::THREAD_COLUMNS], dp[S::THREAD_ROWS][S::THREAD_COLUMNS] = {};
        multiply<DIM>(s, shared.first_rows + shared.thread_row * S::PITCH,
                      shared.first_columns + shared.thread_column * S::PITCH);
        if (params.part != SAMPLES_SUMS)
            multiply<DIM>(dp, shared.second_rows + shared.thread_row * S::PITCH,
                          shared.second_columns + shared.thread_column * S::PITCH);
#pragma unroll
        for (u32 j = 0; j < S::THREAD_COLUMNS; ++j) {
            u32 column = shared.thread_column + j * SIDE;
            const bool counts = memory.key_rows[column] != NO_KEY;
            const float log_weight = memory.log_weights[column];
#pragma unroll
            for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
                float share, slope;
                params.pair(s[i][j], dp[i][j], log_weight, terms[i], bounds[i], share, slope);
                shared.put(shared.thread_row + i * SIDE, column, counts ? slope : 0.0f, 0.0f);
            }
        }
        __syncthreads();
        accumulate<DIM>(sums, shared.slopes, shared.first_columns, count, false, [](u32, u32) { return true; });
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 row = memory.query_rows[own_row + i];
        if (row == NO_KEY)
            continue;
        if (common.flags & TILE_STORE)
            write_sums(p.state_accumulated + (head_row + row) * p.head_dim, own_column, p.head_dim, sums[i]);
        else
            write_gradient(p.out.row(tile.batch, tile.head, row), p.out, p.out_type, own_column, p.head_dim, sums[i],
                           backward.scale);
    }
}

// The samples' dk and dv. Thread block: some samples of a rectangle, and a chunk of its queries.
template <u32 DIM> __device__ __forceinline__ void samples_of_keys(const BackwardSamplesParams &params)
{
    using S = Shape<DIM>;
    constexpr u32 COLUMNS = S::COLUMNS;
    static_assert(sizeof(SamplesOfKeys<DIM>) <= S::MEMORY_BYTES, "it takes the place of the other tiles' memory");
    static_assert(S::ROWS <= 64 && (S::ROWS % 32 == 0 || 32 % S::ROWS == 0), "rows' bits are in two words");
    const BackwardParams &backward = params.backward;
    const AttendParams &p = backward.attend;
    const PassTiles &common = params.common;
    Memory<DIM> shared;
    SamplesOfKeys<DIM> &memory = *(SamplesOfKeys<DIM> *)shared.tile;
    const u32 own_row = threadIdx.x / (DIM / 4) * 4, own_column = threadIdx.x % (DIM / 4) * 4;
    const u32 parts = (common.sample_size + (S::ROWS - 1)) / S::ROWS, first_row = blockIdx.x % parts * S::ROWS;
    const u32 chunk = blockIdx.x / parts % params.chunks, rectangle_number = blockIdx.x / parts / params.chunks;
    const u32 index = rectangle_number % common.pass.count, set_kv_head = rectangle_number / common.pass.count;
    Rectangle rectangle;
    if (!common.rectangle(index, rectangle))
        return;
    const u64 start = rectangle.query_start + (u64)chunk * params.chunk_queries;
    if (start >= rectangle.query_end)
        return;
    const u32 end = rectangle.query_end - start < params.chunk_queries ? rectangle.query_end
                                                                       : (u32)start + params.chunk_queries;
    const u32 flat_kv_head = common.first_kv_head + set_kv_head;
    const u32 batch = flat_kv_head / p.heads_kv(), kv_head = flat_kv_head % p.heads_kv();
    const u64 first_sample = params.first_sample(set_kv_head, index);

    // Without any mass in the values none of the samples is one.
    const bool any = params.log_weight(rectangle, first_sample) != negative_infinity();
    if (threadIdx.x < S::ROWS) {
        u32 sample = first_row + threadIdx.x, row = NO_KEY;
        float log_weight = negative_infinity();
        if (any && sample < common.sample_size) {
            row = params.key_row(flat_kv_head, params.positions[first_sample + sample]);
            log_weight = params.log_weight(rectangle, first_sample + sample);
        }
        memory.key_rows[threadIdx.x] = row;
        memory.log_weights[threadIdx.x] = log_weight;
    }
    __syncthreads();
    copy_rows<DIM, S::ROWS>(shared.first_rows, vectors(p.k, batch, kv_head, p.head_dim, p.kv_type), memory.key_rows);
    if (params.part != SAMPLES_SUMS)
        copy_rows<DIM, S::ROWS>(shared.second_rows, vectors(p.v, batch, kv_head, p.value_dim, p.kv_type),
                                memory.key_rows);
    float key_sums[4][4] = {}, value_sums[4][4] = {};

    for (u32 member = 0; any && member < common.group; ++member) {
        const u32 head = kv_head * common.group + member;
        const u64 head_row = (u64)(batch * p.heads_q + head) * p.n_q;
        for (u32 at = (u32)start; at < end; at += COLUMNS) {
            const u32 count = end - at < COLUMNS ? end - at : COLUMNS;
            if (threadIdx.x < COLUMNS) {
                u32 position = at + threadIdx.x, row = NO_KEY, covered[2] = {};
                RowTerms terms = {-negative_infinity(), 0.0f};
                float bound = -negative_infinity();
                if (threadIdx.x < count) {
                    row = params.blocks.sorted ? p.query_order[head_row + position] : position;
                    terms = backward.row_terms[head_row + row];
                    if (params.bounds)
                        bound = params.bounds[head_row + row];
                    if (params.covered) {
                        u32 block = params.blocks.block_of(rectangle, position), word = first_row / 32;
                        const u32 *words = params.covered_of(set_kv_head, member, index, block);
                        covered[0] = words[word];
                        covered[1] = word + 1 < params.covered_words ? words[word + 1] : 0;
                    }
                }
                memory.query_rows[threadIdx.x] = row;
                memory.terms[threadIdx.x] = terms;
                memory.bounds[threadIdx.x] = bound;
                memory.covered[0][threadIdx.x] = covered[0];
                memory.covered[1][threadIdx.x] = covered[1];
            }
            __syncthreads();
            copy_rows<DIM, COLUMNS>(shared.first_columns, vectors(p.q, batch, head, p.head_dim, p.q_type),
                                    memory.query_rows);
            if (params.part != SAMPLES_SUMS)
                copy_rows<DIM, COLUMNS>(shared.second_columns,
                                        vectors(backward.dout, batch, head, p.value_dim, backward.dout_type),
                                        memory.query_rows);
            __syncthreads();
            float s[S::THREAD_ROWS][S::THREAD_COLUMNS], dp[S::THREAD_ROWS][S::THREAD_COLUMNS] = {};
            multiply<DIM>(s, shared.first_rows + shared.thread_row * S::PITCH,
                          shared.first_columns + shared.thread_column * S::PITCH);
            if (params.part != SAMPLES_SUMS)
                multiply<DIM>(dp, shared.second_rows + shared.thread_row * S::PITCH,
                              shared.second_columns + shared.thread_column * S::PITCH);
#pragma unroll
            for (u32 j = 0; j < S::THREAD_COLUMNS; ++j) {
                u32 column = shared.thread_column + j * SIDE;
                const RowTerms terms = memory.terms[column];
                const float bound = memory.bounds[column];
#pragma unroll
                for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
                    u32 row = shared.thread_row + i * SIDE;
                    bool counts = !(memory.covered[row / 32][column] >> (first_row + row) % 32 & 1);
                    float share, slope;
                    params.pair(s[i][j], dp[i][j], memory.log_weights[row], terms, bound, share, slope);
                    shared.put(row, column, counts ? slope : 0.0f, counts ? share : 0.0f);
                }
            }
            __syncthreads();
            auto seen = [](u32, u32) { return true; };
            accumulate<DIM>(key_sums, shared.slopes, shared.first_columns, count, false, seen);
            if (params.part != SAMPLES_SUMS)
                accumulate<DIM>(value_sums, shared.shares, shared.second_columns, count, false, seen);
            __syncthreads();
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 sample = first_row + own_row + i;
        if (sample >= common.sample_size)
            continue;
        u64 row = ((u64)rectangle_number * params.chunks + chunk) * common.sample_size + sample;
        write_sums(params.key_partials + row * p.head_dim, own_column, p.head_dim, key_sums[i]);
        write_sums(params.value_partials + row * p.value_dim, own_column, p.value_dim, value_sums[i]);
    }
}

} // namespace backward_simt
} // namespace hyperattn

// Which samples the queries of every block meet exactly. One warp per list: grid ceil(kv_heads * lists_per_kv_head *
// rectangles * blocks / 4), block 128.
extern "C" __global__ void __launch_bounds__(128)
    backward_samples_covered(const __grid_constant__ hyperattn::BackwardSamplesParams params)
{
    using namespace hyperattn;
    const PassTiles &common = params.common;
    u32 lane = threadIdx.x % 32;
    u64 list = (u64)blockIdx.x * 4 + threadIdx.x / 32;
    u32 block = (u32)(list % common.blocks), index = (u32)(list / common.blocks) % common.pass.count;
    u32 head = (u32)(list / common.blocks / common.pass.count), set_kv_head = head / params.lists_per_kv_head;
    Rectangle rectangle;
    if (set_kv_head >= common.kv_heads || !common.rectangle(index, rectangle))
        return;
    u64 query = params.blocks.first_query(rectangle, block);
    if (query >= rectangle.query_end)
        return;
    u32 flat_head = (common.first_kv_head + set_kv_head) * common.group + head % params.lists_per_kv_head;
    const u32 *positions = params.positions + params.first_sample(set_kv_head, index);
    for (u32 word = 0; word < params.covered_words; ++word) {
        u32 sample = word * 32 + lane;
        bool met = sample < common.sample_size &&
                   params.blocks.meets(rectangle, flat_head, (u32)query, positions[sample]);
        u32 bits = __ballot_sync(0xffffffffu, met);
        if (lane == 0)
            params.covered[list * params.covered_words + word] = bits;
    }
}

// Grids: tiles * TILE_ROWS / Shape<DIM>::ROWS; kv_heads * rectangles * chunks * ceil(sample_size / Shape<DIM>::ROWS).
#define HYPERATTN_BACKWARD_SAMPLES(DIM)                                                                                \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_simt::THREADS)                                    \
        backward_samples_queries_##DIM(const __grid_constant__ hyperattn::BackwardSamplesParams params)                \
    {                                                                                                                  \
        hyperattn::backward_simt::samples_of_queries<DIM>(params);                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_simt::THREADS)                                    \
        backward_samples_keys_##DIM(const __grid_constant__ hyperattn::BackwardSamplesParams params)                   \
    {                                                                                                                  \
        hyperattn::backward_simt::samples_of_keys<DIM>(params);                                                        \
    }

HYPERATTN_BACKWARD_SAMPLES(64)
HYPERATTN_BACKWARD_SAMPLES(128)
HYPERATTN_BACKWARD_SAMPLES(256)

#undef HYPERATTN_BACKWARD_SAMPLES
