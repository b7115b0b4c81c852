// Checks attend_mma and attend_any against a plain kernel in double precision, then times them.
//
// In cuda/, for the architecture at hand:
//
//     nvcc -std=c++17 -O3 -I kernels/hyperattn -gencode arch=compute_90a,code=sm_90a -o attend_check
//         tests/attend_check.cu
//     attend_check [part of the names of the cases to run] [--no-times]
//
// One line per case; the exit status is 1 if any failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "attend_any.cuh"
#include "attend_mma.cuh"

using namespace hyperattn;

#define CUDA(CALL)                                                                                                     \
    do {                                                                                                               \
        cudaError_t status = (CALL);                                                                                   \
        if (status != cudaSuccess) {                                                                                   \
            std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #CALL, cudaGetErrorString(status));                     \
            std::exit(2);                                                                                              \
        }                                                                                                              \
    } while (0)

static u32 bytes_of(u32 type) { return type == F32 ? 4 : 2; }
static const char *name_of(u32 type) { return type == F32 ? "f32" : type == F16 ? "f16" : "bf16"; }

// A generator of the host's choices.
struct Random {
    u64 state;
    u32 below(u32 bound)
    {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (u32)(state >> 33) % bound;
    }
    std::vector<u32> permutation(u32 n)
    {
        std::vector<u32> order(n);
        for (u32 i = 0; i < n; ++i)
            order[i] = i;
        for (u32 i = n; i > 1; --i)
            std::swap(order[i - 1], order[below(i)]);
        return order;
    }
};

// Device memory.

static std::vector<void *> allocations;

static void *allocate(u64 bytes)
{
    void *data = nullptr;
    CUDA(cudaMalloc(&data, std::max<u64>(bytes, 16)));
    allocations.push_back(data);
    return data;
}

static void free_all()
{
    for (void *data : allocations)
        CUDA(cudaFree(data));
    allocations.clear();
}

template <typename T> static T *upload(const std::vector<T> &values)
{
    T *data = (T *)allocate(values.size() * sizeof(T));
    CUDA(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return data;
}

struct Tensor {
    View view = {};
    char *memory = nullptr;
    u64 bytes = 0;
    u32 batch = 0, heads = 0, rows = 0, dim = 0, type = F32;

    // [batch, rows, heads, dim + padding] in memory, after `offset` elements.
    Tensor(u32 batch, u32 heads, u32 rows, u32 dim, u32 type, u32 padding, u32 offset)
        : batch(batch), heads(heads), rows(rows), dim(dim), type(type)
    {
        u64 element = bytes_of(type);
        view.head_stride = (dim + padding) * element;
        view.row_stride = heads * view.head_stride;
        view.batch_stride = rows * view.row_stride;
        bytes = batch * view.batch_stride + offset * element;
        memory = (char *)allocate(bytes);
        view.data = memory + offset * element;
    }
};

__device__ void put(char *to, u32 type, float value)
{
    if (type == F32)
        *(float *)to = value;
    else
        *(u16 *)to = type == BF16 ? bf16_from_f32(value) : f16_from_f32(value);
}

__device__ double get(const char *from, u32 type)
{
    if (type == F32)
        return *(const float *)from;
    return type == BF16 ? f32_from_bf16(*(const u16 *)from) : f32_from_f16(*(const u16 *)from);
}

enum Filling : u32 { NORMAL, POSITIVE, INTEGERS };

__device__ u32 mix(u64 x)
{
    x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull, x ^= x >> 33;
    return (u32)x;
}

__global__ void fill(char *data, u64 count, u32 type, u64 seed, u32 filling)
{
    u32 size = type == F32 ? 4 : 2;
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
        float a = (mix(seed * 0x9e3779b97f4a7c15ull + 2 * i) + 1.0f) * 0x1p-32f;
        float b = mix(seed * 0x9e3779b97f4a7c15ull + 2 * i + 1) * 0x1p-32f;
        float value = sqrtf(-2.0f * logf(fminf(a, 1.0f))) * cospif(2.0f * b);
        if (filling == POSITIVE)
            value = fabsf(value) + 0.1f;
        if (filling == INTEGERS)
            value = truncf(5.0f * fminf(b, 0.999f)) - 2.0f;
        put(data + i * size, type, value);
    }
}

static void fill_tensor(const Tensor &tensor, u64 seed, u32 filling)
{
    fill<<<1024, 256>>>(tensor.memory, tensor.bytes / bytes_of(tensor.type), tensor.type, seed, filling);
    CUDA(cudaGetLastError());
}

// Every batch's and head's row.
__global__ void set_row(View view, u32 heads, u32 row, u32 dim, u32 type, float value)
{
    for (u32 column = threadIdx.x; column < dim; column += blockDim.x)
        put(view.row(blockIdx.x / heads, blockIdx.x % heads, row) + column * (type == F32 ? 4 : 2), type, value);
}

static void set_rows(const Tensor &tensor, u32 first, u32 end, float value)
{
    for (u32 row = first; row < end; ++row)
        set_row<<<tensor.batch * tensor.heads, 64>>>(tensor.view, tensor.heads, row, tensor.dim, tensor.type, value);
    CUDA(cudaGetLastError());
}

// The reference: one thread block per row, logits in scratch memory, everything in double precision.

__global__ void reference(AttendParams p, const u32 *checked_tiles, u32 checked, double *logits, i64 *rows,
                          u64 capacity, double *out, double *lse)
{
    constexpr i64 UNSEEN = -1, EXTRA = (i64)1 << 40;
    __shared__ double shared[128];
    logits += blockIdx.x * capacity;
    rows += blockIdx.x * capacity;
    u32 q_bytes = p.q_type == F32 ? 4 : 2, kv_bytes = p.kv_type == F32 ? 4 : 2;
    for (u64 item = blockIdx.x; item < (u64)checked * TILE_ROWS; item += gridDim.x) {
        const Tile tile = p.tiles[checked_tiles[item / TILE_ROWS]];
        u32 number = item % TILE_ROWS;
        if (number >= tile.rows)
            continue;
        u32 query_row = p.query_row(tile, number);
        u32 limit = p.limit(query_row);
        const char *query = p.q.row(tile.batch, tile.head, query_row);
        u64 keys = 0;
        double most = -INFINITY;
        for (u32 s = 0; s < tile.segments; ++s) {
            const Segment segment = p.segments[tile.first_segment + s];
            for (u32 j = threadIdx.x; j < segment.count; j += blockDim.x) {
                i64 row;
                const char *key;
                if (segment.flags & SEGMENT_EXTRA) {
                    row = EXTRA | (segment.first + j);
                    key = p.extra_keys + (u64)(segment.first + j) * p.head_dim * kv_bytes;
                } else {
                    u32 position = p.position(segment, j);
                    bool seen = !(position >= segment.hidden_start && position < segment.hidden_end);
                    if (segment.flags & SEGMENT_LIMITED)
                        seen = seen && position < limit;
                    u32 key_row = p.key_row(p.order_of_keys(tile, p.kv_head(tile)), segment, j, position);
                    row = seen ? (i64)key_row : UNSEEN;
                    key = p.k.row(tile.batch, p.kv_head(tile), key_row);
                }
                double dot = 0;
                for (u32 d = 0; d < p.head_dim; ++d)
                    dot += get(query + d * q_bytes, p.q_type) * get(key + d * kv_bytes, p.kv_type);
                double logit = dot * (double)p.scale_log2 + (double)segment.log_weight;
                logits[keys + j] = logit;
                rows[keys + j] = row;
                if (row != UNSEEN)
                    most = fmax(most, logit);
            }
            keys += segment.count;
        }
        shared[threadIdx.x] = most;
        __syncthreads();
        for (u32 i = 0; i < blockDim.x; ++i)
            most = fmax(most, shared[i]);
        __syncthreads();
        double sum = 0;
        for (u64 j = threadIdx.x; j < keys; j += blockDim.x) {
            double weight = rows[j] == UNSEEN ? 0 : exp2(logits[j] - (most == -INFINITY ? 0 : most));
            logits[j] = weight;
            sum += weight;
        }
        shared[threadIdx.x] = sum;
        __syncthreads();
        sum = 0;
        for (u32 i = 0; i < blockDim.x; ++i)
            sum += shared[i];
        u64 at = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q + query_row;
        for (u32 column = threadIdx.x; column < p.value_dim; column += blockDim.x) {
            double accumulated = 0;
            for (u64 j = 0; j < keys; ++j) {
                if (rows[j] == UNSEEN)
                    continue;
                const char *value = rows[j] & EXTRA
                                        ? p.extra_values + (u64)(rows[j] ^ EXTRA) * p.value_dim * kv_bytes
                                        : p.v.row(tile.batch, p.kv_head(tile), (u32)rows[j]);
                accumulated += logits[j] * get(value + column * kv_bytes, p.kv_type);
            }
            out[at * p.value_dim + column] = sum == 0 ? 0 : accumulated / sum;
        }
        if (threadIdx.x == 0)
            lse[at] = sum == 0 ? -INFINITY : (most + log2(sum)) * 0.6931471805599453;
        __syncthreads();
    }
}

// Kernels under test.

struct Kernel {
    void (*entry)(AttendParams);
    u32 threads;
    u32 shared_bytes;
};

template <u32 DIM> static Kernel mma_kernel(void (*entry)(AttendParams))
{
    return {entry, mma::Shape<DIM>::THREADS, mma::Shape<DIM>::SHARED_BYTES};
}

template <u32 DIM> static Kernel any_kernel(void (*entry)(AttendParams))
{
    return {entry, simt::THREADS, simt::Shape<DIM>::SHARED_BYTES};
}

static Kernel kernel_for(bool any, u32 type, u32 dim)
{
    if (any)
        return dim <= 64    ? any_kernel<64>(attend_any_64)
               : dim <= 128 ? any_kernel<128>(attend_any_128)
                            : any_kernel<256>(attend_any_256);
    bool bf16 = type == BF16;
    return dim <= 64    ? mma_kernel<64>(bf16 ? attend_mma_bf16_64 : attend_mma_f16_64)
           : dim <= 96  ? mma_kernel<96>(bf16 ? attend_mma_bf16_96 : attend_mma_f16_96)
           : dim <= 128 ? mma_kernel<128>(bf16 ? attend_mma_bf16_128 : attend_mma_f16_128)
           : dim <= 192 ? mma_kernel<192>(bf16 ? attend_mma_bf16_192 : attend_mma_f16_192)
                        : mma_kernel<256>(bf16 ? attend_mma_bf16_256 : attend_mma_f16_256);
}

static u32 grid_of(const Kernel &kernel, u32 tiles)
{
    int device, multiprocessors, resident;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    CUDA(cudaFuncSetAttribute(kernel.entry, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)kernel.shared_bytes));
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel.entry, (int)kernel.threads,
                                                       kernel.shared_bytes));
    return std::max(1u, std::min(tiles, (u32)(multiprocessors * std::max(resident, 1))));
}

static void launch(const Kernel &kernel, const AttendParams &p)
{
    CUDA(cudaMemsetAsync(p.next_tile, 0, 4));
    u32 grid = grid_of(kernel, p.tile_count);
    kernel.entry<<<grid, kernel.threads, kernel.shared_bytes>>>(p);
    CUDA(cudaGetLastError());
}

// Cases.

struct Work {
    Tile tile;
    std::vector<Segment> segments;
};

struct Case {
    std::string name;
    bool any = false;
    u32 q_type = BF16, kv_type = BF16, out_type = BF16;
    u32 head_dim = 64, value_dim = 64;
    u32 batch = 1, heads_q = 2, group = 1, n_q = 128, n_k = 128;
    i32 visible = 0;
    float scale_log2 = 0;
    u32 extra = 0;
    u32 launches = 1;
    bool lse = true;
    // Elements between rows, and before the first one.
    u32 padding = 0, offset = 0;
    u32 q_filling = NORMAL, k_filling = NORMAL;
    std::vector<Work> works;
    std::vector<u32> positions, query_order, key_order, listed_rows;
    std::function<void(const Tensor &, const Tensor &)> spoil;
    // Tiles to check, all if empty.
    std::vector<u32> checked;
    double tolerance = 0;

    u32 heads_kv() const { return heads_q / group; }
};

static Segment run_of(u32 first, u32 count, u32 flags = 0) { return {first, count, flags, 0.0f, 0, 0}; }

// Plain tiles of all rows; `segments` tells those of a tile.
static void plain_tiles(Case &c, const std::function<std::vector<Segment>(const Tile &)> &segments)
{
    for (u32 batch = 0; batch < c.batch; ++batch)
        for (u32 head = 0; head < c.heads_q; ++head)
            for (u32 first = 0; first < c.n_q; first += TILE_ROWS) {
                Tile tile = {batch, head, first, std::min(TILE_ROWS, c.n_q - first), 0, 0, 0, 0};
                c.works.push_back({tile, segments(tile)});
            }
}

struct Prepared {
    AttendParams p = {};
    Tensor out;
    std::vector<Tile> tiles;
    std::vector<Segment> segments;
    std::vector<AttendParams> launches;
};

static Prepared prepare(const Case &c)
{
    u32 offset = c.offset, padding = c.padding;
    Tensor q(c.batch, c.heads_q, c.n_q, c.head_dim, c.q_type, padding, offset);
    Tensor k(c.batch, c.heads_kv(), c.n_k, c.head_dim, c.kv_type, padding, offset);
    Tensor v(c.batch, c.heads_kv(), c.n_k, c.value_dim, c.kv_type, padding, offset);
    Tensor extra_keys(1, 1, c.extra, c.head_dim, c.kv_type, 0, 0);
    Tensor extra_values(1, 1, c.extra, c.value_dim, c.kv_type, 0, 0);
    fill_tensor(q, 1, c.q_filling);
    fill_tensor(k, 2, c.k_filling);
    fill_tensor(v, 3, NORMAL);
    fill_tensor(extra_keys, 4, c.k_filling);
    fill_tensor(extra_values, 5, NORMAL);
    if (c.spoil)
        c.spoil(k, v);

    Prepared prepared = {{}, Tensor(c.batch, c.heads_q, c.n_q, c.value_dim, c.out_type, padding, offset), {}, {}, {}};
    CUDA(cudaMemset(prepared.out.memory, 0xff, prepared.out.bytes));
    AttendParams &p = prepared.p;
    p.q = q.view, p.k = k.view, p.v = v.view, p.out = prepared.out.view;
    u64 all_rows = (u64)c.batch * c.heads_q * c.n_q;
    if (c.lse) {
        p.lse = {(char *)allocate(all_rows * 4), (i64)c.heads_q * c.n_q * 4, (i64)c.n_q * 4, 4};
        CUDA(cudaMemset(p.lse.data, 0xff, all_rows * 4));
    }
    p.q_type = c.q_type, p.kv_type = c.kv_type, p.out_type = c.out_type;
    p.heads_q = c.heads_q, p.group = c.group, p.n_q = c.n_q, p.n_k = c.n_k;
    p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.visible = c.visible;
    p.scale_log2 = c.scale_log2 != 0 ? c.scale_log2 : 1.4426950408889634f / std::sqrt((float)c.head_dim);
    p.extra_keys = extra_keys.memory, p.extra_values = extra_values.memory;
    p.positions = upload(c.positions), p.query_order = upload(c.query_order), p.key_order = upload(c.key_order);
    p.listed_rows = upload(c.listed_rows);
    if (c.launches > 1) {
        u64 partials = (c.launches - 1) * all_rows, columns = (c.value_dim + 31) / 32 * 32;
        u64 bytes = partials * columns * (c.out_type == F32 ? 4 : 2);
        p.partial_rows = (c.launches - 1) * c.n_q;
        p.partial_values = (char *)allocate(bytes);
        p.partial_lse = (float *)allocate(partials * 4);
        CUDA(cudaMemset(p.partial_values, 0xff, bytes));
        CUDA(cudaMemset(p.partial_lse, 0xff, partials * 4));
    }
    p.next_tile = (u32 *)allocate(4);

    // The tiles as a whole for the reference, and as the launches take them.
    for (const Work &work : c.works) {
        Tile tile = work.tile;
        tile.first_segment = (u32)prepared.segments.size();
        tile.segments = (u32)work.segments.size();
        prepared.tiles.push_back(tile);
        prepared.segments.insert(prepared.segments.end(), work.segments.begin(), work.segments.end());
    }
    p.tile_count = (u32)prepared.tiles.size();
    // The last launch goes on from the partials of all others, which are told behind its tiles' segments.
    std::vector<Segment> segments = prepared.segments;
    std::vector<std::vector<Tile>> parts;
    u32 partials = c.launches - 1;
    for (u32 number = 0; number < c.launches; ++number) {
        parts.push_back(prepared.tiles);
        for (Tile &tile : parts.back()) {
            u32 start = tile.segments * number / c.launches, end = tile.segments * (number + 1) / c.launches;
            u32 first = tile.first_segment + start;
            tile.first_segment = (u32)segments.size();
            tile.segments = end - start;
            auto from = prepared.segments.begin() + first;
            segments.insert(segments.end(), from, from + (end - start));
            if (number < partials) {
                tile.flags |= TILE_PARTIAL;
                tile.first_output = number * c.n_q;
            } else if (partials > 0) {
                tile.flags |= TILE_MERGE;
                tile.first_output = partials;
                for (u32 i = 0; i < partials; ++i)
                    segments.push_back(run_of(i * c.n_q, 0));
            }
        }
    }
    p.segments = upload(segments);
    p.tiles = upload(prepared.tiles);
    for (const std::vector<Tile> &part : parts) {
        AttendParams of = p;
        of.tiles = upload(part);
        prepared.launches.push_back(of);
    }
    return prepared;
}

static float host_value(const char *from, u32 type)
{
    if (type == F32) {
        float value;
        std::memcpy(&value, from, 4);
        return value;
    }
    u16 bits;
    std::memcpy(&bits, from, 2);
    if (type == BF16) {
        u32 wide = (u32)bits << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                : std::ldexp((float)fraction, -24);
    return bits & 0x8000 ? -size : size;
}

static u32 failures = 0, passes = 0;

// Compares what the launches wrote with the reference.
static void verify(const Case &c, const Prepared &prepared)
{
    const AttendParams &p = prepared.p;
    u64 rows = (u64)c.batch * c.heads_q * c.n_q;
    std::vector<u32> checked = c.checked;
    if (checked.empty())
        for (u32 i = 0; i < p.tile_count; ++i)
            checked.push_back(i);
    u64 capacity = 1;
    for (u32 tile : checked) {
        u64 keys = 0;
        for (const Segment &segment : c.works[tile].segments)
            keys += segment.count;
        capacity = std::max(capacity, keys);
    }
    u32 blocks = 528;
    double *scratch = (double *)allocate(blocks * capacity * 8);
    i64 *scratch_rows = (i64 *)allocate(blocks * capacity * 8);
    double *expected_memory = (double *)allocate(rows * c.value_dim * 8);
    double *expected_lse_memory = (double *)allocate(rows * 8);
    reference<<<blocks, 128>>>(p, upload(checked), (u32)checked.size(), scratch, scratch_rows, capacity,
                               expected_memory, expected_lse_memory);
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
    std::vector<double> expected(rows * c.value_dim), expected_lse(rows);
    std::vector<char> got(prepared.out.bytes);
    std::vector<float> got_lse(rows);
    CUDA(cudaMemcpy(expected.data(), expected_memory, expected.size() * 8, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(expected_lse.data(), expected_lse_memory, rows * 8, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(got.data(), prepared.out.memory, got.size(), cudaMemcpyDeviceToHost));
    if (c.lse)
        CUDA(cudaMemcpy(got_lse.data(), p.lse.data, rows * 4, cudaMemcpyDeviceToHost));

    u32 size = bytes_of(c.out_type);
    double tolerance = c.tolerance;
    if (tolerance == 0)
        tolerance = c.any ? (c.out_type == F32 ? 2e-6 : c.out_type == F16 ? 4e-4 : 3e-3)
                          : (c.kv_type == F16 ? 1e-3 : 6e-3);
    double lse_tolerance = c.any ? 1e-5 : 2e-4;
    double error = 0, norm = 0, lse_error = 0;
    char first[160] = "";
    std::vector<bool> written(c.checked.empty() ? got.size() : 0);
    for (u32 number : checked) {
        const Tile &tile = prepared.tiles[number];
        for (u32 i = 0; i < tile.rows; ++i) {
            u32 row = tile.first_query + i;
            u64 head = tile.batch * c.heads_q + tile.head;
            if (tile.flags & TILE_SORTED)
                row = c.query_order[head * c.n_q + row];
            u64 at = head * c.n_q + row;
            u64 offset = (u64)(p.out.data - prepared.out.memory) + tile.batch * p.out.batch_stride +
                         tile.head * p.out.head_stride + row * p.out.row_stride;
            double row_size = 0.05;
            for (u32 d = 0; d < c.value_dim; ++d)
                row_size = std::max(row_size, std::fabs(expected[at * c.value_dim + d]));
            if (!std::isfinite(row_size))
                row_size = 1;
            for (u32 d = 0; d < c.value_dim; ++d) {
                double want = expected[at * c.value_dim + d];
                double have = host_value(got.data() + offset + d * size, c.out_type);
                if (!written.empty())
                    for (u32 b = 0; b < size; ++b)
                        written[offset + d * size + b] = true;
                bool bad;
                if (!std::isfinite(want)) {
                    bad = std::isfinite(have);
                } else {
                    error += (have - want) * (have - want);
                    norm += want * want;
                    bad = !(std::fabs(have - want) <= 20 * tolerance * row_size);
                }
                if (bad && !first[0])
                    std::snprintf(first, sizeof first, " tile %u batch %u head %u row %u column %u: %.9g for %.9g",
                                  number, tile.batch, tile.head, row, d, have, want);
            }
            if (c.lse) {
                double want = expected_lse[at], have = got_lse[at];
                bool bad;
                if (!std::isfinite(want)) {
                    bad = std::isnan(want) ? !std::isnan(have) : have != want;
                } else {
                    double difference = std::fabs(have - want) / std::max(1.0, std::fabs(want));
                    bad = !(difference <= lse_tolerance);
                    if (std::isfinite(difference))
                        lse_error = std::max(lse_error, difference);
                }
                if (bad && !first[0])
                    std::snprintf(first, sizeof first, " tile %u batch %u head %u row %u: lse %.9g for %.9g", number,
                                  tile.batch, tile.head, row, have, want);
            }
        }
    }
    for (u64 i = 0; i < written.size() && !first[0]; ++i)
        if (!written[i] && (unsigned char)got[i] != 0xff)
            std::snprintf(first, sizeof first, " byte %llu of the output was none of the kernel's", i);
    double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    bool passed = !first[0] && relative <= tolerance;
    (passed ? passes : failures) += 1;
    std::printf("%s %-66s error %.2e lse %.1e%s\n", passed ? "PASS" : "FAIL", c.name.c_str(), relative, lse_error,
                first);
    std::fflush(stdout);
}

static const char *filter = nullptr;

static void run(const Case &c)
{
    if (filter && !std::strstr(c.name.c_str(), filter))
        return;
    Prepared prepared = prepare(c);
    Kernel kernel = kernel_for(c.any, c.q_type, std::max(c.head_dim, c.value_dim));
    for (const AttendParams &p : prepared.launches)
        launch(kernel, p);
    cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) {
        std::printf("FAIL %s: %s\n", c.name.c_str(), cudaGetErrorString(status));
        std::exit(2);
    }
    verify(c, prepared);
    free_all();
}

// Sorted blocks of `width`, listed samples with the block itself hidden, and extra columns.
static void block_work(Case &c, u32 width, u32 samples)
{
    Random random = {c.n_q * 7 + c.n_k};
    for (u32 i = 0; i < c.batch * c.heads_q; ++i)
        for (u32 row : random.permutation(c.n_q))
            c.query_order.push_back(row);
    for (u32 i = 0; i < c.batch * c.heads_kv(); ++i)
        for (u32 row : random.permutation(c.n_k))
            c.key_order.push_back(row);
    for (u32 batch = 0; batch < c.batch; ++batch)
        for (u32 head = 0; head < c.heads_q; ++head) {
            u32 sampled = (u32)c.positions.size();
            u64 order = (u64)(batch * c.heads_kv() + head / c.group) * c.n_k;
            for (u32 i = 0; i < samples; ++i) {
                c.positions.push_back(random.below(c.n_k));
                c.listed_rows.push_back(c.key_order[order + c.positions.back()]);
            }
            for (u32 first = 0; first < c.n_q; first += 100) {
                Tile tile = {batch, head, first, std::min(100u, c.n_q - first), TILE_SORTED, 0, 0, 0};
                u32 start = std::min(first / width * width, c.n_k), end = std::min(start + width, c.n_k);
                std::vector<Segment> segments = {run_of(start, end - start, SEGMENT_SORTED)};
                Segment sample = run_of(sampled, samples, SEGMENT_LISTED | SEGMENT_SORTED);
                sample.log_weight = 1.75f;
                sample.hidden_start = start, sample.hidden_end = end;
                segments.push_back(sample);
                Segment extra = run_of(3, c.extra > 3 ? c.extra - 3 : 0, SEGMENT_EXTRA);
                extra.log_weight = -0.5f;
                segments.push_back(extra);
                Segment cut = run_of(start, std::min(50u, end - start), SEGMENT_SORTED);
                cut.log_weight = -1.0f;
                cut.hidden_start = start, cut.hidden_end = start + 7;
                segments.push_back(cut);
                c.works.push_back({tile, segments});
            }
        }
}

static std::vector<Case> scenarios(const Case &base)
{
    std::vector<Case> cases;
    auto add = [&](const char *name) -> Case & {
        cases.push_back(base);
        cases.back().name += std::string(" ") + name;
        return cases.back();
    };
    auto whole = [](Case &c, u32 flags) {
        plain_tiles(c, [&](const Tile &) { return std::vector<Segment>{run_of(0, c.n_k, flags)}; });
    };
    {
        Case &c = add("exact, groups");
        c.batch = 2, c.heads_q = 4, c.group = 2, c.n_q = 257, c.n_k = 333;
        whole(c, 0);
    }
    {
        Case &c = add("causal, one key for the first row");
        c.n_q = 300, c.n_k = 200, c.visible = 1;
        whole(c, SEGMENT_LIMITED);
    }
    {
        Case &c = add("causal, all keys for the last row");
        c.heads_q = 3, c.group = 3, c.n_q = 130, c.n_k = 517, c.visible = 517 - 130 + 1;
        whole(c, SEGMENT_LIMITED);
    }
    {
        Case &c = add("causal, rows that see nothing");
        c.n_q = 300, c.n_k = 100, c.visible = 100 - 300 + 1;
        whole(c, SEGMENT_LIMITED);
    }
    for (u32 launches : {1u, 2u, 3u}) {
        Case &c = add(launches == 1   ? "sorted blocks, samples, extra"
                      : launches == 2 ? "sorted blocks, samples, extra in 2 launches"
                                      : "sorted blocks, samples, extra in 3 launches");
        c.batch = 2, c.heads_q = 4, c.group = 2, c.n_q = 450, c.n_k = 410, c.extra = 40, c.launches = launches;
        block_work(c, 128, 77);
    }
    for (u32 launches : {1u, 4u}) {
        Case &c = add(launches == 1 ? "limited runs and lists, sorted queries"
                                    : "limited, in 4 launches, some without keys");
        c.n_q = 300, c.n_k = 300, c.visible = 1, c.launches = launches;
        Random random = {5};
        for (u32 head = 0; head < c.heads_q; ++head)
            for (u32 row : random.permutation(c.n_q))
                c.query_order.push_back(row);
        for (u32 i = 0; i < 90; ++i)
            c.positions.push_back(random.below(c.n_k));
        for (u32 head = 0; head < c.heads_q; ++head)
            for (u32 first = 0; first < c.n_q; first += 70) {
                Tile tile = {0, head, first, std::min(70u, c.n_q - first), TILE_SORTED, 0, 0, 0};
                Segment late = run_of(150, 150, SEGMENT_LIMITED);
                late.hidden_start = 170, late.hidden_end = 290;
                Segment list = run_of(10, 80, SEGMENT_LIMITED | SEGMENT_LISTED);
                list.log_weight = 2.5f;
                list.hidden_start = 60, list.hidden_end = 100;
                Segment early = run_of(20, 64, SEGMENT_LIMITED);
                early.hidden_start = 0, early.hidden_end = 40;
                c.works.push_back({tile, {late, list, early}});
            }
    }
    {
        Case &c = add("NaN that nobody may see");
        c.n_q = 200, c.n_k = 256;
        c.spoil = [](const Tensor &k, const Tensor &v) {
            for (const Tensor *tensor : {&k, &v}) {
                set_rows(*tensor, 150, 256, NAN);
                set_rows(*tensor, 40, 50, NAN);
                set_rows(*tensor, 0, 3, INFINITY);
            }
        };
        plain_tiles(c, [&](const Tile &) {
            Segment segment = run_of(3, 147);
            segment.hidden_start = 40, segment.hidden_end = 50;
            return std::vector<Segment>{segment};
        });
    }
    {
        Case &c = add("NaN and infinite values within causal tiles");
        c.n_q = 300, c.n_k = 300, c.visible = 1;
        c.spoil = [](const Tensor &k, const Tensor &v) {
            set_rows(v, 45, 46, INFINITY);
            set_rows(v, 70, 71, -INFINITY);
            set_rows(v, 100, 101, NAN);
            set_rows(v, 299, 300, NAN);
        };
        whole(c, SEGMENT_LIMITED);
    }
    {
        Case &c = add("NaN keys and values within causal tiles");
        c.n_q = 300, c.n_k = 300, c.visible = 1;
        c.spoil = [](const Tensor &k, const Tensor &v) {
            set_rows(v, 255, 256, NAN);
            set_rows(k, 200, 201, NAN);
            set_rows(k, 280, 281, INFINITY);
        };
        plain_tiles(c, [&](const Tile &) {
            return std::vector<Segment>{run_of(150, 150, SEGMENT_LIMITED), run_of(0, 150, SEGMENT_LIMITED)};
        });
    }
    {
        Case &c = add("NaN values in limited lists");
        c.n_q = 300, c.n_k = 300, c.visible = 1;
        Random random = {9};
        c.positions = random.permutation(300);
        c.spoil = [](const Tensor &, const Tensor &v) { set_rows(v, 217, 219, NAN); };
        plain_tiles(c, [&](const Tile &) {
            return std::vector<Segment>{run_of(0, 300, SEGMENT_LIMITED | SEGMENT_LISTED)};
        });
    }
    {
        Case &c = add("no segments, no keys");
        c.n_q = 300, c.n_k = 64;
        c.works.push_back({{0, 0, 0, 0, 0, 0, 0, 0}, {run_of(0, 64)}});
        plain_tiles(c, [&](const Tile &tile) {
            std::vector<Segment> segments;
            if (tile.head == 0)
                return segments;
            Segment hidden = run_of(0, 64);
            hidden.hidden_start = 0, hidden.hidden_end = 64;
            segments = {run_of(0, 0), hidden};
            if (tile.first_query == 128)
                segments.push_back(run_of(5, 1));
            segments.push_back(run_of(9, 0));
            return segments;
        });
    }
    for (int power : {21, 100}) {
        Case &c = add(power == 21 ? "large logits" : "huge logits");
        c.n_q = 150, c.n_k = 300, c.scale_log2 = std::ldexp(1.0f, power);
        c.q_filling = INTEGERS, c.k_filling = INTEGERS;
        plain_tiles(c, [&](const Tile &) {
            return std::vector<Segment>{run_of(0, 100), run_of(100, 128), run_of(228, 72)};
        });
    }
    {
        Case &c = add("keys of -inf");
        c.n_q = 150, c.n_k = 320, c.q_filling = POSITIVE;
        c.spoil = [](const Tensor &k, const Tensor &) {
            set_rows(k, 0, 140, -INFINITY);
            set_rows(k, 200, 210, -INFINITY);
        };
        whole(c, 0);
    }
    {
        Case &c = add("only keys of -inf");
        c.n_q = 30, c.n_k = 70, c.q_filling = POSITIVE;
        c.spoil = [](const Tensor &k, const Tensor &) { set_rows(k, 0, 70, -INFINITY); };
        whole(c, 0);
    }
    {
        Case &c = add("negative scale");
        c.n_q = 140, c.n_k = 260, c.scale_log2 = -0.3f;
        whole(c, 0);
    }
    {
        Case &c = add("many short segments, tiles of few rows");
        c.heads_q = 1, c.n_q = 211, c.n_k = 900;
        Random random = {3};
        for (u32 first = 0, rows = 1; first < c.n_q; first += rows, rows = rows * 2 + 1) {
            Tile tile = {0, 0, first, std::min(std::min(rows, TILE_ROWS), c.n_q - first), 0, 0, 0, 0};
            std::vector<Segment> segments;
            for (u32 i = 0; i < 30; ++i) {
                u32 start = random.below(800);
                segments.push_back(run_of(start, random.below(70)));
                segments.back().log_weight = i % 3 - 1.0f;
            }
            c.works.push_back({tile, segments});
        }
    }
    return cases;
}

static void check_mma()
{
    struct Dims {
        u32 head, value;
    };
    for (u32 type : {BF16, F16})
        for (Dims dims : {Dims{64, 64}, Dims{128, 128}, Dims{96, 96}, Dims{192, 192}, Dims{256, 256}, Dims{8, 16},
                          Dims{72, 40}, Dims{80, 80}, Dims{104, 128}, Dims{200, 168}, Dims{48, 256}}) {
            Case base;
            base.q_type = base.kv_type = type;
            base.head_dim = dims.head, base.value_dim = dims.value;
            base.padding = dims.head == dims.value ? 0 : 8;
            bool wide = (dims.head + dims.value) / 8 % 2;
            base.out_type = wide ? (u32)F32 : type;
            base.lse = dims.head != 80;
            base.name = std::string("mma ") + name_of(type) + " " + std::to_string(dims.head) + "/" +
                        std::to_string(dims.value) + " to " + name_of(base.out_type);
            for (const Case &c : scenarios(base))
                run(c);
        }
    for (u32 dim : {64u, 128u, 192u}) {
        Case base;
        base.head_dim = base.value_dim = dim;
        base.out_type = F32;
        base.name = "mma bf16 " + std::to_string(dim) + " to f32";
        for (const Case &c : scenarios(base))
            run(c);
    }
}

static void check_any()
{
    struct Dims {
        u32 head, value, padding, offset;
    };
    for (Dims dims : {Dims{64, 64, 0, 0}, Dims{128, 128, 0, 0}, Dims{256, 256, 0, 0}, Dims{1, 1, 0, 0},
                      Dims{3, 3, 0, 0}, Dims{40, 40, 0, 0}, Dims{72, 72, 3, 1}, Dims{80, 80, 0, 2},
                      Dims{100, 100, 0, 0}, Dims{256, 17, 0, 0}, Dims{5, 200, 1, 0}}) {
        Case base;
        base.any = true;
        base.q_type = base.kv_type = base.out_type = F32;
        base.head_dim = dims.head, base.value_dim = dims.value, base.padding = dims.padding, base.offset = dims.offset;
        base.name = "any f32 " + std::to_string(dims.head) + "/" + std::to_string(dims.value) + " +" +
                    std::to_string(dims.padding) + " @" + std::to_string(dims.offset);
        for (const Case &c : scenarios(base))
            run(c);
    }
    for (u32 q_type : {F32, F16, BF16})
        for (u32 kv_type : {F32, F16, BF16})
            for (u32 out_type : {F32, F16, BF16})
                for (u32 odd : {0u, 1u}) {
                    Case c;
                    c.any = true;
                    c.q_type = q_type, c.kv_type = kv_type, c.out_type = out_type;
                    c.head_dim = odd ? 33 : 72, c.value_dim = odd ? 130 : 40, c.offset = odd;
                    c.n_q = 200, c.n_k = 300, c.visible = 101, c.extra = 20;
                    c.name = std::string("any ") + name_of(q_type) + " " + name_of(kv_type) + " " + name_of(out_type) +
                             (odd ? " odd" : " even");
                    plain_tiles(c, [&](const Tile &) {
                        return std::vector<Segment>{run_of(0, 300, SEGMENT_LIMITED), run_of(0, 20, SEGMENT_EXTRA)};
                    });
                    run(c);
                }
    Case c;
    c.any = true;
    c.q_type = c.kv_type = c.out_type = F32;
    c.heads_q = 1, c.n_q = 256, c.n_k = 16384;
    for (u32 dim : {64u, 128u}) {
        c.head_dim = c.value_dim = dim;
        c.works.clear();
        c.name = "any f32 " + std::to_string(dim) + ", 16,384 keys";
        c.tolerance = 1.5e-6;
        plain_tiles(c, [&](const Tile &) { return std::vector<Segment>{run_of(0, c.n_k)}; });
        run(c);
    }
}

static void time_exact(bool any, u32 type, u32 dim, u32 n, u32 heads, bool causal)
{
    Case c;
    c.any = any;
    c.q_type = c.kv_type = c.out_type = type;
    c.head_dim = c.value_dim = dim, c.heads_q = heads, c.n_q = c.n_k = n, c.visible = 1;
    c.name = std::string(any ? "any " : "mma ") + name_of(type) + " " + std::to_string(dim) +
             ", n = " + std::to_string(n) + ", " + std::to_string(heads) + " heads" + (causal ? ", causal" : "");
    plain_tiles(c, [&](const Tile &) { return std::vector<Segment>{run_of(0, n, causal ? SEGMENT_LIMITED : 0)}; });
    // The longest first.
    std::reverse(c.works.begin(), c.works.end());
    std::stable_sort(c.works.begin(), c.works.end(),
                     [](const Work &a, const Work &b) { return a.tile.first_query > b.tile.first_query; });
    c.checked = {0, (u32)c.works.size() / 2 + 1, (u32)c.works.size() - 1};
    Prepared prepared = prepare(c);
    Kernel kernel = kernel_for(any, type, dim);
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    std::vector<float> times;
    for (u32 i = 0; i < 22; ++i) {
        CUDA(cudaMemsetAsync(prepared.p.next_tile, 0, 4));
        u32 grid = grid_of(kernel, prepared.p.tile_count);
        CUDA(cudaEventRecord(start));
        kernel.entry<<<grid, kernel.threads, kernel.shared_bytes>>>(prepared.launches[0]);
        CUDA(cudaEventRecord(stop));
        CUDA(cudaEventSynchronize(stop));
        float milliseconds;
        CUDA(cudaEventElapsedTime(&milliseconds, start, stop));
        if (i >= 2)
            times.push_back(milliseconds);
    }
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    double pairs = causal ? 0.5 * n * (n + 1.0) : (double)n * n;
    double work = 4.0 * pairs * dim * heads;
    verify(c, prepared);
    std::printf("TIME %-66s %.3f ms %.1f TFLOP/s\n", c.name.c_str(), times[10], work / times[10] * 1e-9);
    std::fflush(stdout);
    free_all();
}

int main(int argc, char **argv)
{
    bool times = true;
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--no-times"))
            times = false;
        else
            filter = argv[i];
    }
    cudaDeviceProp properties;
    CUDA(cudaGetDeviceProperties(&properties, 0));
    std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
    check_mma();
    check_any();
    if (times) {
        for (u32 dim : {64u, 128u})
            for (bool causal : {false, true})
                time_exact(false, BF16, dim, 16384, 32, causal);
        time_exact(false, BF16, 256, 16384, 16, false);
        for (u32 dim : {64u, 128u})
            time_exact(true, F32, dim, 8192, 8, false);
    }
    std::printf("%u passed, %u failed\n", passes, failures);
    return failures != 0;
}
