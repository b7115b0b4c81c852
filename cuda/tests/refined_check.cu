// Checks the selection of METHOD_REFINED on a GPU against a plain implementation for one tile at a time, and times it.
//
// nvcc -std=c++17 -O3 -cudart static -gencode arch=compute_90a,code=sm_90a -I cuda/kernels/hyperattn refined_check.cu
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "budget.cuh"
#include "refine.cuh"
#include "refined_tiles.cuh"
#include "summary.cuh"
#include "weigh_f32.cuh"

using namespace hyperattn;
using namespace hyperattn::refined;

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        cudaError_t code = (call);                                                                                     \
        if (code != cudaSuccess) {                                                                                     \
            std::printf("FAIL %s: %s\n", #call, cudaGetErrorString(code));                                             \
            std::exit(1);                                                                                              \
        }                                                                                                              \
    } while (0)

static int failures = 0;

static void report(bool good, const std::string &what)
{
    std::printf("%s %s\n", good ? "PASS" : "FAIL", what.c_str());
    failures += !good;
}

struct Case {
    const char *name;
    u32 type;
    u32 kv_type;
    u32 batch, heads_q, group, n_q, n_k, head_dim, value_dim;
    // 0 none, 1 bottom right, 2 top left.
    int mask;
    u32 first_keys, band, budget;
    bool clustered;
    // Some keys and queries are NaN.
    bool poisoned;
    // Elements between rows besides those of a row.
    u32 padding;
};

// Of a row of summaries.
static u64 width_of(const Case &c) { return c.head_dim + c.value_dim; }

static u32 bytes_of(u32 type) { return type == F32 ? 4 : 2; }

static u16 host_bf16(float x)
{
    u32 bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (u16)(bits >> 16 | 0x40);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void put(char *to, u64 at, u32 type, float x)
{
    if (type == F32)
        ((float *)to)[at] = x;
    else if (type == BF16)
        ((u16 *)to)[at] = host_bf16(x);
    else
        ((__half *)to)[at] = __float2half(x);
}

static float get(const char *from, u64 at, u32 type)
{
    if (type == F32)
        return ((const float *)from)[at];
    if (type == F16)
        return __half2float(((const __half *)from)[at]);
    u32 bits = (u32)((const u16 *)from)[at] << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static float rounded(u32 type, float x)
{
    char bytes[4];
    put(bytes, 0, type, x);
    return get(bytes, 0, type);
}

static u64 random_state = 88172645463325252ull;

static float uniform()
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (float)(random_state >> 40) / (1 << 24);
}

static float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7320508f; }

// Device memory that lives until the program ends.
template <class T> static T *device(u64 count)
{
    void *memory;
    CHECK(cudaMalloc(&memory, std::max<u64>(count * sizeof(T), 256)));
    return (T *)memory;
}

template <class T> static std::vector<T> fetch(const T *from, u64 count)
{
    std::vector<T> to(count);
    CHECK(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
}

// A tensor on both sides.
struct Tensor {
    std::vector<char> host;
    View view;
    u32 type, heads, rows, dim;
    u64 stride;

    float at(u32 batch, u32 head, u32 row, u32 column) const
    {
        return get(host.data(), (((u64)batch * heads + head) * rows + row) * stride + column, type);
    }
};

static Tensor make_tensor(u32 type, u32 batch, u32 heads, u32 rows, u32 dim, u32 padding,
                          const std::function<float(u32, u32, u32)> &element)
{
    Tensor tensor;
    tensor.type = type;
    tensor.heads = heads;
    tensor.rows = rows;
    tensor.dim = dim;
    tensor.stride = dim + padding;
    u64 count = (u64)batch * heads * rows * tensor.stride;
    tensor.host.resize(count * bytes_of(type));
    for (u32 head = 0; head < batch * heads; ++head)
        for (u32 row = 0; row < rows; ++row)
            for (u32 column = 0; column < tensor.stride; ++column)
                put(tensor.host.data(), ((u64)head * rows + row) * tensor.stride + column, type,
                    column < dim ? element(head, row, column) : NAN);
    char *memory = device<char>(tensor.host.size());
    CHECK(cudaMemcpy(memory, tensor.host.data(), tensor.host.size(), cudaMemcpyHostToDevice));
    i64 row_stride = (i64)tensor.stride * bytes_of(type);
    tensor.view = {memory, row_stride * rows * heads, row_stride * rows, row_stride};
    return tensor;
}

static u32 ranges_of(const RefinedParams &p)
{
    u32 range = (p.blocks + MOST_RANGES * KEY_BLOCK - 1) / (MOST_RANGES * KEY_BLOCK) * KEY_BLOCK;
    return (p.blocks + range - 1) / range;
}

// Shapes and scratch memory, as the library's host side makes them.
static RefinedParams make_params(const Case &c, const View &q, const View &k, const View &v, u64 chunk_bytes)
{
    RefinedParams p = {};
    p.q = q;
    p.k = k;
    p.v = v;
    p.q_type = c.type;
    p.kv_type = c.kv_type;
    p.operand_type = c.type == c.kv_type ? c.type : (u32)F32;
    u32 parts = (c.head_dim + 31) / 32;
    parts = parts <= 2 ? 2 : parts <= 4 ? parts : parts <= 6 ? 6 : 8;
    p.width = parts * 32;
    p.batch = c.batch;
    p.heads_q = c.heads_q;
    p.group = c.group;
    p.n_q = c.n_q;
    p.n_k = c.n_k;
    p.head_dim = c.head_dim;
    p.value_dim = c.value_dim;
    p.visible = c.mask == 0 ? (i32)c.n_k : c.mask == 1 ? 1 + (i32)c.n_k - (i32)c.n_q : 1;
    p.scale_log2 = 1.44269504f / std::sqrt((float)c.head_dim);
    p.flags = (c.mask ? REFINED_CAUSAL : 0) | REFINED_REST;
    auto aligned = [](const View &view, u32 dim) {
        return dim % 8 == 0 && ((u64)view.data | view.row_stride | view.head_stride | view.batch_stride) % 16 == 0;
    };
    p.flags |= aligned(q, c.head_dim) ? REFINED_Q_ALIGNED : 0;
    p.flags |= aligned(k, c.head_dim) ? REFINED_K_ALIGNED : 0;
    p.flags |= aligned(v, c.value_dim) ? REFINED_V_ALIGNED : 0;
    p.num_first_keys = c.first_keys;
    p.band = c.band;
    bool is_long = c.n_k > 32768;
    p.candidates_per_key = is_long ? 3 : 4;
    p.least_budget = c.budget;
    p.tile_rows = is_long ? 256 : 128;
    bool latest = c.mask && (c.n_q - 1) % p.tile_rows >= 32;
    p.earlier_queries = latest ? c.n_q - 32 : c.n_q;
    p.query_tiles = (p.earlier_queries + p.tile_rows - 1) / p.tile_rows + latest;
    p.blocks = (c.n_k + 63) / 64;
    p.most_candidates = std::min(std::max((p.candidates_per_key * c.budget + 63) / 64, 8u) + 1, p.blocks);
    u32 most_first = std::min(c.first_keys, c.n_k);
    p.most_positions = std::min(std::max(c.budget, most_first + c.budget / 8), c.n_k);
    p.tiles_of_head = p.query_tiles;
    p.groups_of_head = (p.query_tiles + GROUP_TILES - 1) / GROUP_TILES;
    u64 heads = (u64)c.batch * c.heads_q, kv = heads / c.group;
    p.pass_groups = heads * p.groups_of_head;
    u32 words = (p.blocks + 31) / 32;
    u32 ranges = ranges_of(p);
    u64 shared = std::max<u64>({p.most_candidates * KEY_BLOCK, p.blocks, (u64)ranges * width_of(c)});
    u64 place_bytes = 4 * (2 * REPRESENTATIVES + (u64)p.blocks + p.most_candidates + 1 + shared + ranges + 2 * words);
    p.chunk_groups = std::clamp<u64>(chunk_bytes / (place_bytes * GROUP_TILES), 1, p.pass_groups);
    if (p.chunk_groups >= p.groups_of_head)
        p.chunk_groups = p.chunk_groups / p.groups_of_head * p.groups_of_head;

    u64 operand_row = p.width * (p.operand_type == F32 ? 4 : 2);
    u64 tiles = heads * p.query_tiles;
    p.summaries = device<float>(kv * p.blocks * (c.head_dim + c.value_dim));
    // Sixteen at a time are read.
    u64 operand_rows = kv * p.blocks + 16;
    p.key_counts = device<float>(operand_rows);
    p.mean_keys = device<char>(operand_rows * operand_row);
    p.outliers = device<char>(operand_rows * operand_row);
    p.representatives = device<char>(tiles * REPRESENTATIVES * operand_row);
    p.represented = device<float>(tiles * REPRESENTATIVES);
    u32 *budgets = device<u32>(heads);
    std::vector<u32> same(heads, c.budget);
    CHECK(cudaMemcpy(budgets, same.data(), heads * 4, cudaMemcpyHostToDevice));
    p.budgets = budgets;
    u64 places = (u64)p.chunk_groups * GROUP_TILES;
    p.totals = device<float>(places * REPRESENTATIVES);
    p.starts = device<float>(places * REPRESENTATIVES);
    p.block_weights = device<float>(places * p.blocks);
    p.candidates = device<u32>(places * p.most_candidates);
    p.candidate_count = device<u32>(places);
    p.key_weights = device<float>(places * shared);
    p.outlier_weights = p.key_weights;
    p.column_sums = p.key_weights;
    p.weight_sums = device<float>(places * ranges);
    p.candidate_bits = device<u32>(places * words);
    p.candidate_ranks = device<u32>(places * words);
    places = (u64)p.pass_groups * GROUP_TILES;
    p.positions = device<u32>(places * p.most_positions);
    p.chosen = device<u32>(places);
    p.extra_keys = device<char>(places * c.head_dim * bytes_of(c.kv_type));
    p.extra_values = device<char>(places * c.value_dim * bytes_of(c.kv_type));
    p.segments = device<Segment>(places * SEGMENTS_OF_TILE);
    p.tiles = device<Tile>(places * RECORDS_OF_TILE);
    return p;
}

using Kernel = void (*)(const RefinedParams);

// total_weights, weigh_blocks and weigh_keys.
struct WeighKernels {
    Kernel totals, blocks, keys;
};

static WeighKernels weigh_kernels(const RefinedParams &p)
{
#define OF_PARTS(PARTS)                                                                                                \
    if (p.width == PARTS * 32)                                                                                         \
        return p.operand_type == F16                                                                                   \
                   ? WeighKernels{total_weights_f16_##PARTS, weigh_blocks_f16_##PARTS, weigh_keys_f16_##PARTS}         \
                   : WeighKernels{total_weights_bf16_##PARTS, weigh_blocks_bf16_##PARTS, weigh_keys_bf16_##PARTS};
    OF_PARTS(2)
    OF_PARTS(3)
    OF_PARTS(4)
    OF_PARTS(6)
    OF_PARTS(8)
#undef OF_PARTS
    std::abort();
}

enum Stage { SUMMARISE, REPRESENT, WEIGH_BLOCKS, CHOOSE_BLOCKS, WEIGH_KEYS, CHOOSE_KEYS, SUMS, TILES, STAGES };
static const char *const STAGE_NAMES[STAGES] = {"summarise_keys", "represent_queries", "weigh_blocks", "choose_blocks",
                                                "weigh_keys",     "choose_keys",       "sum_summaries",
                                                "refined_tiles"};

// Selection of a whole pass; `each` is called before every kernel. Thread blocks weigh the keys of one block, or of
// several where there are more than `most_key_blocks`.
static void select(const RefinedParams &p, const std::function<void(Stage)> &each, u32 most_key_blocks = ~0u)
{
    u32 heads = p.batch * p.heads_q;
    each(SUMMARISE);
    summarise_keys<<<heads / p.group * p.blocks, SUMMARY_THREADS>>>(p);
    each(REPRESENT);
    u32 chunks = (p.head_dim + REPRESENT_CHUNK - 1) / REPRESENT_CHUNK;
    if (p.q_type != F32 && chunks <= 2) {
        auto represent = p.q_type == BF16 ? represent_queries_bf16 : represent_queries_f16;
        u32 shared_bytes = chunks * REPRESENT_CHUNK_BYTES;
        CHECK(cudaFuncSetAttribute(represent, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
        represent<<<heads * p.query_tiles, REPRESENT_THREADS, shared_bytes>>>(p);
    } else {
        represent_queries<<<heads * p.query_tiles, REPRESENT_THREADS>>>(p);
    }
    for (u32 first = 0; first < p.pass_groups; first += p.chunk_groups) {
        RefinedParams chunk = p;
        chunk.chunk_first = first;
        chunk.chunk_groups = std::min(p.chunk_groups, p.pass_groups - first);
        u32 places = chunk.chunk_groups * GROUP_TILES;
        u32 heads_of_chunk = (first + chunk.chunk_groups - 1) / p.groups_of_head - first / p.groups_of_head + 1;
        each(WEIGH_BLOCKS);
        if (p.operand_type == F32) {
            weigh_blocks_f32<<<places, WEIGH_F32_THREADS>>>(chunk);
        } else {
            WeighKernels weigh = weigh_kernels(p);
            weigh.totals<<<chunk.chunk_groups, WEIGH_BLOCKS_THREADS>>>(chunk);
            u32 slices = std::min((1024 + chunk.chunk_groups - 1) / chunk.chunk_groups, (p.blocks + 15) / 16);
            weigh.blocks<<<dim3(chunk.chunk_groups, slices), WEIGH_BLOCKS_THREADS>>>(chunk);
        }
        each(CHOOSE_BLOCKS);
        choose_blocks<<<places, SELECT_THREADS>>>(chunk);
        each(WEIGH_KEYS);
        if (p.operand_type == F32)
            weigh_keys_f32<<<places, WEIGH_F32_THREADS>>>(chunk);
        else
            weigh_kernels(p).keys<<<dim3(std::min(p.blocks, most_key_blocks), heads_of_chunk), WEIGH_KEYS_THREADS>>>(
                chunk);
        each(CHOOSE_KEYS);
        // Every other chunk leaves the weights of many candidates where they are.
        u32 kept = first / p.chunk_groups % 2 ? 8 : p.most_candidates;
        choose_keys<<<places, SELECT_THREADS, std::min(kept * CANDIDATE_BYTES, 36u << 10)>>>(chunk);
        each(SUMS);
        dim3 sums(chunk.chunk_groups, ranges_of(p), (p.head_dim + p.value_dim + SUM_COLUMNS - 1) / SUM_COLUMNS);
        sum_summaries<<<sums, SUM_THREADS>>>(chunk);
        each(TILES);
        refined_tiles<<<chunk.chunk_groups, REFINED_TILES_THREADS>>>(chunk);
    }
    CHECK(cudaGetLastError());
}

// The plain implementation.

struct HostFrame {
    bool chooses = false;
    u32 first = 0, near = 0, seen = 0, wanted = 0;
};

static u32 visible_keys(const Case &c, u32 row)
{
    if (c.mask == 0)
        return c.n_k;
    if (c.mask == 2)
        return std::min(row + 1, c.n_k);
    i64 keys = (i64)row + 1 + c.n_k - c.n_q;
    return keys < 0 ? 0 : (u32)keys;
}

static HostFrame host_frame(const Case &c, u32 begin, u32 end)
{
    HostFrame frame;
    u32 least = visible_keys(c, begin), most = visible_keys(c, end - 1);
    if (most <= c.budget)
        return frame;
    u32 far_end = c.mask ? (least > c.band ? least - c.band : 0) : least;
    frame.near = far_end / 64 * 64;
    frame.first = std::min(c.first_keys, frame.near);
    frame.seen = least;
    u64 visible = 0;
    for (u32 row = begin; row < end; ++row)
        visible += visible_keys(c, row);
    u64 met = frame.first + visible / (end - begin) - frame.near;
    frame.wanted = std::max<u32>(c.budget > met + 1 ? c.budget - (u32)met - 1 : 0, c.budget / 8);
    frame.chooses = frame.near - frame.first > frame.wanted;
    return frame;
}

struct HostSummaries {
    std::vector<float> mean_key, mean_value, outlier, count;
};

static HostSummaries summarise(const Case &c, const Tensor &k, const Tensor &v, u32 batch, u32 head)
{
    u32 blocks = (c.n_k + 63) / 64;
    HostSummaries s;
    s.mean_key.assign((u64)blocks * c.head_dim, 0.0f);
    s.mean_value.assign((u64)blocks * c.value_dim, 0.0f);
    s.outlier.assign((u64)blocks * c.head_dim, 0.0f);
    s.count.assign(blocks, 0.0f);
    for (u32 block = 0; block < blocks; ++block) {
        std::vector<u32> rows;
        for (u32 row = block * 64; row < std::min(c.n_k, block * 64 + 64); ++row) {
            bool finite = true;
            for (u32 i = 0; i < c.head_dim; ++i)
                finite &= std::isfinite(k.at(batch, head, row, i));
            for (u32 i = 0; i < c.value_dim; ++i)
                finite &= std::isfinite(v.at(batch, head, row, i));
            if (finite)
                rows.push_back(row);
        }
        s.count[block] = (float)rows.size();
        if (rows.empty())
            continue;
        for (u32 i = 0; i < c.head_dim; ++i) {
            double sum = 0;
            for (u32 row : rows)
                sum += k.at(batch, head, row, i);
            s.mean_key[(u64)block * c.head_dim + i] = (float)(sum / rows.size());
        }
        for (u32 i = 0; i < c.value_dim; ++i) {
            double sum = 0;
            for (u32 row : rows)
                sum += v.at(batch, head, row, i);
            s.mean_value[(u64)block * c.value_dim + i] = (float)(sum / rows.size());
        }
        double most = -1;
        u32 farthest = rows[0];
        for (u32 row : rows) {
            double distance = 0;
            for (u32 i = 0; i < c.head_dim; ++i) {
                double off = k.at(batch, head, row, i) - s.mean_key[(u64)block * c.head_dim + i];
                distance += off * off;
            }
            if (distance > most) {
                most = distance;
                farthest = row;
            }
        }
        for (u32 i = 0; i < c.head_dim; ++i)
            s.outlier[(u64)block * c.head_dim + i] = k.at(batch, head, farthest, i);
    }
    return s;
}

struct HostRepresentatives {
    u32 len = 0;
    std::vector<float> counts;
    std::vector<std::vector<float>> means;
};

// Squared distances of the queries from the means of their runs, 0 where they are not finite.
static std::vector<double> run_distances(const Case &c, const Tensor &q, u32 batch, u32 head, u32 begin, u32 end,
                                         std::vector<int> &part)
{
    u32 count = end - begin;
    part.assign(count, -1);
    std::vector<double> distance(count, 0.0);
    for (u32 row = 0; row < count; ++row) {
        bool finite = true;
        for (u32 i = 0; i < c.head_dim; ++i)
            finite &= std::isfinite(q.at(batch, head, begin + row, i));
        if (finite)
            part[row] = row * 4 / count;
    }
    for (int run = 0; run < 4; ++run) {
        std::vector<double> mean(c.head_dim, 0.0);
        u32 number = 0;
        for (u32 row = 0; row < count; ++row) {
            if (part[row] != run)
                continue;
            ++number;
            for (u32 i = 0; i < c.head_dim; ++i)
                mean[i] += q.at(batch, head, begin + row, i);
        }
        for (u32 row = 0; row < count; ++row) {
            if (part[row] != run)
                continue;
            for (u32 i = 0; i < c.head_dim; ++i) {
                double off = q.at(batch, head, begin + row, i) - mean[i] / number;
                distance[row] += off * off;
            }
        }
    }
    return distance;
}

static HostRepresentatives represent(const Case &c, const Tensor &q, u32 batch, u32 head, u32 begin, u32 end)
{
    u32 count = end - begin;
    std::vector<int> part;
    std::vector<double> distance = run_distances(c, q, batch, head, begin, end, part);
    for (int next = 4; next < 8; ++next) {
        u32 farthest = (u32)(std::max_element(distance.begin(), distance.end()) - distance.begin());
        if (distance[farthest] == 0)
            break;
        for (u32 row = 0; row < count; ++row) {
            if (part[row] < 0)
                continue;
            double from = 0;
            for (u32 i = 0; i < c.head_dim; ++i) {
                double off = q.at(batch, head, begin + row, i) - q.at(batch, head, begin + farthest, i);
                from += off * off;
            }
            if (from < distance[row]) {
                distance[row] = from;
                part[row] = next;
            }
        }
    }
    HostRepresentatives r;
    for (int p = 0; p < 8; ++p) {
        std::vector<double> sum(c.head_dim, 0.0);
        u32 number = 0;
        for (u32 row = 0; row < count; ++row) {
            if (part[row] != p)
                continue;
            ++number;
            for (u32 i = 0; i < c.head_dim; ++i)
                sum[i] += q.at(batch, head, begin + row, i);
        }
        if (number == 0)
            continue;
        std::vector<float> mean;
        for (double x : sum)
            mean.push_back((float)(x / number));
        r.means.push_back(mean);
        r.counts.push_back((float)number);
        ++r.len;
    }
    return r;
}

static std::vector<u32> heaviest(const std::vector<double> &weights, u32 wanted)
{
    std::vector<u32> order(weights.size());
    for (u32 i = 0; i < order.size(); ++i)
        order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](u32 a, u32 b) { return weights[a] > weights[b]; });
    order.resize(std::min<size_t>(wanted, order.size()));
    std::sort(order.begin(), order.end());
    return order;
}

struct HostChoice {
    std::vector<u32> positions;
    std::vector<float> key, value;
    double log_weight;
};

// What a tile with these representatives meets.
static HostChoice choose(const Case &c, const RefinedParams &p, const Tensor &k, const HostSummaries &s, u32 batch,
                         u32 head, const HostFrame &frame, const HostRepresentatives &r)
{
    auto logit = [&](u32 slot, const std::function<float(u32)> &key) {
        double product = 0;
        for (u32 i = 0; i < c.head_dim; ++i)
            product += (double)r.means[slot][i] * key(i);
        return product * p.scale_log2;
    };
    auto key_at = [&](u32 row) { return [&, row](u32 i) { return k.at(batch, head, row, i); }; };
    auto mean_at = [&](u32 block) {
        return [&, block](u32 i) { return rounded(p.operand_type, s.mean_key[(u64)block * c.head_dim + i]); };
    };
    auto outlier_at = [&](u32 block) { return [&, block](u32 i) { return s.outlier[(u64)block * c.head_dim + i]; }; };
    u32 end = frame.near / 64, begin = frame.first / 64;
    std::vector<double> total(r.len), start(r.len);
    double queries = 0;
    for (float count : r.counts)
        queries += count;
    for (u32 slot = 0; slot < r.len; ++slot) {
        std::vector<double> logits;
        for (u32 row = 0; row < frame.first; ++row)
            logits.push_back(logit(slot, key_at(row)));
        for (u32 row = frame.near; row < frame.seen; ++row)
            logits.push_back(logit(slot, key_at(row)));
        for (u32 block = 0; block < end; ++block)
            if (s.count[block] > 0)
                logits.push_back(logit(slot, mean_at(block)) + std::log2(s.count[block]));
        double most = *std::max_element(logits.begin(), logits.end()), sum = 0;
        for (double x : logits)
            sum += std::exp2(x - most);
        total[slot] = most + std::log2(sum);
        // Keys that are not finite are among those that all see: it has no share in anything.
        start[slot] = total[slot] > -INFINITY ? total[slot] + std::log2(queries / r.counts[slot]) : INFINITY;
    }
    auto weight = [&](const std::function<float(u32)> &key) {
        double sum = 0;
        for (u32 slot = 0; slot < r.len; ++slot) {
            double x = logit(slot, key) - start[slot];
            sum += std::exp2(x < 60 ? x : 60.0);
        }
        return sum;
    };
    std::vector<double> by_mean, with_outlier;
    for (u32 block = begin; block < end; ++block) {
        double mean = weight(mean_at(block)) * s.count[block];
        by_mean.push_back(mean);
        with_outlier.push_back(weight(outlier_at(block)) * std::min(s.count[block], 1.0f) + mean);
    }
    if (frame.first % 64)
        with_outlier[0] = 1e300;
    u32 wanted_blocks = std::max((p.candidates_per_key * frame.wanted + 63) / 64, 8u) + 1;
    std::vector<u32> candidates = heaviest(with_outlier, std::min(wanted_blocks, end - begin));
    std::vector<double> weights;
    for (u32 block : candidates)
        for (u32 slot = 0; slot < 64; ++slot) {
            u32 row = (begin + block) * 64 + slot;
            weights.push_back(row < frame.first ? 0.0 : weight(key_at(row)));
        }
    HostChoice choice;
    for (u32 row = 0; row < frame.first; ++row)
        choice.positions.push_back(row);
    std::vector<char> taken(weights.size(), 0);
    for (u32 i : heaviest(weights, frame.wanted)) {
        u32 row = (begin + candidates[i / 64]) * 64 + i % 64;
        if (row >= frame.first) {
            choice.positions.push_back(row);
            taken[i] = 1;
        }
    }
    for (u32 i = 0; i < candidates.size(); ++i) {
        double left = 0;
        for (u32 slot = 0; slot < 64; ++slot)
            left += taken[i * 64 + slot] ? 0.0 : weights[i * 64 + slot];
        by_mean[candidates[i]] = left;
    }
    double all = 0;
    std::vector<double> key(c.head_dim, 0.0), value(c.value_dim, 0.0);
    for (u32 block = begin; block < end; ++block) {
        double w = by_mean[block - begin];
        all += w;
        for (u32 i = 0; i < c.head_dim; ++i)
            key[i] += w * s.mean_key[(u64)block * c.head_dim + i];
        for (u32 i = 0; i < c.value_dim; ++i)
            value[i] += w * s.mean_value[(u64)block * c.value_dim + i];
    }
    for (double x : key)
        choice.key.push_back(rounded(c.kv_type, (float)(x / all)));
    for (double x : value)
        choice.value.push_back(rounded(c.kv_type, (float)(x / all)));
    double mean = 0;
    for (u32 slot = 0; slot < r.len; ++slot)
        mean += r.counts[slot] * (total[slot] - logit(slot, [&](u32 i) { return choice.key[i]; }));
    choice.log_weight = std::log2(all) + mean / queries;
    return choice;
}

// Relative Frobenius distance.
static double distance_of(const std::vector<float> &a, const std::vector<float> &b)
{
    double off = 0, all = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        off += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        all += (double)b[i] * b[i];
    }
    return std::sqrt(off / std::max(all, 1e-30));
}

static void check_case(const Case &c, u64 chunk_bytes)
{
    u32 heads_kv = c.heads_q / c.group;
    const u32 CLUSTERS = 24;
    std::vector<float> centers(CLUSTERS * 256);
    for (float &x : centers)
        x = normal();
    auto cluster = [&](u32 row) { return row / 37 * 7 % CLUSTERS; };
    Tensor q = make_tensor(c.type, c.batch, c.heads_q, c.n_q, c.head_dim, c.padding, [&](u32, u32 row, u32 i) {
        if (c.poisoned && row % 531 == 17)
            return (float)NAN;
        return c.clustered ? 1.5f * centers[cluster(row + 5) * 256 + i] + 0.7f * normal() : normal() * 1.5f;
    });
    Tensor k = make_tensor(c.kv_type, c.batch, heads_kv, c.n_k, c.head_dim, c.padding, [&](u32, u32 row, u32 i) {
        if (c.poisoned && row % 701 == 100)
            return (float)INFINITY;
        return c.clustered ? centers[cluster(row) * 256 + i] + 0.5f * normal() : normal();
    });
    Tensor v = make_tensor(c.kv_type, c.batch, heads_kv, c.n_k, c.value_dim, c.padding, [&](u32, u32 row, u32) {
        return c.poisoned && row % 997 == 300 ? (float)NAN : normal();
    });
    RefinedParams p = make_params(c, q.view, k.view, v.view, chunk_bytes);
    CHECK(cudaMemset(p.tiles, 0xff, (u64)p.pass_groups * GROUP_TILES * RECORDS_OF_TILE * sizeof(Tile)));
    select(p, [](Stage) {});
    CHECK(cudaDeviceSynchronize());

    u32 kv = c.batch * heads_kv, heads = c.batch * c.heads_q;
    u64 places = (u64)p.pass_groups * GROUP_TILES;
    auto summaries = fetch(p.summaries, (u64)kv * p.blocks * width_of(c));
    auto counts = fetch(p.key_counts, (u64)kv * p.blocks);
    u64 operand_row = p.width * (p.operand_type == F32 ? 4 : 2);
    auto outliers = fetch(p.outliers, (u64)kv * p.blocks * operand_row);
    auto representatives = fetch(p.representatives, (u64)heads * p.query_tiles * REPRESENTATIVES * operand_row);
    auto represented = fetch(p.represented, (u64)heads * p.query_tiles * REPRESENTATIVES);
    auto positions = fetch(p.positions, places * p.most_positions);
    auto segments = fetch(p.segments, places * SEGMENTS_OF_TILE);
    auto tiles = fetch(p.tiles, places * RECORDS_OF_TILE);
    auto extra_keys = fetch(p.extra_keys, places * c.head_dim * bytes_of(c.kv_type));
    auto extra_values = fetch(p.extra_values, places * c.value_dim * bytes_of(c.kv_type));

    double worst_summary = 0, worst_representative = 0, worst_key = 0, worst_value = 0, worst_log = 0;
    u32 wrong_outliers = 0, wrong_counts = 0, blocks_checked = 0, unlike = 0, tiles_checked = 0, wrong_records = 0;
    u64 missing = 0, listed = 0, unordered = 0;
    std::vector<HostSummaries> of_kv(kv);
    for (u32 number = 0; number < kv; ++number) {
        if (number != 0 && number != kv - 1)
            continue;
        of_kv[number] = summarise(c, k, v, number / heads_kv, number % heads_kv);
        const HostSummaries &s = of_kv[number];
        for (u32 block = 0; block < p.blocks; ++block) {
            u64 at = (u64)number * p.blocks + block;
            ++blocks_checked;
            wrong_counts += counts[at] != s.count[block];
            for (u32 i = 0; i < c.head_dim; ++i) {
                worst_summary = std::max(worst_summary, (double)std::abs(summaries[at * width_of(c) + i] -
                                                                         s.mean_key[(u64)block * c.head_dim + i]));
            }
            for (u32 i = 0; i < c.value_dim; ++i)
                worst_summary =
                    std::max(worst_summary, (double)std::abs(summaries[at * width_of(c) + c.head_dim + i] -
                                                             s.mean_value[(u64)block * c.value_dim + i]));
            bool same = true;
            for (u32 i = 0; i < p.width; ++i)
                same &= get(outliers.data() + at * operand_row, i, p.operand_type) ==
                        (i < c.head_dim ? s.outlier[(u64)block * c.head_dim + i] : 0.0f);
            wrong_outliers += !same;
        }
    }
    for (u32 head_number = 0; head_number < heads; ++head_number) {
        u32 batch = head_number / c.heads_q, head = head_number % c.heads_q;
        u32 number = batch * heads_kv + head / c.group;
        if (of_kv[number].count.empty())
            continue;
        u32 step = std::max(1u, p.query_tiles / 5);
        for (u32 index = 0; index < p.query_tiles; ++index) {
            u32 begin = std::min(index * p.tile_rows, p.earlier_queries);
            u32 end = begin == p.earlier_queries ? c.n_q : std::min(p.earlier_queries, begin + p.tile_rows);
            HostFrame frame = host_frame(c, begin, end);
            u64 place = ((u64)head_number * p.groups_of_head + index / GROUP_TILES) * GROUP_TILES + index % GROUP_TILES;
            const Tile *records = &tiles[(places - 1 - place) * RECORDS_OF_TILE];
            // Every record: its rows, and segments that add up to what they see.
            for (u32 record = 0; record < RECORDS_OF_TILE; ++record) {
                const Tile &tile = records[record];
                u32 first = begin + record * 128;
                u32 rows = first < end ? std::min(128u, end - first) : 0;
                bool good = tile.rows == rows;
                if (good && rows) {
                    good = tile.batch == batch && tile.head == head && tile.first_query == first && tile.flags == 0;
                    u32 last = visible_keys(c, first + rows - 1), near = frame.chooses ? frame.near : 0;
                    u32 found_near = 0, found_list = 0, found_rest = 0;
                    for (u32 i = 0; i < tile.segments; ++i) {
                        const Segment &segment = segments[tile.first_segment + i];
                        if (segment.flags & SEGMENT_LISTED) {
                            found_list += segment.count;
                            good &= segment.first == place * p.most_positions;
                        } else if (segment.flags & SEGMENT_EXTRA) {
                            ++found_rest;
                            good &= segment.first == place && segment.count == 1;
                        } else {
                            found_near += segment.count;
                            good &= segment.first == near && segment.flags == (c.mask ? (u32)SEGMENT_LIMITED : 0u);
                        }
                    }
                    good &= found_near == last - near && found_rest <= (frame.chooses ? 1 : 0);
                    good &= found_list == (frame.chooses ? frame.first + frame.wanted : 0);
                }
                if (!good && ++wrong_records <= 3)
                    std::printf("  record %u of tile %u of head %u: rows %u, expected %u, segments %u\n", record, index,
                                head_number, tile.rows, rows, tile.segments);
            }
            if (!frame.chooses || (index % step && index + 2 < p.query_tiles))
                continue;
            ++tiles_checked;
            HostRepresentatives r = represent(c, q, batch, head, begin, end), device_r;
            u64 at = ((u64)head_number * p.query_tiles + index) * REPRESENTATIVES;
            while (device_r.len < REPRESENTATIVES && represented[at + device_r.len] > 0) {
                std::vector<float> mean;
                for (u32 i = 0; i < c.head_dim; ++i)
                    mean.push_back(get(representatives.data() + (at + device_r.len) * operand_row, i, p.operand_type));
                device_r.means.push_back(mean);
                device_r.counts.push_back(represented[at + device_r.len]);
                ++device_r.len;
            }
            bool alike = r.len == device_r.len && r.counts == device_r.counts;
            unlike += !alike;
            for (u32 slot = 0; alike && slot < r.len; ++slot)
                worst_representative = std::max(worst_representative, distance_of(device_r.means[slot], r.means[slot]));
            // From here on with the device's representatives: a tie that went the other way is no error.
            HostChoice choice = choose(c, p, k, of_kv[number], batch, head / c.group, frame, device_r);
            const u32 *list = &positions[place * p.most_positions];
            std::vector<u32> its(list, list + choice.positions.size());
            for (size_t i = 1; i < its.size(); ++i)
                unordered += its[i] <= its[i - 1];
            std::vector<u32> both;
            std::set_intersection(its.begin(), its.end(), choice.positions.begin(), choice.positions.end(),
                                  std::back_inserter(both));
            listed += choice.positions.size();
            missing += choice.positions.size() - both.size();
            std::vector<float> key, value;
            for (u32 i = 0; i < c.head_dim; ++i)
                key.push_back(get(extra_keys.data(), place * c.head_dim + i, c.kv_type));
            for (u32 i = 0; i < c.value_dim; ++i)
                value.push_back(get(extra_values.data(), place * c.value_dim + i, c.kv_type));
            worst_key = std::max(worst_key, distance_of(key, choice.key));
            worst_value = std::max(worst_value, distance_of(value, choice.value));
            bool has_rest = false;
            for (u32 i = 0; i < records[0].segments; ++i) {
                const Segment &segment = segments[records[0].first_segment + i];
                if (segment.flags & SEGMENT_EXTRA) {
                    has_rest = true;
                    worst_log = std::max(worst_log, std::abs(segment.log_weight - choice.log_weight));
                }
            }
            // Poisoned near keys leave no rest.
            if (!has_rest && !c.poisoned)
                worst_log = INFINITY;
        }
    }
    char text[400];
    std::snprintf(text, sizeof text, "%s: %u blocks, means within %.1e, %u counts and %u outliers wrong", c.name,
                  blocks_checked, worst_summary, wrong_counts, wrong_outliers);
    report(worst_summary < 2e-6 && wrong_counts == 0 && wrong_outliers * 200 <= blocks_checked, text);
    double rounding = p.operand_type == BF16 ? 4e-3 : p.operand_type == F16 ? 5e-4 : 1e-5;
    std::snprintf(text, sizeof text, "%s: %u tiles, representatives within %.1e, %u divided otherwise", c.name,
                  tiles_checked, worst_representative, unlike);
    report(tiles_checked > 0 && worst_representative < rounding && unlike * 20 <= tiles_checked, text);
    std::snprintf(text, sizeof text, "%s: %llu of %llu keys differ, %llu out of order, %u records wrong", c.name,
                  missing, listed, unordered, wrong_records);
    report(missing * 200 <= listed && unordered == 0 && wrong_records == 0, text);
    std::snprintf(text, sizeof text, "%s: rest key within %.1e, value %.1e, log weight %.1e", c.name, worst_key,
                  worst_value, worst_log);
    report(worst_key < 0.02 && worst_value < 0.03 && worst_log < 0.02, text);
}

// Probe rows and budgets.

static void host_philox(const u32 key_in[2], const u32 counter[4], u32 to[4])
{
    u32 key[2] = {key_in[0], key_in[1]};
    std::memcpy(to, counter, 16);
    for (int round = 0; round < 10; ++round) {
        if (round) {
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
        u64 a = (u64)0xD2511F53u * to[0], b = (u64)0xCD9E8D57u * to[2];
        u32 next[4] = {(u32)(b >> 32) ^ to[1] ^ key[0], (u32)b, (u32)(a >> 32) ^ to[3] ^ key[1], (u32)a};
        std::memcpy(to, next, 16);
    }
}

static u32 host_draw(const ProbeParams &probe, u32 head, u32 index, u32 number, u32 len)
{
    u32 key[2] = {(u32)probe.seed, (u32)(probe.seed >> 32)}, block[4];
    u32 counter[4] = {(u32)probe.offset, (u32)(probe.offset >> 32), head, 5};
    host_philox(key, counter, block);
    u32 counter2[4] = {number / 2, 0, index, probe.tiles};
    u32 stream[2] = {block[0], block[1]};
    host_philox(stream, counter2, block);
    u64 draw = number % 2 ? block[2] | (u64)block[3] << 32 : block[0] | (u64)block[1] << 32;
    return (u32)((unsigned __int128)draw * len >> 64);
}

static void check_probes(const Case &c)
{
    Tensor q = make_tensor(c.type, c.batch, c.heads_q, c.n_q, c.head_dim, 0,
                           [&](u32, u32 row, u32) { return row % 97 == 3 ? 3.0f * normal() : normal(); });
    RefinedParams p = make_params(c, q.view, q.view, q.view, 1 << 20);
    u32 heads = c.batch * c.heads_q;
    ProbeParams probe = {};
    probe.seed = 0x123456789abcdefull;
    probe.offset = 77;
    probe.whole_over_probed = 1.25;
    probe.first_tile = 2;
    probe.tiles = 16;
    probe.target_error = 0.05f;
    probe.callers_budget = 1024;
    probe.most_budget = 2048;
    u32 rows = probe.tiles * PROBE_ROWS;
    probe.records_of_head = (rows + 127) / 128;
    probe.tile_list = device<u32>(heads * probe.tiles);
    probe.rows = device<u32>(heads * rows);
    probe.weights = device<float>(heads * rows);
    u64 outputs = (u64)heads * rows * c.value_dim;
    probe.exact = device<float>(outputs);
    probe.estimate = device<float>(outputs);
    probe.budgets = device<u32>(heads);
    probe.settled = device<u32>(heads);
    probe.parts = 3;
    probe.probe_records = device<Tile>(heads * probe.records_of_head * probe.parts);
    probe.probe_segments = device<Segment>(heads * probe.records_of_head * probe.parts);
    draw_probes<<<heads * probe.tiles, REPRESENT_THREADS>>>(p, probe);
    auto rows_of_any = fetch(probe.rows, heads * rows);
    auto weights_of_any = fetch(probe.weights, heads * rows);
    u32 shared_bytes = (c.head_dim + REPRESENT_CHUNK - 1) / REPRESENT_CHUNK * REPRESENT_CHUNK_BYTES;
    CHECK(cudaFuncSetAttribute(draw_probes_bf16, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
    draw_probes_bf16<<<heads * probe.tiles, REPRESENT_THREADS, shared_bytes>>>(p, probe);
    probe_tiles<<<heads, 32>>>(p, probe);
    CHECK(cudaDeviceSynchronize());
    report(rows_of_any == fetch(probe.rows, heads * rows) && weights_of_any == fetch(probe.weights, heads * rows),
           "probe rows drawn from shared memory are the same");
    auto list = fetch(probe.tile_list, heads * probe.tiles);
    auto drawn = fetch(probe.rows, heads * rows);
    auto weights = fetch(probe.weights, heads * rows);
    auto records = fetch(probe.probe_records, heads * probe.records_of_head * probe.parts);
    auto segments = fetch(probe.probe_segments, heads * probe.records_of_head * probe.parts);
    u32 wrong_tiles = 0, wrong_rows = 0, wrong_weights = 0;
    for (u32 item = 0; item < heads * probe.tiles; ++item) {
        u32 head = item / probe.tiles % c.heads_q, batch = item / probe.tiles / c.heads_q, index = item % probe.tiles;
        u64 count = p.query_tiles - probe.first_tile;
        u32 first = (u32)(index * count / probe.tiles), end = (u32)((index + 1) * count / probe.tiles);
        u32 tile = probe.first_tile + first + host_draw(probe, head, index, 0, end - first);
        wrong_tiles += tile != list[item];
        u32 begin = std::min(tile * p.tile_rows, p.earlier_queries);
        u32 last = begin == p.earlier_queries ? c.n_q : std::min(p.earlier_queries, begin + p.tile_rows);
        std::vector<int> part;
        std::vector<double> squared = run_distances(c, q, batch, head, begin, last, part);
        double mean = 0, total = 0;
        for (double x : squared)
            mean += std::pow(x, 1.5) / squared.size();
        std::vector<double> share;
        for (double x : squared) {
            share.push_back((std::pow(x, 1.5) + 0.1 * mean) / mean);
            total += share.back();
        }
        double phase = host_draw(probe, head, index, 1, 1 << 20) / (double)(1 << 20), reached = share[0];
        u32 row = 0;
        for (u32 i = 0; i < PROBE_ROWS; ++i) {
            while (reached <= (i + phase) / PROBE_ROWS * total && row + 1 < squared.size())
                reached += share[++row];
            wrong_rows += drawn[item * PROBE_ROWS + i] != begin + row;
            double weight = total / (PROBE_ROWS * share[row]);
            wrong_weights += std::abs(weights[item * PROBE_ROWS + i] - weight) > 1e-3 * weight;
        }
    }
    bool lists = true;
    for (u32 head = 0; head < heads; ++head) {
        u32 next = 0;
        for (u32 part = 0; part < probe.parts; ++part) {
            const Tile &tile = records[head * probe.parts + part];
            const Segment &segment = segments[tile.first_segment];
            lists &= tile.rows == rows && tile.first_query == 0 && tile.first_output == part * heads * rows;
            lists &= tile.flags == (TILE_SORTED | TILE_COMPACT | TILE_STORE) && tile.head == head % c.heads_q;
            lists &= segment.first == next && tile.segments == (segment.count > 0);
            next += segment.count;
        }
        lists &= next == visible_keys(c, drawn[head * rows + rows - 1]);
    }
    char text[200];
    std::snprintf(text, sizeof text, "probe rows: %u tiles, %u rows and %u weights of %u differ", wrong_tiles,
                  wrong_rows, wrong_weights, heads * rows);
    report(wrong_tiles == 0 && wrong_rows * 100 <= heads * rows && wrong_weights * 100 <= heads * rows && lists, text);

    // A pass over the probe tiles, the second head settled.
    RefinedParams pass = p;
    pass.tile_list = probe.tile_list;
    pass.probe_rows = probe.rows;
    pass.settled = probe.settled;
    pass.tiles_of_head = probe.tiles;
    pass.groups_of_head = probe.tiles / GROUP_TILES;
    pass.pass_groups = heads * pass.groups_of_head;
    pass.chunk_groups = std::min(p.chunk_groups, pass.pass_groups);
    std::vector<u32> none(heads, 0);
    none[1] = 1;
    CHECK(cudaMemcpy(probe.settled, none.data(), heads * 4, cudaMemcpyHostToDevice));
    select(pass, [](Stage) {}, 7);
    CHECK(cudaDeviceSynchronize());
    u32 places = pass.pass_groups * GROUP_TILES, wrong_records = 0, choosing = 0;
    auto pass_tiles = fetch(pass.tiles, places);
    auto pass_segments = fetch(pass.segments, places * SEGMENTS_OF_TILE);
    for (u32 place = 0; place < places; ++place) {
        const Tile &tile = pass_tiles[places - 1 - place];
        u32 head = place / probe.tiles, index = list[place];
        if (head == 1) {
            wrong_records += tile.rows != 0;
            continue;
        }
        u32 begin = std::min(index * p.tile_rows, p.earlier_queries);
        u32 end = begin == p.earlier_queries ? c.n_q : std::min(p.earlier_queries, begin + p.tile_rows);
        HostFrame frame = host_frame(c, begin, end);
        choosing += frame.chooses;
        u32 near = 0, others = 0;
        for (u32 i = 0; i < tile.segments; ++i) {
            const Segment &segment = pass_segments[tile.first_segment + i];
            (segment.flags & (SEGMENT_LISTED | SEGMENT_EXTRA) ? others : near) += segment.count;
        }
        u32 last = visible_keys(c, drawn[place * PROBE_ROWS + PROBE_ROWS - 1]);
        bool good = tile.rows == PROBE_ROWS && tile.flags == (TILE_SORTED | TILE_COMPACT) && tile.head == head;
        good &= tile.first_query == place % probe.tiles * PROBE_ROWS && near == last - (frame.chooses ? frame.near : 0);
        good &= others == (frame.chooses ? frame.first + frame.wanted + 1 : 0);
        wrong_records += !good;
    }
    std::snprintf(text, sizeof text, "probe pass: %u of %u records wrong, %u choose", wrong_records, places, choosing);
    report(wrong_records == 0 && choosing > 0, text);

    // Errors of .01, .04, .1, 1 from a budget of 512 on: within half the target, below it, within reach, beyond.
    std::vector<float> exact(outputs), estimate(outputs);
    const float errors[4] = {0.01f, 0.035f, 0.1f, 1.0f};
    for (u64 i = 0; i < outputs; ++i) {
        exact[i] = 1.0f;
        estimate[i] = 1.0f + errors[i / (rows * c.value_dim) % 4] * (i % 2 ? 1.0f : -1.0f);
    }
    std::vector<u32> budgets(heads, 512), settled(heads, 0);
    std::vector<float> ones(heads * rows, 1.0f);
    CHECK(cudaMemcpy(probe.weights, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(probe.exact, exact.data(), outputs * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(probe.estimate, estimate.data(), outputs * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(probe.budgets, budgets.data(), heads * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(probe.settled, settled.data(), heads * 4, cudaMemcpyHostToDevice));
    bool good = true;
    const u32 expected[3][4] = {{512, 1024, 1024, EXACT_BUDGET},
                                {512, 1024, 2048, EXACT_BUDGET},
                                {512, 1024, EXACT_BUDGET, EXACT_BUDGET}};
    for (u32 round = 0; round < 3; ++round) {
        settle_budgets<<<heads, NORM_THREADS>>>(p, probe);
        CHECK(cudaDeviceSynchronize());
        budgets = fetch(probe.budgets, heads);
        for (u32 head = 0; head < heads; ++head)
            good &= budgets[head] == expected[round][head % 4];
        if (!good) {
            std::printf("  round %u:", round);
            for (u32 budget : budgets)
                std::printf(" %u", budget);
            std::printf("\n");
        }
    }
    report(good, "budgets settle");

    View keys = {(char *)device<float>(heads), (i64)c.heads_q * 4, 4, 4};
    refined_keys_per_query<<<heads, NORM_THREADS>>>(p, keys);
    CHECK(cudaDeviceSynchronize());
    auto per_query = fetch((const float *)keys.data, heads);
    double pairs = 0;
    for (u32 index = 0; index < p.query_tiles; ++index) {
        u32 begin = std::min(index * p.tile_rows, p.earlier_queries);
        u32 end = begin == p.earlier_queries ? c.n_q : std::min(p.earlier_queries, begin + p.tile_rows);
        HostFrame frame = host_frame(c, begin, end);
        for (u32 row = begin; row < end; ++row)
            pairs += frame.chooses ? visible_keys(c, row) - frame.near + frame.first + frame.wanted + 1
                                   : visible_keys(c, row);
    }
    std::snprintf(text, sizeof text, "keys per query: %f, expected %f", per_query[0], pairs / c.n_q);
    report(std::abs(per_query[0] - pairs / c.n_q) < 1e-3 * per_query[0], text);
}

// States of several parts, some of which have met nothing, or something that is not a number.
static void check_merge(u32 parts, u32 value_dim, u32 out_type)
{
    const u32 batch = 2, heads = 3, n_q = 5, rows = batch * heads * n_q;
    const float infinite = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> max(parts * rows), sum(parts * rows), accumulated((u64)parts * rows * value_dim);
    for (u32 state = 0; state < parts * rows; ++state) {
        u32 row = state % rows, part = state / rows;
        bool empty = row % 7 == 3 || (row + part) % 3 == 0;
        max[state] = empty ? -infinite : 20.0f * normal() + (row % 7 == 1 ? 1e6f : 0.0f);
        sum[state] = empty ? 0.0f : 1.0f + std::abs(normal());
        if (row % 7 == 5 && part == 1)
            max[state] = 0.0f, sum[state] = nan;
        for (u32 i = 0; i < value_dim; ++i)
            accumulated[(u64)state * value_dim + i] = empty ? nan : normal();
    }
    auto upload = [](const std::vector<float> &values) {
        float *to = device<float>(values.size());
        CHECK(cudaMemcpy(to, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
        return to;
    };
    u32 bytes = bytes_of(out_type);
    char *out = device<char>((u64)rows * value_dim * bytes);
    float *lse = device<float>(rows);
    AttendParams p = {};
    p.heads_q = heads, p.n_q = n_q, p.value_dim = value_dim, p.out_type = out_type;
    p.out = {out, (i64)heads * n_q * value_dim * bytes, (i64)n_q * value_dim * bytes, (i64)value_dim * bytes};
    p.lse = {(char *)lse, heads * n_q * 4, n_q * 4, 4};
    p.state_max = upload(max), p.state_sum = upload(sum), p.state_accumulated = upload(accumulated);
    u32 slices = (value_dim + MERGE_COLUMNS - 1) / MERGE_COLUMNS;
    merge_parts<<<(rows * slices + MERGE_WARPS - 1) / MERGE_WARPS, MERGE_THREADS>>>(p, parts, rows);
    CHECK(cudaDeviceSynchronize());
    auto found = fetch(out, (u64)rows * value_dim * bytes);
    auto found_lse = fetch(lse, rows);
    u32 wrong = 0;
    auto differs = [](double a, double b, double tolerance) {
        return std::isnan(b) ? !std::isnan(a) : a != b && !(std::abs(a - b) <= tolerance * std::max(1.0, std::abs(b)));
    };
    for (u32 row = 0; row < rows; ++row) {
        double most = -INFINITY, total = 0;
        for (u32 part = 0; part < parts; ++part)
            most = std::max(most, (double)max[part * rows + row]);
        std::vector<double> values(value_dim);
        for (u32 part = 0; part < parts; ++part) {
            u32 state = part * rows + row;
            if (sum[state] == 0.0f)
                continue;
            double factor = std::exp2(max[state] - most);
            total += factor * sum[state];
            for (u32 i = 0; i < value_dim; ++i)
                values[i] += factor * accumulated[(u64)state * value_dim + i];
        }
        for (u32 i = 0; i < value_dim; ++i) {
            u64 at = (u64)row * value_dim + i;
            u32 bits = 0;
            std::memcpy(&bits, &found[at * bytes], bytes);
            // F32 is compared as it is; what is rounded is within half a step.
            float value;
            bits <<= out_type == BF16 ? 16 : 0;
            std::memcpy(&value, &bits, 4);
            wrong += differs(value, total == 0 ? 0.0 : values[i] / total, out_type == BF16 ? 4e-3 : 1e-5);
        }
        wrong += differs(found_lse[row], total == 0 ? -INFINITY : (most + std::log2(total)) * std::log(2.0), 1e-6);
    }
    char text[200];
    std::snprintf(text, sizeof text, "merge of %u parts, dim %u, type %u: %u numbers wrong", parts, value_dim, out_type,
                  wrong);
    report(wrong == 0, text);
}

__global__ void fill_normal(u16 *to, u64 count, u32 seed, float scale)
{
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
        u64 x = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ x >> 27) * 0x94D049BB133111EBull;
        x ^= x >> 31;
        float sum = 0.0f;
        for (u32 part = 0; part < 4; ++part)
            sum += (float)(u16)(x >> 16 * part) / 65536.0f - 0.5f;
        to[i] = bf16_from_f32(sum * 1.7320508f * scale);
    }
}

static void time_case(const Case &c)
{
    u64 queries = (u64)c.batch * c.heads_q * c.n_q * c.head_dim, keys = queries / c.n_q * c.n_k / c.group;
    u16 *memory[3] = {device<u16>(queries), device<u16>(keys), device<u16>(keys)};
    for (u32 i = 0; i < 3; ++i)
        fill_normal<<<4096, 256>>>(memory[i], i ? keys : queries, i + 1, i ? 1.0f : 1.5f);
    auto view = [&](u16 *data, u32 heads, u32 rows) {
        i64 row = c.head_dim * 2;
        return View{(char *)data, row * rows * heads, row * rows, row};
    };
    RefinedParams p =
        make_params(c, view(memory[0], c.heads_q, c.n_q), view(memory[1], c.heads_q / c.group, c.n_k),
                    view(memory[2], c.heads_q / c.group, c.n_k), 256 << 20);
    select(p, [](Stage) {});
    CHECK(cudaDeviceSynchronize());
    double best[STAGES + 1];
    std::fill(best, best + STAGES + 1, 1e9);
    for (u32 repeat = 0; repeat < 5; ++repeat) {
        std::vector<std::pair<Stage, cudaEvent_t>> events;
        auto mark = [&](Stage stage) {
            cudaEvent_t event;
            CHECK(cudaEventCreate(&event));
            CHECK(cudaEventRecord(event));
            events.push_back({stage, event});
        };
        select(p, mark);
        mark(STAGES);
        CHECK(cudaDeviceSynchronize());
        double of_stage[STAGES + 1] = {};
        for (size_t i = 0; i + 1 < events.size(); ++i) {
            float time;
            CHECK(cudaEventElapsedTime(&time, events[i].second, events[i + 1].second));
            of_stage[events[i].first] += time;
            of_stage[STAGES] += time;
        }
        for (u32 stage = 0; stage <= STAGES; ++stage)
            best[stage] = std::min(best[stage], of_stage[stage]);
        for (auto &event : events)
            CHECK(cudaEventDestroy(event.second));
    }
    std::printf("TIME %s, chunks of %u groups of %u:", c.name, p.chunk_groups, p.pass_groups);
    for (u32 stage = 0; stage < STAGES; ++stage)
        std::printf(" %s %.3f", STAGE_NAMES[stage], best[stage]);
    std::printf("; all %.3f ms\n", best[STAGES]);
}

int main()
{
    const u64 SMALL = 1 << 18, LARGE = 64 << 20;
    // Name, types, batch, heads, group, n_q, n_k, dims, mask, first, band, budget, clustered, poisoned, padding.
    check_case({"bf16 none", BF16, BF16, 1, 2, 1, 1000, 5000, 128, 128, 0, 16, 128, 512, false, false, 0}, SMALL);
    check_case({"bf16 causal", BF16, BF16, 2, 2, 2, 4000, 4000, 128, 128, 1, 16, 128, 512, true, false, 0}, LARGE);
    check_case({"f16 causal", F16, F16, 1, 4, 2, 3000, 4100, 64, 64, 1, 100, 70, 300, true, false, 0}, SMALL);
    check_case({"f16 top left", F16, F16, 1, 1, 1, 4500, 4000, 96, 80, 2, 64, 128, 400, false, false, 0}, LARGE);
    check_case({"bf16 odd", BF16, BF16, 1, 2, 1, 2500, 2600, 50, 33, 1, 3, 10, 256, true, false, 1}, LARGE);
    check_case({"bf16 wide", BF16, BF16, 1, 1, 1, 2000, 3000, 256, 192, 1, 16, 128, 256, true, false, 0}, LARGE);
    check_case({"bf16 192", BF16, BF16, 1, 1, 1, 1500, 3000, 192, 128, 1, 16, 128, 256, false, false, 0}, LARGE);
    check_case({"bf16 poisoned", BF16, BF16, 1, 1, 1, 3000, 3000, 128, 128, 1, 16, 128, 256, true, true, 0}, LARGE);
    check_case({"f32 causal", F32, F32, 1, 2, 1, 3000, 3000, 128, 128, 1, 16, 128, 512, true, false, 0}, SMALL);
    check_case({"f32 over bf16", F32, BF16, 1, 2, 2, 1500, 3000, 80, 64, 0, 16, 128, 256, true, false, 0}, LARGE);
    check_case({"bf16 long", BF16, BF16, 1, 1, 1, 33333, 33333, 128, 128, 1, 16, 128, 1024, true, false, 0}, LARGE);
    check_probes({"probes", BF16, BF16, 1, 8, 1, 6000, 6000, 64, 64, 1, 16, 128, 512, false, false, 0});
    for (u32 parts : {2u, 5u, 40u, MOST_PARTS}) {
        for (u32 dim : {1u, 57u, 64u, 128u, 200u, 256u}) {
            check_merge(parts, dim, F32);
            check_merge(parts, dim, BF16);
        }
    }
    time_case({"d 128 causal 131072 x 32, budget 2048", BF16, BF16, 1, 32, 1, 131072, 131072, 128, 128, 1, 16, 128,
               2048, false, false, 0});
    std::printf(failures ? "FAIL %d checks\n" : "PASS all checks\n", failures);
    return failures != 0;
}
