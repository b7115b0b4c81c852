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

// Stages whose copies this warp has issued but not announced: copies of 16 bytes report their end to their thread only.
// At most two wait while a third is issued. A warp must not wait for a consumer before it has announced all of them.
struct Unannounced {
    u32 newer = 0;
    u32 older = 0;

    // A stage's barrier, after its copies.
    __device__ __forceinline__ void push(u32 barrier)
    {
        copies_commit();
        if (older) {
            copies_wait<2>();
            announce(older);
        }
        older = newer;
        newer = barrier;
    }

    __device__ __forceinline__ void flush()
    {
        if (!newer)
            return;
        copies_wait<0>();
        if (older)
            announce(older);
        announce(newer);
        older = newer = 0;
    }

    // Waits for a phase of a barrier.
    __device__ __forceinline__ void wait(u32 barrier, u32 parity)
    {
        if (__all_sync(ALL_LANES, barrier_test(barrier, parity)))
            return;
        flush();
        barrier_wait(barrier, parity);
    }

    __device__ __forceinline__ static void announce(u32 barrier)
    {
        async_proxy_fence();
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(barrier);
    }
};

// Address of 16 bytes of a row in a chunk.
__device__ __forceinline__ u32 swizzled(u32 chunk, u32 row, u32 part)
{
    return chunk + row * ROW_BYTES + ((part ^ (row & 7)) << 4);
}

// Issues copies of a warp's rows to a stage. Lane i names row i of the warp, or NO_ROW for zeros.
template <u32 WARP_ROWS, u32 CHUNKS>
__device__ __forceinline__ void copy_rows(u32 stage, u32 warp, u32 lane, u32 row, const char *from, i64 row_stride,
                                          u32 dim)
{
    constexpr u32 CHUNK_BYTES = WARP_ROWS * LOADER_WARPS * ROW_BYTES;
    u32 part = lane & 7;
#pragma unroll 2
    for (u32 step = 0; step < WARP_ROWS; step += 4) {
        u32 within = step + (lane >> 3);
        u32 source = __shfl_sync(ALL_LANES, row, within);
        const char *elements = source == NO_ROW ? from : from + source * row_stride + part * 16;
        u32 to = swizzled(stage, warp * WARP_ROWS + within, part);
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            bool valid = source != NO_ROW && chunk * ROW_ELEMENTS + part * 8 < dim;
            copy_16_bytes(to + chunk * CHUNK_BYTES, valid ? elements + chunk * ROW_BYTES : from, valid ? 16 : 0);
        }
    }
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

// A block with its keys looked up.
struct LoadBlock {
    bool plain;
    bool extra;
    // Of the block for the consumers, but BLOCK_LAST.
    u32 flags;
    float log_weight;
    // Row of the lane's key, or of the first key if `plain`.
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
    block.plain = maps && blocks.plain();
    block.extra = segment.flags & SEGMENT_EXTRA;
    block.flags = 0;
    block.log_weight = segment.log_weight;
    block.row = segment.first + blocks.start;
    block.position = 0;
    if (block.plain)
        return block;

    u32 key = blocks.start + warp * WARP_KEYS + lane;
    bool seen = lane < WARP_KEYS && key < blocks.count;
    bool seen_by_all = true;
    block.row = NO_ROW;
    block.position = NO_ROW;
    if (seen && block.extra) {
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
    Ring<S::KEY_STAGES> ring;
    Unannounced unannounced;

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
        unannounced.wait(shared_address(&control.number_full[number_ring.stage]), number_ring.phase);
        u32 number = control.number[number_ring.stage];
        number_ring.advance();
        bool more = number < p.tile_count;
        if (drawer && more)
            upcoming = atomicAdd(p.next_tile, 1u);

        u32 query_full = shared_address(&control.query_full[query_ring.stage]);
        QueryStage &query = control.query[query_ring.stage];
        if (!more) {
            unannounced.flush();
            barrier_wait(shared_address(&control.query_empty[query_ring.stage]), query_ring.phase ^ 1);
            if (drawer)
                query.rows = 0;
            if (lane == 0)
                barrier_arrive(query_full);
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

        // The copies of the tile before have had time to arrive.
        unannounced.flush();
        unannounced.wait(shared_address(&control.query_empty[query_ring.stage]), query_ring.phase ^ 1);
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
        unannounced.push(query_full);
        query_ring.advance();

        LoadBlock next;
        if (have)
            next = look_up(p, tile, blocks, maps, warp, lane);
        while (have) {
            LoadBlock block = next;
            have = blocks.advance(p);

            u32 keys = data + S::KEYS_AT + ring.stage * S::KEY_BYTES;
            u32 values = data + S::VALUES_AT + ring.stage * S::KEY_BYTES;
            u32 key_full = shared_address(&control.key_full[ring.stage]);
            u32 value_full = shared_address(&control.value_full[ring.stage]);
            u32 value_empty = shared_address(&control.value_empty[ring.stage]);
            KeyStage<S::KEYS> &key_stage = control.key[ring.stage];
            ValueStage<S::KEYS> &value_stage = control.value[ring.stage];

            unannounced.wait(shared_address(&control.key_empty[ring.stage]), ring.phase ^ 1);
            if (lane == 0)
                key_stage.flags[warp] = block.flags | (have ? 0u : BLOCK_LAST);
            if (drawer)
                key_stage.log_weight = block.log_weight;
            if (block.plain) {
                if (drawer) {
                    barrier_arrive_expect(key_full, S::KEY_BYTES);
#pragma unroll
                    for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                        tensor_copy(keys + chunk * S::KEY_CHUNK_BYTES, k_map, key_full, chunk * ROW_ELEMENTS, block.row,
                                    kv_head, tile.batch);
                } else if (lane == 0) {
                    barrier_arrive(key_full);
                }
                unannounced.wait(value_empty, ring.phase ^ 1);
                if (drawer) {
                    barrier_arrive_expect(value_full, S::KEY_BYTES);
#pragma unroll
                    for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                        tensor_copy(values + chunk * S::KEY_CHUNK_BYTES, v_map, value_full, chunk * ROW_ELEMENTS,
                                    block.row, kv_head, tile.batch);
                } else if (lane == 0) {
                    barrier_arrive(value_full);
                }
            } else {
                u32 place = warp * S::WARP_KEYS + lane;
                if (lane < S::WARP_KEYS)
                    key_stage.position[place] = block.position;
                const char *from = block.extra ? p.extra_keys : p.k.row(tile.batch, kv_head, 0);
                i64 stride = block.extra ? (i64)p.head_dim * 2 : p.k.row_stride;
                copy_rows<S::WARP_KEYS, S::CHUNKS>(keys, warp, lane, block.row, from, stride, p.head_dim);
                unannounced.push(key_full);

                unannounced.wait(value_empty, ring.phase ^ 1);
                from = block.extra ? p.extra_values : p.v.row(tile.batch, kv_head, 0);
                stride = block.extra ? (i64)p.value_dim * 2 : p.v.row_stride;
                copy_rows<S::WARP_KEYS, S::CHUNKS>(values, warp, lane, block.row, from, stride, p.value_dim);
                unannounced.push(value_full);
                if (block.flags & BLOCK_LIMITED) {
                    u32 not_finite = 0;
                    if (block.flags & BLOCK_MASKED) {
                        copies_wait<0>();
                        not_finite = take_out_not_finite<TYPE, S::WARP_KEYS, S::CHUNKS>(values, warp, lane);
                        if (not_finite && lane < S::WARP_KEYS) {
                            value_stage.row[place] = block.row;
                            value_stage.position[place] = block.position;
                        }
                    }
                    if (lane == 0)
                        value_stage.not_finite[warp] = not_finite;
                    if (block.flags & BLOCK_MASKED)
                        unannounced.flush();
                }
            }
            ring.advance();
            if (have)
                next = look_up(p, tile, blocks, maps, warp, lane);
        }
    }
}

#endif

} // namespace hopper
} // namespace hyperattn
