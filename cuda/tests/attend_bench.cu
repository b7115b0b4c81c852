// Test and benchmark of the Hopper attention kernel on a GPU, without anything else of the library: hand-made tiles
// against a plain f32 kernel, then times. Prints one line a case, PASS or FAIL.
//
//     nvcc -std=c++17 -O2 -gencode arch=compute_90a,code=sm_90a -o attend_bench attend_bench.cu
//     ./attend_bench [test | time] [part of a case's name]
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../kernels/hyperattn/attend_wgmma.cuh"

using namespace hyperattn;

static const char *current_case = "start";

static void check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    printf("FAIL %s: %s: %s\n", current_case, what, cudaGetErrorString(error));
    fflush(stdout);
    _Exit(2);
}
#define CHECK(call) check(call, #call)

// Waits for the device, and gives up on a kernel that does not end.
static void wait_for_device(int seconds)
{
    auto start = std::chrono::steady_clock::now();
    for (;;) {
        cudaError_t state = cudaStreamQuery(0);
        if (state == cudaSuccess)
            return;
        if (state != cudaErrorNotReady)
            check(state, "kernel");
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(seconds)) {
            printf("FAIL %s: HANG, no end after %d s\n", current_case, seconds);
            fflush(stdout);
            _Exit(3);
        }
    }
}

template <typename T> struct Device {
    T *data = nullptr;
    size_t count = 0;

    explicit Device(size_t elements = 0) { resize(elements); }
    explicit Device(const std::vector<T> &from)
    {
        resize(from.size());
        if (!from.empty())
            CHECK(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(const Device &) = delete;
    ~Device() { cudaFree(data); }

    void resize(size_t elements)
    {
        count = elements;
        CHECK(cudaMalloc(&data, std::max<size_t>(elements, 4) * sizeof(T)));
    }
    std::vector<T> host() const
    {
        std::vector<T> to(count);
        CHECK(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return to;
    }
};

__device__ float load_element(u32 type, const char *at, u32 index)
{
    if (type == F32)
        return ((const float *)at)[index];
    u16 bits = ((const u16 *)at)[index];
    return type == BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
}

// About normal numbers: sums of eight uniform ones.
__global__ void fill(u16 *to, u64 count, u32 type, u32 seed, float factor)
{
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (u64)blockDim.x) {
        u64 x = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1b54a32d192ed03ull;
        float sum = 0;
        for (int k = 0; k < 2; ++k) {
            x ^= x >> 30;
            x *= 0xbf58476d1ce4e5b9ull;
            x ^= x >> 27;
            x *= 0x94d049bb133111ebull;
            x ^= x >> 31;
            for (int j = 0; j < 4; ++j)
                sum += (float)(x >> (16 * j) & 0xffff) / 65536.0f - 0.5f;
        }
        float value = sum * 1.2247449f * factor;
        to[i] = type == BF16 ? bf16_from_f32(value) : f16_from_f32(value);
    }
}

// Sets elements of one row of all heads: NaN (or infinity) in columns [first, last).
__global__ void spoil(View view, u32 row, u32 first, u32 last, u16 bits)
{
    for (u32 column = first + threadIdx.x; column < last; column += blockDim.x)
        ((u16 *)view.row(blockIdx.y, blockIdx.x, row))[column] = bits;
}

// Only column 0 is kept, with a factor and few bits.
__global__ void spread(View view, u32 rows, u32 dim, float factor)
{
    for (u32 row = threadIdx.x; row < rows; row += blockDim.x) {
        u16 *at = (u16 *)view.row(blockIdx.y, blockIdx.x, row);
        float value = f32_from_bf16(at[0]) * factor;
        for (u32 column = 1; column < dim; ++column)
            at[column] = 0;
        at[0] = bf16_from_f32(value);
    }
}

// A warp a row: logits, one softmax and sums of values in f32.
__global__ void reference(AttendParams p, float *out, float *lse)
{
    u32 lane = threadIdx.x % 32;
    u32 number = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const Tile &tile = p.tiles[number / TILE_ROWS];
    u32 i = number % TILE_ROWS;
    if (i >= tile.rows)
        return;
    u32 row = p.query_row(tile, i);
    const char *q = p.q.row(tile.batch, tile.head, row);
    float query[8], sums[8] = {};
    for (u32 c = 0; c < 8; ++c)
        query[c] = c * 32 + lane < p.head_dim ? load_element(p.q_type, q, c * 32 + lane) : 0.0f;
    float max = -INFINITY, sum = 0;
    for (u32 s = 0; s < tile.segments; ++s) {
        Segment segment = p.segments[tile.first_segment + s];
        for (u32 j = 0; j < segment.count; ++j) {
            const char *k, *v;
            if (segment.flags & SEGMENT_EXTRA) {
                k = p.extra_keys + (u64)(segment.first + j) * p.head_dim * 2;
                v = p.extra_values + (u64)(segment.first + j) * p.value_dim * 2;
            } else {
                u32 position = p.position(segment, j);
                if (position >= segment.hidden_start && position < segment.hidden_end)
                    continue;
                if ((segment.flags & SEGMENT_LIMITED) && position >= p.limit(row))
                    continue;
                u32 key = p.key_row(p.order_of_keys(tile, p.kv_head(tile)), segment, j, position);
                k = p.k.row(tile.batch, p.kv_head(tile), key);
                v = p.v.row(tile.batch, p.kv_head(tile), key);
            }
            float product = 0;
            for (u32 c = 0; c < 8; ++c)
                if (c * 32 + lane < p.head_dim)
                    product = fmaf(query[c], load_element(p.kv_type, k, c * 32 + lane), product);
            for (u32 offset = 16; offset; offset /= 2)
                product += __shfl_xor_sync(0xffffffff, product, offset);
            float logit = fmaf(product, p.scale_log2, segment.log_weight);
            if (logit == -INFINITY)
                continue;
            float next = fmaxf(max, logit);
            float factor = max == -INFINITY ? 0.0f : exp2f(max - next), weight = exp2f(logit - next);
            if (max == -INFINITY && sum == 0.0f)
                for (u32 c = 0; c < 8; ++c)
                    sums[c] = 0;
            sum = sum * factor + weight;
            for (u32 c = 0; c < 8; ++c)
                if (c * 32 + lane < p.value_dim)
                    sums[c] = sums[c] * factor + weight * load_element(p.kv_type, v, c * 32 + lane);
            max = next;
        }
    }
    u64 index = ((u64)tile.batch * p.heads_q + tile.head) * p.n_q + row;
    for (u32 c = 0; c < 8; ++c)
        if (c * 32 + lane < p.value_dim)
            out[index * p.value_dim + c * 32 + lane] = sum == 0.0f ? 0.0f : sums[c] / sum;
    if (lane == 0)
        lse[index] = sum == 0.0f ? -INFINITY : (max + log2f(sum)) * 0.69314718f;
}

typedef void (*Kernel)(AttendParams, TensorMap, TensorMap);

struct Variant {
    u32 type, dim, keys, shared_bytes;
    Kernel kernel;
};

#define VARIANT(NAME, TYPE, DIM) \
    { \
        TYPE, DIM, hopper::Shape<DIM>::KEYS, hopper::Shape<DIM>::SHARED_BYTES, attend_wgmma_##NAME##_##DIM \
    }
static const Variant variants[] = {
    VARIANT(bf16, BF16, 64),  VARIANT(bf16, BF16, 96),  VARIANT(bf16, BF16, 128), VARIANT(bf16, BF16, 192),
    VARIANT(bf16, BF16, 256), VARIANT(f16, F16, 64),    VARIANT(f16, F16, 96),    VARIANT(f16, F16, 128),
    VARIANT(f16, F16, 192),   VARIANT(f16, F16, 256),
};

static const Variant &variant_for(u32 type, u32 dim)
{
    for (const Variant &variant : variants)
        if (variant.type == type && variant.dim >= dim)
            return variant;
    abort();
}

static int multiprocessors;
static PFN_cuTensorMapEncodeTiled_v12000 encode_tiled;

static TensorMap tensor_map(const View &view, u32 type, u32 dim, u32 rows, u32 heads, u32 batch, u32 keys)
{
    CUtensorMap map;
    cuuint64_t sizes[4] = {dim, rows, heads, batch};
    cuuint64_t strides[3] = {(cuuint64_t)view.row_stride, (cuuint64_t)view.head_stride, (cuuint64_t)view.batch_stride};
    cuuint32_t box[4] = {64, keys, 1, 1}, steps[4] = {1, 1, 1, 1};
    CUresult result =
        encode_tiled(&map, type == BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                     view.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        printf("FAIL %s: cuTensorMapEncodeTiled: %d\n", current_case, (int)result);
        _Exit(2);
    }
    TensorMap to;
    memcpy(&to, &map, sizeof(to));
    return to;
}

struct Problem {
    std::string name;
    u32 type = BF16, out_type = BF16;
    u32 head_dim = 64, value_dim = 64;
    u32 batch = 1, heads = 2, group = 1, n_q = 256, n_k = 256;
    int visible = 0;
    bool rows_outside = false; // [batch, rows, heads, dim]
    bool maps = true;
    u32 out_padding = 8;
    float scale = 0; // 0: 1 / sqrt(head_dim)
    float spread = 0;
    // Keys with NaN in all columns of K and V, and single elements of V.
    std::vector<u32> bad_keys;
    bool bad_elements = false;
    // Tiles of one launch or of two.
    std::vector<Tile> tiles, more_tiles;
    std::vector<Segment> segments;
    std::vector<u32> positions, query_order, key_order, listed_rows;
    u32 extra = 0;
    // Thread blocks that share the tiles; 0: one for each multiprocessor.
    u32 blocks = 0;
};

static View view_of(char *data, u32 heads, u32 rows, u32 row_bytes, bool rows_outside)
{
    View view;
    view.data = data;
    view.batch_stride = (i64)heads * rows * row_bytes;
    view.head_stride = rows_outside ? row_bytes : (i64)rows * row_bytes;
    view.row_stride = rows_outside ? (i64)heads * row_bytes : row_bytes;
    return view;
}

// Everything of a problem on the device.
struct Setup {
    const Problem &problem;
    const Variant &variant;
    u32 heads_kv;
    Device<u16> q, k, v, extra_keys, extra_values;
    Device<char> out;
    Device<float> lse, partial_lse;
    Device<char> partial_values;
    Device<Tile> tiles, more_tiles;
    Device<Segment> segments;
    Device<u32> positions, query_order, key_order, listed_rows, next_tile;
    AttendParams p;
    TensorMap k_map, v_map;

    explicit Setup(const Problem &from)
        : problem(from), variant(variant_for(from.type, std::max(from.head_dim, from.value_dim))),
          heads_kv(from.heads / from.group), q((size_t)from.batch * from.heads * from.n_q * from.head_dim),
          k((size_t)from.batch * heads_kv * from.n_k * from.head_dim),
          v((size_t)from.batch * heads_kv * from.n_k * from.value_dim), extra_keys((size_t)from.extra * from.head_dim),
          extra_values((size_t)from.extra * from.value_dim),
          out((size_t)from.batch * from.heads * from.n_q * (from.value_dim + from.out_padding) * out_bytes()),
          lse((size_t)from.batch * from.heads * from.n_q), partial_lse(from.more_tiles.empty() ? 0 : lse.count),
          partial_values(partial_lse.count * ((from.value_dim + 31) / 32 * 32) * (from.out_type == F32 ? 4 : 2)),
          tiles(from.tiles),
          more_tiles(from.more_tiles), segments(from.segments), positions(from.positions),
          query_order(from.query_order), key_order(from.key_order), listed_rows(from.listed_rows), next_tile(1)
    {
        fill<<<1024, 256>>>(q.data, q.count, from.type, 1, 1.0f);
        fill<<<1024, 256>>>(k.data, k.count, from.type, 2, 1.0f);
        fill<<<1024, 256>>>(v.data, v.count, from.type, 3, 1.0f);
        if (from.extra) {
            fill<<<64, 256>>>(extra_keys.data, extra_keys.count, from.type, 4, 1.0f);
            fill<<<64, 256>>>(extra_values.data, extra_values.count, from.type, 5, 1.0f);
        }
        memset((void *)&p, 0, sizeof(p));
        p.q = view_of((char *)q.data, from.heads, from.n_q, from.head_dim * 2, from.rows_outside);
        p.k = view_of((char *)k.data, heads_kv, from.n_k, from.head_dim * 2, from.rows_outside);
        p.v = view_of((char *)v.data, heads_kv, from.n_k, from.value_dim * 2, from.rows_outside);
        p.out = view_of(out.data, from.heads, from.n_q, (from.value_dim + from.out_padding) * out_bytes(),
                        from.rows_outside);
        p.lse = view_of((char *)lse.data, from.heads, from.n_q, 4, false);
        u16 nan = from.type == BF16 ? 0x7fc0 : 0x7e00, infinity = from.type == BF16 ? 0x7f80 : 0x7c00;
        dim3 kv_grid(heads_kv, from.batch), q_grid(from.heads, from.batch);
        for (u32 key : from.bad_keys) {
            spoil<<<kv_grid, 64>>>(p.k, key, 0, from.head_dim, nan);
            spoil<<<kv_grid, 64>>>(p.v, key, 0, from.value_dim, nan);
        }
        if (from.bad_elements) {
            spoil<<<kv_grid, 64>>>(p.v, 133, 5, 6, nan);
            spoil<<<kv_grid, 64>>>(p.v, 190, 20, 22, infinity);
            spoil<<<kv_grid, 64>>>(p.v, 191, from.value_dim - 1, from.value_dim, infinity | 0x8000);
        }
        if (from.spread) {
            spread<<<q_grid, 128>>>(p.q, from.n_q, from.head_dim, from.spread);
            spread<<<kv_grid, 128>>>(p.k, from.n_k, from.head_dim, from.spread);
        }
        p.q_type = p.kv_type = from.type;
        p.out_type = from.out_type;
        p.heads_q = from.heads;
        p.group = from.group;
        p.n_q = from.n_q;
        p.n_k = from.n_k;
        p.head_dim = from.head_dim;
        p.value_dim = from.value_dim;
        p.visible = from.visible;
        p.scale_log2 = (from.scale ? from.scale : 1.0f / sqrtf((float)from.head_dim)) * 1.44269504f;
        p.segments = segments.data;
        p.positions = positions.data;
        p.query_order = query_order.data;
        p.key_order = key_order.data;
        p.listed_rows = listed_rows.data;
        p.extra_keys = (const char *)extra_keys.data;
        p.extra_values = (const char *)extra_values.data;
        p.partial_values = partial_values.data;
        p.partial_lse = partial_lse.data;
        p.partial_rows = from.n_q;
        p.next_tile = next_tile.data;
        memset((void *)&k_map, 0, sizeof(k_map));
        memset((void *)&v_map, 0, sizeof(v_map));
        if (from.maps) {
            k_map = tensor_map(p.k, from.type, from.head_dim, from.n_k, heads_kv, from.batch, variant.keys);
            v_map = tensor_map(p.v, from.type, from.value_dim, from.n_k, heads_kv, from.batch, variant.keys);
        }
    }

    u32 out_bytes() const { return problem.out_type == F32 ? 4 : 2; }

    void launch(const Device<Tile> &which)
    {
        p.tiles = which.data;
        p.tile_count = (u32)which.count;
        CHECK(cudaMemsetAsync(next_tile.data, 0, 4));
        CHECK(cudaFuncSetAttribute((const void *)variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)variant.shared_bytes));
        u32 blocks = problem.blocks ? problem.blocks : multiprocessors;
        variant.kernel<<<blocks, hopper::THREADS, variant.shared_bytes>>>(p, k_map, v_map);
        CHECK(cudaGetLastError());
    }
};

static float host_element(u32 type, const char *at)
{
    if (type == F32) {
        float value;
        memcpy(&value, at, 4);
        return value;
    }
    u16 bits;
    memcpy(&bits, at, 2);
    if (type == BF16) {
        u32 wide = (u32)bits << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
    int exponent = bits >> 10 & 31;
    float fraction = (float)(bits & 1023);
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? ldexpf(fraction + 1024, exponent - 25)
                                 : ldexpf(fraction, -24);
    return bits & 0x8000 ? -value : value;
}

static int failures;

static void test(Problem problem)
{
    current_case = problem.name.c_str();
    bool two = !problem.more_tiles.empty();
    Setup setup(problem);
    Device<float> expected(setup.lse.count * problem.value_dim), expected_lse(setup.lse.count);
    CHECK(cudaMemset(setup.out.data, 0xff, setup.out.count));
    CHECK(cudaMemset(setup.lse.data, 0xff, setup.lse.count * 4));
    CHECK(cudaMemset(expected.data, 0xff, expected.count * 4));
    CHECK(cudaMemset(expected_lse.data, 0xff, expected_lse.count * 4));
    if (two) {
        CHECK(cudaMemset(setup.partial_lse.data, 0xff, setup.partial_lse.count * 4));
        CHECK(cudaMemset(setup.partial_values.data, 0xff, setup.partial_values.count));
    }

    // The reference takes all segments of both launches at once.
    std::vector<Tile> whole = problem.tiles;
    for (size_t i = 0; i < whole.size(); ++i)
        if (two)
            whole[i].segments += problem.more_tiles[i].segments;
    Device<Tile> whole_tiles(whole);
    setup.p.tiles = whole_tiles.data;
    reference<<<(u32)whole.size() * TILE_ROWS / 4, 128>>>(setup.p, expected.data, expected_lse.data);
    CHECK(cudaGetLastError());
    wait_for_device(20);

    setup.launch(setup.tiles);
    if (two)
        setup.launch(setup.more_tiles);
    wait_for_device(10);

    std::vector<char> out = setup.out.host();
    std::vector<float> lse = setup.lse.host(), want = expected.host(), want_lse = expected_lse.host();
    double error = 0, norm = 0, largest = 0, lse_error = 0;
    long not_finite = 0, bad_lse = 0, bad_padding = 0, bad_rows = 0;
    u32 strips = 0, columns = 0;
    std::string first;
    char text[200];
    for (u32 b = 0; b < problem.batch; ++b)
        for (u32 h = 0; h < problem.heads; ++h)
            for (u32 r = 0; r < problem.n_q; ++r) {
                size_t index = ((size_t)b * problem.heads + h) * problem.n_q + r;
                const char *row = out.data() + b * setup.p.out.batch_stride + h * setup.p.out.head_stride +
                                  r * setup.p.out.row_stride;
                bool bad_row = false;
                for (u32 c = 0; c < problem.value_dim; ++c) {
                    float got = host_element(problem.out_type, row + c * setup.out_bytes());
                    float wanted = want[index * problem.value_dim + c];
                    bool bad;
                    if (std::isfinite(wanted) && std::isfinite(got)) {
                        double difference = fabs((double)got - wanted);
                        error += difference * difference;
                        norm += (double)wanted * wanted;
                        largest = std::max(largest, difference);
                        bad = difference > 0.03 * (1 + fabs(wanted));
                    } else {
                        bad = !(std::isnan(wanted) && std::isnan(got)) && wanted != got;
                        not_finite += bad;
                    }
                    if (bad) {
                        bad_row = true;
                        strips |= 1u << (r / 16 % 8);
                        columns |= 1u << (c / 8);
                        if (first.empty()) {
                            snprintf(text, sizeof(text), " first bad [%u,%u,%u,%u] got %g want %g;", b, h, r, c, got,
                                     wanted);
                            first = text;
                        }
                    }
                }
                if (bad_row && bad_rows++ < 5) {
                    snprintf(text, sizeof(text), " row %u", r);
                    first += text;
                }
                for (u32 i = problem.value_dim * setup.out_bytes();
                     i < (problem.value_dim + problem.out_padding) * setup.out_bytes(); ++i)
                    bad_padding += (unsigned char)row[i] != 0xff;
                float got = lse[index], wanted = want_lse[index];
                if (std::isfinite(got) && std::isfinite(wanted))
                    lse_error = std::max(lse_error, fabs((double)got - wanted) / (1 + 1e-3 * fabs(wanted)));
                else
                    bad_lse += !(std::isnan(got) && std::isnan(wanted)) && got != wanted;
            }
    double relative = sqrt(error / std::max(norm, 1e-30));
    double limit = problem.type == BF16 || problem.out_type == BF16 ? 6e-3 : 1e-3;
    bool pass = relative < limit && lse_error < 2e-3 && !not_finite && !bad_lse && !bad_padding && !bad_rows;
    failures += !pass;
    // Of all bits of the results: two versions that should compute the same are compared by it.
    u64 hash = 14695981039346656037ull;
    auto add_to_hash = [&](const void *data, size_t bytes) {
        for (size_t i = 0; i < bytes; ++i)
            hash = (hash ^ ((const u8 *)data)[i]) * 1099511628211ull;
    };
    add_to_hash(out.data(), out.size());
    add_to_hash(lse.data(), lse.size() * 4);
    printf("%s %-44s dim %3u: relative error %.2e, max abs %.2e, lse %.1e, bits %016llx", pass ? "PASS" : "FAIL",
           problem.name.c_str(), setup.variant.dim, relative, largest, lse_error, hash);
    if (!pass)
        printf("; wrongly (not) finite %ld, lse %ld, padding bytes %ld, bad rows %ld, 16-row strips %#x, 8-column "
               "groups %#x;%s",
               not_finite, bad_lse, bad_padding, bad_rows, strips, columns, first.c_str());
    printf("\n");
    fflush(stdout);
}

static Segment segment(u32 first, u32 count, u32 flags = 0, float log_weight = 0, u32 hidden_start = 0,
                       u32 hidden_end = 0)
{
    return Segment{first, count, flags, log_weight, hidden_start, hidden_end};
}

// A tile whose segments are the last `segments` of the problem.
static Tile tile(const Problem &problem, u32 b, u32 h, u32 first, u32 rows, u32 flags, u32 segments)
{
    return Tile{b, h, first, rows, flags, (u32)problem.segments.size() - segments, segments, 0};
}

// All keys, for all rows; the longest tiles first.
static void make_exact(Problem &problem, bool causal)
{
    problem.segments.push_back(segment(0, problem.n_k, causal ? SEGMENT_LIMITED : 0));
    u32 tiles = (problem.n_q + TILE_ROWS - 1) / TILE_ROWS;
    for (u32 b = 0; b < problem.batch; ++b)
        for (u32 h = 0; h < problem.heads; ++h)
            for (u32 t = tiles; t-- > 0;)
                problem.tiles.push_back(tile(problem, b, h, t * TILE_ROWS,
                                             std::min(TILE_ROWS, problem.n_q - t * TILE_ROWS), 0, 1));
}

// Sorted blocks of `block` queries and keys, and samples that are not counted twice.
static void make_blocks(Problem &problem, u32 block, u32 samples, bool sorted, bool listed)
{
    std::mt19937 random(7);
    u32 heads_kv = problem.heads / problem.group;
    if (sorted) {
        auto orders = [&](std::vector<u32> &to, u32 lists, u32 n) {
            to.resize((size_t)lists * n);
            for (u32 i = 0; i < lists; ++i) {
                for (u32 j = 0; j < n; ++j)
                    to[(size_t)i * n + j] = j;
                std::shuffle(to.begin() + (size_t)i * n, to.begin() + (size_t)(i + 1) * n, random);
            }
        };
        orders(problem.query_order, problem.batch * problem.heads, problem.n_q);
        orders(problem.key_order, problem.batch * heads_kv, problem.n_k);
    }
    u32 key_flags = sorted ? SEGMENT_SORTED : 0;
    u32 blocks = (problem.n_k + block - 1) / block;
    u32 queries = (problem.n_q + blocks - 1) / blocks;
    float weight = log2f((float)problem.n_k / (float)samples);
    for (u32 b = 0; b < problem.batch; ++b)
        for (u32 h = 0; h < problem.heads; ++h) {
            u32 list = (u32)problem.positions.size();
            if (listed)
                for (u32 i = 0; i < samples; ++i)
                    problem.positions.push_back(random() % problem.n_k);
            if (listed && sorted)
                for (u32 i = 0; i < samples; ++i) {
                    size_t order = ((size_t)b * heads_kv + h / problem.group) * problem.n_k;
                    problem.listed_rows.push_back(problem.key_order[order + problem.positions[list + i]]);
                }
            for (u32 i = 0; i < blocks; ++i) {
                u32 start = i * block, end = std::min(problem.n_k, start + block);
                problem.segments.push_back(segment(start, end - start, key_flags));
                problem.segments.push_back(
                    listed ? segment(list, samples, key_flags | SEGMENT_LISTED, weight, start, end)
                           : segment(0, samples, key_flags, weight, start, end));
                for (u32 first = i * queries; first < std::min((i + 1) * queries, problem.n_q); first += TILE_ROWS) {
                    u32 rows = std::min({TILE_ROWS, (i + 1) * queries - first, problem.n_q - first});
                    problem.tiles.push_back(tile(problem, b, h, first, rows, sorted ? TILE_SORTED : 0, 2));
                }
            }
        }
}

// Causal tiles of everything at once: first keys, listed keys at any position, an empty segment, a band with an odd
// start, a hidden part, extra columns.
static void make_mixed(Problem &problem, bool sorted_queries)
{
    std::mt19937 random(11);
    problem.extra = 37;
    u32 list = 0, listed = 210;
    for (u32 i = 0; i < listed; ++i)
        problem.positions.push_back(random() % problem.n_k);
    if (sorted_queries)
        for (u32 i = 0; i < problem.batch * problem.heads; ++i) {
            size_t start = problem.query_order.size();
            for (u32 j = 0; j < problem.n_q; ++j)
                problem.query_order.push_back(j);
            std::shuffle(problem.query_order.begin() + start, problem.query_order.end(), random);
        }
    u32 tiles = (problem.n_q + 99) / 100;
    for (u32 b = 0; b < problem.batch; ++b)
        for (u32 h = 0; h < problem.heads; ++h)
            for (u32 t = 0; t < tiles; ++t) {
                u32 first = t * 100, rows = std::min(100u, problem.n_q - first);
                u32 start = first > 77 && !sorted_queries ? first - 77 : 3;
                problem.segments.push_back(segment(0, 3, SEGMENT_LIMITED));
                problem.segments.push_back(segment(5, 0, SEGMENT_LIMITED));
                problem.segments.push_back(segment(list + t % 3, listed - 5, SEGMENT_LISTED | SEGMENT_LIMITED, -0.5f,
                                                   first / 2, first / 2 + 90));
                problem.segments.push_back(segment(start, problem.n_k - start, SEGMENT_LIMITED, 0.0f, start + 10,
                                                   start + 20));
                problem.segments.push_back(segment(2, 30, SEGMENT_EXTRA, 1.5f));
                problem.tiles.push_back(tile(problem, b, h, first, rows, sorted_queries ? TILE_SORTED : 0, 5));
                if (t % 4 == 1)
                    problem.tiles.push_back(tile(problem, b, h, first, 0, 0, 5));
            }
}

// Small tiles of few segments of every kind and length, none at times: of no block to many, so that another of the
// loading warps begins each tile, and another ends it.
static void make_turns(Problem &problem)
{
    std::mt19937 random(13);
    problem.extra = 150;
    u32 heads_kv = problem.heads / problem.group, samples = 300;
    auto shuffle = [&](std::vector<u32> &to, u32 lists, u32 n) {
        for (u32 i = 0; i < lists; ++i) {
            for (u32 j = 0; j < n; ++j)
                to.push_back(j);
            std::shuffle(to.end() - n, to.end(), random);
        }
    };
    shuffle(problem.query_order, problem.batch * problem.heads, problem.n_q);
    shuffle(problem.key_order, problem.batch * heads_kv, problem.n_k);
    const u32 counts[] = {0, 0, 1, 40, 128, 129, 192, 256, 384, 500};
    const u32 kinds[] = {0, 0, SEGMENT_SORTED, SEGMENT_LISTED | SEGMENT_SORTED, SEGMENT_LISTED, SEGMENT_LIMITED,
                         SEGMENT_LIMITED | SEGMENT_LISTED, SEGMENT_EXTRA};
    for (u32 b = 0; b < problem.batch; ++b)
        for (u32 h = 0; h < problem.heads; ++h) {
            u32 list = (u32)problem.positions.size();
            const u32 *order = problem.key_order.data() + ((size_t)b * heads_kv + h / problem.group) * problem.n_k;
            for (u32 i = 0; i < samples; ++i) {
                problem.positions.push_back(random() % problem.n_k);
                problem.listed_rows.push_back(order[problem.positions.back()]);
            }
            for (u32 first = 0, rows; first < problem.n_q; first += rows) {
                rows = std::min(random() % 10 ? 1 + (u32)random() % 24 : TILE_ROWS, problem.n_q - first);
                u32 segments = random() % 4 ? random() % 5 : random() % 14;
                for (u32 i = 0; i < segments; ++i) {
                    u32 flags = kinds[random() % 8], count = counts[random() % 10];
                    u32 end = flags & SEGMENT_EXTRA ? problem.extra : flags & SEGMENT_LISTED ? samples : problem.n_k;
                    u32 start = random() % end;
                    count = std::min(count, end - start);
                    u32 hidden = random() % problem.n_k, size = random() % 3 ? 0 : random() % 200;
                    if (flags & SEGMENT_EXTRA)
                        hidden = size = 0;
                    problem.segments.push_back(segment(flags & SEGMENT_LISTED ? list + start : start, count, flags,
                                                       (float)(random() % 5) - 2, hidden, hidden + size));
                }
                problem.tiles.push_back(tile(problem, b, h, first, rows, h % 2 ? TILE_SORTED : 0, segments));
                if (random() % 16 == 0)
                    problem.tiles.push_back(tile(problem, b, h, first, 0, 0, segments));
            }
        }
}

// Each tile's segments over two launches, the second of which goes on from the first one's partials.
static void split(Problem &problem)
{
    for (Tile &tile : problem.tiles) {
        Tile more = tile;
        u32 part = tile.segments / 2;
        tile.segments = part;
        tile.flags |= TILE_PARTIAL;
        more.segments -= part;
        more.flags |= TILE_MERGE;
        more.first_output = 1;
        u32 first = more.first_segment + part;
        more.first_segment = (u32)problem.segments.size();
        for (u32 i = 0; i < more.segments; ++i)
            problem.segments.push_back(Segment(problem.segments[first + i]));
        problem.segments.push_back(segment(0, 0));
        problem.more_tiles.push_back(more);
    }
}

static void run_tests(const char *part)
{
    std::vector<Problem> problems;
    auto add = [&](Problem problem, const std::string &name) {
        problem.name = std::string(problem.type == BF16 ? "bf16 " : "f16 ") + name + " " +
                       std::to_string(problem.head_dim) + "/" + std::to_string(problem.value_dim);
        problems.push_back(problem);
    };
    for (u32 type : {BF16, F16}) {
        for (u32 dim : {64u, 80u, 96u, 128u, 192u, 256u}) {
            Problem base;
            base.type = base.out_type = type;
            base.head_dim = base.value_dim = dim;
            base.heads = 4;

            Problem plain = base;
            plain.n_q = 128;
            plain.n_k = hopper::Shape<64>::KEYS * 3;
            make_exact(plain, false);
            add(plain, "one tile, whole blocks");

            Problem gathered = plain;
            gathered.maps = false;
            add(gathered, "the same without maps");

            Problem ragged = base;
            ragged.batch = 2;
            ragged.group = 2;
            ragged.n_q = 301;
            ragged.n_k = 777;
            ragged.rows_outside = true;
            make_exact(ragged, false);
            add(ragged, "none, ragged, GQA, batch");

            Problem causal = base;
            causal.n_q = causal.n_k = 1000;
            causal.visible = 1;
            make_exact(causal, true);
            add(causal, "causal");

            Problem offset = base;
            offset.n_q = 300;
            offset.n_k = 1111;
            offset.visible = 1 + 1111 - 300;
            offset.group = 4;
            make_exact(offset, true);
            add(offset, "causal, n_q < n_k, GQA");

            Problem blocks = base;
            blocks.n_q = 1500;
            blocks.n_k = 1300;
            blocks.group = 2;
            make_blocks(blocks, 256, 200, true, true);
            add(blocks, "sorted blocks and samples");

            Problem mixed = base;
            mixed.n_q = 500;
            mixed.n_k = 640;
            mixed.visible = 120;
            mixed.batch = 2;
            mixed.out_type = F32;
            make_mixed(mixed, false);
            add(mixed, "mixed causal segments, f32 out");

            split(mixed);
            mixed.out_type = type;
            add(mixed, "the same over two launches");

            Problem turns = base;
            turns.batch = 2;
            turns.group = 2;
            turns.n_q = 5000;
            turns.n_k = 1500;
            turns.visible = -1000;
            make_turns(turns);
            add(turns, "tiles of few blocks and of none");
            turns.blocks = 3;
            add(turns, "the same by three thread blocks");
            turns.maps = false;
            add(turns, "the same without maps");
        }
        Problem base;
        base.type = base.out_type = type;

        Problem dims = base;
        dims.head_dim = 192;
        dims.value_dim = 128;
        dims.n_q = 200;
        dims.n_k = 500;
        make_exact(dims, false);
        add(dims, "dimensions differ");
        dims.head_dim = 40;
        dims.value_dim = 104;
        dims.maps = false;
        add(dims, "dimensions differ, gathered");
        dims.maps = true;
        add(dims, "dimensions differ, maps");

        Problem sorted = base;
        sorted.head_dim = sorted.value_dim = 128;
        sorted.n_q = sorted.n_k = 600;
        sorted.visible = 1;
        make_mixed(sorted, true);
        add(sorted, "sorted queries, causal segments");

        Problem shifted = base;
        shifted.n_q = 400;
        shifted.n_k = 300;
        shifted.visible = -99;
        make_exact(shifted, true);
        add(shifted, "causal, rows without keys");
        shifted.out_padding = 1;
        add(shifted, "the same, rows not aligned");
        shifted.tiles.push_back(Tile{0, 0, 0, 0, 0, 0, 1, 0});
        split(shifted);
        add(shifted, "the same over two launches, first empty");

        for (u32 dim : {64u, 128u, 256u}) {
            Problem bad = base;
            bad.head_dim = bad.value_dim = dim;
            bad.n_q = bad.n_k = 420;
            bad.visible = 1;
            bad.bad_elements = true;
            make_exact(bad, true);
            add(bad, "causal, single NaN and Inf in V");
            bad.bad_elements = false;
            for (u32 key = 230; key < 420; key += 7)
                bad.bad_keys.push_back(key);
            add(bad, "causal, NaN keys");

            Problem piece = base;
            piece.head_dim = piece.value_dim = dim;
            piece.n_q = 130;
            piece.n_k = 700;
            piece.segments.push_back(segment(37, 333, 0, 0.0f, 100, 140));
            for (u32 h = 0; h < 2; ++h) {
                piece.tiles.push_back(tile(piece, 0, h, 0, 128, 0, 1));
                piece.tiles.push_back(tile(piece, 0, h, 128, 2, 0, 1));
            }
            for (u32 key = 0; key < 700; ++key)
                if (key < 37 || key >= 370 || (key >= 100 && key < 140))
                    piece.bad_keys.push_back(key);
            add(piece, "a piece between NaN keys");
        }

        Problem scale = base;
        scale.scale = -0.125f;
        make_exact(scale, false);
        add(scale, "negative scale");
        scale.scale = 1e-30f;
        add(scale, "scale of about 0");
        scale.scale = 20.0f;
        add(scale, "steep");
        if (type == BF16) {
            scale.scale = 0;
            scale.spread = 1099511627776.0f;
            add(scale, "logits of 1e24");
            scale.scale = -0.125f;
            add(scale, "logits of 1e24, negative scale");
        }
    }
    for (const Problem &problem : problems)
        if (!part || problem.name.find(part) != std::string::npos)
            test(problem);
    printf("%s: %d of %d cases failed\n", failures ? "FAIL" : "PASS", failures, (int)problems.size());
}

// Milliseconds, median of 20.
static double time_of(Setup &setup)
{
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 3; ++i)
        setup.launch(setup.tiles);
    wait_for_device(10);
    std::vector<float> times;
    for (int i = 0; i < 20; ++i) {
        CHECK(cudaEventRecord(start));
        setup.launch(setup.tiles);
        CHECK(cudaEventRecord(end));
        wait_for_device(10);
        float milliseconds;
        CHECK(cudaEventElapsedTime(&milliseconds, start, end));
        times.push_back(milliseconds);
    }
    std::sort(times.begin(), times.end());
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(end));
    return times[times.size() / 2];
}

static void time_case(Problem &problem, double products)
{
    current_case = problem.name.c_str();
    Setup setup(problem);
    double milliseconds = time_of(setup);
    printf("TIME %-44s %8.3f ms %7.1f TFLOP/s\n", problem.name.c_str(), milliseconds,
           2 * products * (problem.head_dim + problem.value_dim) * problem.heads / milliseconds / 1e9);
    fflush(stdout);
}

static void run_times(const char *part)
{
    for (u32 type : {BF16, F16})
        for (u32 dim : {64u, 96u, 128u, 192u, 256u})
            for (bool causal : {false, true})
                for (u32 n : {4096u, 16384u}) {
                    if ((type == F16 || n == 4096) && dim != 128 && dim != 64)
                        continue;
                    Problem problem;
                    problem.name = std::string(type == BF16 ? "bf16" : "f16") + (causal ? " causal" : " none") + " d=" +
                                   std::to_string(dim) + " n=" + std::to_string(n);
                    problem.type = problem.out_type = type;
                    problem.head_dim = problem.value_dim = dim;
                    problem.heads = 32;
                    problem.n_q = problem.n_k = n;
                    problem.visible = 1;
                    problem.out_padding = 0;
                    make_exact(problem, causal);
                    if (part && problem.name.find(part) == std::string::npos)
                        continue;
                    time_case(problem, (double)n * n / (causal ? 2 : 1));
                    if (n == 16384 && type == BF16 && (dim == 64 || dim == 128) && !causal) {
                        problem.name += ", gathered";
                        problem.maps = false;
                        time_case(problem, (double)n * n);
                    }
                }
    for (u32 dim : {64u, 128u})
        for (int way = 0; way < 3; ++way) {
            Problem problem;
            const char *ways[] = {"sorted, both gathered", "sorted, samples in a row", "permuted before"};
            problem.name = std::string("blocks of 256 + 256 d=") + std::to_string(dim) + " n=131072 " + ways[way];
            if (part && problem.name.find(part) == std::string::npos)
                continue;
            problem.head_dim = problem.value_dim = dim;
            problem.heads = 32;
            problem.n_q = problem.n_k = 131072;
            problem.out_padding = 0;
            make_blocks(problem, 256, 256, way < 2, way == 0);
            time_case(problem, 131072.0 * 512);
        }
}

int main(int count, char **arguments)
{
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    multiprocessors = properties.multiProcessorCount;
    cudaDriverEntryPointQueryResult found;
    void *function = nullptr;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    encode_tiled = (PFN_cuTensorMapEncodeTiled_v12000)function;
    printf("%s, %d multiprocessors\n", properties.name, multiprocessors);
    for (const Variant &variant : variants) {
        cudaFuncAttributes attributes;
        CHECK(cudaFuncGetAttributes(&attributes, (const void *)variant.kernel));
        if (variant.type == BF16)
            printf("dim %u: %u keys a block, %u bytes of shared memory, %d registers, %zu bytes of local memory\n",
                   variant.dim, variant.keys, variant.shared_bytes, attributes.numRegs, attributes.localSizeBytes);
    }
    const char *what = count > 1 ? arguments[1] : "";
    const char *part = count > 2 ? arguments[2] : nullptr;
    if (strcmp(what, "time"))
        run_tests(part);
    if (strcmp(what, "test"))
        run_times(part);
    return failures ? 1 : 0;
}
