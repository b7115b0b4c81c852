// Copies from global to shared memory: boxes by the copy engine (TMA), and 16 bytes at a time.
#pragma once

#include "types.cuh"

namespace hyperattn {

// The driver's CUtensorMap. A map whose first word is 0 stands for none.
struct alignas(64) TensorMap {
    u64 words[16];
};

namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap &map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Box at [batch, head, row, dim] to shared memory; its bytes count on the barrier.
__device__ __forceinline__ void tensor_copy(u32 to, const TensorMap &map, u32 barrier, u32 dim, u32 row, u32 head,
                                            u32 batch)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(dim), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

// The first `bytes` of 16 bytes are copied, the others are 0.
__device__ __forceinline__ void copy_16_bytes(u32 to, const void *from, u32 bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Has a line of global memory fetched into the second-level cache.
__device__ __forceinline__ void prefetch(const void *at)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
}

// Arrives on the barrier when all of this thread's copies so far have ended.
__device__ __forceinline__ void copies_arrive(u32 barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for all of this thread's committed groups but the newest `PENDING`.
template <u32 PENDING> __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

} // namespace hopper
} // namespace hyperattn
