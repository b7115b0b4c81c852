// How a loading warp of the Hopper attention kernel gathers rows that the copy engine cannot fetch, and tells of them.
#pragma once

#include "attend_wgmma_layout.cuh"
#include "barrier.cuh"
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
}

// All arrivals of a warp on a barrier.
__device__ __forceinline__ void warp_arrive(u32 barrier, u32 arrivals, u32 lane)
{
    __syncwarp();
    if (lane == 0)
        barrier_arrive(barrier, arrivals);
}

// One when the warp's committed copies have ended, but the newest PENDING groups of them. They are ordered before what
// the tensor cores read. Consumers would order them together with their stores of outputs, which takes long.
template <u32 PENDING> __device__ __forceinline__ void warp_arrive_when_copied(u32 barrier, u32 lane)
{
    copies_wait<PENDING>();
    async_proxy_fence();
    warp_arrive(barrier, 1, lane);
}

// Address of 16 bytes of a row in a chunk.
__device__ __forceinline__ u32 swizzled(u32 chunk, u32 row, u32 part)
{
    return chunk + row * ROW_BYTES + ((part ^ (row & 7)) << 4);
}

// The rows that a warp copies to a stage are read from a list in shared memory. In step s the eight lanes of group g
// copy row 4 s + g of the stage. The list has a group's rows of four steps side by side: they are read at once.
constexpr u32 GROUP_LANES = 8;
constexpr u32 GROUPS = 32 / GROUP_LANES;
constexpr u32 LIST_STEPS = 4;
constexpr u32 LIST_ROWS = GROUPS * LIST_STEPS;

// Where the list has row 32 i + lane, less 32 i.
__device__ __forceinline__ u32 list_place(u32 lane)
{
    return lane / LIST_ROWS * LIST_ROWS + lane % GROUPS * LIST_STEPS + lane / GROUPS % LIST_STEPS;
}

// Puts rows 32 i + lane into the list. The warp has to be synchronized before the list is read, and after.
template <u32 COUNT> __device__ __forceinline__ void list_rows(u32 *list, u32 lane, const u32 (&rows)[COUNT])
{
    u32 *at = list + list_place(lane);
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        at[32 * i] = rows[i];
}

// Of 32-bit factors: with one instruction, to which the sum with an address is added.
__device__ __forceinline__ u64 product(u32 a, u32 b)
{
    u64 c;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(c) : "r"(a), "r"(b));
    return c;
}

// Issues copies of listed rows, NO_ROW for zeros, to a stage of ROWS rows. `WHOLE` if all are rows and of all the
// chunks' elements, and their stride has 32 bits. Copies of no bytes do not touch their address.
template <u32 ROWS, u32 CHUNKS, bool WHOLE>
__device__ __forceinline__ void copy_rows_as(u32 stage, const u32 *list, u32 lane, const char *from, i64 row_stride,
                                             u32 dim)
{
    constexpr u32 CHUNK_BYTES = ROWS * ROW_BYTES;
    // Rows whose numbers are read before any of them is copied: after each reading, copies are slow to begin.
    constexpr u32 BATCH_ROWS = !WHOLE ? 2 * LIST_ROWS : ROWS % (4 * LIST_ROWS) == 0 ? 4 * LIST_ROWS : 3 * LIST_ROWS;
    static_assert(ROWS % BATCH_ROWS == 0 && BATCH_ROWS % LIST_ROWS == 0, "whole batches");
    // What follows from the lane is made anew each time, there are no registers to keep it.
    lane = opaque(lane);
    u32 part = lane % GROUP_LANES, group = lane / GROUP_LANES;
    from += part * 16;
    // One address that rows are added to, not a sum that is made anew.
    asm volatile("" : "+l"(from));
    // Rows of odd steps lie in the swizzle's other half.
    u32 to = swizzled(stage, group, part);
    u32 to_odd = to ^ 64;
    list += group * LIST_STEPS;
#pragma unroll(WHOLE ? ROWS / BATCH_ROWS : 1)
    for (u32 first = 0; first < ROWS; first += BATCH_ROWS) {
        u32 rows[BATCH_ROWS / GROUPS];
#pragma unroll
        for (u32 i = 0; i < BATCH_ROWS / LIST_ROWS; ++i) {
            uint4 four = *(const uint4 *)(list + first + i * LIST_ROWS);
            rows[4 * i] = four.x;
            rows[4 * i + 1] = four.y;
            rows[4 * i + 2] = four.z;
            rows[4 * i + 3] = four.w;
        }
#pragma unroll
        for (u32 step = 0; step < BATCH_ROWS / GROUPS; ++step) {
            u32 row = rows[step];
            const char *elements = from + (WHOLE ? product(row, (u32)row_stride) : (u64)row * (u64)row_stride);
#pragma unroll
            for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
                bool copied = WHOLE || (row != NO_ROW && chunk * ROW_ELEMENTS + part * 8 < dim);
                copy_16_bytes((step % 2 ? to_odd : to) + (first + step * GROUPS) * ROW_BYTES + chunk * CHUNK_BYTES,
                              elements + chunk * ROW_BYTES, copied ? 16 : 0);
            }
        }
    }
}

template <u32 ROWS, u32 CHUNKS>
__device__ __forceinline__ void copy_rows(u32 stage, const u32 *list, bool whole, u32 lane, const char *from,
                                          i64 row_stride, u32 dim)
{
    if (whole && dim == CHUNKS * ROW_ELEMENTS && (u64)row_stride >> 32 == 0)
        copy_rows_as<ROWS, CHUNKS, true>(stage, list, lane, from, row_stride, dim);
    else
        copy_rows_as<ROWS, CHUNKS, false>(stage, list, lane, from, row_stride, dim);
}

// The sum with two products with 0: NaN stays, and NaN and infinities become NaN.
template <u32 TYPE> __device__ __forceinline__ u32 add_times_zero(u32 pair, u32 sum)
{
    if (TYPE == BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(pair), "r"(0), "r"(sum));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(pair), "r"(0), "r"(sum));
    return pair;
}

// Whether all elements of the rows that this warp has copied are finite. Each lane looks at what it copied itself.
template <u32 TYPE, u32 ROWS, u32 CHUNKS> __device__ __forceinline__ bool all_finite(u32 stage, u32 lane)
{
    u32 even = swizzled(stage, lane / GROUP_LANES, lane % GROUP_LANES);
    u32 sums[4] = {};
#pragma unroll 1
    for (u32 first = 0; first < ROWS * CHUNKS; first += 4 * GROUPS) {
        u32 words[4][4];
#pragma unroll
        for (u32 step = 0; step < 4; ++step)
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[step][0]), "=r"(words[step][1]), "=r"(words[step][2]), "=r"(words[step][3])
                         : "r"((even ^ (step % 2 * 64)) + (first + step * GROUPS) * ROW_BYTES)
                         : "memory");
#pragma unroll
        for (u32 step = 0; step < 4; ++step) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                sums[i] = add_times_zero<TYPE>(words[step][i], sums[i]);
        }
    }
    return __all_sync(ALL_LANES, ((sums[0] | sums[1] | sums[2] | sums[3]) & 0x7fff7fff) == 0);
}

// Sets elements that are not finite to 0 in the rows that this warp has copied, each lane in what it copied itself.
// Writes a bit for each row that had one, and returns whether there is any.
template <u32 TYPE, u32 ROWS, u32 CHUNKS>
__device__ __forceinline__ bool take_out_not_finite(u32 stage, u32 lane, u32 (&not_finite)[ROWS / 32])
{
    constexpr u32 CHUNK_BYTES = ROWS * ROW_BYTES;
    constexpr u32 EXPONENT = TYPE == BF16 ? 0x7f80 : 0x7c00;
    // Nearly always, and quickly found.
    if (all_finite<TYPE, ROWS, CHUNKS>(stage, lane)) {
        if (lane < ROWS / 32)
            not_finite[lane] = 0;
        return false;
    }
    u32 all_found = 0;
    u32 found = 0;
#pragma unroll 1
    for (u32 row = 0; row < ROWS; row += GROUPS) {
        u32 address = swizzled(stage, row + lane / GROUP_LANES, lane % GROUP_LANES);
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
        for (u32 group = 0; group < GROUPS; ++group)
            found |= (lanes >> (GROUP_LANES * group) & 0xff ? 1u : 0u) << ((row + group) % 32);
        if (row % 32 == 32 - GROUPS) {
            if (lane == 0)
                not_finite[row / 32] = found;
            all_found |= found;
            found = 0;
        }
    }
    return all_found != 0;
}

#endif

} // namespace hopper
} // namespace hyperattn
