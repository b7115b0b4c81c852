// Types and tensor views that host and device share. No headers are included: the same source is compiled by nvcc and by
// NVRTC, which has none. cuda/src/abi.rs mirrors every struct here field by field.
#pragma once

namespace hyperattn {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8, "the host's mirror of these structs counts on it");

// Element types, with the numbers of the C header.
enum ElementType : u32 { F32 = 1, F16 = 2, BF16 = 3 };

__device__ __forceinline__ u32 element_bytes(u32 type) { return type == F32 ? 4 : 2; }

// A tensor [batch, heads, rows, dim] in device memory whose last dimension is contiguous. Strides are bytes.
struct View {
    char *data;
    i64 batch_stride;
    i64 head_stride;
    i64 row_stride;

    __device__ __forceinline__ char *row(u32 batch, u32 head, u32 row) const
    {
        return data + batch * batch_stride + head * head_stride + row * row_stride;
    }
};

} // namespace hyperattn
