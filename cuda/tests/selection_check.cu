// Checks METHOD_PAPER's selection on the device bit for bit against plain C++ written from the CPU's Rust, and that C++
// against numbers that the Rust code printed. Then times hash and sort.
//
//     nvcc -std=c++17 -O3 -cudart static -gencode arch=compute_90a,code=sm_90a -o selection_check \
//         tests/selection_check.cu
//     selection_check [--host-only]
//
// Prints a PASS or FAIL line per check; the exit status is the number of failures.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "../kernels/hyperattn/block_mask_tiles.cuh"
#include "../kernels/hyperattn/bucket_sort.cuh"
#include "../kernels/hyperattn/hash.cuh"
#include "../kernels/hyperattn/paper_tiles.cuh"
#include "../kernels/hyperattn/row_norm.cuh"
#include "../kernels/hyperattn/sample.cuh"

static int failures = 0;

static void report(bool passed, const std::string &what)
{
    printf("%s %s\n", passed ? "PASS" : "FAIL", what.c_str());
    failures += !passed;
}

// ------------------------------------------------------------------------------------------------ the CPU's algorithms

namespace host {

struct Words {
    uint32_t at[4];
};

static Words philox(uint32_t k0, uint32_t k1, Words c)
{
    for (int round = 0; round < 10; round++) {
        if (round > 0) {
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uint64_t p0 = (uint64_t)0xD2511F53u * c.at[0], p1 = (uint64_t)0xCD9E8D57u * c.at[2];
        c = {{(uint32_t)(p1 >> 32) ^ c.at[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.at[3] ^ k1, (uint32_t)p0}};
    }
    return c;
}

struct Stream {
    uint32_t k0, k1;

    Stream(uint64_t seed, uint64_t offset, uint32_t head, uint32_t purpose)
    {
        Words w = philox((uint32_t)seed, (uint32_t)(seed >> 32),
                         {{(uint32_t)offset, (uint32_t)(offset >> 32), head, purpose}});
        k0 = w.at[0];
        k1 = w.at[1];
    }

    void block(uint32_t s0, uint32_t s1, uint64_t index, uint64_t out[2]) const
    {
        Words w = philox(k0, k1, {{(uint32_t)index, (uint32_t)(index >> 32), s0, s1}});
        out[0] = w.at[0] | (uint64_t)w.at[1] << 32;
        out[1] = w.at[2] | (uint64_t)w.at[3] << 32;
    }
};

static double ln(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int64_t exponent = (int64_t)(bits >> 52) - 1023;
    bits = (bits & ((1ull << 52) - 1)) | (1023ull << 52);
    double mantissa;
    memcpy(&mantissa, &bits, 8);
    if (mantissa > 1.41421356237309504880) {
        mantissa *= 0.5;
        exponent += 1;
    }
    double t = (mantissa - 1.0) / (mantissa + 1.0), square = t * t, sum = 0.0;
    for (int k = 11; k >= 0; k--) {
        double product = sum * square;
        sum = product + 1.0 / (double)(2 * k + 1);
    }
    double whole = (double)exponent * 0.693147180559945309417, rest = 2.0 * t * sum;
    return whole + rest;
}

static double series(double square, int first)
{
    double sum = 0.0;
    for (int k = 8; k >= 0; k--) {
        double n = 2 * k + first, product = square / ((n + 1.0) * (n + 2.0)) * sum;
        sum = 1.0 - product;
    }
    return sum;
}

static void normal_pair(uint64_t radius, uint64_t angle, float out[2])
{
    double u = (double)((radius >> 11) + 1) * (1.0 / (double)(1ull << 53));
    double r = std::sqrt(-2.0 * ln(u));
    uint64_t quarter = (angle + (1ull << 61)) >> 62;
    int64_t rest = (int64_t)(angle - (quarter << 62));
    double x = (double)rest * (6.28318530717958647692 / 18446744073709551616.0);
    double c = series(x * x, 0), s = x * series(x * x, 1), sine, cosine;
    if (quarter == 0)
        sine = s, cosine = c;
    else if (quarter == 1)
        sine = c, cosine = -s;
    else if (quarter == 2)
        sine = -s, cosine = -c;
    else
        sine = -c, cosine = s;
    out[0] = (float)(r * cosine);
    out[1] = (float)(r * sine);
}

// [d][r].
static std::vector<float> projections(uint64_t seed, uint64_t offset, uint32_t head, uint32_t d, uint32_t r)
{
    Stream stream(seed, offset, head, 1);
    std::vector<float> to(d * r);
    for (uint32_t i = 0; i < d; i++) {
        for (uint32_t j = 0; j < r; j++) {
            uint64_t index = (uint64_t)j * d + i, words[2];
            stream.block(0, 0, index / 2, words);
            float pair[2];
            normal_pair(words[0], words[1], pair);
            to[i * r + j] = pair[index % 2];
        }
    }
    return to;
}

static uint32_t rank_of(const float *row, const std::vector<float> &normals, uint32_t d, uint32_t r)
{
    uint32_t code = 0;
    for (uint32_t j = 0; j < r; j++) {
        float sum = 0.0f;
        for (uint32_t i = 0; i < d; i++)
            sum = std::fmaf(row[i], normals[i * r + j], sum);
        code |= (uint32_t)(sum > 0.0f) << j;
    }
    for (uint32_t shift = 1; shift < 32; shift *= 2)
        code ^= code >> shift;
    return code;
}

// Positions 0..ranks.size() ascending by (rank, position).
static std::vector<uint32_t> sort(const std::vector<uint32_t> &ranks, uint32_t r)
{
    std::vector<uint32_t> starts((1u << r) + 1), order(ranks.size());
    for (uint32_t rank : ranks)
        starts[rank + 1]++;
    for (size_t i = 1; i < starts.size(); i++)
        starts[i] += starts[i - 1];
    for (uint32_t i = 0; i < ranks.size(); i++)
        order[starts[ranks[i]]++] = i;
    return order;
}

static void split(std::vector<uint32_t> &order, uint32_t start, uint32_t middle, uint32_t end)
{
    std::vector<uint32_t> from(order.begin() + start, order.begin() + end);
    uint32_t at = start;
    for (uint32_t position : from)
        if (position < middle)
            order[at++] = position;
    for (uint32_t position : from)
        if (position >= middle)
            order[at++] = position;
}

static std::vector<uint32_t> uniform_positions(
    uint64_t seed, uint64_t offset, uint32_t kv_head, uint32_t start, uint32_t len, uint32_t m)
{
    Stream stream(seed, offset, kv_head, 2);
    std::vector<uint32_t> to(m);
    for (uint32_t i = 0; i < m; i++) {
        uint64_t words[2];
        stream.block(start, len, i / 2, words);
        to[i] = start + (uint32_t)(((unsigned __int128)words[i % 2] * len) >> 64);
    }
    return to;
}

// Intervals of a level as (start, middle, end); those that stopped dividing are left out.
static std::vector<std::vector<uint32_t>> divisions(uint32_t len, uint32_t leaf, uint32_t level)
{
    std::vector<std::vector<uint32_t>> intervals{{0, len}}, next;
    for (uint32_t depth = 0; depth < level; depth++) {
        next.clear();
        for (auto &interval : intervals) {
            if (interval[1] - interval[0] <= leaf)
                continue;
            uint32_t middle = interval[0] + (interval[1] - interval[0] + 1) / 2;
            next.push_back({interval[0], middle});
            next.push_back({middle, interval[1]});
        }
        intervals = next;
    }
    next.clear();
    for (auto &interval : intervals)
        if (interval[1] - interval[0] > leaf)
            next.push_back({interval[0], interval[0] + (interval[1] - interval[0] + 1) / 2, interval[1]});
    return next;
}

} // namespace host

template <class T>
static uint64_t fold(const std::vector<T> &numbers)
{
    uint64_t hash = 0;
    for (T x : numbers) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        hash = hash * 0x100000001b3ull ^ bits;
    }
    return hash;
}

// ------------------------------------------------------------------------------------------ against the Rust's numbers

static void check_host()
{
    auto known = [](uint32_t k0, uint32_t k1, host::Words counter, host::Words expected) {
        host::Words answer = host::philox(k0, k1, counter);
        return memcmp(&answer, &expected, sizeof answer) == 0;
    };
    bool philox = known(0, 0, {{0, 0, 0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}})
        && known(~0u, ~0u, {{~0u, ~0u, ~0u, ~0u}}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}})
        && known(0xa4093822, 0x299f31d0, {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                 {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
    report(philox, "host: Philox known answers");

    struct Normal {
        uint64_t seed, offset;
        uint32_t head, d, i, j, bits;
    };
    const Normal normals[] = {
        {0ull, 0ull, 0, 64, 0, 0, 0x3fbe1116},
        {0ull, 0ull, 0, 64, 1, 0, 0xbfd557cd},
        {0ull, 0ull, 0, 64, 2, 0, 0xbe523cb5},
        {0ull, 0ull, 0, 64, 63, 0, 0x3fc99686},
        {0ull, 0ull, 0, 64, 0, 1, 0x3f9eb327},
        {0ull, 0ull, 0, 64, 17, 3, 0xbf8c2dd4},
        {0ull, 0ull, 0, 64, 63, 6, 0x3e481b65},
        {0ull, 0ull, 0, 64, 32, 3, 0xbff44028},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 0, 0, 0x3f7f30c2},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 1, 0, 0xbfaa702c},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 2, 0, 0x3e687d46},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 79, 0, 0xc01e7c7e},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 0, 1, 0xbf3ff7e0},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 17, 3, 0xbf3304f8},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 79, 23, 0x3f742492},
        {81985529216486895ull, 18364758544493064720ull, 5, 80, 40, 12, 0xbf72af05},
    };
    bool equal = true;
    for (const Normal &normal : normals) {
        uint32_t r = normal.head == 0 ? 7 : 24, bits;
        auto all = host::projections(normal.seed, normal.offset, normal.head, normal.d, r);
        memcpy(&bits, &all[normal.i * r + normal.j], 4);
        equal = equal && bits == normal.bits;
    }
    report(equal, "host: normals of the Rust code");
    auto others = host::projections(81985529216486895ull, 18364758544493064720ull, 5, 80, 24);
    report(fold(host::projections(0, 0, 0, 64, 7)) == 0x368eda7f41e9a83ull && fold(others) == 0x906c727ffa887409ull,
           "host: all normals of two heads of the Rust code");
    report(fold(host::uniform_positions(1, 2, 3, 100, 1024, 256)) == 0x5f6756744c82052cull
               && fold(host::uniform_positions(9, 1ull << 33, 7, 0, 131072, 256)) == 0x3dfa59a40f3b61f3ull
               && fold(host::uniform_positions(9, 5, 0, 65537, 65535, 100)) == 0x81efeff905b572c3ull,
           "host: samples of the Rust code");

    struct Sorted {
        uint32_t n, d, r;
        uint64_t ranks, order, halves;
    };
    const Sorted sorted[] = {
        {1000, 37, 7, 0x8035d509d95d21e2ull, 0xe764a7aec24c3bacull, 0xc06a40e194f2e300ull},
        {3000, 64, 13, 0xab20792e56f80886ull, 0x70649a89f5dea9daull, 0x94fa730d07235486ull},
        {2500, 16, 24, 0xb4a84482ca4416d5ull, 0xa75d7280c941ba42ull, 0x2ad6a70e63060f68ull},
    };
    uint64_t x = 88172645463325252ull;
    for (const Sorted &expected : sorted) {
        std::vector<float> rows(expected.n * expected.d);
        for (float &element : rows) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            element = (float)((int64_t)(x >> 40) - (1 << 23)) / (float)(1 << 20);
        }
        auto normals = host::projections(42, 7, 1, expected.d, expected.r);
        std::vector<uint32_t> ranks(expected.n);
        for (uint32_t i = 0; i < expected.n; i++)
            ranks[i] = host::rank_of(&rows[i * expected.d], normals, expected.d, expected.r);
        auto order = host::sort(ranks, expected.r), halves = order;
        host::split(halves, 0, (expected.n + 1) / 2, expected.n);
        report(fold(ranks) == expected.ranks && fold(order) == expected.order && fold(halves) == expected.halves,
               "host: ranks, order and halves of the Rust code, " + std::to_string(expected.r) + " hyperplanes");
    }
}

// ---------------------------------------------------------------------------------------------------------- the device

static void check(cudaError_t error, const char *what)
{
    if (error != cudaSuccess) {
        printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
        exit(failures + 1);
    }
}

template <class T>
struct Buffer {
    T *data = nullptr;
    size_t len;

    explicit Buffer(size_t len) : len(len)
    {
        check(cudaMalloc((void **)&data, (len + 1) * sizeof(T)), "cudaMalloc");
        check(cudaMemset(data, 0xA5, (len + 1) * sizeof(T)), "cudaMemset");
    }
    Buffer(const std::vector<T> &from) : Buffer(from.size())
    {
        check(cudaMemcpy(data, from.data(), len * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() { cudaFree(data); }

    std::vector<T> read() const
    {
        std::vector<T> to(len);
        check(cudaMemcpy(to.data(), data, len * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
        return to;
    }
};

static uint64_t state = 0x9E3779B97F4A7C15ull;

static uint32_t next_random()
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

// A number and its bytes in a type; mostly ordinary ones.
static float random_element(uint32_t type, uint8_t *to)
{
    uint32_t kind = next_random() % 4096;
    float x = (float)((int32_t)next_random() >> 8) / (float)(1 << 22);
    if (kind == 0)
        x = 0.0f;
    if (kind == 1)
        x = std::numeric_limits<float>::quiet_NaN();
    if (kind == 2)
        x = std::numeric_limits<float>::infinity();
    if (kind == 3)
        x *= 1e-7f;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (type == hyperattn::F32) {
        memcpy(to, &x, 4);
        return x;
    }
    uint16_t half;
    if (type == hyperattn::BF16) {
        half = (uint16_t)(bits >> 16);
        bits = (uint32_t)half << 16;
    } else {
        // Any 16 bits: subnormal ones, infinities and NaN included.
        uint32_t ordinary = (next_random() & 0x83FF) | (10 + next_random() % 7) << 10;
        half = (uint16_t)(kind < 8 ? next_random() : ordinary);
        uint32_t sign = (uint32_t)(half >> 15) << 31, exponent = half >> 10 & 31, fraction = half & 0x3FF;
        if (exponent == 31) {
            bits = sign | 0x7F800000 | fraction << 13;
        } else if (exponent == 0) {
            float small = (float)fraction / 16777216.0f;
            memcpy(&bits, &small, 4);
            bits |= sign;
        } else {
            bits = sign | (exponent + 112) << 23 | fraction << 13;
        }
    }
    memcpy(to, &half, 2);
    memcpy(&x, &bits, 4);
    return x;
}

struct Tensor {
    uint32_t type, batch, heads, n, d;
    // Elements between rows' ends and starts, and before the first.
    uint32_t gap, shift;
    std::vector<float> wide;
    Buffer<uint8_t> bytes;

    uint32_t size() const { return type == hyperattn::F32 ? 4 : 2; }

    Tensor(uint32_t type, uint32_t batch, uint32_t heads, uint32_t n, uint32_t d, uint32_t gap, uint32_t shift)
        : type(type), batch(batch), heads(heads), n(n), d(d), gap(gap), shift(shift),
          wide((size_t)batch * heads * n * d),
          bytes(((size_t)batch * heads * n * (d + gap) + shift) * (type == hyperattn::F32 ? 4 : 2))
    {
        std::vector<uint8_t> image(bytes.len, 0xFF);
        for (size_t row = 0; row < (size_t)batch * heads * n; row++)
            for (uint32_t i = 0; i < d; i++)
                wide[row * d + i] = random_element(type, &image[(row * (d + gap) + shift + i) * size()]);
        check(cudaMemcpy(bytes.data, image.data(), bytes.len, cudaMemcpyHostToDevice), "copy rows");
    }

    hyperattn::HashSide side(uint32_t *ranks, uint32_t heads_per_projection) const
    {
        hyperattn::i64 row = (d + gap) * size();
        uint32_t unit = 16, first = shift * size();
        while ((d * size() | (uint32_t)row | first) % unit)
            unit /= 2;
        uint32_t rows = hyperattn::HASH_TILE_ROWS * hyperattn::HASH_TILES;
        return {{(char *)bytes.data + first, row * n * heads, row * n, row}, ranks, type, heads, heads_per_projection,
                0, batch * heads, n, unit, (n + rows - 1) / rows};
    }
};

static void launch_hash(const hyperattn::HashParams &params, uint32_t r)
{
    using namespace hyperattn;
    uint32_t groups = (r + 7) / 8;
    uint32_t shared = (params.head_dim + 7) / 8 * 8 * groups * 8 * 4 + 2 * HASH_STAGE;
    auto kernel = groups == 1 ? paper_hash_8 : groups == 2 ? paper_hash_16 : paper_hash_24;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), "shared memory");
    uint32_t grid = params.query.set_heads * params.query.blocks + params.key.set_heads * params.key.blocks;
    kernel<<<grid, HASH_THREADS, shared>>>(params);
}

// A launch of so many thread blocks for one pass.
template <class Params> static hyperattn::Passes<Params> one_pass(const Params &params, unsigned blocks)
{
    hyperattn::Passes<Params> passes{};
    passes.passes[0] = params;
    for (unsigned &end : passes.end_block)
        end = blocks;
    return passes;
}

// Queries and keys of a causal square at the sequences' ends and of a rectangle of all of them, or of what is before
// the square: their orders, those of the levels first.
struct Sort {
    hyperattn::SortParams params{};
    uint32_t r;
    Buffer<uint32_t> query_order, key_order, query_spare, key_spare, counts, places;

    Sort(const Buffer<uint32_t> &query_ranks, const Buffer<uint32_t> &key_ranks, uint32_t query_heads,
         uint32_t key_heads, uint32_t n_q, uint32_t n_k, uint32_t r, uint32_t leaf)
        : Sort(query_ranks, key_ranks, query_heads, key_heads, n_q, n_k, r, leaf, levels_of(n_q, n_k, leaf))
    {
    }

    static uint32_t levels_of(uint32_t n_q, uint32_t n_k, uint32_t leaf)
    {
        uint32_t levels = 0;
        for (uint32_t longest = n_q < n_k ? n_q : n_k; leaf && longest > leaf; longest = (longest + 1) / 2)
            levels++;
        return levels;
    }

    void launch()
    {
        using namespace hyperattn;
        uint32_t digits = (r + 7) / 8, heads = params.query.heads + params.key.heads;
        uint32_t intervals = (1u << params.levels) - 1 + params.orders - params.levels;
        params.query.from = params.key.from = nullptr;
        for (u32 digit = 0; digit < digits; digit++) {
            bool last = (digits - 1 - digit) % 2 == 0;
            params.query.to = last ? query_order.data : query_spare.data;
            params.key.to = last ? key_order.data : key_spare.data;
            params.shift = 8 * digit;
            uint32_t cells = (digit ? params.orders : 1) * heads * params.cells;
            paper_sort_count<<<cells, SORT_THREADS>>>(params);
            paper_sort_scan<<<heads * intervals, SORT_THREADS>>>(params);
            paper_sort_scatter<<<cells, SORT_THREADS>>>(params);
            params.query.from = params.query.to;
            params.key.from = params.key.to;
        }
    }

private:
    static uint32_t longest_leaf(uint32_t n_q, uint32_t n_k, uint32_t levels)
    {
        uint32_t longest = n_q < n_k ? n_q : n_k;
        for (uint32_t level = 0; level < levels; level++)
            longest = (longest + 1) / 2;
        return longest;
    }

    static uint32_t cells_of(uint32_t rows) { return (rows + hyperattn::SORT_CELL - 1) / hyperattn::SORT_CELL; }

    // Of a head. Without a leaf there is no square, and all rows are the rectangle's; with one it has what is before
    // it.
    static uint32_t square_cells(uint32_t n_q, uint32_t n_k, uint32_t leaf, uint32_t levels)
    {
        return leaf ? cells_of(longest_leaf(n_q, n_k, levels)) << levels : 0;
    }

    static uint32_t all_cells(uint32_t n_q, uint32_t n_k, uint32_t leaf, uint32_t levels)
    {
        uint32_t rest = leaf ? (n_k > n_q ? n_k - n_q : 0) : n_q > n_k ? n_q : n_k;
        return square_cells(n_q, n_k, leaf, levels) + cells_of(rest);
    }

    static uint32_t orders_of(uint32_t n_q, uint32_t n_k, uint32_t leaf, uint32_t levels)
    {
        return levels + (!leaf || n_k > n_q);
    }

    Sort(const Buffer<uint32_t> &query_ranks, const Buffer<uint32_t> &key_ranks, uint32_t query_heads,
         uint32_t key_heads, uint32_t n_q, uint32_t n_k, uint32_t planes, uint32_t leaf, uint32_t levels)
        : r(planes), query_order(query_ranks.len * orders_of(n_q, n_k, leaf, levels)),
          key_order(key_ranks.len * orders_of(n_q, n_k, leaf, levels)), query_spare(query_order.len),
          key_spare(key_order.len),
          counts((size_t)(query_heads + key_heads) * all_cells(n_q, n_k, leaf, levels) *
                 (orders_of(n_q, n_k, leaf, levels) + 1) * hyperattn::SORT_DIGITS),
          places(counts.len)
    {
        uint32_t len = n_q < n_k ? n_q : n_k;
        params.query = {query_ranks.data, nullptr, nullptr, n_q, query_heads, 0, leaf ? 0 : n_q};
        params.key = {key_ranks.data, nullptr, nullptr, n_k, key_heads, 0, leaf ? n_k - len : n_k};
        if (leaf)
            params.square = {n_q - len, n_k - len, len, leaf};
        params.counts = counts.data;
        params.places = places.data;
        params.levels = levels;
        params.orders = orders_of(n_q, n_k, leaf, levels);
        params.leaf_cells = leaf ? cells_of(longest_leaf(n_q, n_k, levels)) : 0;
        params.square_cells = square_cells(n_q, n_k, leaf, levels);
        params.cells = all_cells(n_q, n_k, leaf, levels);
    }
};

struct Case {
    uint32_t q_type, k_type, batch, heads_q, heads_kv, n_q, n_k, d, r;
    uint64_t seed, offset;
    uint32_t gap, shift, leaf;
};

static void check_case(const Case &c)
{
    using namespace hyperattn;
    char name[200];
    snprintf(name, sizeof name, "types %u/%u batch %u heads %u/%u n %u/%u d %u r %u gap %u shift %u leaf %u", c.q_type,
             c.k_type, c.batch, c.heads_q, c.heads_kv, c.n_q, c.n_k, c.d, c.r, c.gap, c.shift, c.leaf);
    uint32_t group = c.heads_q / c.heads_kv, width = (c.r + 7) / 8 * 8, stored = (c.d + 7) / 8 * 8;
    uint32_t query_heads = c.batch * c.heads_q, key_heads = c.batch * c.heads_kv;
    Tensor q(c.q_type, c.batch, c.heads_q, c.n_q, c.d, c.gap, c.shift);
    Tensor k(c.k_type, c.batch, c.heads_kv, c.n_k, c.d, c.gap, c.shift);
    Buffer<float> projections((size_t)c.heads_kv * stored * width);
    Buffer<u32> query_ranks((size_t)query_heads * c.n_q), key_ranks((size_t)key_heads * c.n_k);

    ProjectionParams drawn{c.seed, c.offset, projections.data, c.heads_kv, c.d, c.r, width};
    paper_projections<<<(unsigned)((projections.len + 127) / 128), 128>>>(drawn);
    HashParams hash{q.side(query_ranks.data, group), k.side(key_ranks.data, 1), projections.data, c.d, 0};
    launch_hash(hash, c.r);
    check(cudaDeviceSynchronize(), name);

    bool equal = true;
    std::vector<std::vector<float>> normals;
    auto stored_normals = projections.read();
    for (uint32_t head = 0; head < c.heads_kv; head++) {
        normals.push_back(host::projections(c.seed, c.offset, head, c.d, c.r));
        for (uint32_t i = 0; i < stored; i++) {
            for (uint32_t j = 0; j < width; j++) {
                float expected = i < c.d && j < c.r ? normals[head][i * c.r + j] : 0.0f;
                equal = equal && memcmp(&expected, &stored_normals[(head * stored + i) * width + j], 4) == 0;
            }
        }
    }
    report(equal, std::string("projections, ") + name);

    auto ranks_of = [&](const Tensor &t, uint32_t flat, uint32_t per_projection) {
        std::vector<uint32_t> ranks(t.n);
        for (uint32_t i = 0; i < t.n; i++)
            ranks[i] = host::rank_of(&t.wide[((size_t)flat * t.n + i) * t.d], normals[flat % t.heads / per_projection],
                                     t.d, c.r);
        return ranks;
    };
    // Queries' heads first.
    std::vector<std::vector<uint32_t>> ranks, orders;
    for (uint32_t flat = 0; flat < query_heads; flat++)
        ranks.push_back(ranks_of(q, flat, group));
    for (uint32_t flat = 0; flat < key_heads; flat++)
        ranks.push_back(ranks_of(k, flat, 1));
    auto rows_of = [&](const std::vector<u32> &queries, const std::vector<u32> &keys, size_t flat) {
        bool is_query = flat < query_heads;
        uint32_t n = is_query ? c.n_q : c.n_k;
        size_t first = (is_query ? flat : flat - query_heads) * n;
        auto start = (is_query ? queries : keys).begin() + first;
        return std::vector<u32>(start, start + n);
    };
    auto found_queries = query_ranks.read(), found_keys = key_ranks.read();
    equal = true;
    for (size_t flat = 0; flat < ranks.size(); flat++)
        equal = equal && rows_of(found_queries, found_keys, flat) == ranks[flat];
    report(equal, std::string("ranks, ") + name);

    Sort whole(query_ranks, key_ranks, query_heads, key_heads, c.n_q, c.n_k, c.r, 0);
    whole.launch();
    check(cudaDeviceSynchronize(), name);
    found_queries = whole.query_order.read(), found_keys = whole.key_order.read();
    equal = true;
    for (size_t flat = 0; flat < ranks.size(); flat++) {
        orders.push_back(host::sort(ranks[flat], c.r));
        equal = equal && rows_of(found_queries, found_keys, flat) == orders[flat];
    }
    report(equal, std::string("order, ") + name);
    if (!c.leaf)
        return;

    // A causal square at the sequences' ends: the orders of all its levels, and of the queries against the keys before
    // it.
    uint32_t len = c.n_q < c.n_k ? c.n_q : c.n_k, query_start = c.n_q - len, key_start = c.n_k - len;
    Sort sort(query_ranks, key_ranks, query_heads, key_heads, c.n_q, c.n_k, c.r, c.leaf);
    sort.launch();
    check(cudaDeviceSynchronize(), name);
    auto all_queries = sort.query_order.read(), all_keys = sort.key_order.read();
    // Of one order all heads.
    auto take = [&](uint32_t order) {
        auto part = [&](const std::vector<u32> &all, size_t rows) {
            return std::vector<u32>(all.begin() + order * rows, all.begin() + (order + 1) * rows);
        };
        found_queries = part(all_queries, query_ranks.len), found_keys = part(all_keys, key_ranks.len);
    };
    if (key_start > 0) {
        take(sort.params.levels);
        equal = true;
        for (size_t flat = 0; flat < orders.size(); flat++) {
            bool is_query = flat < query_heads;
            auto expected = orders[flat];
            host::split(expected, 0, is_query ? 0 : key_start, is_query ? c.n_q : c.n_k);
            auto found = rows_of(found_queries, found_keys, flat);
            auto end = expected.begin() + (is_query ? c.n_q : key_start);
            equal = equal && std::equal(expected.begin(), end, found.begin());
        }
        report(equal, std::string("order of the past, ") + name);
    }
    for (size_t flat = 0; flat < orders.size(); flat++) {
        bool is_query = flat < query_heads;
        host::split(orders[flat], 0, is_query ? query_start : key_start, is_query ? c.n_q : c.n_k);
    }
    equal = true;
    bool samples_equal = true;
    uint32_t m = 77;
    for (uint32_t level = 0; level < sort.params.levels; level++) {
        Pass pass{PASS_LEVEL, level, 0, 1u << level, {}, sort.params.square};
        Buffer<u32> positions((size_t)key_heads * pass.count * m);
        SampleParams sample{pass, c.seed, c.offset, positions.data, c.heads_kv, 0, key_heads, m};
        unsigned sample_blocks = (unsigned)((positions.len + 127) / 128);
        paper_samples<<<sample_blocks, 128>>>(one_pass(sample, sample_blocks));
        check(cudaDeviceSynchronize(), name);
        take(level);
        auto found_positions = positions.read();
        auto cuts = host::divisions(len, c.leaf, level);
        for (size_t flat = 0; flat < orders.size(); flat++) {
            bool is_query = flat < query_heads;
            uint32_t start = is_query ? query_start : key_start;
            auto found = rows_of(found_queries, found_keys, flat);
            for (auto &cut : cuts) {
                host::split(orders[flat], start + cut[0], start + cut[1], start + cut[2]);
                uint32_t first = start + (is_query ? cut[1] : cut[0]), last = start + (is_query ? cut[2] : cut[1]);
                equal = equal && std::equal(found.begin() + first, found.begin() + last, orders[flat].begin() + first);
            }
        }
        // Every list is found at its interval's number, which its start tells: intervals are those of whole divisions.
        for (uint32_t flat = 0; flat < key_heads; flat++) {
            for (uint32_t index = 0; index < pass.count; index++) {
                uint32_t start = 0, part = len;
                bool exists = true;
                for (uint32_t depth = 0; depth < level && exists; depth++) {
                    exists = part > c.leaf;
                    uint32_t half = (part + 1) / 2;
                    if (index >> (level - 1 - depth) & 1)
                        start += half, part -= half;
                    else
                        part = half;
                }
                if (!exists || part <= c.leaf)
                    continue;
                auto expected = host::uniform_positions(
                    c.seed, c.offset, flat % c.heads_kv, key_start + start, (part + 1) / 2, m);
                samples_equal = samples_equal
                    && std::equal(expected.begin(), expected.end(),
                                  found_positions.begin() + (flat * pass.count + index) * m);
            }
        }
    }
    report(equal, std::string("orders of the levels, ") + name);
    report(samples_equal, std::string("samples of the levels, ") + name);
}

// Sorted blocks against select.rs: every query once, in the block that its position falls in.
static void check_tiles(uint32_t n_q, uint32_t n_k, uint32_t block_size, uint32_t group)
{
    using namespace hyperattn;
    uint32_t kv_heads = 3, m = 10, heads_q = kv_heads * group;
    uint32_t blocks = (n_k + block_size - 1) / block_size;
    uint64_t most = ((uint64_t)block_size * n_q + n_k - 1) / n_k;
    most = most < n_q ? most : n_q;
    uint32_t parts = (uint32_t)((most + TILE_ROWS - 1) / TILE_ROWS);
    Buffer<Tile> tiles((size_t)heads_q * blocks * parts);
    Buffer<Segment> segments((size_t)kv_heads * blocks * 2);
    PaperTileParams params{};
    params.common = {{PASS_ONE, 0, 0, 1, {3, 3 + n_q, 5, 5 + n_k}, {}}, tiles.data, segments.data, heads_q, group, 0,
                     kv_heads, blocks, parts, TILE_SORTED, 0, m, n_k, 1.5f, 2.5f};
    params.block_size = block_size;
    params.sorted = SEGMENT_SORTED;
    params.segments_per_block = 2;
    unsigned tile_blocks = (unsigned)((tiles.len + 127) / 128);
    paper_tiles<<<tile_blocks, 128>>>(one_pass(params, tile_blocks));
    check(cudaDeviceSynchronize(), "paper_tiles");
    auto found_tiles = tiles.read();
    auto found_segments = segments.read();
    std::vector<int> seen((size_t)heads_q * n_q);
    bool right = true;
    for (const Tile &tile : found_tiles) {
        right = right && tile.batch == 0 && tile.rows <= TILE_ROWS && tile.flags == TILE_SORTED && tile.segments == 2;
        if (!right)
            break;
        const Segment *two = &found_segments[tile.first_segment];
        for (uint32_t i = 0; i < tile.rows; i++) {
            uint32_t p = tile.first_query + i - 3;
            seen[(size_t)tile.head * n_q + p]++;
            uint32_t block = (uint32_t)((uint64_t)p * n_k / n_q) / block_size, first = block * block_size;
            uint32_t last = first + block_size < n_k ? first + block_size : n_k;
            right = right && two[0].first == 5 + first && two[0].count == last - first && two[0].flags == SEGMENT_SORTED
                && two[1].flags == (SEGMENT_SORTED | SEGMENT_LISTED) && two[1].first == tile.head / group * m
                && two[1].count == m && two[1].log_weight == 1.5f && two[1].hidden_start == two[0].first
                && two[1].hidden_end == 5 + last;
        }
    }
    for (int count : seen)
        right = right && count == 1;
    char name[100];
    snprintf(name, sizeof name, "tiles of sorted blocks, n %u/%u block %u group %u", n_q, n_k, block_size, group);
    report(right, name);
}

// Tiles of an exact pass over the leaves: every query once, all its visible keys of its own leaf.
static void check_leaves(uint32_t len, uint32_t leaf)
{
    using namespace hyperattn;
    uint32_t levels = 0, longest = len;
    while (longest > leaf)
        longest = (longest + 1) / 2, levels++;
    uint32_t blocks = (longest + TILE_ROWS - 1) / TILE_ROWS, count = 1u << levels;
    Buffer<Tile> tiles((size_t)count * blocks);
    Buffer<Segment> segments(tiles.len * 2);
    PaperTileParams params{};
    params.common = {{PASS_LEAVES, levels, 0, count, {}, {0, 0, len, leaf}}, tiles.data, segments.data, 1, 1, 0, 1,
                     blocks, 1, 0, TILE_STORE, 0, 0, 0.0f, 0.0f};
    params.exact = 1;
    params.limited = SEGMENT_LIMITED;
    params.visible = 1;
    params.segments_per_block = 2;
    unsigned tile_blocks = (unsigned)((tiles.len + 127) / 128);
    paper_tiles<<<tile_blocks, 128>>>(one_pass(params, tile_blocks));
    check(cudaDeviceSynchronize(), "paper_tiles");
    auto found_tiles = tiles.read();
    auto found_segments = segments.read();
    // Leaves by dividing as the CPU does.
    std::vector<uint32_t> leaf_start(len), stack{0, len};
    while (!stack.empty()) {
        uint32_t end = stack.back(), start = stack[stack.size() - 2];
        stack.resize(stack.size() - 2);
        if (end - start <= leaf) {
            for (uint32_t i = start; i < end; i++)
                leaf_start[i] = start;
        } else {
            uint32_t middle = start + (end - start + 1) / 2;
            stack.insert(stack.end(), {start, middle, middle, end});
        }
    }
    std::vector<int> seen(len);
    bool right = true;
    for (const Tile &tile : found_tiles) {
        for (uint32_t i = 0; i < tile.rows; i++) {
            uint32_t row = tile.first_query + i, start = leaf_start[row];
            seen[row]++;
            const Segment &segment = found_segments[tile.first_segment];
            right = right && tile.segments == 1 && segment.first == start && segment.first + segment.count >= row + 1
                && segment.first + segment.count == tile.first_query + tile.rows && segment.flags == SEGMENT_LIMITED
                && ((tile.flags & TILE_STORE) != 0) == (start > 0);
        }
    }
    for (int count : seen)
        right = right && count == 1;
    char name[100];
    snprintf(name, sizeof name, "tiles of the leaves, n %u leaf %u", len, leaf);
    report(right, name);
}

// A random block mask: the segments cover what the mask says, the samples are those outside it.
static void check_block_mask(uint32_t n_q, uint32_t n_k, uint32_t query_block, uint32_t key_block, bool per_head)
{
    using namespace hyperattn;
    uint32_t kv_heads = 2, group = 2, heads_q = 4, m = 50, rows = (n_q + query_block - 1) / query_block;
    uint32_t columns_n = (n_k + key_block - 1) / key_block, patterns = per_head ? heads_q : 1;
    std::vector<i64> offsets;
    std::vector<i32> columns;
    for (uint32_t pattern = 0; pattern < patterns; pattern++) {
        offsets.push_back((i64)columns.size());
        for (uint32_t row = 0; row < rows; row++) {
            for (uint32_t column = 0; column < columns_n; column++)
                if (next_random() % 3 && row % 4 != 3)
                    columns.push_back((i32)column);
            offsets.push_back((i64)columns.size());
        }
    }
    columns.push_back(0);
    Buffer<i64> device_offsets(offsets);
    Buffer<i32> device_columns(columns);
    Rectangle rectangle{n_q / 5, n_q, n_k / 7, n_k - n_k / 9};
    uint32_t blocks = (rectangle.query_end - 1) / query_block - rectangle.query_start / query_block + 1;
    uint32_t parts = (query_block + TILE_ROWS - 1) / TILE_ROWS, room = (columns_n + 1) / 2 + 1;
    uint32_t lists = (per_head ? heads_q : kv_heads) * blocks;
    Buffer<Tile> tiles((size_t)heads_q * blocks * parts);
    Buffer<Segment> segments((size_t)lists * room);
    Buffer<u32> positions((size_t)lists * m);
    BlockMaskTileParams params{};
    params.common = {{PASS_ONE, 0, 0, 1, rectangle, {}}, tiles.data, segments.data, heads_q, group, 0, kv_heads, blocks,
                     parts, 0, 0, m, rectangle.key_end - rectangle.key_start, 1.5f, 2.5f};
    params.seed = 3, params.offset = 4;
    params.row_offsets = device_offsets.data, params.columns = device_columns.data;
    params.head_stride = per_head ? rows + 1 : 0;
    params.positions = positions.data;
    params.heads_kv = kv_heads, params.per_head = per_head;
    params.query_block = query_block, params.key_block = key_block, params.segments_per_block = room;
    paper_block_mask_tiles<<<(lists + 3) / 4, 128>>>(params);
    check(cudaDeviceSynchronize(), "paper_block_mask_tiles");
    auto found_tiles = tiles.read();
    auto found_segments = segments.read();
    auto found_positions = positions.read();
    std::vector<int> seen((size_t)heads_q * n_q);
    bool right = true;
    for (const Tile &tile : found_tiles) {
        if (tile.rows == 0)
            continue;
        uint32_t row = tile.first_query / query_block;
        right = right && (tile.first_query + tile.rows - 1) / query_block == row;
        for (uint32_t i = 0; i < tile.rows; i++)
            seen[(size_t)tile.head * n_q + tile.first_query + i]++;
        const i64 *begin = &offsets[(per_head ? tile.head * (rows + 1) : 0) + row];
        std::vector<bool> covered(n_k), met(n_k);
        for (i64 at = begin[0]; at < begin[1]; at++)
            for (uint32_t key = columns[at] * key_block; key < (columns[at] + 1) * key_block && key < n_k; key++)
                covered[key] = key >= rectangle.key_start && key < rectangle.key_end;
        std::vector<u32> expected, found;
        uint32_t keys = rectangle.key_end - rectangle.key_start;
        for (uint32_t position : host::uniform_positions(3, 4, tile.head / group, rectangle.key_start, keys, m))
            if (!covered[position])
                expected.push_back(position);
        for (uint32_t i = 0; i < tile.segments; i++) {
            const Segment &segment = found_segments[tile.first_segment + i];
            for (uint32_t j = 0; j < segment.count; j++) {
                if (segment.flags & SEGMENT_LISTED)
                    found.push_back(found_positions[segment.first + j]);
                else
                    met[segment.first + j] = true;
            }
        }
        right = right && met == covered && found == expected;
    }
    for (uint32_t head = 0; head < heads_q; head++)
        for (uint32_t i = 0; i < n_q; i++)
            right = right && seen[(size_t)head * n_q + i] == (i >= rectangle.query_start && i < rectangle.query_end);
    char name[100];
    snprintf(name, sizeof name, "tiles of a block mask, n %u/%u blocks %u/%u %s", n_q, n_k, query_block, key_block,
             per_head ? "per head" : "shared");
    report(right, name);
}

// The row-norm residual against Algorithms 2 and 3 in double precision. `kind`: 0 sorted blocks, 1 a block mask, 2 no
// blocks.
static void check_row_norm(uint32_t kind, uint32_t n_q, uint32_t n_k, uint32_t m, bool finishes)
{
    using namespace hyperattn;
    uint32_t kv_heads = 2, group = 2, heads = 4, d = 20, dv = 40, block = 32, query_block = 48, key_block = 16;
    uint64_t seed = 77, offset = 5;
    Tensor q(F32, 1, heads, n_q, d, 0, 0), k(F32, 1, kv_heads, n_k, d, 3, 1), v(F32, 1, kv_heads, n_k, dv, 0, 0);
    // Only ordinary numbers.
    auto ordinary = [](Tensor &t, float scale) {
        std::vector<float> image((size_t)t.batch * t.heads * t.n * (t.d + t.gap) + t.shift, 0.0f);
        for (size_t i = 0; i < t.wide.size(); i++) {
            t.wide[i] = (float)((int32_t)next_random() >> 8) / (float)(1 << 23) * scale;
            image[i / t.d * (t.d + t.gap) + t.shift + i % t.d] = t.wide[i];
        }
        check(cudaMemcpy(t.bytes.data, image.data(), image.size() * 4, cudaMemcpyHostToDevice), "copy rows");
    };
    ordinary(q, 2.0f);
    ordinary(k, 2.0f);
    ordinary(v, 1.0f);
    auto view = [](const Tensor &t) { return t.side(nullptr, 1).rows; };
    auto permutations = [&](uint32_t heads, uint32_t n) {
        std::vector<u32> orders(heads * n);
        for (uint32_t head = 0; head < heads; head++) {
            for (uint32_t i = 0; i < n; i++) {
                uint32_t j = kind == 0 ? next_random() % (i + 1) : i;
                orders[head * n + i] = orders[head * n + j];
                orders[head * n + j] = i;
            }
        }
        return orders;
    };
    auto query_order = permutations(heads, n_q), key_order = permutations(kv_heads, n_k);
    uint32_t rows = (n_q + query_block - 1) / query_block, columns_n = (n_k + key_block - 1) / key_block;
    std::vector<i64> offsets{0};
    std::vector<i32> columns;
    for (uint32_t row = 0; row < rows; row++) {
        for (uint32_t column = 0; column < columns_n; column++)
            if (next_random() % 3 == 0)
                columns.push_back((i32)column);
        offsets.push_back((i64)columns.size());
    }
    columns.push_back(0);
    Rectangle rectangle{n_q / 9, n_q, 0, n_k - n_k / 8};
    uint32_t queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
    auto meets = [&](uint32_t query_position, uint32_t key_position) {
        if (kind == 2)
            return false;
        if (kind == 0)
            return (uint64_t)(query_position - rectangle.query_start) * keys / queries / block
                == (key_position - rectangle.key_start) / block;
        const i64 *begin = &offsets[query_position / query_block];
        return std::find(&columns[begin[0]], &columns[begin[1]], (i32)(key_position / key_block)) != &columns[begin[1]];
    };
    float scale = 0.4f;
    auto logit = [&](uint32_t head, uint32_t query_position, uint32_t key_position) {
        const float *x = &q.wide[((size_t)head * n_q + query_order[head * n_q + query_position]) * d];
        uint32_t kv = head / group;
        const float *y = &k.wide[((size_t)kv * n_k + key_order[kv * n_k + key_position]) * d];
        double sum = 0.0;
        for (uint32_t i = 0; i < d; i++)
            sum += (double)x[i] * y[i];
        return sum * scale;
    };
    auto value = [&](uint32_t kv, uint32_t position) {
        return &v.wide[((size_t)kv * n_k + key_order[kv * n_k + position]) * dv];
    };

    // The exact blocks' states, and earlier ones.
    std::vector<float> exact_max(heads * n_q), exact_sum(heads * n_q), exact_accumulated((size_t)heads * n_q * dv);
    std::vector<float> state_max(heads * n_q), state_sum(heads * n_q), state_accumulated((size_t)heads * n_q * dv);
    std::vector<double> expected((size_t)heads * n_q * dv), expected_lse(heads * n_q);
    double log2_epsilon = -1.0, log2_kappa = 6.0;
    double log2_cap = 2.0 * log2_epsilon + std::log2(m) - std::log2(keys * std::fmax(std::log(keys), 1.0));
    bool positions_right = true;
    std::vector<u32> expected_positions;
    for (uint32_t head = 0; head < heads; head++) {
        uint32_t kv = head / group;
        auto uniform = host::uniform_positions(seed, offset, kv, rectangle.key_start, keys, m);
        std::vector<double> prefix(keys);
        double total = 0.0;
        for (uint32_t i = 0; i < keys; i++) {
            float norm = 0.0f;
            for (uint32_t j = 0; j < dv; j++)
                norm += value(kv, rectangle.key_start + i)[j] * value(kv, rectangle.key_start + i)[j];
            prefix[i] = total += (double)norm;
        }
        host::Stream by_norm(seed, offset, kv, 4), tau_stream(seed, offset, head, 3);
        std::vector<uint32_t> drawn(m);
        std::vector<double> weights(m);
        for (uint32_t i = 0; i < m; i++) {
            uint64_t words[2];
            by_norm.block(rectangle.key_start, keys, i / 2, words);
            double target = (double)(words[i % 2] >> 11) * (1.0 / 9007199254740992.0) * total;
            uint32_t found = (uint32_t)(std::upper_bound(prefix.begin(), prefix.end(), target) - prefix.begin());
            drawn[i] = found;
            weights[i] = std::log2(total / ((prefix[found] - (found ? prefix[found - 1] : 0.0)) * m));
        }
        if (head % group == 0)
            for (uint32_t found : drawn)
                expected_positions.push_back(rectangle.key_start + found);
        double tau = 0.0;
        for (uint32_t i = 0; i < (queries < m ? queries : m); i++) {
            uint32_t position = rectangle.query_start + i;
            if (queries > m) {
                uint64_t words[2];
                tau_stream.block(rectangle.query_start, queries, i / 2, words);
                position = rectangle.query_start + (uint32_t)(((unsigned __int128)words[i % 2] * queries) >> 64);
            }
            double sum = 0.0;
            for (uint32_t key = rectangle.key_start; key < rectangle.key_end; key++)
                sum += meets(position, key) ? 0.0 : std::exp2(logit(head, position, key));
            tau = std::fmax(tau, sum);
        }
        double floor = tau / std::exp2(log2_kappa);
        for (uint32_t position = rectangle.query_start; position < rectangle.query_end; position++) {
            size_t row = (size_t)head * n_q + query_order[head * n_q + position];
            double exact = 0.0, sampled = 0.0;
            std::vector<double> product(dv);
            for (uint32_t key = rectangle.key_start; key < rectangle.key_end; key++) {
                if (!meets(position, key))
                    continue;
                double weight = std::exp2(logit(head, position, key));
                exact += weight;
                for (uint32_t j = 0; j < dv; j++)
                    product[j] += weight * value(kv, key)[j];
            }
            exact_max[row] = exact > 0.0 ? 1.5f : -std::numeric_limits<float>::infinity();
            exact_sum[row] = (float)(exact / std::exp2(1.5));
            for (uint32_t j = 0; j < dv; j++)
                exact_accumulated[row * dv + j] =
                    exact > 0.0 ? (float)(product[j] / std::exp2(1.5)) : std::numeric_limits<float>::quiet_NaN();
            double cap = std::exp2(log2_cap) * (exact + floor);
            for (uint32_t key : uniform)
                if (!meets(position, key))
                    sampled += std::fmin(std::exp2(logit(head, position, key)), cap) * keys / m;
            double sum = exact + std::fmax(sampled, floor);
            for (uint32_t i = 0; i < m; i++) {
                uint32_t key = rectangle.key_start + drawn[i];
                if (meets(position, key))
                    continue;
                double weight = std::exp2(logit(head, position, key) + weights[i]);
                for (uint32_t j = 0; j < dv; j++)
                    product[j] += weight * value(kv, key)[j];
            }
            state_max[row] = row % 5 ? 0.5f : -std::numeric_limits<float>::infinity();
            state_sum[row] = row % 5 ? 3.0f : 0.0f;
            for (uint32_t j = 0; j < dv; j++) {
                state_accumulated[row * dv + j] = row % 5 ? (float)j : std::numeric_limits<float>::quiet_NaN();
                product[j] += row % 5 ? std::exp2(0.5) * j : 0.0;
            }
            sum += row % 5 ? std::exp2(0.5) * 3.0 : 0.0;
            expected_lse[row] = std::log(sum);
            for (uint32_t j = 0; j < dv; j++)
                expected[row * dv + j] = product[j] / sum;
        }
    }

    // The exact blocks' tiles.
    std::vector<Tile> tiles;
    uint32_t blocks = kind == 0 ? (keys + block - 1) / block
        : kind == 1             ? (rectangle.query_end - 1) / query_block - rectangle.query_start / query_block + 1
                                : (queries + TILE_ROWS - 1) / TILE_ROWS;
    for (uint32_t kv = 0; kv < kv_heads; kv++) {
        for (uint32_t index = 0; index < blocks; index++) {
            for (uint32_t member = 0; member < group; member++) {
                uint32_t start = rectangle.query_start, end = rectangle.query_end;
                if (kind == 0) {
                    while (start < end && (uint64_t)(start - rectangle.query_start) * keys / queries / block < index)
                        start++;
                    uint32_t last = start;
                    while (last < end && (uint64_t)(last - rectangle.query_start) * keys / queries / block == index)
                        last++;
                    end = last;
                } else if (kind == 1) {
                    uint32_t row = start / query_block + index;
                    start = row * query_block > start ? row * query_block : start;
                    end = (row + 1) * query_block < end ? (row + 1) * query_block : end;
                } else {
                    start += index * TILE_ROWS;
                    end = start + TILE_ROWS < end ? start + TILE_ROWS : end;
                }
                tiles.push_back({0, kv * group + member, start, end - start, 0, 0, 0, 0});
            }
        }
    }
    Buffer<Tile> device_tiles(tiles);
    Buffer<u32> device_query_order(query_order), device_key_order(key_order);
    Buffer<i64> device_offsets(offsets);
    Buffer<i32> device_columns(columns);
    Buffer<float> device_exact_max(exact_max), device_exact_sum(exact_sum), device_exact_accumulated(exact_accumulated);
    Buffer<float> device_state_max(state_max), device_state_sum(state_sum), device_state(state_accumulated);
    Buffer<float> out((size_t)heads * n_q * dv), lse((size_t)heads * n_q), norms(kv_heads * n_k), weights(kv_heads * m);
    Buffer<double> prefix(kv_heads * n_k);
    Buffer<u32> positions(kv_heads * m), norm_positions(kv_heads * m);
    Buffer<u32> tau(std::vector<u32>(heads, NO_TAU));
    RowNormParams params{};
    params.common = {{PASS_ONE, 0, 0, 1, rectangle, {}}, device_tiles.data, nullptr, heads, group, 0, kv_heads, blocks,
                     1, TILE_RESUME | (finishes ? 0u : (u32)TILE_STORE), 0, m, keys,
                     (float)std::log2((double)keys / m), 0.0f};
    AttendParams &attend = params.attend;
    attend.q = view(q), attend.k = view(k), attend.v = view(v);
    attend.out = {(char *)out.data, 0, (i64)n_q * dv * 4, (i64)dv * 4};
    attend.lse = {(char *)lse.data, 0, (i64)n_q * 4, 4};
    attend.q_type = attend.kv_type = attend.out_type = F32;
    attend.heads_q = heads, attend.group = group, attend.n_q = n_q, attend.n_k = n_k;
    attend.head_dim = d, attend.value_dim = dv, attend.scale_log2 = scale;
    attend.query_order = device_query_order.data, attend.key_order = device_key_order.data;
    attend.state_max = device_state_max.data, attend.state_sum = device_state_sum.data;
    attend.state_accumulated = device_state.data;
    params.seed = seed, params.offset = offset;
    params.exact_max = device_exact_max.data, params.exact_sum = device_exact_sum.data;
    params.exact_accumulated = device_exact_accumulated.data;
    params.norms = norms.data, params.prefix = prefix.data, params.positions = positions.data;
    params.norm_positions = norm_positions.data, params.norm_weights = weights.data, params.tau = tau.data;
    if (kind == 1) {
        params.blocks.row_offsets = device_offsets.data, params.blocks.columns = device_columns.data;
        params.blocks.query_block = query_block, params.blocks.key_block = key_block;
    }
    params.blocks.block_size = kind == 0 ? block : 0;
    params.blocks.sorted = kind == 0 ? (u32)SEGMENT_SORTED : 0;
    params.sample_size = m;
    params.log2_kappa = (float)log2_kappa, params.log2_cap = (float)log2_cap;
    SampleParams sample{params.common.pass, seed, offset, positions.data, kv_heads, 0, kv_heads, m};
    uint32_t shared = 4 * (d * ROW_NORM_ROWS + ROW_NORM_KEYS * (d + 1)), all = shared + 4 * ROW_NORM_KEYS * dv;
    unsigned sample_blocks = (kv_heads * m + 127) / 128;
    paper_samples<<<sample_blocks, 128>>>(one_pass(sample, sample_blocks));
    paper_row_norms<<<(kv_heads * n_k + 127) / 128, 128>>>(params);
    paper_norm_prefix<<<kv_heads, 32>>>(params);
    paper_norm_samples<<<(kv_heads * m + 127) / 128, 128>>>(params);
    paper_tau<<<heads * ((m + ROW_NORM_ROWS - 1) / ROW_NORM_ROWS), ROW_NORM_THREADS, shared>>>(params);
    paper_row_norm_residual<<<(unsigned)tiles.size() * (TILE_ROWS / ROW_NORM_ROWS), ROW_NORM_THREADS, all>>>(params);
    check(cudaDeviceSynchronize(), "row-norm residual");
    positions_right = norm_positions.read() == expected_positions;
    auto found_max = device_state_max.read(), found_sum = device_state_sum.read(), found = device_state.read();
    auto found_out = out.read(), found_lse = lse.read();
    double worst = 0.0;
    for (uint32_t head = 0; head < heads; head++) {
        for (uint32_t position = rectangle.query_start; position < rectangle.query_end; position++) {
            size_t row = (size_t)head * n_q + query_order[head * n_q + position];
            double lse = finishes ? found_lse[row] : std::log(found_sum[row]) + found_max[row] * std::log(2.0);
            double error = std::fabs(lse - expected_lse[row]), size = 0.02;
            for (uint32_t j = 0; j < dv; j++) {
                double x = finishes ? found_out[row * dv + j] : found[row * dv + j] / found_sum[row];
                size = std::fmax(size, std::fabs(expected[row * dv + j]));
                error = std::fmax(error, std::fabs(x - expected[row * dv + j]) / size);
            }
            worst = error <= worst ? worst : error;
        }
    }
    char name[120];
    snprintf(name, sizeof name, "row-norm residual, kind %u n %u/%u samples %u: error %.1e", kind, n_q, n_k, m, worst);
    report(worst < 2e-4, name);
    report(positions_right, "keys drawn by their norms");
}

// --------------------------------------------------------------------------------------------------------------- times

// bf16 numbers between -2 and 2.
static __global__ void fill(uint32_t *words, size_t len, uint32_t salt)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < len; i += gridDim.x * (size_t)blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u + salt;
        x ^= x >> 15;
        x *= 2246822519u;
        x ^= x >> 13;
        words[i] = (x & 0x80FF80FFu) | 0x3F003F00u;
    }
}

// With a leaf, the orders of all levels.
static void time_selection(uint32_t n, uint32_t heads, uint32_t d, uint32_t r, uint32_t leaf)
{
    using namespace hyperattn;
    size_t words = (size_t)heads * n * d / 2;
    Buffer<u32> q(words), k(words), query_ranks((size_t)heads * n), key_ranks((size_t)heads * n);
    uint32_t width = (r + 7) / 8 * 8;
    Buffer<float> projections((size_t)heads * d * width);
    fill<<<2048, 256>>>(q.data, words, 1);
    fill<<<2048, 256>>>(k.data, words, 2);
    uint32_t rows = HASH_TILE_ROWS * HASH_TILES;
    i64 row = d * 2;
    auto side = [&](Buffer<u32> &from, Buffer<u32> &ranks) {
        return HashSide{{(char *)from.data, 0, row * n, row}, ranks.data, BF16, heads, 1, 0, heads, n, 16,
                        (n + rows - 1) / rows};
    };
    HashParams hash{side(q, query_ranks), side(k, key_ranks), projections.data, d, 0};
    Sort sort(query_ranks, key_ranks, heads, heads, n, n, r, leaf);
    cudaEvent_t events[4];
    for (cudaEvent_t &event : events)
        check(cudaEventCreate(&event), "event");
    float best[3] = {1e9f, 1e9f, 1e9f};
    for (int repeat = 0; repeat < 6; repeat++) {
        check(cudaEventRecord(events[0]), "event");
        ProjectionParams drawn{1, 2, projections.data, heads, d, r, width};
        paper_projections<<<(unsigned)((projections.len + 127) / 128), 128>>>(drawn);
        check(cudaEventRecord(events[1]), "event");
        launch_hash(hash, r);
        check(cudaEventRecord(events[2]), "event");
        sort.launch();
        check(cudaEventRecord(events[3]), "event");
        check(cudaEventSynchronize(events[3]), "time");
        for (int i = 0; i < 3; i++) {
            float ms;
            check(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "time");
            best[i] = ms < best[i] ? ms : best[i];
        }
    }
    printf("TIME n %u heads %u d %u r %u leaf %u: projections %.3f ms, hash %.3f ms (%.0f GB/s), sort %.3f ms, "
           "together %.3f ms\n",
           n, heads, d, r, leaf, best[0], best[1], words * 8.0 / best[1] * 1e-6, best[2], best[0] + best[1] + best[2]);
    for (cudaEvent_t &event : events)
        cudaEventDestroy(event);
}

int main(int count, char **arguments)
{
    check_host();
    if (count > 1 && !strcmp(arguments[1], "--host-only"))
        return failures;

    const uint32_t f32 = hyperattn::F32, f16 = hyperattn::F16, bf16 = hyperattn::BF16;
    const Case cases[] = {
        {bf16, bf16, 1, 4, 4, 3000, 3000, 64, 7, 1, 2, 0, 0, 300},
        {bf16, bf16, 2, 4, 2, 1500, 2111, 128, 7, 3, 4, 0, 0, 100},
        {f16, f16, 1, 6, 2, 1111, 777, 80, 8, 5, 1ull << 40, 0, 0, 50},
        {f32, f32, 1, 2, 1, 900, 900, 256, 7, 7, 8, 0, 0, 128},
        {f32, bf16, 1, 2, 2, 700, 1300, 96, 12, 1ull << 50, 9, 4, 0, 64},
        {bf16, bf16, 1, 2, 1, 2100, 2100, 37, 7, 11, 12, 3, 1, 1},
        {f16, f16, 1, 2, 1, 1000, 1000, 20, 16, 13, 14, 2, 2, 7},
        {f32, f32, 1, 1, 1, 800, 801, 5, 24, 15, 16, 1, 1, 33},
        {bf16, bf16, 1, 2, 2, 40000, 40000, 16, 7, 17, 18, 0, 0, 5000},
        {bf16, bf16, 1, 2, 1, 20000, 30000, 8, 13, 19, 20, 0, 0, 4000},
        {f16, f16, 1, 1, 1, 25000, 25000, 8, 24, 21, 22, 0, 4, 6000},
        {bf16, bf16, 1, 1, 1, 1, 1, 64, 7, 23, 24, 0, 0, 0},
        {f32, f32, 1, 1, 1, 5000, 17, 1, 1, 25, 26, 0, 0, 3},
    };
    for (const Case &c : cases)
        check_case(c);
    const uint32_t shapes[][4] = {{10, 10, 4, 1}, {1000, 1000, 256, 2}, {7, 1000, 64, 1}, {1000, 7, 3, 3},
                                  {13, 29, 29, 1}, {4097, 8192, 256, 1}, {3000, 2000, 700, 2}, {1, 1, 1, 1}};
    for (auto &s : shapes)
        check_tiles(s[0], s[1], s[2], s[3]);
    for (uint32_t leaf : {1u, 100u, 128u, 511u, 5000u})
        check_leaves(1025, leaf);
    for (bool per_head : {false, true}) {
        check_block_mask(1000, 1300, 128, 64, per_head);
        check_block_mask(700, 500, 300, 7, per_head);
        check_block_mask(50, 90, 1, 1, per_head);
    }
    for (uint32_t kind : {0u, 1u, 2u}) {
        check_row_norm(kind, 200, 300, 64, true);
        check_row_norm(kind, 150, 140, 200, false);
    }
    for (uint32_t d : {64u, 128u})
        time_selection(131072, 32, d, 7, 0);
    time_selection(131072, 32, 64, 14, 0);
    time_selection(131072, 32, 64, 7, 4096);
    time_selection(8192, 32, 64, 7, 0);
    printf("%d failures\n", failures);
    return failures;
}
