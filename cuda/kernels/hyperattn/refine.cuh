// Which keys a tile of queries meets: the heaviest blocks are candidates, and of their keys the heaviest are met
// exactly. The weights of blocks and keys come from weigh.cuh.
//
// Launches: choose_blocks and choose_keys, grid (places of the chunk), SELECT_THREADS threads. choose_keys works in
// dynamic shared memory where that has CANDIDATE_BYTES for each candidate of the tile.
#pragma once

#include "select_heaviest.cuh"

namespace hyperattn::refined {

__device__ __forceinline__ void choose_blocks(const RefinedParams &p, SelectShared &shared)
{
    u64 place = blockIdx.x;
    u32 lane = threadIdx.x % 32;
    u32 in_chunk = blockIdx.x / GROUP_TILES, i = blockIdx.x % GROUP_TILES;
    Frame frame = frame_of(p, tile_of_group(p, p.chunk_first + in_chunk, i));
    u64 first_word = (u64)in_chunk * p.words() * GROUP_TILES + i;
    if (!frame.chooses) {
        for (u32 word = threadIdx.x; word < p.words(); word += SELECT_THREADS)
            p.candidate_bits[first_word + (u64)word * GROUP_TILES] = 0;
        if (threadIdx.x == 0)
            p.candidate_count[place] = 0;
        return;
    }
    const float *weights = p.outlier_weights + place * p.blocks;
    u32 begin = frame.first_block(), end = frame.end_block();
    Heaviest heaviest = find_heaviest(shared, end - begin, candidate_blocks(p, frame),
                                      [&](u32 j) { return __float_as_uint(weights[begin + j]); });
    u32 *candidates = p.candidates + place * p.most_candidates;
    u32 count = take_heaviest(
        shared, heaviest, p.words(), 1,
        [&](u32 block) {
            return block >= begin && block < end ? __float_as_uint(weights[block]) : NOT_ELIGIBLE;
        },
        [&](u32 word, u32, bool takes, u32 rank) {
            u32 bits = __ballot_sync(ALL_LANES, takes);
            if (takes)
                candidates[rank] = word * 32 + lane;
            if (lane == 0) {
                p.candidate_bits[first_word + (u64)word * GROUP_TILES] = bits;
                // Lane 0's rank counts what comes before the word.
                p.candidate_ranks[first_word + (u64)word * GROUP_TILES] = rank;
            }
        });
    if (threadIdx.x == 0)
        p.candidate_count[place] = count;
}

// Of a candidate block in shared memory: weights of its keys, and its number.
constexpr u32 CANDIDATE_BYTES = 4 * KEY_BLOCK + 4;

__device__ __forceinline__ u32 dynamic_shared_bytes()
{
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// Lists the first keys and those chosen, ascending, and leaves each candidate block the weight of its keys that are
// not met.
__device__ __forceinline__ void choose_among(const RefinedParams &p, SelectShared &shared, const Frame &frame,
                                             u32 blocks, const u32 *candidates, const float *weights)
{
    u64 place = blockIdx.x, place_in_pass = (u64)(p.chunk_first - p.pass_first) * GROUP_TILES + place;
    u32 lane = threadIdx.x % 32;
    u32 *positions = p.positions + place_in_pass * p.most_positions;
    for (u32 i = threadIdx.x; i < frame.first; i += SELECT_THREADS)
        positions[i] = i;
    // The block that the first keys cut is the first candidate.
    u32 met = frame.first % KEY_BLOCK, count = blocks * KEY_BLOCK;
    Heaviest heaviest = find_heaviest(shared, count, frame.wanted,
                                      [&](u32 i) { return i < met ? 0 : __float_as_uint(weights[i]); });
    float left = 0.0f;
    u32 chosen = take_heaviest(
        shared, heaviest, count / 32, KEY_BLOCK / 32,
        [&](u32 i) { return i < met ? NOT_ELIGIBLE : __float_as_uint(weights[i]); },
        [&](u32 step, u32 bits, bool takes, u32 rank) {
            u32 block = candidates[step / 2];
            if (takes)
                positions[frame.first + rank] = block * KEY_BLOCK + step % 2 * 32 + lane;
            float weight = takes || bits == NOT_ELIGIBLE ? 0.0f : __uint_as_float(bits);
            left = step % 2 ? left + weight : weight;
            if (step % 2) {
#pragma unroll
                for (u32 other = 1; other < 32; other *= 2)
                    left += __shfl_xor_sync(ALL_LANES, left, other);
                if (lane == 0)
                    p.block_weights[place * p.blocks + block] = left;
            }
        });
    if (threadIdx.x == 0)
        p.chosen[place_in_pass] = chosen;
}

// `kept` is the dynamic shared memory.
__device__ __forceinline__ void choose_keys(const RefinedParams &p, SelectShared &shared, uint4 *kept)
{
    u64 place = blockIdx.x;
    u32 group = p.chunk_first + blockIdx.x / GROUP_TILES;
    u32 blocks = p.candidate_count[place];
    if (blocks == 0) {
        if (threadIdx.x == 0)
            p.chosen[(u64)(p.chunk_first - p.pass_first) * GROUP_TILES + place] = 0;
        return;
    }
    Frame frame = frame_of(p, tile_of_group(p, group, blockIdx.x % GROUP_TILES));
    const u32 *candidates = p.candidates + place * p.most_candidates;
    const float *weights = p.key_weights + place * p.most_candidates * KEY_BLOCK;
    if (blocks * CANDIDATE_BYTES > dynamic_shared_bytes()) {
        choose_among(p, shared, frame, blocks, candidates, weights);
        return;
    }
    constexpr u32 PIECES = KEY_BLOCK / 4;
    u32 *kept_candidates = (u32 *)(kept + blocks * PIECES);
#pragma unroll 8
    for (u32 i = threadIdx.x; i < blocks * PIECES; i += SELECT_THREADS)
        kept[i] = ((const uint4 *)weights)[i];
    for (u32 i = threadIdx.x; i < blocks; i += SELECT_THREADS)
        kept_candidates[i] = candidates[i];
    __syncthreads();
    choose_among(p, shared, frame, blocks, kept_candidates, (const float *)kept);
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::SELECT_THREADS)
    choose_blocks(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::SelectShared shared;
    hyperattn::refined::choose_blocks(p, shared);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::SELECT_THREADS)
    choose_keys(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::SelectShared shared;
    extern __shared__ uint4 kept[];
    hyperattn::refined::choose_keys(p, shared, kept);
}
