// Algorithm 1, second half: a stable counting sort by (rank, position) of the rows of disjoint intervals, of queries
// and keys of all heads at once. Ranks are sorted by one digit per pass, from the lowest: chunks of an interval count
// their digits, a scan turns counts into places, and every chunk writes its rows there. No place depends on the order
// in which threads happen to run.
#pragma once

#include "levels.cuh"

namespace hyperattn {

constexpr u32 SORT_THREADS = 256;
constexpr u32 SORT_WARPS = SORT_THREADS / 32;
// Rows of one thread, and of a chunk.
constexpr u32 SORT_THREAD_ROWS = 16;
constexpr u32 SORT_CHUNK = SORT_THREADS * SORT_THREAD_ROWS;
constexpr u32 SORT_DIGIT_BITS = 8;
constexpr u32 SORT_DIGITS = 1u << SORT_DIGIT_BITS;
static_assert(SORT_DIGITS == SORT_THREADS, "a thread scans one digit");

// Queries or keys.
struct SortSide {
    // [heads of the set][rows], like the orders.
    const u32 *ranks;
    // What the pass before wrote; null: the order in memory.
    const u32 *from;
    u32 *to;
    u32 rows;
    // Heads of the set.
    u32 heads;
};

struct SortParams {
    // Query intervals and key intervals of its rectangles are sorted, each by itself.
    Pass pass;
    SortSide query;
    SortSide key;
    // [heads, queries' first][rectangles][chunks][SORT_DIGITS].
    u32 *counters;
    // Chunks of the longest interval. With one, nothing is counted before rows are written.
    u32 chunks;
    // Lowest bit of this pass's digit.
    u32 shift;
};

static_assert(sizeof(SortParams) == 128, "the host's mirror of this struct counts on it");

// An interval of one head.
struct SortPlace {
    const u32 *ranks;
    const u32 *from;
    u32 *to;
    u32 start;
    u32 end;

    // `item` counts intervals: head * rectangles + rectangle.
    __device__ __forceinline__ SortPlace(const SortParams &params, u32 item)
    {
        u32 head = item / params.pass.count;
        bool is_query = head < params.query.heads;
        const SortSide &side = is_query ? params.query : params.key;
        u64 first = (u64)(is_query ? head : head - params.query.heads) * side.rows;
        ranks = side.ranks + first;
        from = side.from ? side.from + first : nullptr;
        to = side.to + first;
        Rectangle rectangle;
        bool exists = params.pass.rectangle(params.pass.first + item % params.pass.count, rectangle);
        start = !exists ? 0 : is_query ? rectangle.query_start : rectangle.key_start;
        end = !exists ? 0 : is_query ? rectangle.query_end : rectangle.key_end;
    }

    // Keeps one chunk of the interval.
    __device__ __forceinline__ void cut(u32 chunk)
    {
        u64 first = start + (u64)chunk * SORT_CHUNK;
        start = first < end ? (u32)first : end;
        end = end - start < SORT_CHUNK ? end : start + SORT_CHUNK;
    }

    __device__ __forceinline__ u32 position(u32 at) const { return from ? from[at] : at; }
};

// Exclusive sum over the block's threads; all of them call it.
__device__ __forceinline__ u32 sum_before(u32 value)
{
    __shared__ u32 warp_sums[SORT_WARPS];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, inclusive = value;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 other = __shfl_up_sync(0xFFFFFFFFu, inclusive, distance);
        inclusive += lane >= distance ? other : 0;
    }
    if (lane == 31)
        warp_sums[warp] = inclusive;
    __syncthreads();
    u32 before = inclusive - value;
    for (u32 other = 0; other < warp; other++)
        before += warp_sums[other];
    return before;
}

} // namespace hyperattn

// Counts the digits of every chunk. Grid: heads * rectangles * chunks; block SORT_THREADS.
extern "C" __global__ void __launch_bounds__(256) paper_sort_count(const __grid_constant__ hyperattn::SortParams params)
{
    using namespace hyperattn;
    __shared__ u32 counts[SORT_DIGITS];
    counts[threadIdx.x] = 0;
    __syncthreads();
    SortPlace place(params, blockIdx.x / params.chunks);
    place.cut(blockIdx.x % params.chunks);
#pragma unroll 4
    for (u32 at = place.start + threadIdx.x; at < place.end; at += SORT_THREADS)
        atomicAdd(&counts[place.ranks[place.position(at)] >> params.shift & (SORT_DIGITS - 1)], 1u);
    __syncthreads();
    params.counters[(u64)blockIdx.x * SORT_DIGITS + threadIdx.x] = counts[threadIdx.x];
}

// Replaces every count by the place of the chunk's first row with that digit. Grid: heads * rectangles; block
// SORT_THREADS.
extern "C" __global__ void __launch_bounds__(256) paper_sort_scan(const __grid_constant__ hyperattn::SortParams params)
{
    using namespace hyperattn;
    SortPlace place(params, blockIdx.x);
    u32 chunks = (place.end - place.start + SORT_CHUNK - 1) / SORT_CHUNK;
    u32 *counters = params.counters + (u64)blockIdx.x * params.chunks * SORT_DIGITS + threadIdx.x;
    u32 total = 0;
#pragma unroll 8
    for (u32 chunk = 0; chunk < chunks; chunk++)
        total += counters[(u64)chunk * SORT_DIGITS];
    u32 next = place.start + sum_before(total);
#pragma unroll 8
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        u32 count = counters[(u64)chunk * SORT_DIGITS];
        counters[(u64)chunk * SORT_DIGITS] = next;
        next += count;
    }
}

// Writes the rows of every chunk to their places. Grid: heads * rectangles * chunks; block SORT_THREADS.
extern "C" __global__ void __launch_bounds__(256)
    paper_sort_scatter(const __grid_constant__ hyperattn::SortParams params)
{
    using namespace hyperattn;
    // Rows of a warp with a digit, then those before the warp's first.
    __shared__ u32 counts[SORT_WARPS][SORT_DIGITS];
    // What a row's place in the sorted chunk lacks to its place in the interval, by digit.
    __shared__ u32 distance[SORT_DIGITS];
    __shared__ u32 first[SORT_DIGITS];
    __shared__ u32 sorted[SORT_CHUNK];
    __shared__ u8 sorted_digit[SORT_CHUNK];

    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    SortPlace place(params, blockIdx.x / params.chunks);
    u32 interval_start = place.start;
    place.cut(blockIdx.x % params.chunks);
    u32 length = place.end - place.start;
    if (length == 0)
        return;
#pragma unroll
    for (u32 i = 0; i < SORT_WARPS; i++)
        counts[i][threadIdx.x] = 0;
    __syncthreads();

    // A warp takes consecutive rows, 32 at a time. Digit 256 marks what is past the end.
    u32 position[SORT_THREAD_ROWS], digit[SORT_THREAD_ROWS], before[SORT_THREAD_ROWS];
    u32 at = warp * (SORT_CHUNK / SORT_WARPS) + lane;
#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++)
        position[i] = at + 32 * i < length ? place.position(place.start + at + 32 * i) : 0;
#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++) {
        bool valid = at + 32 * i < length;
        digit[i] = valid ? place.ranks[position[i]] >> params.shift & (SORT_DIGITS - 1) : SORT_DIGITS;
    }
#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++) {
        u32 alike = __match_any_sync(0xFFFFFFFFu, digit[i]);
        u32 earlier = __popc(alike & ((1u << lane) - 1));
        u32 *count = &counts[warp][digit[i] & (SORT_DIGITS - 1)];
        bool valid = digit[i] < SORT_DIGITS;
        before[i] = valid ? *count + earlier : 0;
        __syncwarp();
        if (valid && earlier == 0)
            *count += __popc(alike);
        __syncwarp();
    }
    __syncthreads();

    u32 total = 0;
#pragma unroll
    for (u32 i = 0; i < SORT_WARPS; i++) {
        u32 count = counts[i][threadIdx.x];
        counts[i][threadIdx.x] = total;
        total += count;
    }
    u32 start = sum_before(total);
    first[threadIdx.x] = start;
    u32 to = params.chunks > 1 ? params.counters[(u64)blockIdx.x * SORT_DIGITS + threadIdx.x] : interval_start + start;
    distance[threadIdx.x] = to - start;
    __syncthreads();

#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++) {
        if (digit[i] < SORT_DIGITS) {
            u32 slot = first[digit[i]] + counts[warp][digit[i]] + before[i];
            sorted[slot] = position[i];
            sorted_digit[slot] = (u8)digit[i];
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < length; i += SORT_THREADS)
        place.to[i + distance[sorted_digit[i]]] = sorted[i];
}
