// Copies between global and shared memory: boxes by the copy engine (TMA), and 16 bytes at a time.
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

// Box in shared memory to [batch, head, row, dim]; what is outside the tensor is left out.
__device__ __forceinline__ void tensor_store(const TensorMap &map, u32 from, u32 dim, u32 row, u32 head, u32 batch)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(dim), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

// The same, added to what is there.
__device__ __forceinline__ void tensor_add(const TensorMap &map, u32 from, u32 dim, u32 row, u32 head, u32 batch)
{
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group "
                 "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(dim), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

__device__ __forceinline__ void stores_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's committed stores have read shared memory.
__device__ __forceinline__ void stores_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until they are done.
__device__ __forceinline__ void stores_wait()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// The first `bytes` of 16 bytes are copied, the others are 0.
__device__ __forceinline__ void copy_16_bytes(u32 to, const void *from, u32 bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 4 bytes, or 0 if `bytes` is.
__device__ __forceinline__ void copy_4_bytes(u32 to, const void *from, u32 bytes)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Has `bytes`, a multiple of 16, fetched into the second-level cache.
__device__ __forceinline__ void prefetch(const void *from, u32 bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
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
