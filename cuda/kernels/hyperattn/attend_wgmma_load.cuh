// The loading warpgroup of the Hopper attention kernel: draws tiles and fills the rings of queries, keys and values.
//
// A block of consecutive rows that all queries of the tile see is fetched by the copy engine. Any other block is
// gathered: a lane looks up every 32nd key, eight lanes copy 128 bytes of a row. What no row of the tile may see is
// never read, its elements are 0.
//
// The four warps take turns, so that each knows only every fourth block, and has three blocks' time to find out what is
// next while the others copy.
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

// What a loader notes in a block's flags for itself.
enum LoadFlags : u32 {
    // Fetched by the copy engine.
    LOAD_PLAIN = 16,
    LOAD_EXTRA = 32,
    // All rows of the block are.
    LOAD_WHOLE = 64,
};

// The body of the four loading warps.
//
// All warps go through all tiles, and each loads what is its own: a tile's queries, if that is this warp's task, then
// every fourth block, keys before values.
//
// Nobody waits forever. In the order of the whole stream, what a warp waits for before it loads something depends on
// earlier things only: the consumers empty a stage when they have got what comes before, and whoever has to load that
// has no later thing to load first. A warp waits for a tile's number when it has loaded its part of all tiles before.
// The first warp passes that number on while it is at the tile before, and then only waits for warps that have not yet
// taken the number of the tile before that one; they are at something earlier.
template <u32 TYPE, u32 DIM> struct Loader {
    using S = Shape<DIM>;
    static constexpr u32 LANE_KEYS = S::KEYS / 32;
    static constexpr u32 LANE_QUERIES = TILE_ROWS / 32;
    // The warp of a tile's first block loads its queries, which may be long before the tile before ends: else a fixed
    // one for each stage. With more stages of keys the tile's first would come later for it; a single stage of queries
    // is not free before.
    static constexpr bool FIRST_LOADS_QUERIES = S::QUERY_STAGES > 1 && S::KEY_STAGES < LOADER_WARPS;

    const AttendParams &p;
    const TensorMap &k_map;
    const TensorMap &v_map;
    typename S::Control &control;
    u32 data;
    u32 warp;
    u32 lane;
    bool maps;

    Passed<NUMBER_STAGES> numbers;
    Passed<S::QUERY_STAGES> queries;
    // Blocks that the warp has loaded.
    u32 turn = 0;
    Blocks<S::KEYS> blocks;

    __device__ __forceinline__ Loader(const AttendParams &params, const TensorMap &keys, const TensorMap &values,
                                      typename S::Control &shared_control, u32 shared_data)
        : p(params), k_map(keys), v_map(values), control(shared_control), data(shared_data),
          warp(__shfl_sync(ALL_LANES, threadIdx.x / 32, 0)), lane(threadIdx.x % 32),
          maps(keys.words[0] != 0 && values.words[0] != 0)
    {
    }

    // Barriers are what `control` begins with.
    __device__ __forceinline__ u32 barrier(u32 number) const { return data + S::CONTROL_AT + number * 8; }

    // The number of the next tile, for one thread. Nobody waits for it here.
    __device__ __forceinline__ u32 draw() const { return threadIdx.x == 0 ? atomicAdd(p.next_tile, 1u) : 0; }

    // Passes the number of the tile after those taken to the warps: the first warp's.
    __device__ __forceinline__ void put_number(u32 number)
    {
        Passed<NUMBER_STAGES> place = {opaque(numbers.count)};
        if (lane == 0) {
            barrier_wait(barrier(S::NUMBER_EMPTY + place.stage()), place.phase() ^ 1);
            control.number[place.stage()] = number;
            barrier_arrive(barrier(S::NUMBER_FULL + place.stage()));
        }
    }

    __device__ __forceinline__ u32 take_number()
    {
        warp_wait(barrier(S::NUMBER_FULL + numbers.stage()), numbers.phase());
        u32 number = control.number[numbers.stage()];
        warp_arrive(barrier(S::NUMBER_EMPTY + numbers.stage()), 1, lane);
        ++numbers.count;
        return number;
    }

    __device__ __forceinline__ u32 batch() const { return word_of(blocks.tile, TILE_BATCH); }
    __device__ __forceinline__ u32 kv_head() const { return word_of(blocks.tile, TILE_KV_HEAD); }
    __device__ __forceinline__ u32 *list() const { return control.list[warp]; }

    // Goes to the tile, whose words these are. Tiles without rows are passed over.
    __device__ __forceinline__ void begin_blocks(Tile tile, u32 tile_words)
    {
        if (tile.rows == 0)
            tile.segments = 0;
        u32 end = tile.first_segment + tile.segments;
        u32 segment_words = segment_word(p, tile.first_segment, end, lane);
        u32 last_words = segment_word(p, tile.segments == 0 ? end : end - 1, end, lane);
        // Two divisions at once: of the head, and of the head counted through the batch.
        u32 kv_head = (lane == TILE_KV_HEAD ? tile.head : tile.batch * p.heads_q + tile.head) / p.group;
        u32 order = kv_head + (tile.flags >> TILE_ORDER_SHIFT) * p.order_heads;
        u32 lowest = 0, highest = 0;
        bool limited = __ballot_sync(ALL_LANES, segment_words & SEGMENT_LIMITED) & SEGMENT_FLAGS_LANES;
        if (limited || tile.segments > HELD_SEGMENTS)
            tile_limits(p, tile, lane, lowest, highest);
        tile_words = lane < TILE_KV_HEAD          ? tile_words
                     : lane == TILE_KV_HEAD       ? kv_head
                     : lane == TILE_KEY_ORDER     ? order
                     : lane == TILE_LOWEST_LIMIT  ? lowest
                                                  : highest;
        blocks.begin(p, lane, tile_words, tile.first_segment, end, segment_words, last_words);
    }

    // Tells the partials that the tile's rows go on from, and has them fetched into the second-level cache: the
    // consumers read them a tile later, and wait for them.
    __device__ __forceinline__ void find_partials(const Tile &tile, QueryStage &query)
    {
        if (lane >= tile.first_output)
            return;
        u32 first_output = p.segments[tile.first_segment + tile.segments + lane].first;
        query.partial[lane] = first_output;
        u64 number = p.partial_row(tile.batch, tile.head, first_output, tile.first_query);
        u32 bytes = p.partial_bytes();
        prefetch(p.partial_values + number * bytes, tile.rows * bytes);
        // Of whole 16 bytes: the workspace's parts begin and end with such.
        u32 before = (u32)number % 4;
        prefetch(p.partial_lse + number - before, (before + tile.rows + 3) / 4 * 16);
    }

    // Whether this warp loads the next queries. At a tile's start.
    __device__ __forceinline__ bool loads_next_queries() const
    {
        return FIRST_LOADS_QUERIES ? blocks.start == 0 : warp == LOADER_WARPS - 1 - queries.stage();
    }

    // Waits until the stage of the next queries is empty.
    __device__ __forceinline__ void wait_for_query_stage()
    {
        // Unless this warp has loaded what was there before, it may still have to be loaded, and the phases of "empty"
        // cannot be told apart. All warps have come to that tile, the last but one, so that those of "full" can.
        if (FIRST_LOADS_QUERIES)
            warp_wait(barrier(S::QUERY_FULL + queries.stage()), queries.phase() ^ 1);
        warp_wait(barrier(S::QUERY_EMPTY + queries.stage()), queries.phase() ^ 1);
    }

    // Issues the copies of the tile's queries.
    __device__ __forceinline__ void load_queries(const Tile &tile, const u32 (&rows)[LANE_QUERIES])
    {
        QueryStage &query = control.query[queries.stage()];
        list_rows(list(), lane, rows);
        wait_for_query_stage();
        copy_rows<TILE_ROWS, S::CHUNKS>(data + queries.stage() * S::QUERY_BYTES, list(), tile.rows == TILE_ROWS, lane,
                                        p.q.row(tile.batch, tile.head, 0), p.q.row_stride, p.head_dim);
        copies_commit();
        // The list's next rows are a block's.
        __syncwarp();
        if (tile.flags & TILE_MERGE)
            find_partials(tile, query);
#pragma unroll
        for (u32 i = 0; i < LANE_QUERIES; ++i)
            query.row[32 * i + lane] = rows[i];
        if (lane == 0) {
            query.batch = tile.batch;
            query.head = tile.head;
            query.rows = tile.rows;
            query.flags = tile.flags;
            query.has_keys = !blocks.empty();
            query.first_output = tile.first_output;
        }
    }

    // Hands the queries of the tile at hand over, when their copies have ended: all but the newest `PENDING`.
    template <u32 PENDING> __device__ __forceinline__ void announce_queries()
    {
        Passed<S::QUERY_STAGES> place = {opaque(queries.count) - 1};
        warp_arrive_when_copied<PENDING>(barrier(S::QUERY_FULL + place.stage()), lane);
    }

    // Moves the rows that are there before those that are not, through the list, so that most keys need not be masked.
    // Returns their number.
    __device__ __forceinline__ u32 gather_visible(u32 (&rows)[LANE_KEYS])
    {
        u32 below = (1u << lane) - 1, visible = 0;
        u32 seen[LANE_KEYS];
#pragma unroll
        for (u32 i = 0; i < LANE_KEYS; ++i) {
            seen[i] = __ballot_sync(ALL_LANES, rows[i] != NO_ROW);
            visible += __popc(seen[i]);
        }
        u32 next = 0, next_hidden = visible;
#pragma unroll
        for (u32 i = 0; i < LANE_KEYS; ++i) {
            u32 place = rows[i] != NO_ROW ? next + __popc(seen[i] & below) : next_hidden + __popc(~seen[i] & below);
            list()[place] = rows[i];
            next += __popc(seen[i]);
            next_hidden += 32 - __popc(seen[i]);
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < LANE_KEYS; ++i)
            rows[i] = list()[32 * i + lane];
        __syncwarp();
        return visible;
    }

    // Rows of the block's keys that are lane, lane + 32, ... of it, NO_ROW where no query may see one. Returns flags.
    __device__ __forceinline__ u32 look_up(u32 (&rows)[LANE_KEYS])
    {
        u32 kind = blocks.flags;
        // What follows from the lane or the warp is made anew each time, there are no registers to keep it.
        u32 lane = opaque(this->lane);
        u32 at = blocks.first + blocks.start + lane, left = blocks.count - blocks.start;
        u32 flags = 0;
        flags |= kind & SEGMENT_EXTRA ? LOAD_EXTRA : 0;
        flags |= kind & SEGMENT_LIMITED ? BLOCK_LIMITED : 0;
        if (kind & (SEGMENT_LISTED | SEGMENT_SORTED)) {
            const u32 *from = !(kind & SEGMENT_SORTED) ? p.positions
                              : kind & SEGMENT_LISTED
                                  ? p.listed_rows
                                  : p.key_order + (u64)word_of(blocks.tile, TILE_KEY_ORDER) * p.n_k;
            from += at;
#pragma unroll
            for (u32 i = 0; i < LANE_KEYS; ++i)
                rows[i] = 32 * i + lane < left ? from[32 * i] : NO_ROW;
        } else {
#pragma unroll
            for (u32 i = 0; i < LANE_KEYS; ++i)
                rows[i] = 32 * i + lane < left ? at + 32 * i : NO_ROW;
        }
        u32 hidden_start = blocks.hidden_start(), hidden_end = blocks.hidden_end();
        if (hidden_start < hidden_end) {
            bool listed_rows = (kind & SEGMENT_LISTED) && (kind & SEGMENT_SORTED);
#pragma unroll
            for (u32 i = 0; i < LANE_KEYS; ++i) {
                u32 position = kind & SEGMENT_LISTED ? rows[i] : at + 32 * i;
                if (listed_rows && 32 * i + lane < left)
                    position = p.positions[at + 32 * i];
                if (position - hidden_start < hidden_end - hidden_start)
                    rows[i] = NO_ROW;
            }
        }
        // Rows of limited segments are positions.
        u32 seen_by_all = NO_ROW;
        if (kind & SEGMENT_LIMITED) {
            u32 highest = blocks.highest_limit();
            seen_by_all = blocks.lowest_limit();
#pragma unroll
            for (u32 i = 0; i < LANE_KEYS; ++i)
                rows[i] = rows[i] < highest ? rows[i] : NO_ROW;
        }
        u32 last_row = rows[0];
#pragma unroll
        for (u32 i = 1; i < LANE_KEYS; ++i)
            last_row = max(last_row, rows[i]);
        constexpr u32 LAST_PART = BLOCK_PART_MASKED << (S::PARTS - 1);
        if (!__all_sync(ALL_LANES, last_row < seen_by_all))
            flags |= BLOCK_MASKED | LAST_PART | BLOCK_PART_MASKED;
        if (__all_sync(ALL_LANES, last_row != NO_ROW)) {
            flags |= LOAD_WHOLE;
        } else if (!(kind & SEGMENT_LIMITED)) {
            u32 visible = gather_visible(rows);
            if (visible >= S::KEYS - TAIL_KEYS)
                flags = (flags & ~BLOCK_PART_MASKED) | LAST_PART | BLOCK_TAIL | visible << BLOCK_VISIBLE_SHIFT;
        }
        return flags;
    }

    // The warp's blocks are all in one stage.
    __device__ __forceinline__ u32 stage() const { return opaque(warp) % S::KEY_STAGES; }

    // Waits for the block before in the warp's stage: it is of this turn, or of the one before.
    __device__ __forceinline__ void wait_until_empty(u32 released)
    {
        u32 warp = opaque(this->warp);
        u32 before = (warp - S::KEY_STAGES) % LOADER_WARPS;
        warp_wait(barrier(released + before), (turn + (before >= warp)) % 2);
    }

    // Has the copy engine fetch the block.
    __device__ __forceinline__ void fetch(u32 to, const TensorMap &map, u32 full)
    {
        u32 row = blocks.first + blocks.start, of_head = kv_head(), of_batch = batch();
        if (lane == 0) {
            barrier_expect(full, S::KEY_BYTES);
#pragma unroll
            for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                tensor_copy(to + chunk * S::KEY_CHUNK_BYTES, map, full, chunk * ROW_ELEMENTS, row, of_head, of_batch);
            barrier_arrive(full);
        }
    }

    // Hands the tile's queries over too if `announces`.
    __device__ __forceinline__ void load_keys(u32 flags, const u32 (&rows)[LANE_KEYS], bool announces)
    {
        float log_weight = blocks.log_weight();
        wait_until_empty(S::KEY_EMPTY);
        u32 stage = this->stage();
        KeyStage<S::KEYS> &block = control.key[stage];
        u32 to = data + S::KEYS_AT + stage * S::KEY_BYTES, full = barrier(S::KEY_FULL + stage);
        if (lane == 0) {
            block.flags = flags | (blocks.last() ? BLOCK_LAST : 0u);
            block.log_weight = log_weight;
        }
        if (flags & LOAD_PLAIN) {
            fetch(to, k_map, full);
            if (announces)
                announce_queries<0>();
            return;
        }
        if (flags & BLOCK_MASKED) {
#pragma unroll
            for (u32 i = 0; i < LANE_KEYS; ++i)
                block.position[32 * i + lane] = rows[i];
        }
        const char *head = p.k.row(batch(), kv_head(), 0);
        const char *from = flags & LOAD_EXTRA ? p.extra_keys : head;
        i64 stride = flags & LOAD_EXTRA ? (i64)(p.head_dim * 2) : p.k.row_stride;
        copy_rows<S::KEYS, S::CHUNKS>(to, list(), flags & LOAD_WHOLE, lane, from, stride, p.head_dim);
        copies_commit();
        if (announces)
            announce_queries<1>();
        warp_arrive_when_copied<0>(full, lane);
    }

    __device__ __forceinline__ void load_values(u32 flags)
    {
        wait_until_empty(S::VALUE_EMPTY);
        u32 stage = this->stage();
        u32 to = data + S::VALUES_AT + stage * S::KEY_BYTES, full = barrier(S::VALUE_FULL + stage);
        if (flags & LOAD_PLAIN) {
            fetch(to, v_map, full);
            return;
        }
        const char *head = p.v.row(batch(), kv_head(), 0);
        const char *from = flags & LOAD_EXTRA ? p.extra_values : head;
        i64 stride = flags & LOAD_EXTRA ? (i64)(p.value_dim * 2) : p.v.row_stride;
        copy_rows<S::KEYS, S::CHUNKS>(to, list(), flags & LOAD_WHOLE, lane, from, stride, p.value_dim);
        if ((flags & (BLOCK_LIMITED | BLOCK_MASKED)) == (BLOCK_LIMITED | BLOCK_MASKED)) {
            copies_commit();
            copies_wait<0>();
            ValueStage<S::KEYS> &block = control.value[stage];
            if (take_out_not_finite<TYPE, S::KEYS, S::CHUNKS>(to, lane, block.not_finite)) {
#pragma unroll
                for (u32 i = 0; i < LANE_KEYS; ++i)
                    block.row[32 * i + lane] = list()[32 * i + list_place(lane)];
            }
            async_proxy_fence();
            warp_arrive(full, 1, lane);
        } else {
            copies_commit();
            warp_arrive_when_copied<0>(full, lane);
        }
    }

    // Loads the warp's part of a tile, and draws the next one.
    __device__ __forceinline__ void load_tile(u32 number)
    {
        u32 next_number = draw();
        // Whether that is still to be passed on.
        bool drawn = warp == 0;

        u32 words = ((const u32 *)(p.tiles + number))[lane % TILE_WORDS];
        Tile tile = tile_of(words);
        bool loads_queries = tile.rows != 0 && loads_next_queries();
        u32 query_rows[LANE_QUERIES] = {};
        if (loads_queries) {
#pragma unroll
            for (u32 i = 0; i < LANE_QUERIES; ++i)
                query_rows[i] = 32 * i + lane < tile.rows ? p.query_row(tile, 32 * i + lane) : NO_ROW;
        }
        begin_blocks(tile, words);
        if (loads_queries)
            load_queries(tile, query_rows);
        if (tile.rows != 0)
            ++queries.count;

#pragma unroll 1
        for (;;) {
            bool more = blocks.advance(p, lane);
            u32 flags = LOAD_PLAIN;
            u32 rows[LANE_KEYS] = {};
            if (more && !(maps && blocks.plain())) {
                flags = look_up(rows);
                list_rows(list(), lane, rows);
            }
            // Before the warp waits for what the consumers of these queries have to do. The keys of a tile's first block
            // wait for consumers of earlier ones only: they are on their way when the queries are waited for.
            bool with_keys = FIRST_LOADS_QUERIES && more;
            if (loads_queries && !with_keys)
                announce_queries<0>();
            if (more)
                load_keys(flags, rows, loads_queries && with_keys);
            loads_queries = false;
            if (drawn) {
                put_number(next_number);
                drawn = false;
            }
            if (!more)
                break;
            load_values(flags);
            blocks.start += LOADER_WARPS * S::KEYS;
            ++turn;
        }
    }

    __device__ __forceinline__ void run()
    {
        if (maps && threadIdx.x == 0) {
            tensor_map_prefetch(k_map);
            tensor_map_prefetch(v_map);
        }
        u32 number = draw();
        if (warp == 0)
            put_number(number);
        blocks.start = warp * S::KEYS;
#pragma unroll 1
        for (;;) {
            number = take_number();
            if (number >= p.tile_count)
                break;
            load_tile(number);
        }
        if (loads_next_queries()) {
            wait_for_query_stage();
            if (lane == 0)
                control.query[queries.stage()].rows = 0;
            warp_arrive(barrier(S::QUERY_FULL + queries.stage()), 1, lane);
        }
    }
};

#endif

} // namespace hopper
} // namespace hyperattn
