// Fragments of matrices of 16-bit elements, out of shared memory.
#pragma once

#include "types.cuh"

namespace hyperattn {

// Four matrices of 8 x 8 elements, whose rows are 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and
// gets elements 2 (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void load_matrices(u32 (&fragment)[4], u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
}

// The same of the matrices' transposes.
__device__ __forceinline__ void load_matrices_transposed(u32 (&fragment)[4], u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
}

// 16 bytes of a row.
__device__ __forceinline__ uint4 load_row_part(u32 address)
{
    uint4 part;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part.x), "=r"(part.y), "=r"(part.z), "=r"(part.w)
                 : "r"(address)
                 : "memory");
    return part;
}

// The inverse of load_matrices().
__device__ __forceinline__ void store_matrices(u32 address, const u32 (&fragment)[4])
{
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(fragment[0]),
                 "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
#endif
}

} // namespace hyperattn
