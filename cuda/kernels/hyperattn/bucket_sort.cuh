// Algorithm 1, second half: stable counting sorts by (rank, position) of queries and keys of all heads at once, for the
// rectangles of all levels of a causal square and one rectangle besides. Rows are cut in cells, which are no longer
// than a leaf, so that an interval of any level is some cells that follow each other, and a cell is in at most one
// interval of an order. Ranks are sorted by one digit per pass, from the lowest: cells count their digits, a scan turns
// the counts of an interval into places, and every cell writes its rows there, for the lowest digit to all orders. No
// place depends on the order in which threads happen to run.
#pragma once

#include "levels.cuh"

namespace hyperattn {

constexpr u32 SORT_THREADS = 256;
constexpr u32 SORT_WARPS = SORT_THREADS / 32;
// Rows of one thread, and of a cell at most.
constexpr u32 SORT_THREAD_ROWS = 16;
constexpr u32 SORT_CELL = SORT_THREADS * SORT_THREAD_ROWS;
constexpr u32 SORT_DIGIT_BITS = 8;
constexpr u32 SORT_DIGITS = 1u << SORT_DIGIT_BITS;
static_assert(SORT_DIGITS == SORT_THREADS, "a thread scans one digit");

// Queries or keys.
struct SortSide {
    // [heads of the set][rows].
    const u32 *ranks;
    // [order][heads of the set][rows]: what the pass before wrote; null: the order in memory, for all orders.
    const u32 *from;
    u32 *to;
    u32 rows;
    // Heads of the set.
    u32 heads;
    // Rows of the rectangle besides, where they are not the square's.
    u32 rest_start;
    u32 rest_end;
};

struct SortParams {
    // Order number l is of level l: of its intervals' second halves for queries, of their first halves for keys.
    Square square;
    SortSide query;
    SortSide key;
    // [order; one for all if `from` is null][heads, queries' first][cells][SORT_DIGITS].
    u32 *counts;
    // [order][heads][cells][SORT_DIGITS].
    u32 *places;
    u32 levels;
    // `levels`, or one more, which is of the rectangle besides.
    u32 orders;
    // Of the square: so many of each leaf.
    u32 leaf_cells;
    // Of a head: those of the square, then those of the rest.
    u32 square_cells;
    u32 cells;
    // Lowest bit of this pass's digit.
    u32 shift;

    __device__ __forceinline__ u32 heads() const { return query.heads + key.heads; }
    // Orders that have counts of their own.
    __device__ __forceinline__ u32 sources() const { return query.from ? orders : 1; }
};

static_assert(sizeof(SortParams) == 136, "the host's mirror of this struct counts on it");

// One side of one head.
struct SortRows {
    const SortSide &side;
    bool is_query;
    u32 side_head;

    // `head` counts queries' heads first.
    __device__ __forceinline__ SortRows(const SortParams &params, u32 head)
        : side(head < params.query.heads ? params.query : params.key), is_query(head < params.query.heads),
          side_head(head < params.query.heads ? head : head - params.query.heads)
    {
    }

    __device__ __forceinline__ u64 first(u32 order) const { return ((u64)order * side.heads + side_head) * side.rows; }
    __device__ __forceinline__ const u32 *ranks() const { return side.ranks + first(0); }
    // Null for the order in memory.
    __device__ __forceinline__ const u32 *from(u32 order) const
    {
        return side.from ? side.from + first(order) : nullptr;
    }
    __device__ __forceinline__ u32 *to(u32 order) const { return side.to + first(order); }
    __device__ __forceinline__ u32 square_start(const Square &square) const
    {
        return is_query ? square.query_start : square.key_start;
    }
    __device__ __forceinline__ bool has_rest() const { return side.rest_start < side.rest_end; }
};

// Rows [start, end), and what tells the orders that they are in.
struct SortCell {
    u32 start;
    u32 end;
    // Of the square: the leaf's number, and the level at which it stopped dividing.
    bool in_square;
    u32 leaf;
    u32 stopped;

    __device__ __forceinline__ SortCell(const SortParams &params, const SortRows &rows, u32 number)
    {
        in_square = number < params.square_cells;
        u32 piece = number - params.square_cells;
        start = rows.side.rest_start, end = rows.side.rest_end;
        leaf = stopped = 0;
        if (in_square) {
            leaf = number / params.leaf_cells;
            piece = number % params.leaf_cells;
            u32 length;
            params.square.interval(params.levels, leaf, start, length, stopped);
            // An interval that stopped early is counted once, at its first descendant.
            bool repeats = leaf & ((1u << (params.levels - stopped)) - 1);
            start += rows.square_start(params.square);
            end = repeats ? start : start + length;
        }
        u64 first = start + (u64)piece * SORT_CELL;
        start = first < end ? (u32)first : end;
        end = end - start < SORT_CELL ? end : start + SORT_CELL;
    }

    // Whether the rows have places in an order.
    __device__ __forceinline__ bool is_in(const SortParams &params, const SortRows &rows, u32 order) const
    {
        if (order == params.levels)
            return in_square != rows.has_rest();
        bool second_half = leaf >> (params.levels - 1 - order) & 1;
        return in_square && order < stopped && second_half == rows.is_query;
    }
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

// Counts the digits of every cell. Grid: sources * heads * cells; block SORT_THREADS.
extern "C" __global__ void __launch_bounds__(256) paper_sort_count(const __grid_constant__ hyperattn::SortParams params)
{
    using namespace hyperattn;
    __shared__ u32 counts[SORT_DIGITS];
    u32 item = blockIdx.x / params.cells, order = item / params.heads();
    SortRows rows(params, item % params.heads());
    SortCell cell(params, rows, blockIdx.x % params.cells);
    const u32 *ranks = rows.ranks(), *from = rows.from(order);
    if (from && !cell.is_in(params, rows, order))
        return;
    counts[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 4
    for (u32 at = cell.start + threadIdx.x; at < cell.end; at += SORT_THREADS)
        atomicAdd(&counts[ranks[from ? from[at] : at] >> params.shift & (SORT_DIGITS - 1)], 1u);
    __syncthreads();
    params.counts[(u64)blockIdx.x * SORT_DIGITS + threadIdx.x] = counts[threadIdx.x];
}

// Turns the counts of the cells of one interval into the places of their first rows with each digit. Grid: heads *
// intervals, which are those of all levels, 2^levels - 1, and the rectangle besides if it is sorted; block
// SORT_THREADS.
extern "C" __global__ void __launch_bounds__(256) paper_sort_scan(const __grid_constant__ hyperattn::SortParams params)
{
    using namespace hyperattn;
    u32 intervals = (1u << params.levels) - 1 + (params.orders - params.levels);
    u32 head = blockIdx.x / intervals, number = blockIdx.x % intervals + 1;
    SortRows rows(params, head);
    // Interval `number` - 2^level of a level; behind the last level's comes the rectangle besides.
    u32 order = 31 - __clz(number), first_cell = rows.has_rest() ? params.square_cells : 0;
    u32 end_cell = rows.has_rest() ? params.cells : params.square_cells;
    if (order < params.levels) {
        u32 half = (number - (1u << order)) * 2 + rows.is_query, leaves = 1u << (params.levels - 1 - order);
        first_cell = half * leaves * params.leaf_cells;
        end_cell = first_cell + leaves * params.leaf_cells;
    }
    SortCell first(params, rows, first_cell);
    if (!first.is_in(params, rows, order))
        return;
    u64 of_head = (u64)params.cells * SORT_DIGITS, place = ((u64)order * params.heads() + head) * of_head + threadIdx.x;
    const u32 *counts = params.counts + (params.sources() > 1 ? place : head * of_head + threadIdx.x);
    u32 *places = params.places + place;
    u32 total = 0;
#pragma unroll 8
    for (u32 cell = first_cell; cell < end_cell; cell++)
        total += counts[(u64)cell * SORT_DIGITS];
    u32 next = first.start + sum_before(total);
#pragma unroll 8
    for (u32 cell = first_cell; cell < end_cell; cell++) {
        places[(u64)cell * SORT_DIGITS] = next;
        next += counts[(u64)cell * SORT_DIGITS];
    }
}

// Writes the rows of every cell to their places. Grid: sources * heads * cells; block SORT_THREADS.
extern "C" __global__ void __launch_bounds__(256)
    paper_sort_scatter(const __grid_constant__ hyperattn::SortParams params)
{
    using namespace hyperattn;
    // Rows of a warp with a digit, then those before the warp's first.
    __shared__ u32 counts[SORT_WARPS][SORT_DIGITS];
    // What a row's place in the sorted cell lacks to its place in the interval, by digit.
    __shared__ u32 distance[SORT_DIGITS];
    __shared__ u32 first[SORT_DIGITS];
    __shared__ u32 sorted[SORT_CELL];
    __shared__ u8 sorted_digit[SORT_CELL];

    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 item = blockIdx.x / params.cells, number = blockIdx.x % params.cells;
    u32 source = item / params.heads(), head = item % params.heads();
    SortRows rows(params, head);
    SortCell cell(params, rows, number);
    const u32 *ranks = rows.ranks(), *from = rows.from(source);
    u32 length = cell.end - cell.start;
    if (length == 0 || (from && !cell.is_in(params, rows, source)))
        return;
#pragma unroll
    for (u32 i = 0; i < SORT_WARPS; i++)
        counts[i][threadIdx.x] = 0;
    __syncthreads();

    // A warp takes consecutive rows, 32 at a time. Digit 256 marks what is past the end.
    u32 position[SORT_THREAD_ROWS], digit[SORT_THREAD_ROWS], before[SORT_THREAD_ROWS];
    u32 at = warp * (SORT_CELL / SORT_WARPS) + lane;
#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++) {
        u32 place = cell.start + at + 32 * i;
        position[i] = at + 32 * i >= length ? 0 : from ? from[place] : place;
    }
#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++) {
        bool valid = at + 32 * i < length;
        digit[i] = valid ? ranks[position[i]] >> params.shift & (SORT_DIGITS - 1) : SORT_DIGITS;
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
    __syncthreads();

#pragma unroll
    for (u32 i = 0; i < SORT_THREAD_ROWS; i++) {
        if (digit[i] < SORT_DIGITS) {
            u32 slot = first[digit[i]] + counts[warp][digit[i]] + before[i];
            sorted[slot] = position[i];
            sorted_digit[slot] = (u8)digit[i];
        }
    }
    u32 first_order = from ? source : 0, end_order = from ? source + 1 : params.orders;
    for (u32 order = first_order; order < end_order; order++) {
        if (!cell.is_in(params, rows, order))
            continue;
        u64 cell_number = ((u64)order * params.heads() + head) * params.cells + number;
        const u32 *places = params.places + cell_number * SORT_DIGITS;
        __syncthreads();
        distance[threadIdx.x] = places[threadIdx.x] - start;
        __syncthreads();
        u32 *to = rows.to(order);
        for (u32 i = threadIdx.x; i < length; i += SORT_THREADS)
            to[i + distance[sorted_digit[i]]] = sorted[i];
    }
}
