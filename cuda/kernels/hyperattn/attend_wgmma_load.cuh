// The loading warpgroup of the Hopper attention kernel: draws tiles and fills the rings of queries, keys and values.
//
// A block of consecutive rows that all queries of the tile see is fetched by the copy engine. Any other block is
// gathered by the four warps: a lane looks up one key, eight lanes copy 128 bytes of a row. What no row of the tile may
// see is never read, its elements are 0.
//
// What is read to know what to copy is requested while something else is copied, and used afterwards: a block's keys
// are looked up a block earlier, and the next tile is looked at one step per block, see look_ahead().
#pragma once

#include "attend_wgmma_layout.cuh"
#include "barrier.cuh"
#include "convert.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

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
    // What follows from the lane is made anew each time, there are no registers to keep it.
    lane = opaque(lane);
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

// How many stages of a ring a warp has been through, which tells its place. One register instead of a Ring's two.
template <u32 STAGES> struct Passed {
    u32 count = 0;
    static_assert((STAGES & (STAGES - 1)) == 0, "divided by shifts");

    __device__ __forceinline__ u32 stage() const { return count % STAGES; }
    __device__ __forceinline__ u32 phase() const { return count / STAGES % 2; }
};

// Registers are scarce. A warp holds words of structs with a lane one of them: those of a tile, and those of up to five
// of its segments.
constexpr u32 TILE_WORDS = sizeof(Tile) / 4;
constexpr u32 SEGMENT_WORDS = sizeof(Segment) / 4;
constexpr u32 HELD_SEGMENTS = 32 / SEGMENT_WORDS;
constexpr u32 HELD_WORDS = HELD_SEGMENTS * SEGMENT_WORDS;
// The lanes that hold segments' flags.
constexpr u32 SEGMENT_FLAGS_LANES = 0x04104104;
// Words that are added to a tile's: what warps want to know besides.
enum TileWord : u32 {
    TILE_BATCH = 0,
    TILE_HEAD = 1,
    TILE_QUERIES = 3,
    TILE_FIRST_SEGMENT = 5,
    TILE_SEGMENTS = 6,
    TILE_KV_HEAD = 8,
    // Counted through the batch.
    TILE_FLAT_KV_HEAD = 9,
    // The smallest and largest causal limit of the tile's rows.
    TILE_LOWEST_LIMIT = 10,
    TILE_HIGHEST_LIMIT = 11,
};

static_assert(TILE_WORDS == 8 && SEGMENT_WORDS == 6 && HELD_SEGMENTS == 5, "see the mask and the words' numbers");

__device__ __forceinline__ u32 word_of(u32 words, u32 lane) { return __shfl_sync(ALL_LANES, words, lane); }

__device__ __forceinline__ Tile tile_of(u32 words)
{
    return {word_of(words, 0), word_of(words, 1), word_of(words, 2), word_of(words, 3),
            word_of(words, 4), word_of(words, 5), word_of(words, 6), 0};
}

// The lane's word of segments number `first` to `end`, as many as are held.
__device__ __forceinline__ u32 segment_word(const AttendParams &p, u32 first, u32 end, u32 lane)
{
    if (lane >= HELD_WORDS || lane / SEGMENT_WORDS >= end - first)
        return 0;
    return ((const u32 *)(p.segments + first))[lane];
}

// One block after another of a tile's segments.
template <u32 KEYS> struct Blocks {
    // Of the segment.
    u32 first;
    u32 flags;
    // Keys of the segment without those that lie beyond all limits.
    u32 count;
    // The next block's first key in the segment.
    u32 next_start;
    u32 next_segment;
    // Words of several segments, and the number of this one's first word.
    u32 words;
    u32 word;
    u32 tile;

    __device__ __forceinline__ float log_weight() const { return __uint_as_float(word_of(words, word + 3)); }
    __device__ __forceinline__ u32 hidden_start() const { return word_of(words, word + 4); }
    __device__ __forceinline__ u32 hidden_end() const { return word_of(words, word + 5); }
    __device__ __forceinline__ u32 lowest_limit() const { return word_of(tile, TILE_LOWEST_LIMIT); }
    __device__ __forceinline__ u32 highest_limit() const { return word_of(tile, TILE_HIGHEST_LIMIT); }
    // The block's first key in the segment.
    __device__ __forceinline__ u32 start() const { return next_start - KEYS; }

    __device__ __forceinline__ void begin(u32 tile_words, u32 segment_words)
    {
        tile = tile_words;
        next_segment = word_of(tile, TILE_FIRST_SEGMENT);
        words = segment_words;
        // One segment before.
        word = 0u - SEGMENT_WORDS;
        count = next_start = 0;
    }

    __device__ __forceinline__ bool advance(const AttendParams &p, u32 lane)
    {
        while (next_start >= count) {
            u32 end_segment = word_of(tile, TILE_FIRST_SEGMENT) + word_of(tile, TILE_SEGMENTS);
            if (next_segment == end_segment)
                return false;
            word += SEGMENT_WORDS;
            if (word == HELD_WORDS) {
                words = segment_word(p, next_segment, end_segment, lane);
                word = 0;
            }
            ++next_segment;
            next_start = 0;
            first = word_of(words, word);
            count = word_of(words, word + 1);
            flags = word_of(words, word + 2);
            if ((flags & (SEGMENT_LIMITED | SEGMENT_LISTED)) == SEGMENT_LIMITED) {
                u32 highest = highest_limit();
                u32 visible = highest > first ? highest - first : 0;
                count = visible < count ? visible : count;
            }
        }
        next_start += KEYS;
        return true;
    }

    // How many blocks from this one on have KEYS consecutive rows that all queries see.
    __device__ __forceinline__ u32 plain() const
    {
        if (flags & (SEGMENT_LISTED | SEGMENT_SORTED | SEGMENT_EXTRA))
            return 0;
        u32 at = first + start(), end = first + count;
        if (flags & SEGMENT_LIMITED)
            end = min(end, lowest_limit());
        u32 hidden_from = hidden_start();
        if (hidden_end() > at)
            end = min(end, hidden_from);
        return end > at ? (end - at) / KEYS : 0;
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

// What is known of the next tile; each step uses what the one before has requested.
enum Ahead : u32 {
    // Thread 0 has asked for its number.
    AHEAD_DRAWN,
    // The number is in the ring.
    AHEAD_NUMBERED,
    // The tile's words were requested.
    AHEAD_TILE,
    // Its query rows and its first segments were requested.
    AHEAD_READY,
    // Its first block is being looked up.
    AHEAD_BEGUN,
    // It has queries only.
    AHEAD_EMPTY,
    // There is no next tile.
    AHEAD_NONE,
};

// The body of the four loading warps.
//
// All warps take the same steps in the same order. A warp waits for a stage to be emptied by the consumers, who wait
// only for what is loaded earlier in this order; and for a tile's number, which thread 0 writes at an earlier step and
// for which it waits until all warps have read the number that was in its place. So the warp that is furthest behind
// always gets on.
template <u32 TYPE, u32 DIM> struct Loader {
    using S = Shape<DIM>;

    const AttendParams &p;
    const TensorMap &k_map;
    const TensorMap &v_map;
    typename S::Control &control;
    u32 data;
    u32 warp;
    u32 lane;
    // Draws the tiles, and starts the copy engine.
    bool drawer;
    bool maps;

    Passed<NUMBER_STAGES> numbers;
    Passed<S::QUERY_STAGES> queries;
    // Values follow keys.
    Passed<S::KEY_STAGES> keys;

    // The next tile as far as it is known: thread 0's draw, then the tile's words; the lane's query row, and the words
    // of its first segments.
    u32 ahead = AHEAD_DRAWN;
    u32 words = 0;
    u32 query_row = NO_ROW;
    u32 segment_words = 0;

    // The block that is being looked up, and what was requested for the lane's key.
    Blocks<S::KEYS> blocks;
    // The copy engine can fetch as many blocks from this one on.
    u32 plain = 0;
    u32 position = NO_ROW;
    u32 key_row = NO_ROW;

    // Words of the tile that is being loaded.
    u32 loading = 0;

    __device__ __forceinline__ Loader(const AttendParams &params, const TensorMap &keys, const TensorMap &values,
                                      typename S::Control &shared_control, u32 shared_data)
        : p(params), k_map(keys), v_map(values), control(shared_control), data(shared_data),
          warp(__shfl_sync(ALL_LANES, threadIdx.x / 32, 0)), lane(threadIdx.x % 32), drawer(threadIdx.x == 0),
          maps(keys.words[0] != 0 && values.words[0] != 0)
    {
    }

    // Passes the drawn number to the warps.
    __device__ __forceinline__ void put_number()
    {
        if (drawer) {
            barrier_wait(shared_address(&control.number_empty[numbers.stage()]), numbers.phase() ^ 1);
            control.number[numbers.stage()] = words;
            barrier_arrive(shared_address(&control.number_full[numbers.stage()]));
        }
        __syncwarp();
    }

    // Requests the words of the tile whose number comes next.
    __device__ __forceinline__ void take_number()
    {
        warp_wait(shared_address(&control.number_full[numbers.stage()]), numbers.phase());
        u32 number = control.number[numbers.stage()];
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared_address(&control.number_empty[numbers.stage()]));
        ++numbers.count;
        ahead = AHEAD_NONE;
        if (number < p.tile_count) {
            words = ((const u32 *)(p.tiles + number))[lane % TILE_WORDS];
            ahead = AHEAD_TILE;
        }
    }

    __device__ __forceinline__ void request_rows()
    {
        // Tiles without rows are passed over.
        while (word_of(words, TILE_QUERIES) == 0) {
            if (drawer)
                words = atomicAdd(p.next_tile, 1u);
            put_number();
            take_number();
            if (ahead == AHEAD_NONE)
                return;
        }
        Tile tile = tile_of(words);
        u32 i = warp * 32 + lane;
        query_row = i < tile.rows ? p.query_row(tile, i) : NO_ROW;
        segment_words = segment_word(p, tile.first_segment, tile.first_segment + tile.segments, lane);
        ahead = AHEAD_READY;
    }

    // One step towards the next tile.
    __device__ __forceinline__ void look_ahead()
    {
        if (ahead == AHEAD_DRAWN) {
            put_number();
            ahead = AHEAD_NUMBERED;
        } else if (ahead == AHEAD_NUMBERED) {
            take_number();
        } else if (ahead == AHEAD_TILE) {
            request_rows();
        }
    }

    // Goes to the first block of the next tile, if there is one.
    __device__ __forceinline__ void begin_blocks()
    {
        if (ahead == AHEAD_NONE)
            return;
        Tile tile = tile_of(words);
        u32 lowest = 0, highest = 0;
        bool limited = __ballot_sync(ALL_LANES, segment_words & SEGMENT_LIMITED) & SEGMENT_FLAGS_LANES;
        if (limited || tile.segments > HELD_SEGMENTS)
            tile_limits(p, tile, lane, lowest, highest);
        u32 kv_head = p.kv_head(tile), flat_kv_head = tile.batch * p.heads_kv() + kv_head;
        u32 tile_words = lane == TILE_KV_HEAD         ? kv_head
                         : lane == TILE_FLAT_KV_HEAD  ? flat_kv_head
                         : lane == TILE_LOWEST_LIMIT  ? lowest
                         : lane == TILE_HIGHEST_LIMIT ? highest
                                                      : words;
        blocks.begin(tile_words, segment_words);
        ahead = AHEAD_EMPTY;
        if (blocks.advance(p, lane)) {
            ahead = AHEAD_BEGUN;
            look_up();
        }
    }

    // Number in the segment of the lane's key.
    __device__ __forceinline__ u32 lane_key() const { return blocks.start() + warp * S::WARP_KEYS + lane; }

    __device__ __forceinline__ bool is_key() const { return lane < S::WARP_KEYS && lane_key() < blocks.count; }

    // Requests what is to be read of the block's keys. looked_up() waits for it, before `blocks` moves on.
    __device__ __forceinline__ void look_up()
    {
        u32 flags = blocks.flags, at = blocks.first + lane_key();
        plain = maps ? blocks.plain() : 0;
        u32 flat_kv_head = word_of(blocks.tile, TILE_FLAT_KV_HEAD);
        if (!(flags & (SEGMENT_LISTED | SEGMENT_SORTED)) || !is_key())
            return;
        if (flags & SEGMENT_LISTED)
            position = p.positions[at];
        if (flags & SEGMENT_SORTED)
            key_row = flags & SEGMENT_LISTED ? p.listed_rows[at] : p.key_order[(u64)flat_kv_head * p.n_k + at];
    }

    __device__ __forceinline__ LoadBlock looked_up() const
    {
        u32 flags = blocks.flags;
        LoadBlock block;
        block.flags = plain ? LOAD_PLAIN : BLOCK_GATHERED;
        block.log_weight = blocks.log_weight();
        block.row = blocks.first + blocks.start();
        block.position = 0;
        if (plain)
            return block;
        u32 at = blocks.first + lane_key();
        u32 hidden_start = blocks.hidden_start(), hidden_end = blocks.hidden_end();
        bool seen = is_key();
        bool seen_by_all = true;
        if (flags & SEGMENT_EXTRA) {
            block.flags |= LOAD_EXTRA;
            block.row = at;
        } else {
            block.position = flags & SEGMENT_LISTED ? position : at;
            block.row = flags & SEGMENT_SORTED ? key_row : block.position;
            seen = seen && !(block.position >= hidden_start && block.position < hidden_end);
            if (flags & SEGMENT_LIMITED) {
                u32 lowest = blocks.lowest_limit(), highest = blocks.highest_limit();
                seen = seen && block.position < highest;
                seen_by_all = block.position < lowest;
            }
        }
        if (!seen)
            block.row = block.position = NO_ROW;
        if (!__all_sync(ALL_LANES, (seen && seen_by_all) || lane >= S::WARP_KEYS))
            block.flags |= BLOCK_MASKED;
        if (flags & SEGMENT_LIMITED)
            block.flags |= BLOCK_LIMITED;
        return block;
    }

    __device__ __forceinline__ void load_queries(bool has_keys)
    {
        Tile tile = tile_of(blocks.tile);
        QueryStage &query = control.query[queries.stage()];
        warp_wait(shared_address(&control.query_empty[queries.stage()]), queries.phase() ^ 1);
        copy_rows<TILE_ROWS / LOADER_WARPS, S::CHUNKS>(data + queries.stage() * S::QUERY_BYTES, warp, lane, query_row,
                                                       p.q.row(tile.batch, tile.head, 0), p.q.row_stride, p.head_dim);
        copies_commit();
        query.row[warp * 32 + lane] = query_row;
        if (drawer) {
            query.batch = tile.batch;
            query.head = tile.head;
            query.rows = tile.rows;
            query.flags = tile.flags;
            query.has_keys = has_keys;
            query.first_output = tile.first_query;
        }
    }

    // Hands the queries over. Waits for their copies, unlike for those of keys and values: the consumers would order
    // them together with their stores of outputs, which takes long. What was issued since does not matter.
    __device__ __forceinline__ void announce_queries()
    {
        copies_commit();
        copies_wait<1>();
        async_proxy_fence();
        warp_arrive(shared_address(&control.query_full[queries.stage()]), lane);
        ++queries.count;
    }

    __device__ __forceinline__ u32 batch() const { return word_of(loading, TILE_BATCH); }
    __device__ __forceinline__ u32 kv_head() const { return word_of(loading, TILE_KV_HEAD); }

    // Has the copy engine fetch a plain block. With all `arrivals` nobody else arrives.
    __device__ __forceinline__ void fetch(u32 to, const TensorMap &map, u32 full, u32 row, u32 arrivals)
    {
        u32 of_batch = batch(), of_head = kv_head();
        __syncwarp();
        if (lane != 0)
            return;
        if (drawer) {
            barrier_expect(full, S::KEY_BYTES);
#pragma unroll
            for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                tensor_copy(to + chunk * S::KEY_CHUNK_BYTES, map, full, chunk * ROW_ELEMENTS, row, of_head, of_batch);
        }
        barrier_arrive(full, arrivals);
    }

    __device__ __forceinline__ void load_keys(const LoadBlock &block, bool last)
    {
        u32 to = data + S::KEYS_AT + keys.stage() * S::KEY_BYTES;
        u32 full = shared_address(&control.key_full[keys.stage()]);
        KeyStage<S::KEYS> &stage = control.key[keys.stage()];
        warp_wait(shared_address(&control.key_empty[keys.stage()]), keys.phase() ^ 1);
        if (lane == 0)
            stage.flags[warp] = block.flags | (last ? BLOCK_LAST : 0u);
        if (drawer)
            stage.log_weight = block.log_weight;
        if (block.flags & LOAD_PLAIN) {
            fetch(to, k_map, full, block.row, LOADER_ARRIVALS / LOADER_WARPS);
        } else {
            if (lane < S::WARP_KEYS)
                stage.position[warp * S::WARP_KEYS + lane] = block.position;
            const char *head = p.k.row(batch(), kv_head(), 0);
            const char *from = block.flags & LOAD_EXTRA ? p.extra_keys : head;
            i64 stride = block.flags & LOAD_EXTRA ? (i64)p.head_dim * 2 : p.k.row_stride;
            copy_rows<S::WARP_KEYS, S::CHUNKS>(to, warp, lane, block.row, from, stride, p.head_dim);
            warp_arrive_after_copies(full, lane);
        }
        ++keys.count;
    }

    // Of the block `later` blocks before the one whose keys come next. What the warp has written to the keys' stage is
    // still there: it is this warp that will write there next, for a later block.
    __device__ __forceinline__ void load_values(u32 row, u32 later)
    {
        static_assert(S::KEY_STAGES >= 2, "see above");
        Passed<S::KEY_STAGES> values = {keys.count - later};
        u32 flags = control.key[values.stage()].flags[warp];
        u32 to = data + S::VALUES_AT + values.stage() * S::KEY_BYTES;
        u32 full = shared_address(&control.value_full[values.stage()]);
        warp_wait(shared_address(&control.value_empty[values.stage()]), values.phase() ^ 1);
        if (flags & LOAD_PLAIN) {
            fetch(to, v_map, full, row, LOADER_ARRIVALS / LOADER_WARPS);
        } else {
            const char *head = p.v.row(batch(), kv_head(), 0);
            const char *from = flags & LOAD_EXTRA ? p.extra_values : head;
            i64 stride = flags & LOAD_EXTRA ? (i64)p.value_dim * 2 : p.v.row_stride;
            copy_rows<S::WARP_KEYS, S::CHUNKS>(to, warp, lane, row, from, stride, p.value_dim);
            if ((flags & (BLOCK_LIMITED | BLOCK_MASKED)) == (BLOCK_LIMITED | BLOCK_MASKED)) {
                copies_commit();
                copies_wait<0>();
                u32 not_finite = take_out_not_finite<TYPE, S::WARP_KEYS, S::CHUNKS>(to, warp, lane);
                ValueStage<S::KEYS> &stage = control.value[values.stage()];
                if (not_finite && lane < S::WARP_KEYS) {
                    stage.row[warp * S::WARP_KEYS + lane] = row;
                    stage.position[warp * S::WARP_KEYS + lane] =
                        control.key[values.stage()].position[warp * S::WARP_KEYS + lane];
                }
                if (lane == 0)
                    stage.not_finite[warp] = not_finite;
                async_proxy_fence();
                warp_arrive(full, lane);
            } else {
                if (lane == 0 && (flags & BLOCK_LIMITED))
                    control.value[values.stage()].not_finite[warp] = 0;
                warp_arrive_after_copies(full, lane);
            }
        }
    }

    // The keys of `count` plain blocks that follow the block whose first row is `row`, and the values of all but the
    // last of these 1 + count. One warp is enough, and the others leave the consumers in peace.
    __device__ __forceinline__ void load_plain(u32 row, u32 count, bool last)
    {
        // The others have read what they need of the keys' stages.
        named_barrier_sync(LOADERS_BARRIER, WARPGROUP);
        if (warp == 0) {
#pragma unroll 1
            for (u32 i = 0; i < count; ++i) {
                Passed<S::KEY_STAGES> values = {keys.count - 1};
                KeyStage<S::KEYS> &stage = control.key[keys.stage()];
                u32 full = shared_address(&control.key_full[keys.stage()]);
                warp_wait(shared_address(&control.key_empty[keys.stage()]), keys.phase() ^ 1);
                if (lane < LOADER_WARPS)
                    stage.flags[lane] = LOAD_PLAIN | (last && i == count - 1 ? BLOCK_LAST : 0u);
                if (drawer)
                    stage.log_weight = control.key[values.stage()].log_weight;
                fetch(data + S::KEYS_AT + keys.stage() * S::KEY_BYTES, k_map, full, row + S::KEYS, LOADER_ARRIVALS);
                full = shared_address(&control.value_full[values.stage()]);
                warp_wait(shared_address(&control.value_empty[values.stage()]), values.phase() ^ 1);
                fetch(data + S::VALUES_AT + values.stage() * S::KEY_BYTES, v_map, full, row, LOADER_ARRIVALS);
                row += S::KEYS;
                ++keys.count;
            }
        } else {
            keys.count += count;
        }
        __syncwarp();
        named_barrier_sync(LOADERS_BARRIER, WARPGROUP);
    }

    // Loads the queries of the tile that `blocks` are of, and asks for the number of the next one.
    __device__ __forceinline__ bool begin_tile()
    {
        bool has_keys = ahead == AHEAD_BEGUN;
        loading = blocks.tile;
        if (drawer)
            words = atomicAdd(p.next_tile, 1u);
        ahead = AHEAD_DRAWN;
        load_queries(has_keys);
        return has_keys;
    }

    // Loads the blocks of the tile, if it has `more` than its queries, and goes to the first block of the next tile. A
    // pass loads a block's keys and the values of the block before: keys are needed, and their stage is free, earlier.
    // Nothing is written twice here, the consumers need the instruction cache.
    __device__ __forceinline__ void load_blocks(bool more)
    {
        u32 row_before = NO_ROW;
        // 0 in the first one, 1 in the second if the queries have not been announced.
        u32 pass = 0;
#pragma unroll 1
        for (;;) {
            bool keys_too = more;
            u32 row = NO_ROW, follow = 0, next_pass = pass + 1;
            if (keys_too) {
                LoadBlock block = looked_up();
                row = block.row;
                follow = plain ? plain - 1 : 0;
                blocks.next_start += follow * S::KEYS;
                more = blocks.advance(p, lane);
                if (more)
                    look_up();
                load_keys(block, !more && follow == 0);
                if (pass == 1 || (pass == 0 && (!more || follow != 0))) {
                    announce_queries();
                    next_pass = 2;
                }
            }
            // Where all that is left of the tile is plain, it goes first: the next tile can wait until then.
            if (follow != 0 ? more : keys_too || ahead < AHEAD_BEGUN) {
#pragma unroll 1
                do
                    look_ahead();
                while (!more && ahead < AHEAD_READY);
                if (!more)
                    begin_blocks();
            }
            if (pass != 0)
                load_values(row_before, keys_too ? 2 : 1);
            if (follow != 0) {
                load_plain(row, follow, !more);
                row += follow * S::KEYS;
            }
            if (!keys_too)
                break;
            row_before = row;
            pass = next_pass;
        }
    }

    __device__ __forceinline__ void run()
    {
        if (drawer) {
            if (maps) {
                tensor_map_prefetch(k_map);
                tensor_map_prefetch(v_map);
            }
            words = atomicAdd(p.next_tile, 1u);
        }
        bool more = false;
#pragma unroll 1
        for (;;) {
            load_blocks(more);
            if (ahead == AHEAD_NONE)
                break;
            more = begin_tile();
            if (!more)
                announce_queries();
        }
        warp_wait(shared_address(&control.query_empty[queries.stage()]), queries.phase() ^ 1);
        if (drawer)
            control.query[queries.stage()].rows = 0;
        warp_arrive(shared_address(&control.query_full[queries.stage()]), lane);
    }
};

#endif

} // namespace hopper
} // namespace hyperattn
