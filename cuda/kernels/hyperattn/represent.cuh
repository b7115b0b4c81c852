// Representatives: a few queries that stand for a tile when keys are weighed.
//
// The queries of a tile are divided among the runs of neighbours that they belong to and the few that are farthest
// from all others so far; each part is represented by its mean. A mean of neighbours alone would hide the one query
// among them that looks elsewhere. Queries that are not finite are passed over.
//
// Launch: represent_queries, grid (query tiles), REPRESENT_THREADS threads.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 REPRESENT_THREADS = 256;
constexpr u32 MOST_HEAD_DIM = 256;

// Runs of neighbouring queries.
constexpr u32 RUNS = 4;

// The part of a query that is not finite.
constexpr u32 NO_PART = 0xffffffffu;

struct RepresentShared {
    float partial[REPRESENT_THREADS * 8];
    float means[REPRESENTATIVES][MOST_HEAD_DIM];
    float center[MOST_HEAD_DIM];
    float distance[QUERY_TILE_ROWS];
    u32 part[QUERY_TILE_ROWS];
    float queries_of_part[REPRESENTATIVES];
    float best_distance[REPRESENT_THREADS / 32];
    u32 best_row[REPRESENT_THREADS / 32];
};

// The queries of a tile.
struct TileQueries {
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
};

// Run that a query belongs to.
__device__ __forceinline__ u32 run_of(u32 row, u32 count) { return row * RUNS / count; }

// Means of the queries of each of the first `parts` parts, 0 for a part without any; and their numbers.
__device__ __forceinline__ void average(RepresentShared &shared, const TileQueries &queries, u32 parts)
{
    u32 thread = threadIdx.x;
    u32 chunks = (queries.dim + 7) / 8, slices = REPRESENT_THREADS / chunks;
    u32 chunk = thread % chunks, slice = thread / chunks;
    u32 first = slice * queries.count / slices, end = (slice + 1) * queries.count / slices;
    if (slice >= slices)
        first = end = 0;
    static_assert(REPRESENT_THREADS / 32 == REPRESENTATIVES, "a warp counts the queries of one part");
    u32 number = 0;
    for (u32 row = thread % 32; row < QUERY_TILE_ROWS; row += 32)
        number += __popc(__ballot_sync(ALL_LANES, row < queries.count && shared.part[row] == thread / 32));
    if (thread % 32 == 0)
        shared.queries_of_part[thread / 32] = (float)number;
    __syncthreads();
    for (u32 part = 0; part < parts; ++part) {
        float sums[8] = {};
        for (u32 row = first; row < end; ++row) {
            if (shared.part[row] == part) {
                float x[8];
                queries.load(row, chunk * 8, x);
                // Sums keep to the range of f32.
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    sums[i] += x[i] * (1.0f / QUERY_TILE_ROWS);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            shared.partial[thread * 8 + i] = sums[i];
        __syncthreads();
        float number = shared.queries_of_part[part];
        float factor = number > 0.0f ? QUERY_TILE_ROWS / number : 0.0f;
        for (u32 column = thread; column < queries.dim; column += REPRESENT_THREADS) {
            float sum = 0.0f;
            for (u32 i = 0; i < slices; ++i)
                sum += shared.partial[(i * chunks + column / 8) * 8 + column % 8];
            shared.means[part][column] = sum * factor;
        }
        __syncthreads();
    }
}

// Visits every query with its squared distance from center(row); one lane of the eight that measured it is called.
template <class Center, class Visit>
__device__ __forceinline__ void measure(const TileQueries &queries, Center center, Visit visit)
{
    u32 part = threadIdx.x % 8, group = threadIdx.x / 8;
    constexpr u32 GROUPS = REPRESENT_THREADS / 8;
    for (u32 first = 0; first < queries.count; first += GROUPS) {
        u32 row = first + group;
        float distance = 0.0f;
        if (row < queries.count) {
            const float *from = center(row);
            for (u32 column = part * 8; column < queries.dim; column += 64) {
                float x[8];
                queries.load(row, column, x);
                u32 end = min(queries.dim - column, 8u);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    float difference = i < end ? x[i] - from[column + i] : 0.0f;
                    distance = fmaf(difference, difference, distance);
                }
            }
        }
#pragma unroll
        for (u32 other = 1; other < 8; other *= 2)
            distance += __shfl_xor_sync(ALL_LANES, distance, other);
        if (part == 0 && row < queries.count)
            visit(row, distance);
    }
}

// Squared distances of the queries from the means of the runs that they belong to, 0 for queries that are not finite;
// and their runs as parts.
__device__ __forceinline__ void measure_runs(RepresentShared &shared, const TileQueries &queries)
{
    u32 part = threadIdx.x % 8, group = threadIdx.x / 8;
    for (u32 first = 0; first < queries.count; first += REPRESENT_THREADS / 8) {
        u32 row = first + group;
        float check = 0.0f;
        if (row < queries.count) {
            for (u32 column = part * 8; column < queries.dim; column += 64) {
                float x[8];
                queries.load(row, column, x);
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    check += x[i] * 0.0f;
            }
        }
#pragma unroll
        for (u32 other = 1; other < 8; other *= 2)
            check += __shfl_xor_sync(ALL_LANES, check, other);
        if (part == 0 && row < queries.count)
            shared.part[row] = check == 0.0f ? run_of(row, queries.count) : NO_PART;
    }
    __syncthreads();
    average(shared, queries, RUNS);
    measure(
        queries, [&](u32 row) { return shared.means[run_of(row, queries.count)]; },
        [&](u32 row, float distance) { shared.distance[row] = shared.part[row] == NO_PART ? 0.0f : distance; });
    __syncthreads();
}

// The query farthest from all parts so far, the first of those as far.
__device__ __forceinline__ u32 find_farthest(RepresentShared &shared, u32 count, float &most)
{
    u32 thread = threadIdx.x;
    static_assert(REPRESENT_THREADS == QUERY_TILE_ROWS, "a thread has one query");
    float distance = thread < count ? shared.distance[thread] : -1.0f;
    u32 row = thread;
#pragma unroll
    for (u32 other = 1; other < 32; other *= 2) {
        float its_distance = __shfl_xor_sync(ALL_LANES, distance, other);
        u32 its_row = __shfl_xor_sync(ALL_LANES, row, other);
        if (its_distance > distance || (its_distance == distance && its_row < row)) {
            distance = its_distance;
            row = its_row;
        }
    }
    if (thread % 32 == 0) {
        shared.best_distance[thread / 32] = distance;
        shared.best_row[thread / 32] = row;
    }
    __syncthreads();
    most = shared.best_distance[0];
    row = shared.best_row[0];
    for (u32 warp = 1; warp < REPRESENT_THREADS / 32; ++warp) {
        if (shared.best_distance[warp] > most) {
            most = shared.best_distance[warp];
            row = shared.best_row[warp];
        }
    }
    return row;
}

__device__ __forceinline__ void represent_tile(const RefinedParams &p, RepresentShared &shared)
{
    u32 thread = threadIdx.x;
    QueryTile tile = query_tile(p, blockIdx.x / p.query_tiles, blockIdx.x % p.query_tiles);
    float *represented = p.represented + (u64)tile.number * REPRESENTATIVES;
    if (p.limit(tile.first_query + tile.queries - 1) <= p.least_budget) {
        // Its queries meet everything.
        if (thread < REPRESENTATIVES)
            represented[thread] = 0.0f;
        return;
    }
    TileQueries queries(p, tile);
    measure_runs(shared, queries);
    for (u32 part = RUNS; part < REPRESENTATIVES; ++part) {
        float most;
        u32 farthest = find_farthest(shared, queries.count, most);
        if (most == 0.0f)
            break;
        for (u32 column = thread; column < queries.dim; column += REPRESENT_THREADS)
            shared.center[column] = f32_of(queries.rows + farthest * queries.stride, column, queries.type);
        __syncthreads();
        measure(
            queries, [&](u32) { return shared.center; },
            [&](u32 row, float distance) {
                if (shared.part[row] != NO_PART && distance < shared.distance[row]) {
                    shared.part[row] = part;
                    shared.distance[row] = distance;
                }
            });
        __syncthreads();
    }
    average(shared, queries, REPRESENTATIVES);

    // Parts with queries move up; slots beyond the last repeat it: a query of zeros would make a NaN of a key that
    // nobody may weigh.
    u32 part_of[REPRESENTATIVES], len = 0;
#pragma unroll
    for (u32 part = 0; part < REPRESENTATIVES; ++part) {
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot) {
            if (shared.queries_of_part[part] > 0.0f && slot == len)
                part_of[slot] = part;
        }
        len += shared.queries_of_part[part] > 0.0f;
    }
    char *to = p.representatives + (u64)tile.number * REPRESENTATIVES * p.width * p.operand_bytes();
    u32 last = 0;
#pragma unroll
    for (u32 slot = 0; slot < REPRESENTATIVES; ++slot) {
        if (slot < len)
            last = part_of[slot];
        if (thread == slot)
            represented[slot] = slot < len ? shared.queries_of_part[last] : 0.0f;
        for (u32 column = thread; column < p.width; column += REPRESENT_THREADS) {
            float x = len > 0 && column < p.head_dim ? shared.means[last][column] : 0.0f;
            store_rounded(to, slot * p.width + column, p.operand_type, x);
        }
    }
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REPRESENT_THREADS)
    represent_queries(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::RepresentShared shared;
    hyperattn::refined::represent_tile(p, shared);
}
