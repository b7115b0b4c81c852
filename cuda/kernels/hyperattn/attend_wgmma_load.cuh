// The loading warpgroup of the Hopper attention kernel: draws tiles and fills the rings of queries, keys and values.
//
// A block of consecutive rows that all queries of the tile see is fetched by the copy engine. Any other block is
// gathered by the four warps: a lane looks up one key, eight lanes copy 128 bytes of a row. What no row of the tile may
// see is never read, its elements are 0.
#pragma once

#include "attend_wgmma_layout.cuh"
#include "barrier.cuh"
#include "convert.cuh"
#include "tma.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

// Waits with the whole warp: lanes that had come apart would stay so, and one that waits holds up one that has work.
__device__ __forceinline__ void warp_wait(u32 barrier, u32 parity)
{
    __syncwarp();
    barrier_wait(barrier, parity);
    __syncwarp();
}

// This warp's arrivals on a barrier, for its copies too.
__device__ __forceinline__ void warp_arrive(u32 barrier, u32 lane)
{
    __syncwarp();
    if (lane == 0)
        barrier_arrive(barrier, LOADER_ARRIVALS / LOADER_WARPS);
}

// The warp's arrivals, its copies' when they end: it does not wait for them. The consumers order them before what the
// tensor cores read.
__device__ __forceinline__ void warp_arrive_after_copies(u32 barrier, u32 lane)
{
    copies_arrive(barrier);
    __syncwarp();
    if (lane == 0)
        barrier_arrive(barrier);
}

// Address of 16 bytes of a row in a chunk.
__device__ __forceinline__ u32 swizzled(u32 chunk, u32 row, u32 part)
{
    return chunk + row * ROW_BYTES + ((part ^ (row & 7)) << 4);
}

// Issues copies of a warp's rows to a stage. Lane i names row i of the warp, or NO_ROW for zeros; `WHOLE` if all are
// rows and of all the chunks' elements. Copies of no bytes do not touch their address.
template <u32 WARP_ROWS, u32 CHUNKS, bool WHOLE>
__device__ __forceinline__ void copy_rows_as(u32 stage, u32 warp, u32 lane, u32 row, const char *from, i64 row_stride,
                                             u32 dim)
{
    constexpr u32 CHUNK_BYTES = WARP_ROWS * LOADER_WARPS * ROW_BYTES;
    u32 part = lane & 7;
    u32 first = lane >> 3;
    u32 given = WHOLE ? 0 : __ballot_sync(ALL_LANES, row != NO_ROW) >> first;
    from += part * 16;
    // Rows of odd steps lie in the swizzle's other half.
    u32 to = swizzled(stage, warp * WARP_ROWS + first, part);
    u32 to_odd = to ^ 64;
#pragma unroll
    for (u32 step = 0; step < WARP_ROWS / 4; ++step) {
        u32 source = __shfl_sync(ALL_LANES, row, 4 * step + first);
        const char *elements = from + source * row_stride;
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            bool copied = WHOLE || ((given >> (4 * step) & 1) && chunk * ROW_ELEMENTS + part * 8 < dim);
            copy_16_bytes((step % 2 ? to_odd : to) + step * 4 * ROW_BYTES + chunk * CHUNK_BYTES,
                          elements + chunk * ROW_BYTES, copied ? 16 : 0);
        }
    }
}

template <u32 WARP_ROWS, u32 CHUNKS>
__device__ __forceinline__ void copy_rows(u32 stage, u32 warp, u32 lane, u32 row, const char *from, i64 row_stride,
                                          u32 dim)
{
    if (__all_sync(ALL_LANES, row != NO_ROW || lane >= WARP_ROWS) && dim == CHUNKS * ROW_ELEMENTS)
        copy_rows_as<WARP_ROWS, CHUNKS, true>(stage, warp, lane, row, from, row_stride, dim);
    else
        copy_rows_as<WARP_ROWS, CHUNKS, false>(stage, warp, lane, row, from, row_stride, dim);
}

// Sets elements that are not finite to 0 in the rows that this warp has copied, each lane in what it copied itself.
// Returns a bit for each row that had one.
template <u32 TYPE, u32 WARP_ROWS, u32 CHUNKS>
__device__ __forceinline__ u32 take_out_not_finite(u32 stage, u32 warp, u32 lane)
{
    constexpr u32 CHUNK_BYTES = WARP_ROWS * LOADER_WARPS * ROW_BYTES;
    constexpr u32 EXPONENT = TYPE == BF16 ? 0x7f80 : 0x7c00;
    u32 found = 0;
#pragma unroll 1
    for (u32 step = 0; step < WARP_ROWS; step += 4) {
        u32 address = swizzled(stage, warp * WARP_ROWS + step + (lane >> 3), lane & 7);
        bool any = false;
#pragma unroll 1
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            u32 words[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                         : "r"(address + chunk * CHUNK_BYTES)
                         : "memory");
            bool here = false;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                if ((words[i] & EXPONENT) == EXPONENT) {
                    words[i] &= 0xffff0000;
                    here = true;
                }
                if ((words[i] >> 16 & EXPONENT) == EXPONENT) {
                    words[i] &= 0x0000ffff;
                    here = true;
                }
            }
            if (here)
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address + chunk * CHUNK_BYTES),
                             "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                             : "memory");
            any |= here;
        }
        u32 lanes = __ballot_sync(ALL_LANES, any);
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            found |= (lanes >> (8 * i) & 0xff ? 1u : 0u) << (step + i);
    }
    return found;
}

// One block after another of a tile's segments.
template <u32 KEYS> struct Blocks {
    Segment segment;
    // Keys of the segment without those that lie beyond all limits.
    u32 count = 0;
    // The block's first key in the segment, and the next block's.
    u32 start = 0;
    u32 next_start = 0;
    u32 next_segment;
    u32 end_segment;
    // The smallest and largest causal limit of the tile's rows.
    u32 lowest;
    u32 highest;

    __device__ __forceinline__ bool advance(const AttendParams &p)
    {
        while (next_start >= count) {
            if (next_segment == end_segment)
                return false;
            segment = p.segments[next_segment++];
            next_start = 0;
            count = segment.count;
            if ((segment.flags & SEGMENT_LIMITED) && !(segment.flags & SEGMENT_LISTED)) {
                u32 visible = highest > segment.first ? highest - segment.first : 0;
                count = visible < count ? visible : count;
            }
        }
        start = next_start;
        next_start += KEYS;
        return true;
    }

    // Whether the block is one of KEYS consecutive rows that all queries see.
    __device__ __forceinline__ bool plain() const
    {
        if ((segment.flags & (SEGMENT_LISTED | SEGMENT_SORTED | SEGMENT_EXTRA)) || count - start < KEYS)
            return false;
        u32 first = segment.first + start;
        bool hidden = segment.hidden_start < first + KEYS && segment.hidden_end > first;
        bool limited = (segment.flags & SEGMENT_LIMITED) && first + KEYS > lowest;
        return !hidden && !limited;
    }
};

// What the loaders note in a block's flags for themselves.
enum LoadFlags : u32 {
    // Fetched by the copy engine.
    LOAD_PLAIN = 16,
    LOAD_EXTRA = 32,
};

// A block with its keys looked up.
struct LoadBlock {
    // Also the consumers', but BLOCK_LAST.
    u32 flags;
    float log_weight;
    // Row of the lane's key, or of the first key if plain.
    u32 row;
    // Of the lane's key.
    u32 position;
};

template <u32 KEYS>
__device__ __forceinline__ LoadBlock look_up(const AttendParams &p, const Tile &tile, const Blocks<KEYS> &blocks,
                                             bool maps, u32 warp, u32 lane)
{
    constexpr u32 WARP_KEYS = KEYS / LOADER_WARPS;
    const Segment &segment = blocks.segment;
    LoadBlock block;
    block.flags = maps && blocks.plain() ? LOAD_PLAIN : BLOCK_GATHERED;
    block.log_weight = segment.log_weight;
    block.row = segment.first + blocks.start;
    block.position = 0;
    if (block.flags & LOAD_PLAIN)
        return block;
    if (segment.flags & SEGMENT_EXTRA)
        block.flags |= LOAD_EXTRA;

    u32 key = blocks.start + warp * WARP_KEYS + lane;
    bool seen = lane < WARP_KEYS && key < blocks.count;
    bool seen_by_all = true;
    block.row = NO_ROW;
    block.position = NO_ROW;
    if (seen && (segment.flags & SEGMENT_EXTRA)) {
        block.row = segment.first + key;
        block.position = 0;
    } else if (seen) {
        u32 position = p.position(segment, key);
        if (position >= segment.hidden_start && position < segment.hidden_end)
            seen = false;
        if (segment.flags & SEGMENT_LIMITED) {
            seen = seen && position < blocks.highest;
            seen_by_all = position < blocks.lowest;
        }
        if (seen) {
            block.row = p.key_row(tile, segment, position);
            block.position = position;
        }
    }
    if (!__all_sync(ALL_LANES, (seen && seen_by_all) || lane >= WARP_KEYS))
        block.flags |= BLOCK_MASKED;
    if (segment.flags & SEGMENT_LIMITED)
        block.flags |= BLOCK_LIMITED;
    return block;
}

// Smallest and largest causal limit of a tile's rows.
__device__ __forceinline__ void tile_limits(const AttendParams &p, const Tile &tile, u32 lane, u32 &lowest,
                                            u32 &highest)
{
    if (!(tile.flags & TILE_SORTED)) {
        lowest = p.limit(tile.first_query);
        highest = p.limit(tile.first_query + tile.rows - 1);
        return;
    }
    lowest = NO_ROW;
    highest = 0;
#pragma unroll
    for (u32 i = lane; i < TILE_ROWS; i += 32) {
        if (i < tile.rows) {
            u32 limit = p.limit(p.query_row(tile, i));
            lowest = min(lowest, limit);
            highest = max(highest, limit);
        }
    }
    lowest = __reduce_min_sync(ALL_LANES, lowest);
    highest = __reduce_max_sync(ALL_LANES, highest);
}

// The next tile that has rows; one thread calls it.
__device__ __forceinline__ u32 with_rows(const AttendParams &p, u32 number)
{
    while (number < p.tile_count && p.tiles[number].rows == 0)
        number = atomicAdd(p.next_tile, 1u);
    return number;
}

// Body of the four warps. A tile's number goes from thread 0 to the warps through a ring: it is written after the query
// stage of the tile before was free, so after all warps have read the number that QUERY_STAGES tiles earlier had.
template <u32 TYPE, u32 DIM>
__device__ __forceinline__ void load(const AttendParams &p, const TensorMap &k_map, const TensorMap &v_map,
                                     typename Shape<DIM>::Control &control, u32 data)
{
    using S = Shape<DIM>;
    static_assert(NUMBER_STAGES > S::QUERY_STAGES, "see above");
    u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    u32 lane = threadIdx.x % 32;
    bool drawer = threadIdx.x == 0;
    bool maps = k_map.words[0] != 0 && v_map.words[0] != 0;

    Ring<NUMBER_STAGES> number_ring;
    Ring<S::QUERY_STAGES> query_ring;
    Ring<S::KEY_STAGES> key_ring;
    Ring<S::KEY_STAGES> value_ring;

    u32 upcoming = 0;
    if (drawer) {
        if (maps) {
            tensor_map_prefetch(k_map);
            tensor_map_prefetch(v_map);
        }
        upcoming = atomicAdd(p.next_tile, 1u);
    }
    for (;;) {
        if (drawer) {
            control.number[number_ring.stage] = with_rows(p, upcoming);
            barrier_arrive(shared_address(&control.number_full[number_ring.stage]));
        }
        warp_wait(shared_address(&control.number_full[number_ring.stage]), number_ring.phase);
        u32 number = control.number[number_ring.stage];
        number_ring.advance();
        bool more = number < p.tile_count;
        if (drawer && more)
            upcoming = atomicAdd(p.next_tile, 1u);

        u32 query_full = shared_address(&control.query_full[query_ring.stage]);
        QueryStage &query = control.query[query_ring.stage];
        if (!more) {
            warp_wait(shared_address(&control.query_empty[query_ring.stage]), query_ring.phase ^ 1);
            if (drawer)
                query.rows = 0;
            warp_arrive(query_full, lane);
            break;
        }

        Tile tile = p.tiles[number];
        u32 query_number = warp * 32 + lane;
        u32 query_row = query_number < tile.rows ? p.query_row(tile, query_number) : NO_ROW;
        Blocks<S::KEYS> blocks;
        blocks.next_segment = tile.first_segment;
        blocks.end_segment = tile.first_segment + tile.segments;
        tile_limits(p, tile, lane, blocks.lowest, blocks.highest);
        u32 kv_head = p.kv_head(tile);

        warp_wait(shared_address(&control.query_empty[query_ring.stage]), query_ring.phase ^ 1);
        copy_rows<TILE_ROWS / LOADER_WARPS, S::CHUNKS>(data + query_ring.stage * S::QUERY_BYTES, warp, lane, query_row,
                                                       p.q.row(tile.batch, tile.head, 0), p.q.row_stride, p.head_dim);
        bool have = blocks.advance(p);
        query.row[query_number] = query_row;
        if (drawer) {
            query.batch = tile.batch;
            query.head = tile.head;
            query.rows = tile.rows;
            query.flags = tile.flags;
            query.has_keys = have;
            query.first_output = tile.first_query;
        }
        copies_commit();
        query_ring.advance();
        // Waits for the copies, unlike those of keys and values: the consumers would order them together with their
        // stores of outputs, which takes long.
        auto announce_queries = [&]() {
            copies_commit();
            copies_wait<1>();
            async_proxy_fence();
            warp_arrive(query_full, lane);
        };
        if (!have) {
            announce_queries();
            continue;
        }

        auto load_keys = [&](const LoadBlock &block, bool last) {
            u32 keys = data + S::KEYS_AT + key_ring.stage * S::KEY_BYTES;
            u32 full = shared_address(&control.key_full[key_ring.stage]);
            KeyStage<S::KEYS> &stage = control.key[key_ring.stage];
            warp_wait(shared_address(&control.key_empty[key_ring.stage]), key_ring.phase ^ 1);
            if (lane == 0)
                stage.flags[warp] = block.flags | (last ? BLOCK_LAST : 0u);
            if (drawer)
                stage.log_weight = block.log_weight;
            if (block.flags & LOAD_PLAIN) {
                if (drawer) {
                    barrier_expect(full, S::KEY_BYTES);
#pragma unroll
                    for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                        tensor_copy(keys + chunk * S::KEY_CHUNK_BYTES, k_map, full, chunk * ROW_ELEMENTS, block.row,
                                    kv_head, tile.batch);
                }
                warp_arrive(full, lane);
            } else {
                if (lane < S::WARP_KEYS)
                    stage.position[warp * S::WARP_KEYS + lane] = block.position;
                const char *from = block.flags & LOAD_EXTRA ? p.extra_keys : p.k.row(tile.batch, kv_head, 0);
                i64 stride = block.flags & LOAD_EXTRA ? (i64)p.head_dim * 2 : p.k.row_stride;
                copy_rows<S::WARP_KEYS, S::CHUNKS>(keys, warp, lane, block.row, from, stride, p.head_dim);
                warp_arrive_after_copies(full, lane);
            }
            key_ring.advance();
        };
        auto load_values = [&](const LoadBlock &block) {
            u32 values = data + S::VALUES_AT + value_ring.stage * S::KEY_BYTES;
            u32 full = shared_address(&control.value_full[value_ring.stage]);
            warp_wait(shared_address(&control.value_empty[value_ring.stage]), value_ring.phase ^ 1);
            if (block.flags & LOAD_PLAIN) {
                if (drawer) {
                    barrier_expect(full, S::KEY_BYTES);
#pragma unroll
                    for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                        tensor_copy(values + chunk * S::KEY_CHUNK_BYTES, v_map, full, chunk * ROW_ELEMENTS, block.row,
                                    kv_head, tile.batch);
                }
                warp_arrive(full, lane);
            } else {
                const char *from = block.flags & LOAD_EXTRA ? p.extra_values : p.v.row(tile.batch, kv_head, 0);
                i64 stride = block.flags & LOAD_EXTRA ? (i64)p.value_dim * 2 : p.v.row_stride;
                copy_rows<S::WARP_KEYS, S::CHUNKS>(values, warp, lane, block.row, from, stride, p.value_dim);
                if ((block.flags & (BLOCK_LIMITED | BLOCK_MASKED)) == (BLOCK_LIMITED | BLOCK_MASKED)) {
                    copies_commit();
                    copies_wait<0>();
                    u32 not_finite = take_out_not_finite<TYPE, S::WARP_KEYS, S::CHUNKS>(values, warp, lane);
                    ValueStage<S::KEYS> &stage = control.value[value_ring.stage];
                    if (not_finite && lane < S::WARP_KEYS) {
                        stage.row[warp * S::WARP_KEYS + lane] = block.row;
                        stage.position[warp * S::WARP_KEYS + lane] = block.position;
                    }
                    if (lane == 0)
                        stage.not_finite[warp] = not_finite;
                    async_proxy_fence();
                    warp_arrive(full, lane);
                } else {
                    if (lane == 0 && (block.flags & BLOCK_LIMITED))
                        control.value[value_ring.stage].not_finite[warp] = 0;
                    warp_arrive_after_copies(full, lane);
                }
            }
            value_ring.advance();
        };

        // A block's keys before the values of the block before: they are needed, and their stage is free, earlier.
        LoadBlock block = look_up(p, tile, blocks, maps, warp, lane);
        have = blocks.advance(p);
        load_keys(block, !have);
        announce_queries();
        while (have) {
            LoadBlock next = look_up(p, tile, blocks, maps, warp, lane);
            have = blocks.advance(p);
            load_keys(next, !have);
            load_values(block);
            block = next;
        }
        load_values(block);
    }
}

#endif

} // namespace hopper
} // namespace hyperattn
