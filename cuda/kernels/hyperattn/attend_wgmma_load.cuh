// The loading warpgroup of the Hopper attention kernel: draws tiles and fills the rings of queries, keys and values.
//
// A block of consecutive rows that all queries of the tile see is fetched by the copy engine. Any other block is
// gathered by the four warps: a lane looks up one key, eight lanes copy 128 bytes of a row. What no row of the tile may
// see is never read, its elements are 0.
//
// What is read to know what to copy is requested while something else is copied, and used afterwards: a block's keys
// are looked up a block earlier, and the next tile is looked at one step per block, see look_ahead().
#pragma once

#include "attend_wgmma_blocks.cuh"
#include "attend_wgmma_copy.cuh"
#include "tma.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

// How many stages of a ring a warp has been through, which tells its place. One register instead of a Ring's two.
template <u32 STAGES> struct Passed {
    u32 count = 0;
    static_assert((STAGES & (STAGES - 1)) == 0, "divided by shifts");

    __device__ __forceinline__ u32 stage() const { return count % STAGES; }
    __device__ __forceinline__ u32 phase() const { return count / STAGES % 2; }
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
// always gets on. Only load_plain() is the first warp's; the others wait for it to be done.
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
            query.first_output = tile.first_output;
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
