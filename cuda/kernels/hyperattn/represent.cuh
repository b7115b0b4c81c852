// Representatives: a few queries that stand for a tile when keys are weighed.
//
// The queries of a tile are divided among the runs of neighbours that they belong to and the few that are farthest
// from all others so far; each part is represented by its mean. A mean of neighbours alone would hide the one query
// among them that looks elsewhere. Queries that are not finite are passed over.
//
// Launch: represent_queries, grid (query tiles), REPRESENT_THREADS threads. For queries of 16 bits in rows of
// 2 * REPRESENT_CHUNK elements at most, represent_queries_f16 and represent_queries_bf16 do the same in shared memory:
// REPRESENT_CHUNK_BYTES of dynamic shared memory for each REPRESENT_CHUNK elements of a row, rounded up.
#pragma once

#include "elements.cuh"

namespace hyperattn::refined {

constexpr u32 REPRESENT_THREADS = 256;
constexpr u32 REPRESENT_WARPS = REPRESENT_THREADS / 32;
constexpr u32 MOST_HEAD_DIM = 256;

// Eight lanes read so many elements of a row at a time.
constexpr u32 REPRESENT_CHUNK = 64;
constexpr u32 REPRESENT_CHUNK_BYTES = QUERY_TILE_ROWS * REPRESENT_CHUNK * 2;

// Runs of neighbouring queries.
constexpr u32 RUNS = 4;

// The part of a query that is not finite.
constexpr u32 NO_PART = 0xff;

static_assert(REPRESENT_THREADS == QUERY_TILE_ROWS, "a thread has one query");
static_assert(REPRESENT_WARPS == REPRESENTATIVES, "a warp has one part");

struct RepresentShared {
    alignas(16) float means[REPRESENTATIVES][MOST_HEAD_DIM];
    float queries_of_part[REPRESENTATIVES];
    // Of every warp, for this turn and the next.
    u32 best_distance[2][REPRESENT_WARPS];
    u32 best_row[2][REPRESENT_WARPS];
    // The queries part by part: row, and its slice times 256.
    u16 ordered[QUERY_TILE_ROWS];
    u8 part[QUERY_TILE_ROWS];
    u8 slice[QUERY_TILE_ROWS];
};

// Run that a query belongs to.
__device__ __forceinline__ u32 run_of(u32 row, u32 count) { return row * RUNS / count; }

// The queries of a tile where they are.
struct TileQueries {
    // A lane adds so many columns up.
    static constexpr u32 COLUMNS = 8;

    const char *rows;
    i64 stride;
    u32 count;
    u32 dim;
    u32 type;
    bool aligned;

    __device__ __forceinline__ TileQueries(const RefinedParams &p, const QueryTile &tile)
        : rows(p.q.row(tile.batch, tile.head, tile.first_query)), stride(p.q.row_stride), count(tile.queries),
          dim(p.head_dim), type(p.q_type), aligned(p.flags & REFINED_Q_ALIGNED)
    {
    }

    __device__ __forceinline__ void load(u32 row, u32 column, float x[8]) const
    {
        load_8(rows + row * stride, column, dim, type, aligned, x);
    }

    __device__ __forceinline__ void load_columns(u32 row, float x[COLUMNS]) const
    {
        load(row, threadIdx.x % 32 * COLUMNS, x);
    }

    // The squared distance of the thread's query from the mean of its run.
    __device__ __forceinline__ float distance_from_run(const RepresentShared &shared) const
    {
        return measure([&](u32 row, u32 column, float x[8]) {
            const float *mean = shared.means[run_of(row, count)] + column;
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                x[i] = mean[i];
        });
    }

    // The squared distance of the thread's query from another.
    __device__ __forceinline__ float distance_from(u32 other) const
    {
        return measure([&](u32, u32 column, float x[8]) { load(other, column, x); });
    }

private:
    // Eight lanes measure a query.
    template <class Center> __device__ __forceinline__ float measure(Center center) const
    {
        u32 part = threadIdx.x % 8;
        float of_thread = 0.0f;
#pragma unroll 1
        for (u32 i = 0; i < 8; ++i) {
            u32 row = threadIdx.x / 8 * 8 + i;
            float distance = 0.0f;
            if (row < count) {
                for (u32 column = part * 8; column < dim; column += REPRESENT_CHUNK) {
                    float x[8], from[8];
                    load(row, column, x);
                    center(row, column, from);
                    u32 end = min(dim - column, 8u);
#pragma unroll
                    for (u32 j = 0; j < 8; ++j) {
                        float difference = j < end ? x[j] - from[j] : 0.0f;
                        distance = fmaf(difference, difference, distance);
                    }
                }
            }
#pragma unroll
            for (u32 other = 1; other < 8; other *= 2)
                distance += __shfl_xor_sync(ALL_LANES, distance, other);
            of_thread = part == i ? distance : of_thread;
        }
        return of_thread;
    }
};

// The queries of a tile in shared memory, in rows of CHUNKS * REPRESENT_CHUNK elements of 16 bits, zeros at their ends.
template <u32 TYPE, u32 CHUNKS> struct SharedQueries {
    static constexpr u32 COLUMNS = 2 * CHUNKS;
    static constexpr u32 ROW_BYTES = 2 * CHUNKS * REPRESENT_CHUNK;

    const char *tile;
    u32 count;
    u32 dim;

    // Reads them; complete after the next barrier.
    __device__ __forceinline__ SharedQueries(const TileQueries &queries, char *to)
        : tile(to), count(queries.count), dim(queries.dim)
    {
        constexpr u32 UNITS = ROW_BYTES / 16, ROWS = REPRESENT_THREADS / UNITS;
        u32 first = threadIdx.x / UNITS, column = threadIdx.x % UNITS * 8;
        const char *from = queries.rows + first * queries.stride;
        to += threadIdx.x * 16;
        if (queries.aligned) {
#pragma unroll 8
            for (u32 i = 0; i < QUERY_TILE_ROWS / ROWS; ++i) {
                bool present = first + i * ROWS < count && column < dim;
                begin_copy(to + i * ROWS * ROW_BYTES, present ? from + column * 2 : queries.rows, present);
                from += ROWS * queries.stride;
            }
            await_copies();
            return;
        }
#pragma unroll 1
        for (u32 i = 0; i < QUERY_TILE_ROWS / ROWS; ++i) {
            EightElements<TYPE> x;
            x.clear();
            if (first + i * ROWS < count)
                x.load(from, column, dim, false);
            x.store_shared(to + i * ROWS * ROW_BYTES);
            from += ROWS * queries.stride;
        }
    }

    __device__ __forceinline__ void load(u32 row, u32 column, float x[8]) const
    {
        EightElements<TYPE> elements;
        elements.load_shared(tile + row * ROW_BYTES + column * 2);
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            x[i] = elements[i];
    }

    __device__ __forceinline__ void load_columns(u32 row, float x[COLUMNS]) const
    {
        const char *from = tile + row * ROW_BYTES + threadIdx.x % 32 * (2 * COLUMNS);
        u32 words[CHUNKS];
        if constexpr (CHUNKS == 2) {
            uint2 both = *(const uint2 *)from;
            words[0] = both.x;
            words[1] = both.y;
        } else {
            words[0] = *(const u32 *)from;
        }
#pragma unroll
        for (u32 i = 0; i < COLUMNS; ++i)
            x[i] = f32_from_16<TYPE>((u16)(words[i / 2] >> i % 2 * 16));
    }

    __device__ __forceinline__ float distance_from_run(const RepresentShared &shared) const
    {
        u32 first = threadIdx.x / 8 * 8, run = first < count ? run_of(first, count) : 0;
        float center[8 * CHUNKS];
        load_mean(shared, run, center);
        return measure(center, [&](u32 row) {
            if (row < count && row * RUNS >= (run + 1) * count) {
                run = run_of(row, count);
                load_mean(shared, run, center);
            }
        });
    }

    __device__ __forceinline__ float distance_from(u32 other) const
    {
        float center[8 * CHUNKS];
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk)
            load(other, chunk * REPRESENT_CHUNK + threadIdx.x % 8 * 8, center + 8 * chunk);
        return measure(center, [](u32) {});
    }

private:
    static __device__ __forceinline__ void load_mean(const RepresentShared &shared, u32 run, float center[8 * CHUNKS])
    {
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            EightElements<F32> mean;
            mean.load_shared((const char *)(shared.means[run] + chunk * REPRESENT_CHUNK + threadIdx.x % 8 * 8));
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                center[8 * chunk + i] = mean[i];
        }
    }

    // Eight lanes measure a query; before(row) may change the center.
    template <class Before> __device__ __forceinline__ float measure(float (&center)[8 * CHUNKS], Before before) const
    {
        float distances[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            u32 row = threadIdx.x / 8 * 8 + i;
            before(row);
            distances[i] = 0.0f;
#pragma unroll
            for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
                float x[8];
                load(row, chunk * REPRESENT_CHUNK + threadIdx.x % 8 * 8, x);
#pragma unroll
                for (u32 j = 0; j < 8; ++j) {
                    float difference = x[j] - center[8 * chunk + j];
                    distances[i] = fmaf(difference, difference, distances[i]);
                }
            }
        }
        return sum_of_eight_lanes(distances);
    }
};

// Means of the queries of each part, 0 for a part without any; and their numbers. A part is added up in slices of
// neighbouring rows. Returns false for a thread that found a sum which is not finite: that of a run is where all of its
// queries are.
template <class Queries> __device__ __forceinline__ bool average(RepresentShared &shared, const Queries &queries)
{
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 before = 0, number = 0, of_part[QUERY_TILE_ROWS / 32];
#pragma unroll
    for (u32 word = 0; word < QUERY_TILE_ROWS / 32; ++word) {
        u32 part = shared.part[word * 32 + lane];
        before += __popc(__ballot_sync(ALL_LANES, part < warp));
        of_part[word] = __ballot_sync(ALL_LANES, part == warp);
        number += __popc(of_part[word]);
    }
    u32 place = before;
#pragma unroll
    for (u32 word = 0; word < QUERY_TILE_ROWS / 32; ++word) {
        if (of_part[word] >> lane & 1) {
            u32 row = word * 32 + lane, earlier = __popc(of_part[word] & ((1u << lane) - 1));
            shared.ordered[place + earlier] = (u16)(row | (u32)shared.slice[row] << 8);
        }
        place += __popc(of_part[word]);
    }
    __syncwarp();

    constexpr u32 COLUMNS = Queries::COLUMNS;
    float sums[COLUMNS] = {}, of_slice[COLUMNS] = {};
    u32 slice = 0;
    for (u32 first = 0; first < number; first += 4) {
        float x[4][COLUMNS];
        u32 entries[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            entries[i] = shared.ordered[before + min(first + i, number - 1)];
            queries.load_columns(entries[i] & 0xff, x[i]);
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (entries[i] >> 8 != slice) {
                slice = entries[i] >> 8;
#pragma unroll
                for (u32 j = 0; j < COLUMNS; ++j) {
                    sums[j] += of_slice[j];
                    of_slice[j] = 0.0f;
                }
            }
            // Sums keep to the range of f32.
            float factor = first + i < number ? 1.0f / QUERY_TILE_ROWS : 0.0f;
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j)
                of_slice[j] = fmaf(x[i][j], factor, of_slice[j]);
        }
    }
    bool finite = true;
    float factor = number > 0 ? (float)QUERY_TILE_ROWS / (float)number : 0.0f;
#pragma unroll
    for (u32 j = 0; j < COLUMNS; ++j) {
        sums[j] += of_slice[j];
        finite = finite && is_finite(sums[j]);
        shared.means[warp][lane * COLUMNS + j] = sums[j] * factor;
    }
    if (lane == 0)
        shared.queries_of_part[warp] = (float)number;
    return finite;
}

// Notes the runs of the queries as their parts, and returns the squared distance of the thread's query from the mean of
// its run, 0 for a query that is not finite. Begins with a barrier.
template <class Queries>
__device__ __forceinline__ float measure_run(RepresentShared &shared, const Queries &queries, u32 &part)
{
    u32 thread = threadIdx.x, count = queries.count;
    u32 slices = REPRESENT_THREADS / ((queries.dim + 7) / 8);
    part = thread < count ? run_of(thread, count) : NO_PART;
    shared.part[thread] = (u8)part;
    if (thread < count)
        shared.slice[thread] = (u8)(((thread + 1) * slices - 1) / count);
    __syncthreads();
    bool finite = average(shared, queries);
    if (__syncthreads_or(!finite)) {
        float check = 0.0f;
        for (u32 column = 0; thread < count && column < queries.dim; column += 8) {
            float x[8];
            queries.load(thread, column, x);
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                check += x[i] * 0.0f;
        }
        if (check != 0.0f)
            part = NO_PART;
        shared.part[thread] = (u8)part;
        __syncthreads();
        average(shared, queries);
        __syncthreads();
    }
    float distance = queries.distance_from_run(shared);
    return part == NO_PART ? 0.0f : distance;
}

// The query farthest from all parts so far, the first of those as far, and the bits of its distance: those of numbers
// that are not negative have their order. Turns that follow each other have different buffers.
__device__ __forceinline__ u32 find_farthest(RepresentShared &shared, float distance, u32 turn, u32 &most)
{
    u32 thread = threadIdx.x, bits = __float_as_uint(distance);
    most = __reduce_max_sync(ALL_LANES, bits);
    u32 row = __reduce_min_sync(ALL_LANES, bits == most ? thread : ~0u);
    if (thread % 32 == 0) {
        shared.best_distance[turn % 2][thread / 32] = most;
        shared.best_row[turn % 2][thread / 32] = row;
    }
    __syncthreads();
    bits = shared.best_distance[turn % 2][thread % REPRESENT_WARPS];
    row = shared.best_row[turn % 2][thread % REPRESENT_WARPS];
    most = __reduce_max_sync(ALL_LANES, bits);
    return __reduce_min_sync(ALL_LANES, bits == most ? row : ~0u);
}

// A warp writes a representative. Parts with queries move up; slots beyond the last repeat it: a query of zeros would
// make a NaN of a key that nobody may weigh.
__device__ __forceinline__ void write_representatives(const RefinedParams &p, const RepresentShared &shared,
                                                      u32 tile_number)
{
    u32 lane = threadIdx.x % 32, slot = threadIdx.x / 32;
    bool has_queries = shared.queries_of_part[lane % REPRESENTATIVES] > 0.0f;
    u32 filled = __ballot_sync(ALL_LANES, lane < REPRESENTATIVES && has_queries);
    u32 len = __popc(filled), rest = filled;
    for (u32 i = 0; i < slot && (rest & (rest - 1)); ++i)
        rest &= rest - 1;
    u32 part = rest ? __ffs(rest) - 1 : 0;
    u64 first = (u64)tile_number * REPRESENTATIVES + slot;
    if (lane == 0)
        p.represented[first] = slot < len ? shared.queries_of_part[part] : 0.0f;
    char *to = p.representatives + first * p.width * p.operand_bytes();
    for (u32 column = 2 * lane; column < p.width; column += 64) {
        float low = len > 0 && column < p.head_dim ? shared.means[part][column] : 0.0f;
        float high = len > 0 && column + 1 < p.head_dim ? shared.means[part][column + 1] : 0.0f;
        if (p.operand_type == F32)
            *(float2 *)(to + 4 * column) = make_float2(low, high);
        else
            *(u32 *)(to + 2 * column) =
                p.operand_type == BF16 ? bf16x2_from_f32(low, high) : f16x2_from_f32(low, high);
    }
}

// The block's tile.
__device__ __forceinline__ QueryTile represented_tile(const RefinedParams &p)
{
    return query_tile(p, blockIdx.x / p.query_tiles, blockIdx.x % p.query_tiles);
}

// Whether its queries meet everything; then nothing represents them.
__device__ __forceinline__ bool is_exact(const RefinedParams &p, const QueryTile &tile)
{
    if (p.limit(tile.first_query + tile.queries - 1) > p.least_budget)
        return false;
    if (threadIdx.x < REPRESENTATIVES)
        p.represented[(u64)tile.number * REPRESENTATIVES + threadIdx.x] = 0.0f;
    return true;
}

template <class Queries>
__device__ __forceinline__ void represent(const RefinedParams &p, RepresentShared &shared, const Queries &queries,
                                          u32 tile_number)
{
    u32 part;
    float distance = measure_run(shared, queries, part);
#pragma unroll 1
    for (u32 next = RUNS; next < REPRESENTATIVES; ++next) {
        u32 most, farthest = find_farthest(shared, distance, next, most);
        if (most == 0)
            break;
        float from_farthest = queries.distance_from(farthest);
        if (part != NO_PART && from_farthest < distance) {
            part = next;
            distance = from_farthest;
        }
    }
    shared.part[threadIdx.x] = (u8)part;
    __syncthreads();
    average(shared, queries);
    __syncthreads();
    write_representatives(p, shared, tile_number);
}

template <u32 TYPE>
__device__ __forceinline__ void represent_from_shared(const RefinedParams &p, RepresentShared &shared)
{
    extern __shared__ __align__(16) char represented_queries[];
    QueryTile tile = represented_tile(p);
    if (is_exact(p, tile))
        return;
    TileQueries queries(p, tile);
    if (p.head_dim <= REPRESENT_CHUNK)
        represent(p, shared, SharedQueries<TYPE, 1>(queries, represented_queries), tile.number);
    else
        represent(p, shared, SharedQueries<TYPE, 2>(queries, represented_queries), tile.number);
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REPRESENT_THREADS, 3)
    represent_queries(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::RepresentShared shared;
    hyperattn::refined::QueryTile tile = hyperattn::refined::represented_tile(p);
    if (!hyperattn::refined::is_exact(p, tile))
        hyperattn::refined::represent(p, shared, hyperattn::refined::TileQueries(p, tile), tile.number);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REPRESENT_THREADS, 3)
    represent_queries_f16(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::RepresentShared shared;
    hyperattn::refined::represent_from_shared<hyperattn::F16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REPRESENT_THREADS, 3)
    represent_queries_bf16(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::RepresentShared shared;
    hyperattn::refined::represent_from_shared<hyperattn::BF16>(p, shared);
}
