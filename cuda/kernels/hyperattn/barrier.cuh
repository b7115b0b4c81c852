// Barriers in shared memory (mbarrier), named barriers and the fences that go with them. Shared memory is addressed by
// 32-bit addresses throughout.
#pragma once

#include "types.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ u32 shared_address(const void *pointer)
{
    u32 address;
    asm("{\n.reg .u64 wide;\ncvta.to.shared.u64 wide, %1;\ncvt.u32.u64 %0, wide;\n}\n" : "=r"(address) : "l"(pointer));
    return address;
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers known to the copy engine; a barrier of the threads has to follow.
__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 arrivals)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Has the phase wait for that many bytes of the copy engine.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes)
{
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whether the phase of that parity is over.
__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity)
{
    u32 over;
    asm volatile("{\n.reg .pred over;\nmbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, over;\n}\n"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return over;
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity)
{
    u32 over;
    do {
        asm volatile("{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, over;\n}\n"
                     : "=r"(over)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!over);
}

__device__ __forceinline__ void named_barrier_sync(u32 name, u32 threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// The same of COUNT threads, which tells whether any of them found something.
template <u32 NAME, u32 COUNT> __device__ __forceinline__ bool barrier_or(bool found)
{
    u32 any;
    asm volatile("{\n.reg .pred mine, all;\nsetp.ne.u32 mine, %1, 0;\n"
                 "barrier.cta.red.or.pred all, %2, %3, mine;\nselp.u32 %0, 1, 0, all;\n}\n"
                 : "=r"(any)
                 : "r"((u32)found), "n"(NAME), "n"(COUNT)
                 : "memory");
    return any;
}

__device__ __forceinline__ void named_barrier_arrive(u32 name, u32 threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Orders this thread's ordinary writes to shared memory before reads by the tensor cores and the copy engine.
__device__ __forceinline__ void async_proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers of a warpgroup's threads; all four warps call it.
template <u32 REGISTERS> __device__ __forceinline__ void registers_increase()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <u32 REGISTERS> __device__ __forceinline__ void registers_decrease()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

} // namespace hopper
} // namespace hyperattn
