// Algorithms 2 and 3: the residual whose row sums are estimated by a capped uniform sample and whose values are sampled
// by their row norms. The exact blocks are the attention kernels', which leave their sums and products as states; here
// the rest is added to them. f32 arithmetic; everything is in base-2 logs, so that large logits cannot overflow.
#pragma once

#include "convert.cuh"
#include "paper_tiles.cuh"
#include "philox.cuh"

namespace hyperattn {

struct RowNormParams {
    // `tiles` are of exact blocks alone; the flags say what follows and precedes the whole pass.
    PassTiles common;
    AttendParams attend;
    u64 seed;
    u64 offset;
    // What the exact blocks left, in the places of the states of `attend`.
    const float *exact_max;
    const float *exact_sum;
    const float *exact_accumulated;
    // |v|^2 of every key [KV heads of the set][n_k], and its running sums over each rectangle's keys in key order.
    float *norms;
    double *prefix;
    // [KV heads of the set][rectangles][sample_size]: the uniform sample; the sample by norm and its log weights.
    const u32 *positions;
    u32 *norm_positions;
    float *norm_weights;
    // Base-2 log of tau, [query heads of the set][rectangles], as ordered_bits.
    u32 *tau;
    ExactBlocks blocks;
    // Where the bounds of the rows' sampled terms are wanted, and nothing else: base-2 logits beyond which such a term
    // is a constant, [batch][heads_q][n_q]. Otherwise null.
    float *bounds;
    // Samples and rows that bound tau, at most.
    u32 sample_size;
    float log2_kappa;
    // Base-2 log of eps^2 m / (n ln n), for a rectangle with most_keys keys and with one less.
    float log2_cap;
    float log2_cap_less;
    // Numbers of the first query head and of the first KV head among those that random numbers are drawn for.
    u32 first_stream_head;
    u32 first_stream_kv_head;
};

static_assert(sizeof(RowNormParams) == 288 + sizeof(AttendParams), "the host's mirror of this struct counts on it");

constexpr u32 ROW_NORM_THREADS = 128;
constexpr u32 ROW_NORM_WARPS = ROW_NORM_THREADS / 32;
// Rows of a warp, and of a thread block.
constexpr u32 ROW_NORM_WARP_ROWS = 4;
constexpr u32 ROW_NORM_ROWS = ROW_NORM_WARPS * ROW_NORM_WARP_ROWS;
// Keys that are staged at once: one per lane.
constexpr u32 ROW_NORM_KEYS = 32;
// Values of a lane.
constexpr u32 ROW_NORM_VALUES = 256 / 32;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }

// Bits that are ordered like the numbers.
__device__ __forceinline__ u32 ordered_bits(float x)
{
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ordered_bits of -inf.
constexpr u32 NO_TAU = 0x007FFFFFu;
static_assert(NO_TAU == ~0xFF800000u, "paper/row_norm.rs has the same number");

__device__ __forceinline__ float from_ordered_bits(u32 bits)
{
    return __uint_as_float(bits >> 31 ? bits & 0x7FFFFFFFu : ~bits);
}

// log2(2^a + 2^b); -inf is neutral, NaN stays.
__device__ __forceinline__ float log2_add(float a, float b)
{
    if (!(a >= b || a < b))
        return a + b;
    float low = a < b ? a : b, high = a < b ? b : a;
    if (low == minus_infinity() || high == -minus_infinity())
        return high;
    return high + log2f(1.0f + exp2f(low - high));
}

// A running sum of weights 2^logit, relative to the largest.
struct RunningSum {
    float max;
    float sum;

    __device__ __forceinline__ void add(float logit)
    {
        if (logit > max) {
            sum = sum * exp2f(max - logit) + 1.0f;
            max = logit;
        } else if (logit != minus_infinity()) {
            // A NaN comes here too.
            sum += exp2f(logit - max);
        }
    }

    // Base-2 log of the sum over the warp's lanes.
    __device__ __forceinline__ float log2_of_warp() const
    {
        float most = max;
        for (u32 distance = 16; distance > 0; distance /= 2)
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, distance));
        float total = max == minus_infinity() ? sum : sum * exp2f(max - most);
        for (u32 distance = 16; distance > 0; distance /= 2)
            total += __shfl_xor_sync(0xFFFFFFFFu, total, distance);
        return total == 0.0f ? minus_infinity() : most + log2f(total);
    }
};

// Query rows and some keys in shared memory.
struct RowNormStage {
    // [head_dim][ROW_NORM_ROWS], scaled.
    float *queries;
    // [ROW_NORM_KEYS][head_dim + 1].
    float *keys;
    // [ROW_NORM_KEYS][value_dim].
    float *values;

    __device__ __forceinline__ RowNormStage(float *shared, const AttendParams &attend)
    {
        queries = shared;
        keys = queries + attend.head_dim * ROW_NORM_ROWS;
        values = keys + ROW_NORM_KEYS * (attend.head_dim + 1);
    }

    // `rows` are in shared memory; those from `count` on are left out.
    __device__ __forceinline__ void load_queries(
        const AttendParams &attend, u32 batch, u32 head, const u32 *rows, u32 count) const
    {
        for (u32 i = threadIdx.x; i < attend.head_dim * ROW_NORM_ROWS; i += ROW_NORM_THREADS) {
            u32 row = i / attend.head_dim, dim = i % attend.head_dim;
            float x = 0.0f;
            if (row < count)
                x = read_element(attend.q.row(batch, head, rows[row]), dim, attend.q_type) * attend.scale_log2;
            queries[dim * ROW_NORM_ROWS + row] = x;
        }
    }

    // Keys, and values where wanted, of `count` rows, zeros for the rest. Between two barriers.
    __device__ __forceinline__ void load_keys(
        const AttendParams &attend, u32 batch, u32 kv_head, const u32 *rows, u32 count, bool with_values) const
    {
        for (u32 i = threadIdx.x; i < ROW_NORM_KEYS * attend.head_dim; i += ROW_NORM_THREADS) {
            u32 key = i / attend.head_dim, dim = i % attend.head_dim;
            float x = key < count ? read_element(attend.k.row(batch, kv_head, rows[key]), dim, attend.kv_type) : 0.0f;
            keys[key * (attend.head_dim + 1) + dim] = x;
        }
        for (u32 i = threadIdx.x; with_values && i < ROW_NORM_KEYS * attend.value_dim; i += ROW_NORM_THREADS) {
            u32 key = i / attend.value_dim, dim = i % attend.value_dim;
            values[i] = key < count ? read_element(attend.v.row(batch, kv_head, rows[key]), dim, attend.kv_type) : 0.0f;
        }
    }

    // Logits of the warp's rows with the lane's key.
    __device__ __forceinline__ void multiply(u32 head_dim, float (&logits)[ROW_NORM_WARP_ROWS]) const
    {
        const float *key = keys + threadIdx.x % 32 * (head_dim + 1);
        const float *query = queries + threadIdx.x / 32 * ROW_NORM_WARP_ROWS;
        for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++)
            logits[r] = 0.0f;
        for (u32 dim = 0; dim < head_dim; dim++) {
            float x = key[dim];
#pragma unroll
            for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++)
                logits[r] = __fmaf_rn(query[dim * ROW_NORM_ROWS + r], x, logits[r]);
        }
    }
};

// Row at a position of the key order.
__device__ __forceinline__ u32 row_at(const RowNormParams &params, u32 flat_kv_head, u32 position)
{
    return params.blocks.sorted ? params.attend.key_order[(u64)flat_kv_head * params.attend.n_k + position] : position;
}

// Rows of a rectangle that bound tau.
__device__ __forceinline__ u32 tau_rows(const RowNormParams &params, const Rectangle &rectangle)
{
    u32 queries = rectangle.query_end - rectangle.query_start;
    return queries < params.sample_size ? queries : params.sample_size;
}

__device__ __forceinline__ bool counts(float norm) { return norm - norm == 0.0f; }

} // namespace hyperattn

// |v|^2 of every key of the set, in the CPU's order. One thread per key: grid ceil(kv_heads * n_k / 128), block 128.
extern "C" __global__ void __launch_bounds__(128)
    paper_row_norms(const __grid_constant__ hyperattn::RowNormParams params)
{
    using namespace hyperattn;
    const AttendParams &attend = params.attend;
    u64 at = (u64)blockIdx.x * 128 + threadIdx.x;
    if (at >= (u64)params.common.kv_heads * attend.n_k)
        return;
    u32 flat = params.common.first_kv_head + (u32)(at / attend.n_k), heads_kv = attend.heads_kv();
    const char *row = attend.v.row(flat / heads_kv, flat % heads_kv, (u32)(at % attend.n_k));
    float sum = 0.0f;
    for (u32 i = 0; i < attend.value_dim; i++) {
        float x = read_element(row, i, attend.kv_type);
        sum = __fadd_rn(sum, __fmul_rn(x, x));
    }
    params.norms[at] = sum;
}

// The running sums over each rectangle, one after the other as on the CPU. One warp per rectangle: grid kv_heads *
// rectangles, block 32.
extern "C" __global__ void __launch_bounds__(32)
    paper_norm_prefix(const __grid_constant__ hyperattn::RowNormParams params)
{
    using namespace hyperattn;
    u32 set_head = blockIdx.x / params.common.pass.count, lane = threadIdx.x;
    Rectangle rectangle;
    if (!params.common.rectangle(blockIdx.x % params.common.pass.count, rectangle))
        return;
    u64 first = (u64)set_head * params.attend.n_k;
    double sum = 0.0;
    for (u32 at = rectangle.key_start; at < rectangle.key_end; at += 32) {
        bool valid = lane < rectangle.key_end - at;
        float norm = 0.0f;
        if (valid)
            norm = params.norms[first + row_at(params, params.common.first_kv_head + set_head, at + lane)];
        // Adding 0 is as good as not adding: sums are not negative.
        norm = counts(norm) ? norm : 0.0f;
        double mine = 0.0;
        for (u32 i = 0; i < 32; i++) {
            sum = __dadd_rn(sum, (double)__shfl_sync(0xFFFFFFFFu, norm, i));
            mine = i == lane ? sum : mine;
        }
        if (valid)
            params.prefix[first + at + lane] = mine;
    }
}

// The keys drawn by norm. One thread per sample: grid ceil(kv_heads * rectangles * sample_size / 128), block 128.
extern "C" __global__ void __launch_bounds__(128)
    paper_norm_samples(const __grid_constant__ hyperattn::RowNormParams params)
{
    using namespace hyperattn;
    u64 at = (u64)blockIdx.x * 128 + threadIdx.x;
    u32 count = params.common.pass.count;
    if (at >= (u64)params.common.kv_heads * count * params.sample_size)
        return;
    u32 index = (u32)(at % params.sample_size), item = (u32)(at / params.sample_size), set_head = item / count;
    Rectangle rectangle;
    if (!params.common.rectangle(item % count, rectangle))
        return;
    u32 len = rectangle.key_end - rectangle.key_start;
    const double *prefix = params.prefix + (u64)set_head * params.attend.n_k + rectangle.key_start;
    double total = prefix[len - 1];
    // Numbers of running sums that are below the total, and that are at most the target.
    auto partition = [&](double bound, bool inclusive) {
        u32 begin = 0, end = len;
        while (begin < end) {
            u32 middle = begin + (end - begin) / 2;
            if (prefix[middle] < bound || (inclusive && prefix[middle] == bound))
                begin = middle + 1;
            else
                end = middle;
        }
        return begin;
    };
    u32 head = (params.common.first_kv_head + set_head) % params.attend.heads_kv();
    Stream stream(params.seed, params.offset, params.first_stream_kv_head + head, PURPOSE_ROW_NORM_KEY);
    u64 draw = stream.uniform(rectangle.key_start, len, index);
    double target = __dmul_rn(__dmul_rn(__ull2double_rn(draw >> 11), 1.0 / 9007199254740992.0), total);
    u32 last = partition(total, false), found = partition(target, true);
    found = found < last ? found : last;
    found = found < len ? found : len - 1;
    double norm = __dsub_rn(prefix[found], found > 0 ? prefix[found - 1] : 0.0);
    double weight = __ddiv_rn(total, __dmul_rn(norm, (double)params.sample_size));
    params.norm_positions[at] = rectangle.key_start + found;
    // Without any mass in V no column counts.
    params.norm_weights[at] = total > 0.0 ? log2f(__double2float_rn(weight)) : minus_infinity();
}

// Line 1 of Algorithm 2: the largest unmasked row sum. Grid: query heads of the set * rectangles * ceil(sample_size /
// ROW_NORM_ROWS); block ROW_NORM_THREADS; dynamic shared bytes 4 * (head_dim * ROW_NORM_ROWS + ROW_NORM_KEYS *
// (head_dim + 1)). `tau` is NO_TAU before.
extern "C" __global__ void __launch_bounds__(128) paper_tau(const __grid_constant__ hyperattn::RowNormParams params)
{
    using namespace hyperattn;
    extern __shared__ __align__(16) float row_norm_shared[];
    __shared__ u32 rows[ROW_NORM_ROWS], positions[ROW_NORM_ROWS], key_rows[ROW_NORM_KEYS];
    const AttendParams &attend = params.attend;
    RowNormStage stage(row_norm_shared, attend);
    u32 chunks = (params.sample_size + ROW_NORM_ROWS - 1) / ROW_NORM_ROWS, item = blockIdx.x / chunks;
    u32 set_head = item / params.common.pass.count, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Rectangle rectangle;
    if (!params.common.rectangle(item % params.common.pass.count, rectangle))
        return;
    u32 first = blockIdx.x % chunks * ROW_NORM_ROWS, all = tau_rows(params, rectangle);
    if (first >= all)
        return;
    u32 count = all - first < ROW_NORM_ROWS ? all - first : ROW_NORM_ROWS;
    u32 flat = params.common.first_kv_head * attend.group + set_head;
    u32 batch = flat / attend.heads_q, head = flat % attend.heads_q, flat_kv = flat / attend.group;
    u32 queries = rectangle.query_end - rectangle.query_start;
    if (threadIdx.x < count) {
        u32 index = first + threadIdx.x, position = rectangle.query_start + index;
        if (queries > params.sample_size) {
            Stream stream(params.seed, params.offset, params.first_stream_head + head, PURPOSE_TAU_ROW);
            position = rectangle.query_start + below(stream.uniform(rectangle.query_start, queries, index), queries);
        }
        positions[threadIdx.x] = position;
        rows[threadIdx.x] = params.blocks.sorted ? attend.query_order[(u64)flat * attend.n_q + position] : position;
    }
    __syncthreads();
    stage.load_queries(attend, batch, head, rows, count);

    RunningSum sums[ROW_NORM_WARP_ROWS];
    for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++)
        sums[r] = {minus_infinity(), 0.0f};
    for (u32 at = rectangle.key_start; at < rectangle.key_end; at += ROW_NORM_KEYS) {
        u32 left = rectangle.key_end - at, keys = left < ROW_NORM_KEYS ? left : ROW_NORM_KEYS;
        if (threadIdx.x < keys)
            key_rows[threadIdx.x] = row_at(params, flat_kv, at + threadIdx.x);
        __syncthreads();
        stage.load_keys(attend, batch, flat_kv % attend.heads_kv(), key_rows, keys, false);
        __syncthreads();
        float logits[ROW_NORM_WARP_ROWS];
        stage.multiply(attend.head_dim, logits);
        for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++) {
            u32 row = warp * ROW_NORM_WARP_ROWS + r;
            if (row < count && lane < keys && !params.blocks.meets(rectangle, flat, positions[row], at + lane))
                sums[r].add(logits[r]);
        }
        __syncthreads();
    }
    for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++) {
        float log2_sum = sums[r].log2_of_warp();
        // A NaN stays in its own row and is passed over.
        if (lane == 0 && warp * ROW_NORM_WARP_ROWS + r < count && log2_sum == log2_sum)
            atomicMax(&params.tau[item], ordered_bits(log2_sum));
    }
}

// The rows' estimates from their exact blocks and the samples, or the bounds of their sampled terms. Grid: tiles *
// TILE_ROWS / ROW_NORM_ROWS; block ROW_NORM_THREADS; dynamic shared bytes those of paper_tau and 4 * ROW_NORM_KEYS *
// value_dim.
extern "C" __global__ void __launch_bounds__(128)
    paper_row_norm_residual(const __grid_constant__ hyperattn::RowNormParams params)
{
    using namespace hyperattn;
    constexpr u32 ALL = 0xFFFFFFFFu;
    extern __shared__ __align__(16) float row_norm_shared[];
    __shared__ u32 rows[ROW_NORM_ROWS], key_rows[ROW_NORM_KEYS], key_positions[ROW_NORM_KEYS];
    const AttendParams &attend = params.attend;
    const PassTiles &common = params.common;
    RowNormStage stage(row_norm_shared, attend);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 number = blockIdx.x / (TILE_ROWS / ROW_NORM_ROWS);
    const Tile tile = common.tiles[number];
    u32 first = blockIdx.x % (TILE_ROWS / ROW_NORM_ROWS) * ROW_NORM_ROWS;
    if (first >= tile.rows)
        return;
    u32 count = tile.rows - first < ROW_NORM_ROWS ? tile.rows - first : ROW_NORM_ROWS;
    u32 block_number = number / common.tiles_per_block / common.group;
    u32 index = block_number / common.blocks % common.pass.count;
    u32 set_kv_head = block_number / common.blocks / common.pass.count;
    u32 flat = tile.batch * attend.heads_q + tile.head, flat_kv = flat / attend.group;
    u32 kv_head = tile.head / attend.group;
    Rectangle rectangle;
    common.rectangle(index, rectangle);
    u32 tau_item = (flat - common.first_kv_head * attend.group) * common.pass.count + index;
    float floor = from_ordered_bits(params.tau[tau_item]) - params.log2_kappa;
    bool longest = rectangle.key_end - rectangle.key_start == common.most_keys;
    float factor = longest ? params.log2_cap : params.log2_cap_less;
    float log_weight = common.weight(rectangle);

    if (threadIdx.x < count) {
        u32 position = tile.first_query + first + threadIdx.x;
        rows[threadIdx.x] = params.blocks.sorted ? attend.query_order[(u64)flat * attend.n_q + position] : position;
    }
    __syncthreads();
    stage.load_queries(attend, tile.batch, tile.head, rows, count);

    u32 query_rows[ROW_NORM_WARP_ROWS] = {};
    auto state = [&](u32 r) { return (u64)flat * attend.n_q + query_rows[r]; };
    float exact[ROW_NORM_WARP_ROWS], cap[ROW_NORM_WARP_ROWS], max[ROW_NORM_WARP_ROWS];
    float accumulated[ROW_NORM_WARP_ROWS][ROW_NORM_VALUES];
    RunningSum sums[ROW_NORM_WARP_ROWS];
#pragma unroll
    for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++) {
        u32 row = warp * ROW_NORM_WARP_ROWS + r;
        sums[r] = {minus_infinity(), 0.0f};
        query_rows[r] = row < count ? rows[row] : rows[0];
        float sum = params.exact_sum[state(r)];
        max[r] = params.exact_max[state(r)];
        exact[r] = sum == 0.0f ? minus_infinity() : max[r] + log2f(sum);
        cap[r] = factor + log2_add(exact[r], floor);
        // The products of a row that met nothing are not there.
        bool empty = sum == 0.0f && max[r] == minus_infinity();
#pragma unroll
        for (u32 i = 0; i < ROW_NORM_VALUES; i++) {
            u32 dim = i * 32 + lane;
            accumulated[r][i] = 0.0f;
            if (dim < attend.value_dim && !empty)
                accumulated[r][i] = params.exact_accumulated[state(r) * attend.value_dim + dim];
        }
    }
    // All rows of a tile meet the same keys exactly.
    auto covered = [&](u32 position) { return params.blocks.meets(rectangle, flat, tile.first_query, position); };
    u64 samples = ((u64)set_kv_head * common.pass.count + index) * params.sample_size;

    // Lines 2 to 4 of Algorithm 2.
    for (u32 at = 0; at < params.sample_size; at += ROW_NORM_KEYS) {
        u32 left = params.sample_size - at, keys = left < ROW_NORM_KEYS ? left : ROW_NORM_KEYS;
        if (threadIdx.x < keys) {
            key_positions[threadIdx.x] = params.positions[samples + at + threadIdx.x];
            key_rows[threadIdx.x] = row_at(params, flat_kv, key_positions[threadIdx.x]);
        }
        __syncthreads();
        stage.load_keys(attend, tile.batch, kv_head, key_rows, keys, false);
        __syncthreads();
        float logits[ROW_NORM_WARP_ROWS];
        stage.multiply(attend.head_dim, logits);
        if (lane < keys && !covered(key_positions[lane])) {
#pragma unroll
            for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++)
                sums[r].add((cap[r] < logits[r] ? cap[r] : logits[r]) + log_weight);
        }
        __syncthreads();
    }
    float log2_sum[ROW_NORM_WARP_ROWS];
#pragma unroll
    for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++)
        log2_sum[r] = sums[r].log2_of_warp();
    if (params.bounds) {
#pragma unroll
        for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++) {
            // Where tau / kappa takes the place of the whole sum, all its terms are constants.
            if (lane == 0 && warp * ROW_NORM_WARP_ROWS + r < count)
                params.bounds[state(r)] = floor > log2_sum[r] ? minus_infinity() : cap[r];
        }
        return;
    }
#pragma unroll
    for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++)
        log2_sum[r] = log2_add(exact[r], floor > log2_sum[r] ? floor : log2_sum[r]);

    // Line 4 of Algorithm 3: the product with the values.
    for (u32 at = 0; at < params.sample_size; at += ROW_NORM_KEYS) {
        u32 left = params.sample_size - at, keys = left < ROW_NORM_KEYS ? left : ROW_NORM_KEYS;
        if (threadIdx.x < keys) {
            key_positions[threadIdx.x] = params.norm_positions[samples + at + threadIdx.x];
            key_rows[threadIdx.x] = row_at(params, flat_kv, key_positions[threadIdx.x]);
        }
        __syncthreads();
        stage.load_keys(attend, tile.batch, kv_head, key_rows, keys, true);
        __syncthreads();
        float logits[ROW_NORM_WARP_ROWS];
        stage.multiply(attend.head_dim, logits);
        float weight = lane < keys ? params.norm_weights[samples + at + lane] : minus_infinity();
        bool takes_part = weight != minus_infinity() && !covered(key_positions[lane]);
        u32 taking = __ballot_sync(ALL, takes_part);
#pragma unroll
        for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++) {
            float logit = takes_part ? logits[r] + weight : minus_infinity(), most = logit;
            for (u32 distance = 16; distance > 0; distance /= 2)
                most = fmaxf(most, __shfl_xor_sync(ALL, most, distance));
            most = fmaxf(most, max[r]);
            float scale = most == max[r] ? 1.0f : exp2f(max[r] - most);
            // Without a finite logit there is nothing to be relative to.
            float weight_of_lane = takes_part && logit != minus_infinity() ? exp2f(logit - most) : 0.0f;
            max[r] = most;
#pragma unroll
            for (u32 i = 0; i < ROW_NORM_VALUES; i++)
                accumulated[r][i] *= scale;
            for (u32 left = taking; left != 0; left &= left - 1) {
                u32 key = __popc((left & (0u - left)) - 1);
                float weight_of_key = __shfl_sync(ALL, weight_of_lane, key);
#pragma unroll
                for (u32 i = 0; i < ROW_NORM_VALUES; i++) {
                    u32 dim = i * 32 + lane;
                    if (dim < attend.value_dim)
                        accumulated[r][i] =
                            __fmaf_rn(weight_of_key, stage.values[key * attend.value_dim + dim], accumulated[r][i]);
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (u32 r = 0; r < ROW_NORM_WARP_ROWS; r++) {
        u32 row = warp * ROW_NORM_WARP_ROWS + r;
        if (row >= count)
            continue;
        // Values may weigh far more than the sum says: keep the sum a normal number relative to the maximum.
        float old = max[r], sum, scale;
        if (log2_sum[r] == minus_infinity()) {
            max[r] = minus_infinity(), sum = 0.0f, scale = 0.0f;
        } else {
            max[r] = fminf(fmaxf(old, log2_sum[r]), log2_sum[r] + 100.0f);
            sum = exp2f(log2_sum[r] - max[r]);
            // A finite factor: 0 stays 0 where the output is too large for f32.
            scale = exp2f(fminf(old - max[r], 127.0f));
        }
        float stored_scale = 0.0f;
        if (common.flags_of(index) & TILE_RESUME) {
            float stored_max = attend.state_max[state(r)], stored_sum = attend.state_sum[state(r)];
            if (stored_max != minus_infinity() || stored_sum != 0.0f) {
                float joined = fmaxf(max[r], stored_max);
                float mine = joined == minus_infinity() ? 1.0f : exp2f(max[r] - joined);
                stored_scale = joined == minus_infinity() ? 1.0f : exp2f(stored_max - joined);
                sum = sum * mine + stored_sum * stored_scale;
                scale *= mine;
                max[r] = joined;
            }
        }
        // All lanes have read what the first one writes.
        __syncwarp();
        bool stores = common.flags_of(index) & TILE_STORE;
        float normal = stores ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
        for (u32 i = 0; i < ROW_NORM_VALUES; i++) {
            u32 dim = i * 32 + lane;
            if (dim >= attend.value_dim)
                continue;
            float *slot = attend.state_accumulated + state(r) * attend.value_dim + dim;
            float value = accumulated[r][i] * scale;
            if (stored_scale != 0.0f)
                value += *slot * stored_scale;
            value *= normal;
            if (stores) {
                *slot = value;
            } else {
                char *out = attend.out.row(tile.batch, tile.head, query_rows[r]);
                if (attend.out_type == F32)
                    ((float *)out)[dim] = value;
                else
                    ((u16 *)out)[dim] = attend.out_type == BF16 ? bf16_from_f32(value) : f16_from_f32(value);
            }
        }
        if (lane == 0 && stores) {
            attend.state_max[state(r)] = max[r];
            attend.state_sum[state(r)] = sum;
        } else if (lane == 0 && attend.lse.data) {
            float lse = sum == 0.0f ? minus_infinity() : (max[r] + log2f(sum)) * 0.693147180559945f;
            *(float *)attend.lse.row(tile.batch, tile.head, query_rows[r]) = lse;
        }
    }
}
