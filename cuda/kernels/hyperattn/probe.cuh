// Probe rows: a few queries of each head that are computed exactly besides, to estimate the error of an estimator.
//
// Launches: draw_probes, grid (heads * probe tiles), REPRESENT_THREADS threads; probe_tiles, grid
// (heads), 32 threads; probe_errors, grid (heads), NORM_THREADS threads.
#pragma once

#include "philox.cuh"
#include "represent.cuh"

namespace hyperattn::refined {

// A head's budget when it is exact.
constexpr u32 EXACT_BUDGET = 0xffffffffu;

// Tiles with probe rows in a head, at most.
constexpr u32 MOST_PROBE_TILES = 64;

struct ProbeParams {
    u64 seed;
    u64 offset;
    // All queries over those that probe rows stand for.
    double whole_over_probed;
    // Tiles before it are exact; tiles with probe rows in a head.
    u32 first_tile;
    u32 tiles;
    float target_error;
    u32 callers_budget;
    u32 most_budget;
    u32 out_type;
    View out;
    View error;
    // [head][tiles]: which tiles.
    u32 *tile_list;
    // [head][tiles][PROBE_ROWS]: the rows, ascending, and how many rows of its tile each stands for; their outputs.
    u32 *rows;
    float *weights;
    float *exact;
    float *estimate;
    // [head]; budgets may be null where no head is exact.
    u32 *budgets;
    u32 *settled;
    // For the exact outputs: records of each head, with one segment each.
    Tile *probe_records;
    Segment *probe_segments;
    u32 records_of_head;
    // Number of the first query head among those that random numbers are drawn for.
    u32 first_stream_head;

    __device__ __forceinline__ u32 rows_of_head() const { return tiles * PROBE_ROWS; }

    // A number in 0..len for probe tile `index` of a query head.
    __device__ __forceinline__ u32 draw(u32 head, u32 index, u32 number, u32 len) const
    {
        Stream stream(seed, offset, first_stream_head + head, PURPOSE_PROBE_ROW);
        return below(stream.uniform(index, tiles, number), len);
    }
};

static_assert(sizeof(ProbeParams) == 192, "the host's mirror counts on it");

__device__ __forceinline__ double cube_of(float squared) { return (double)squared * sqrt((double)squared); }

struct DrawShared {
    RepresentShared represent;
    // Of each row: the cube of its distance, then its share, then its share and those of all rows before it.
    double of_row[QUERY_TILE_ROWS];
    double mean;
};

// Draws rows in proportion to the cubes of their distances, plus a tenth of the mean; all of them, once, where they
// are no more than PROBE_ROWS.
__device__ __forceinline__ void draw_rows(DrawShared &shared, double cube, u32 count, float phase, u32 first_query,
                                          u32 *rows, float *weights)
{
    u32 thread = threadIdx.x;
    if (count <= PROBE_ROWS) {
        if (thread < PROBE_ROWS) {
            rows[thread] = first_query + min(thread, count - 1);
            weights[thread] = thread < count ? 1.0f : 0.0f;
        }
        return;
    }
    shared.of_row[thread] = cube;
    __syncthreads();
    // One thread adds, in the order of the rows.
    if (thread == 0) {
        double mean = 0.0;
#pragma unroll 8
        for (u32 row = 0; row < count; ++row)
            mean += shared.of_row[row];
        mean /= count;
        shared.mean = mean > 0.0 && mean * 0.0 == 0.0 ? mean : 1.0;
    }
    __syncthreads();
    double mean = shared.mean, most = mean * count;
    // Not fused, as on any other device.
    double share = __dadd_rn(cube < most ? cube : most, __dmul_rn(0.1, mean)) / mean;
    shared.of_row[thread] = share;
    __syncthreads();
    if (thread == 0) {
        double reached = 0.0;
#pragma unroll 8
        for (u32 row = 0; row < count; ++row) {
            reached += shared.of_row[row];
            shared.of_row[row] = reached;
        }
    }
    __syncthreads();
    if (thread >= count)
        return;
    // The first row beyond each target, or the last row.
    double total = shared.of_row[count - 1];
    for (u32 i = 0; i < PROBE_ROWS; ++i) {
        double target = ((double)i + (double)phase) / PROBE_ROWS * total;
        bool reached = shared.of_row[thread] > target || thread == count - 1;
        if (reached && (thread == 0 || shared.of_row[thread - 1] <= target)) {
            rows[i] = first_query + thread;
            weights[i] = (float)(total / (PROBE_ROWS * share));
        }
    }
}

// A query that is far from its neighbours' mean is drawn more often: it looks where the others do not, and there most
// of the error is.
__device__ __forceinline__ void draw_probes(const RefinedParams &p, const ProbeParams &probe, DrawShared &shared)
{
    u32 head_number = blockIdx.x / probe.tiles, index = blockIdx.x % probe.tiles;
    u32 head = head_number % p.heads_q;
    u64 tiles = p.query_tiles - probe.first_tile;
    u32 first = (u32)(index * tiles / probe.tiles), end = (u32)((index + 1) * tiles / probe.tiles);
    u32 drawn = probe.first_tile + first + probe.draw(head, index, 0, end - first);
    QueryTile tile = query_tile(p, head_number, drawn);
    u32 part;
    float distance = measure_run(shared.represent, TileQueries(p, tile), part);
    u64 at = (u64)blockIdx.x * PROBE_ROWS;
    float phase = (float)probe.draw(head, index, 1, 1u << 20) / (1u << 20);
    draw_rows(shared, cube_of(distance), tile.queries, phase, tile.first_query, probe.rows + at, probe.weights + at);
    if (threadIdx.x == 0)
        probe.tile_list[blockIdx.x] = drawn;
}

// Attention of the probe rows to everything that they see.
__device__ __forceinline__ void write_probe_tiles(const RefinedParams &p, const ProbeParams &probe)
{
    u32 rows = probe.rows_of_head();
    for (u32 record = threadIdx.x; record < probe.records_of_head; record += 32) {
        u32 first = record * TILE_ROWS, number = blockIdx.x * probe.records_of_head + record;
        Tile tile = {};
        tile.batch = blockIdx.x / p.heads_q;
        tile.head = blockIdx.x % p.heads_q;
        tile.first_query = first;
        tile.rows = min(rows - first, TILE_ROWS);
        tile.flags = TILE_SORTED | TILE_COMPACT;
        Segment segment = {};
        segment.count = p.limit(probe.rows[(u64)blockIdx.x * rows + first + tile.rows - 1]);
        segment.flags = p.flags & REFINED_CAUSAL ? (u32)SEGMENT_LIMITED : 0u;
        tile.first_segment = number;
        tile.segments = segment.count > 0;
        probe.probe_segments[number] = segment;
        probe.probe_records[number] = tile;
    }
}

constexpr u32 NORM_THREADS = 256;

struct NormShared {
    double difference[MOST_PROBE_TILES * PROBE_ROWS];
    double whole[MOST_PROBE_TILES * PROBE_ROWS];
};

// Squared Frobenius norms of a difference and of what it is relative to, over the probe rows of a head.
struct Norms {
    double difference;
    // Sums of the squares and of the cubes of the groups' shares of `difference`.
    double squares;
    double cubes;
    double whole;
    double groups;
    double whole_over_probed;

    // 0 where there is no difference, whatever it is relative to.
    __device__ __forceinline__ float relative(double of) const
    {
        return of == 0.0 ? 0.0f : (float)sqrt(of / (whole * whole_over_probed));
    }

    // Few rows have most of a head's error, so that a sum over some of them is more often too small than too large.
    // The third moment over six times the variance makes up for that (N. J. Johnson 1978).
    __device__ __forceinline__ float relative_error() const
    {
        double mean = difference / groups, square = squares / groups, cube = cubes / groups;
        double variance = square - mean * mean;
        double third = cube - mean * (3.0 * square - 2.0 * mean * mean);
        double correction = variance > 0.0 ? third / (6.0 * variance) : 0.0;
        return relative(difference + (correction > 0.0 ? correction : 0.0));
    }

    // If the difference were larger by twice the standard error of its sum over the groups.
    __device__ __forceinline__ float upper_relative_error() const
    {
        double variance = squares - difference * difference / groups;
        return relative(difference + 2.0 * sqrt(variance > 0.0 ? variance : 0.0));
    }
};

// The norms of a head; element(row, column) is the estimator's output for a probe row. The result is thread 0's.
template <class Element>
__device__ __forceinline__ Norms norms_of(const RefinedParams &p, const ProbeParams &probe, NormShared &shared,
                                          u32 head, Element element)
{
    u32 rows = probe.rows_of_head(), lane = threadIdx.x % 32;
    u64 first = (u64)head * rows;
    for (u32 row = threadIdx.x / 32; row < rows; row += NORM_THREADS / 32) {
        double difference = 0.0, whole = 0.0;
        for (u32 column = lane; column < p.value_dim; column += 32) {
            double exact = probe.exact[(first + row) * p.value_dim + column];
            double off = (double)element(row, column) - exact;
            difference += off * off;
            whole += exact * exact;
        }
#pragma unroll
        for (u32 other = 1; other < 32; other *= 2) {
            difference += __shfl_xor_sync(ALL_LANES, difference, other);
            whole += __shfl_xor_sync(ALL_LANES, whole, other);
        }
        if (lane == 0) {
            double weight = probe.weights[first + row];
            shared.difference[row] = weight * difference;
            shared.whole[row] = weight * whole;
        }
    }
    __syncthreads();
    Norms norms = {};
    norms.whole_over_probed = probe.whole_over_probed;
    if (threadIdx.x == 0) {
        for (u32 group = 0; group < probe.tiles; ++group) {
            double difference = 0.0;
            for (u32 row = group * PROBE_ROWS; row < (group + 1) * PROBE_ROWS; ++row) {
                difference += shared.difference[row];
                norms.whole += shared.whole[row];
            }
            norms.difference += difference;
            norms.squares += difference * difference;
            norms.cubes += difference * difference * difference;
            norms.groups += 1.0;
        }
    }
    return norms;
}

// The error tensor: 0 where a head is exact, else the relative error of the output's probe rows.
__device__ __forceinline__ void write_errors(const RefinedParams &p, const ProbeParams &probe, NormShared &shared)
{
    u32 head = blockIdx.x;
    float error = 0.0f;
    if (!probe.budgets || probe.budgets[head] != EXACT_BUDGET) {
        const u32 *rows = probe.rows + (u64)head * probe.rows_of_head();
        error = norms_of(p, probe, shared, head, [&](u32 row, u32 column) {
                    return f32_of(probe.out.row(head / p.heads_q, head % p.heads_q, rows[row]), column, probe.out_type);
                }).relative_error();
    }
    if (threadIdx.x == 0)
        *(float *)probe.error.row(head / p.heads_q, head % p.heads_q, 0) = error;
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REPRESENT_THREADS)
    draw_probes(const __grid_constant__ hyperattn::refined::RefinedParams p,
                          const __grid_constant__ hyperattn::refined::ProbeParams probe)
{
    __shared__ hyperattn::refined::DrawShared shared;
    hyperattn::refined::draw_probes(p, probe, shared);
}

extern "C" __global__ void __launch_bounds__(32)
    probe_tiles(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                const __grid_constant__ hyperattn::refined::ProbeParams probe)
{
    hyperattn::refined::write_probe_tiles(p, probe);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::NORM_THREADS)
    probe_errors(const __grid_constant__ hyperattn::refined::RefinedParams p,
                           const __grid_constant__ hyperattn::refined::ProbeParams probe)
{
    __shared__ hyperattn::refined::NormShared shared;
    hyperattn::refined::write_errors(p, probe, shared);
}
