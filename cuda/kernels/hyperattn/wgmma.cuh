// Matrix products of a warpgroup (wgmma): f32 accumulators of 64 rows in registers, 16-bit operands.
//
// Of the 64 x N accumulators, thread t of the warpgroup holds columns 8j + 2 (t % 4) and the next of two rows:
// 16 (t / 32) + t % 32 / 4 (elements 4j and 4j + 1) and 8 below it (4j + 2 and 4j + 3).
#pragma once

#include "types.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

// Describes an operand in shared memory that lies in rows of 128 bytes, swizzled by 128 bytes. Where the rows run along
// the dimension that is not summed over, the next 64 elements of it follow after NEXT bytes.
template <u32 NEXT> __device__ __forceinline__ u64 operand(u32 address)
{
    constexpr u32 HIGH = (1024 >> 4) | 1u << 30;
    u64 bits;
    asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"((address >> 4) | (NEXT >> 4) << 16), "r"(HIGH));
    return bits;
}

// Before the first product, and after accumulators or operands in registers were written otherwise.
__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all committed groups but the newest `PENDING`.
template <u32 PENDING> __device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of registers across this place.
template <u32 COUNT> __device__ __forceinline__ void pin(float (&registers)[COUNT])
{
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        asm volatile("" : "+f"(registers[i])::"memory");
}

template <u32 COUNT> __device__ __forceinline__ void pin(u32 (&registers)[COUNT])
{
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        asm volatile("" : "+r"(registers[i])::"memory");
}

// The same of COUNT registers from FIRST on.
template <u32 FIRST, u32 COUNT, u32 ALL> __device__ __forceinline__ void pin_some(u32 (&registers)[ALL])
{
#pragma unroll
    for (u32 i = FIRST; i < FIRST + COUNT; ++i)
        asm volatile("" : "+r"(registers[i])::"memory");
}

// A number that nobody has made.
__device__ __forceinline__ float anything()
{
    float number;
    asm volatile("" : "=f"(number));
    return number;
}

// Keeps the compiler from computing everything that follows from a number once and for all, in many registers.
__device__ __forceinline__ u32 opaque(u32 number)
{
    asm volatile("" : "+r"(number));
    return number;
}

// clang-format off
#define HYPERATTN_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HYPERATTN_NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HYPERATTN_NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define HYPERATTN_NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HYPERATTN_NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define HYPERATTN_NAMES_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HYPERATTN_NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define HYPERATTN_NAMES_112 \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define HYPERATTN_REGISTERS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HYPERATTN_REGISTERS_16(d, i) \
    HYPERATTN_REGISTERS_4(d, i), HYPERATTN_REGISTERS_4(d, i + 4), HYPERATTN_REGISTERS_4(d, i + 8), \
    HYPERATTN_REGISTERS_4(d, i + 12)
#define HYPERATTN_REGISTERS_32(d, i) HYPERATTN_REGISTERS_16(d, i), HYPERATTN_REGISTERS_16(d, i + 16)
#define HYPERATTN_REGISTERS_48(d, i) HYPERATTN_REGISTERS_32(d, i), HYPERATTN_REGISTERS_16(d, i + 32)
#define HYPERATTN_REGISTERS_64(d, i) HYPERATTN_REGISTERS_32(d, i), HYPERATTN_REGISTERS_32(d, i + 32)
#define HYPERATTN_REGISTERS_96(d, i) HYPERATTN_REGISTERS_64(d, i), HYPERATTN_REGISTERS_32(d, i + 64)
#define HYPERATTN_REGISTERS_128(d, i) HYPERATTN_REGISTERS_64(d, i), HYPERATTN_REGISTERS_64(d, i + 64)

#define HYPERATTN_LIST_64 \
    HYPERATTN_NAMES_0 ", " HYPERATTN_NAMES_16
#define HYPERATTN_LIST_96 \
    HYPERATTN_NAMES_0 ", " HYPERATTN_NAMES_16 ", " HYPERATTN_NAMES_32
#define HYPERATTN_LIST_128 \
    HYPERATTN_NAMES_0 ", " HYPERATTN_NAMES_16 ", " HYPERATTN_NAMES_32 ", " HYPERATTN_NAMES_48
#define HYPERATTN_LIST_192 \
    HYPERATTN_NAMES_0 ", " HYPERATTN_NAMES_16 ", " HYPERATTN_NAMES_32 ", " HYPERATTN_NAMES_48 ", " \
    HYPERATTN_NAMES_64 ", " HYPERATTN_NAMES_80
#define HYPERATTN_LIST_256 \
    HYPERATTN_NAMES_0 ", " HYPERATTN_NAMES_16 ", " HYPERATTN_NAMES_32 ", " HYPERATTN_NAMES_48 ", " \
    HYPERATTN_NAMES_64 ", " HYPERATTN_NAMES_80 ", " HYPERATTN_NAMES_96 ", " HYPERATTN_NAMES_112

// The operands after the accumulators are numbered from their count on.
#define HYPERATTN_PRODUCT_SHARED(N, COUNT, A, B, ACCUMULATE, TRANSPOSED, ELEMENT) \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #ACCUMULATE ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ELEMENT "." ELEMENT " {" HYPERATTN_LIST_##N "}, " \
                 "%" #A ", %" #B ", accumulate, 1, 1, " TRANSPOSED ";\n}\n" \
                 : HYPERATTN_REGISTERS_##COUNT(d, 0) \
                 : "l"(a), "l"(b), "r"(accumulate))
#define HYPERATTN_PRODUCT_REGISTERS(N, COUNT, A0, A1, A2, A3, B, ACCUMULATE, TRANSPOSED, ELEMENT) \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #ACCUMULATE ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ELEMENT "." ELEMENT " {" HYPERATTN_LIST_##N "}, " \
                 "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", accumulate, 1, 1, " TRANSPOSED ";\n}\n" \
                 : HYPERATTN_REGISTERS_##COUNT(d, 0) \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate))
#define HYPERATTN_BY_TYPE(PRODUCT, ...) \
    do { \
        if constexpr (TYPE == BF16) \
            PRODUCT(__VA_ARGS__, "bf16"); \
        else \
            PRODUCT(__VA_ARGS__, "f16"); \
    } while (0)
// clang-format on

// d = a b^T, added to d if `accumulate`: 64 and N rows of 16 elements in shared memory.
template <u32 TYPE, u32 N>
__device__ __forceinline__ void multiply_shared(float (&d)[N / 2], u64 a, u64 b, u32 accumulate)
{
    static_assert(N == 64 || N == 96 || N == 128, "a size that is written out below");
    if constexpr (N == 64)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_SHARED, 64, 32, 32, 33, 34, "0, 0");
    else if constexpr (N == 96)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_SHARED, 96, 48, 48, 49, 50, "0, 0");
    else if constexpr (N == 128)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_SHARED, 128, 64, 64, 65, 66, "0, 0");
}

// d = a^T b, added to d if `accumulate`: 16 rows of 64 and of N columns in shared memory.
template <u32 TYPE, u32 N>
__device__ __forceinline__ void multiply_transposed(float (&d)[N / 2], u64 a, u64 b, u32 accumulate)
{
    static_assert(N == 64, "a size that is written out below");
    HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_SHARED, 64, 32, 32, 33, 34, "1, 1");
}

// d += a b: a has 64 x 16 elements, in registers in pairs that lie as 16 columns of accumulators do; b has 16 rows of N
// columns in shared memory.
template <u32 TYPE, u32 N>
__device__ __forceinline__ void multiply_registers(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b)
{
    static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "a size that is written out below");
    constexpr u32 accumulate = 1;
    if constexpr (N == 64)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_REGISTERS, 64, 32, 32, 33, 34, 35, 36, 37, "1");
    else if constexpr (N == 96)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_REGISTERS, 96, 48, 48, 49, 50, 51, 52, 53, "1");
    else if constexpr (N == 128)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_REGISTERS, 128, 64, 64, 65, 66, 67, 68, 69, "1");
    else if constexpr (N == 192)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_REGISTERS, 192, 96, 96, 97, 98, 99, 100, 101, "1");
    else if constexpr (N == 256)
        HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_REGISTERS, 256, 128, 128, 129, 130, 131, 132, 133, "1");
}

// d = a b^T, added to d if `accumulate`: a as above; b has N rows of 16 elements in shared memory.
template <u32 TYPE, u32 N>
__device__ __forceinline__ void multiply_registers_by_rows(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b,
                                                           u32 accumulate)
{
    static_assert(N == 64, "a size that is written out below");
    HYPERATTN_BY_TYPE(HYPERATTN_PRODUCT_REGISTERS, 64, 32, 32, 33, 34, 35, 36, 37, "0");
}

#endif

} // namespace hopper
} // namespace hyperattn
