// Attention on Hopper for queries, keys and values of one 16-bit type: executes the tiles of work.cuh.
//
// Launched with one block of THREADS threads per multiprocessor and Shape<DIM>::SHARED_BYTES of dynamic shared memory.
// DIM is at least head_dim and value_dim, which are multiples of 8; rows of q, k, v and the extra columns are aligned
// to 16 bytes. The tensor maps are of [dim, row, head, batch] with boxes of 64 x Shape<DIM>::KEYS elements, 128-byte
// swizzle and zeros out of bounds; without them every block is gathered.
#pragma once

#include "attend_wgmma_compute.cuh"
#include "attend_wgmma_load.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

template <u32 TYPE, u32 DIM>
__device__ __forceinline__ void attend(const AttendParams &p, const TensorMap &k_map, const TensorMap &v_map)
{
    using S = Shape<DIM>;
    extern __shared__ __align__(1024) char shared[];
    u32 start = shared_address(shared);
    u32 data = (start + 1023) & ~1023u;
    typename S::Control &control = *(typename S::Control *)(shared + (data - start) + S::CONTROL_AT);

    if (threadIdx.x == 0) {
        auto initialize = [&](u32 first, u32 count, u32 arrivals) {
            for (u32 i = first; i < first + count; ++i)
                barrier_init(shared_address(&control.barriers[i]), arrivals);
        };
        initialize(S::QUERY_FULL, S::QUERY_STAGES, 1);
        initialize(S::QUERY_EMPTY, S::QUERY_STAGES, CONSUMER_WARPS);
        initialize(S::KEY_FULL, S::KEY_STAGES, 1);
        initialize(S::KEY_EMPTY, LOADER_WARPS, CONSUMER_WARPS);
        initialize(S::VALUE_FULL, S::KEY_STAGES, 1);
        initialize(S::VALUE_EMPTY, LOADER_WARPS, CONSUMER_WARPS);
        initialize(S::NUMBER_FULL, NUMBER_STAGES, 1);
        initialize(S::NUMBER_EMPTY, NUMBER_STAGES, LOADER_WARPS);
        barrier_init_fence();
    }
    __syncthreads();

    u32 warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        registers_decrease<Shape<DIM>::LOADER_REGISTERS>();
        Loader<TYPE, DIM>(p, k_map, v_map, control, data).run();
    } else {
        registers_increase<Shape<DIM>::CONSUMER_REGISTERS>();
        Consumer<TYPE, DIM>(p, control, data, warpgroup - 1).run();
    }
}

#endif

} // namespace hopper
} // namespace hyperattn

// Other targets have the names only.
#if __CUDA_ARCH_FEAT_SM90_ALL
#define HYPERATTN_ATTEND(TYPE, DIM) hyperattn::hopper::attend<TYPE, DIM>(p, k_map, v_map)
#else
#define HYPERATTN_ATTEND(TYPE, DIM) __trap()
#endif

#define HYPERATTN_ATTEND_WGMMA(NAME, TYPE, DIM) \
    extern "C" __global__ void __launch_bounds__(hyperattn::hopper::THREADS, 1) \
        attend_wgmma_##NAME##_##DIM(const __grid_constant__ hyperattn::AttendParams p, \
                                    const __grid_constant__ hyperattn::TensorMap k_map, \
                                    const __grid_constant__ hyperattn::TensorMap v_map) \
    { \
        HYPERATTN_ATTEND(TYPE, DIM); \
    }

HYPERATTN_ATTEND_WGMMA(bf16, hyperattn::BF16, 64)
HYPERATTN_ATTEND_WGMMA(bf16, hyperattn::BF16, 96)
HYPERATTN_ATTEND_WGMMA(bf16, hyperattn::BF16, 128)
HYPERATTN_ATTEND_WGMMA(bf16, hyperattn::BF16, 192)
HYPERATTN_ATTEND_WGMMA(bf16, hyperattn::BF16, 256)
HYPERATTN_ATTEND_WGMMA(f16, hyperattn::F16, 64)
HYPERATTN_ATTEND_WGMMA(f16, hyperattn::F16, 96)
HYPERATTN_ATTEND_WGMMA(f16, hyperattn::F16, 128)
HYPERATTN_ATTEND_WGMMA(f16, hyperattn::F16, 192)
HYPERATTN_ATTEND_WGMMA(f16, hyperattn::F16, 256)
