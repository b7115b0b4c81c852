/* hyperattn for C++17 and later: hyperattn.h with typed views, defaults, exceptions and callables as thread pools.
 *
 * Link as for hyperattn.h. SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 *     hyperattn::params params;
 *     params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
 *     hyperattn::tensors tensors(hyperattn::bshd(q, 1, 8, n, 64), hyperattn::bshd(k, 1, 2, n, 64),
 *                                hyperattn::bshd(v, 1, 2, n, 64), hyperattn::bshd(out, 1, 8, n, 64));
 *     hyperattn::forward(params, tensors);
 *
 * The types derive from C's structs and add no fields: what hyperattn.h says about a field, a shape or a status holds
 * here, constants are C's, and a C struct can be passed wherever a type of the same name is taken. C's functions that
 * cannot fail (hyperattn_version_string, hyperattn_cpu_isa, ...) have no second name.
 *
 * Errors. Functions that can fail throw hyperattn::error, which has the status and the sentence. Under
 * HYPERATTN_NO_EXCEPTIONS, defined before the #include or here where exceptions are off, they return the status and
 * hyperattn_last_error() has the sentence; "Throws" below then reads "returns". Files of both kinds link together.
 *
 * Memory. Views, structs and thread pools own nothing and point to what they were made from, which must outlive the
 * calls. Of what is written here only class workspace, the plans and a thrown error allocate; the library allocates
 * where no workspace is given, as hyperattn.h says. */

#ifndef HYPERATTN_HPP
#define HYPERATTN_HPP

#if (defined(_MSVC_LANG) ? _MSVC_LANG : __cplusplus) < 201703L
#error "hyperattn.hpp needs C++17; hyperattn.h serves older standards"
#endif

#include <hyperattn/hyperattn.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <new>
#include <type_traits>
#include <utility>

#if !defined(HYPERATTN_NO_EXCEPTIONS) && !defined(__cpp_exceptions) && !defined(_CPPUNWIND)
#define HYPERATTN_NO_EXCEPTIONS
#endif
#ifndef HYPERATTN_NO_EXCEPTIONS
#include <exception>
#include <stdexcept>
#include <string>
#endif
#if defined(__STDCPP_FLOAT16_T__) || defined(__STDCPP_BFLOAT16_T__)
#include <stdfloat>
#endif

namespace hyperattn {

// ---------------------------------------------------------------------------------------------------- Element types

namespace detail {
template <class T>
inline constexpr bool always_false = false;
} // namespace detail

/// The HYPERATTN_DTYPE_* of a C++ type: float, and std::float16_t and std::bfloat16_t where they exist. For an
/// engine's own type of 16 bits:
///
///     template <>
///     struct hyperattn::dtype_of<engine::half> {
///         static constexpr hyperattn_dtype value = HYPERATTN_DTYPE_F16;
///     };
template <class T>
struct dtype_of {
    static_assert(detail::always_false<T>, "hyperattn knows no dtype for this type: specialise hyperattn::dtype_of, or "
                                           "give a pointer and a HYPERATTN_DTYPE_*");
};

/// HYPERATTN_DTYPE_F32.
template <>
struct dtype_of<float> {
    /// See dtype_of.
    static constexpr hyperattn_dtype value = HYPERATTN_DTYPE_F32;
};

#ifdef __STDCPP_FLOAT16_T__
template <>
struct dtype_of<std::float16_t> {
    static constexpr hyperattn_dtype value = HYPERATTN_DTYPE_F16;
};
#endif

#ifdef __STDCPP_BFLOAT16_T__
template <>
struct dtype_of<std::bfloat16_t> {
    static constexpr hyperattn_dtype value = HYPERATTN_DTYPE_BF16;
};
#endif

// ------------------------------------------------------------------------------------------------------------ Views

/// A hyperattn_tensor that is only read: what functions take as input. Without arguments: no tensor.
struct const_view : hyperattn_tensor {
    const_view() noexcept : hyperattn_tensor{} {}
    /// The same view; implicit, because reading needs no promise.
    const_view(const hyperattn_tensor &tensor) noexcept : hyperattn_tensor(tensor) {}
};

/// A hyperattn_tensor that may be written: an output, or an input where a const_view is taken. Without arguments: no
/// tensor. From a C struct only explicitly, because that does not say whether its memory may be written.
struct view : hyperattn_tensor {
    view() noexcept : hyperattn_tensor{} {}
    /// The same view, by a caller who knows that its memory may be written.
    explicit view(const hyperattn_tensor &tensor) noexcept : hyperattn_tensor(tensor) {}
    view(const const_view &) = delete;
};

/// const_view for a const element type, else view.
template <class T>
using view_of = std::conditional_t<std::is_const_v<T>, const_view, view>;

namespace detail {

template <class T>
constexpr hyperattn_dtype element_dtype() noexcept
{
    constexpr hyperattn_dtype dtype = dtype_of<std::remove_cv_t<T>>::value;
    static_assert(sizeof(T) == (dtype == HYPERATTN_DTYPE_F32 ? 4 : 2), "dtype_of names a type of another size");
    return dtype;
}

/// The order of a tensor's dimensions in memory.
enum class order { bhsd, bshd };

inline hyperattn_tensor packed(order memory_order, const void *data, hyperattn_dtype dtype, std::int64_t batch,
                               std::int64_t heads, std::int64_t sequence, std::int64_t head_dim) noexcept
{
    const auto fill = memory_order == order::bhsd ? hyperattn_tensor_bhsd : hyperattn_tensor_bshd;
    return fill(data, dtype, batch, heads, sequence, head_dim);
}

inline hyperattn_tensor strided(const void *data, hyperattn_dtype dtype, const std::int64_t (&shape)[4],
                                const std::int64_t (&stride)[4]) noexcept
{
    hyperattn_tensor tensor = {};
    tensor.data = const_cast<void *>(data);
    tensor.dtype = dtype;
    for (int dimension = 0; dimension < 4; ++dimension) {
        tensor.shape[dimension] = shape[dimension];
        tensor.stride[dimension] = stride[dimension];
    }
    return tensor;
}

/// A tensor of 2 to 4 dimensions in the given order; leading dimensions that are missing have the extent 1.
template <class Extent, class Stride>
hyperattn_tensor ranked(order memory_order, const void *data, hyperattn_dtype dtype, std::size_t rank, Extent extent,
                        Stride stride_at)
{
    std::int64_t shape[4] = {1, 1, 1, 1};
    std::int64_t stride[4] = {0, 0, 0, 0};
    for (std::size_t dimension = 0; dimension < rank; ++dimension) {
        shape[4 - rank + dimension] = static_cast<std::int64_t>(extent(dimension));
        stride[4 - rank + dimension] = static_cast<std::int64_t>(stride_at(dimension));
    }
    if (memory_order == order::bshd) {
        std::swap(shape[1], shape[2]);
        std::swap(stride[1], stride[2]);
    }
    return strided(data, dtype, shape, stride);
}

/// Whether all elements lie within count elements from the tensor's address. Bad extents are left to the call.
inline bool lies_within(const hyperattn_tensor &tensor, std::uint64_t count) noexcept
{
    for (const std::int64_t extent : tensor.shape) {
        if (extent <= 0) {
            return true;
        }
    }
    if (count == 0) {
        return false;
    }
    std::uint64_t left = count - 1;
    for (int dimension = 0; dimension < 4; ++dimension) {
        const std::uint64_t steps = static_cast<std::uint64_t>(tensor.shape[dimension] - 1);
        if (steps == 0 || tensor.stride[dimension] == 0) {
            continue;
        }
        const std::uint64_t stride = static_cast<std::uint64_t>(tensor.stride[dimension]);
        if (tensor.stride[dimension] < 0 || steps > left / stride) {
            return false;
        }
        left -= steps * stride;
    }
    return true;
}

/// What a view that could not be made looks like without exceptions: not NULL, so that no call takes it for an absent
/// one, and of no dtype, so that every call rejects it.
inline hyperattn_tensor unusable() noexcept
{
    static char somewhere = 0;
    hyperattn_tensor tensor = {};
    tensor.data = &somewhere;
    return tensor;
}

// Types are recognised by their members, so that the headers that define them need not be included.

template <class T, class = void>
struct is_range : std::false_type {};
template <class T>
struct is_range<T, std::void_t<decltype(*std::declval<T &>().data()), decltype(std::declval<T &>().size())>>
    : std::is_pointer<decltype(std::declval<T &>().data())> {};

/// A span's data() is the same for a const span; that of a container is not. A container that is a temporary object
/// would be gone before the view is used.
template <class R>
inline constexpr bool outlives_expression =
    std::is_lvalue_reference_v<R> || std::is_same_v<decltype(std::declval<R &>().data()),
                                                    decltype(std::declval<const R &>().data())>;

template <class R>
using range_element = std::remove_pointer_t<decltype(std::declval<R &>().data())>;

template <class T, class = void>
struct is_mdspan : std::false_type {};
template <class T>
struct is_mdspan<T,
                 std::void_t<typename T::element_type, typename T::layout_type, typename T::accessor_type,
                             decltype(std::declval<const T &>().data_handle()), decltype(T::rank())>>
    : std::true_type {};

template <class T, class = void>
struct is_dltensor : std::false_type {};
template <class T>
struct is_dltensor<
    T, std::void_t<decltype(std::declval<T &>().device.device_type), decltype(std::declval<T &>().dtype.code),
                   decltype(std::declval<T &>().dtype.bits), decltype(std::declval<T &>().dtype.lanes),
                   decltype(std::declval<T &>().data), decltype(std::declval<T &>().ndim),
                   decltype(std::declval<T &>().shape), decltype(std::declval<T &>().strides),
                   decltype(std::declval<T &>().byte_offset)>> : std::true_type {};

template <class T>
using if_range = std::enable_if_t<is_range<std::remove_reference_t<T>>::value, int>;
template <class T>
using if_mdspan = std::enable_if_t<is_mdspan<T>::value, int>;
template <class T>
using if_dltensor = std::enable_if_t<is_dltensor<T>::value, int>;

template <class M>
view_of<typename M::element_type> from_mdspan(order memory_order, const M &tensor) noexcept
{
    using T = typename M::element_type;
    static_assert(M::rank() >= 2 && M::rank() <= 4, "an mdspan of 2 to 4 dimensions is needed");
    static_assert(M::is_always_strided(), "an mdspan with strides is needed");
    static_assert(std::is_same_v<std::decay_t<decltype(tensor.data_handle())>, T *> &&
                      std::is_same_v<typename M::reference, T &>,
                  "an mdspan whose accessor reads plain memory is needed");
    return view_of<T>(ranked(
        memory_order, tensor.data_handle(), element_dtype<T>(), M::rank(),
        [&](std::size_t dimension) { return tensor.extent(static_cast<typename M::rank_type>(dimension)); },
        [&](std::size_t dimension) { return tensor.stride(static_cast<typename M::rank_type>(dimension)); }));
}

} // namespace detail

// bhsd() is for memory in the order [batch, heads, sequence, head_dim], bshd() for (batch, token, head, head_dim). Both
// make views whose dimensions are [batch, heads, sequence, head_dim], from a pointer, a range, an mdspan or a DLTensor.

/// A view of packed memory at data: of T, or read-only of const T. Checks nothing; the call that uses it does.
///
///     hyperattn::view out = hyperattn::bhsd(pointer, 1, 8, n, 64);
///     hyperattn::view lse = hyperattn::bhsd(sums, 1, 8, n, 1);
template <class T>
[[nodiscard]] view_of<T> bhsd(T *data, std::int64_t batch, std::int64_t heads, std::int64_t sequence,
                              std::int64_t head_dim) noexcept
{
    return view_of<T>(
        detail::packed(detail::order::bhsd, data, detail::element_dtype<T>(), batch, heads, sequence, head_dim));
}

/// See bhsd().
template <class T>
[[nodiscard]] view_of<T> bshd(T *data, std::int64_t batch, std::int64_t heads, std::int64_t sequence,
                              std::int64_t head_dim) noexcept
{
    return view_of<T>(
        detail::packed(detail::order::bshd, data, detail::element_dtype<T>(), batch, heads, sequence, head_dim));
}

/// The same where the type of the pointer does not tell the HYPERATTN_DTYPE_*.
[[nodiscard]] inline view bhsd(void *data, hyperattn_dtype dtype, std::int64_t batch, std::int64_t heads,
                               std::int64_t sequence, std::int64_t head_dim) noexcept
{
    return view(detail::packed(detail::order::bhsd, data, dtype, batch, heads, sequence, head_dim));
}

/// See bhsd().
[[nodiscard]] inline const_view bhsd(const void *data, hyperattn_dtype dtype, std::int64_t batch, std::int64_t heads,
                                     std::int64_t sequence, std::int64_t head_dim) noexcept
{
    return detail::packed(detail::order::bhsd, data, dtype, batch, heads, sequence, head_dim);
}

/// See bhsd().
[[nodiscard]] inline view bshd(void *data, hyperattn_dtype dtype, std::int64_t batch, std::int64_t heads,
                               std::int64_t sequence, std::int64_t head_dim) noexcept
{
    return view(detail::packed(detail::order::bshd, data, dtype, batch, heads, sequence, head_dim));
}

/// See bhsd().
[[nodiscard]] inline const_view bshd(const void *data, hyperattn_dtype dtype, std::int64_t batch, std::int64_t heads,
                                     std::int64_t sequence, std::int64_t head_dim) noexcept
{
    return detail::packed(detail::order::bshd, data, dtype, batch, heads, sequence, head_dim);
}

/// A view with any strides, in elements. Checks nothing; the call that uses it does.
///
///     hyperattn::view k = hyperattn::strided(cache, {1, 2, n, 64}, {0, capacity * 64, 64, 1});
template <class T>
[[nodiscard]] view_of<T> strided(T *data, const std::int64_t (&shape)[4], const std::int64_t (&stride)[4]) noexcept
{
    return view_of<T>(detail::strided(data, detail::element_dtype<T>(), shape, stride));
}

/// The same where the type of the pointer does not tell the HYPERATTN_DTYPE_*.
[[nodiscard]] inline view strided(void *data, hyperattn_dtype dtype, const std::int64_t (&shape)[4],
                                  const std::int64_t (&stride)[4]) noexcept
{
    return view(detail::strided(data, dtype, shape, stride));
}

/// See strided().
[[nodiscard]] inline const_view strided(const void *data, hyperattn_dtype dtype, const std::int64_t (&shape)[4],
                                        const std::int64_t (&stride)[4]) noexcept
{
    return detail::strided(data, dtype, shape, stride);
}

/// A view of a std::mdspan, or of what has its members: a reference implementation in C++17. Indices are [batch,
/// heads, sequence, head_dim]; leading ones may be missing and have the extent 1.
///
///     std::mdspan q(pointer, heads, n, 64);
///     hyperattn::view view = hyperattn::bhsd(q);
template <class M, detail::if_mdspan<M> = 0>
[[nodiscard]] view_of<typename M::element_type> bhsd(const M &tensor) noexcept
{
    return detail::from_mdspan(detail::order::bhsd, tensor);
}

/// The same with the indices (batch, token, head, head_dim).
template <class M, detail::if_mdspan<M> = 0>
[[nodiscard]] view_of<typename M::element_type> bshd(const M &tensor) noexcept
{
    return detail::from_mdspan(detail::order::bshd, tensor);
}

/// Where a DLTensor must lie: for forward(), or for cuda_forward().
enum class memory { host, cuda };

// ---------------------------------------------------------------------------------------------------------- Structs

/// hyperattn_params with the defaults.
struct params : hyperattn_params {
    params() noexcept : hyperattn_params{} { hyperattn_params_init(this, sizeof(hyperattn_params)); }

    /// A method for each query head: an array, a std::vector or a span of heads_q hyperattn_method, which must outlive
    /// the calls.
    template <class Range>
    void set_head_methods(Range &methods) noexcept
    {
        head_methods = std::data(methods);
    }
};

/// hyperattn_tensors: q, k, v, out and, where it is wanted, lse. The other fields are unset.
struct tensors : hyperattn_tensors {
    tensors() noexcept : hyperattn_tensors{} { struct_size = sizeof(hyperattn_tensors); }

    /// q [batch, heads_q, n_q, head_dim], k [batch, heads_kv, n_k, head_dim], v [batch, heads_kv, n_k, value_dim],
    /// out [batch, heads_q, n_q, value_dim], lse f32 [batch, heads_q, n_q, 1]. heads_q is a multiple of heads_kv.
    tensors(const const_view &queries, const const_view &keys, const const_view &values, const view &output,
            const view &log_sum_exp = view()) noexcept
        : tensors()
    {
        q = queries;
        k = keys;
        v = values;
        out = output;
        lse = log_sum_exp;
    }

    /// Sequences of different lengths in the rows of one batch item: arrays, std::vectors or spans of std::int32_t,
    /// which must outlive the calls, with the first row of each sequence and the number of all rows at the end. Calls
    /// reject them where they differ in length.
    template <class Queries, class Keys>
    void set_sequences(Queries &starts_of_queries, Keys &starts_of_keys) noexcept
    {
        const std::size_t starts = std::size(starts_of_queries);
        num_sequences = starts == std::size(starts_of_keys) ? static_cast<std::int64_t>(starts) - 1 : -1;
        cu_seqlens_q = std::data(starts_of_queries);
        cu_seqlens_k = std::data(starts_of_keys);
    }

    /// Sets the field mask: numbers to add to the logits, [batch or 1, heads_q or 1, n_q or 1, n_k]. Returns *this.
    ///
    ///     tensors.with_mask(hyperattn::bhsd(numbers, 1, 1, n_q, n_k));
    tensors &with_mask(const const_view &additive_mask) noexcept
    {
        mask = additive_mask;
        return *this;
    }
};

/// hyperattn_grads: the gradients that a backward call reads and writes.
struct grads : hyperattn_grads {
    grads() noexcept : hyperattn_grads{} { struct_size = sizeof(hyperattn_grads); }

    /// With respect to out and, where the loss depends on it, lse: inputs. With respect to q, k and v: outputs. Each is
    /// shaped like what it belongs to.
    grads(const const_view &output, const view &queries, const view &keys, const view &values,
          const const_view &log_sum_exp = const_view()) noexcept
        : grads()
    {
        dout = output;
        dq = queries;
        dk = keys;
        dv = values;
        dlse = log_sum_exp;
    }
};

/// hyperattn_block_mask with nothing set but struct_size.
struct block_mask : hyperattn_block_mask {
    block_mask() noexcept : hyperattn_block_mask{} { struct_size = sizeof(hyperattn_block_mask); }
};

/// hyperattn_cpu_exec: all cores and scratch memory from the heap, until fields say otherwise.
struct cpu_exec : hyperattn_cpu_exec {
    cpu_exec() noexcept : hyperattn_cpu_exec{} { struct_size = sizeof(hyperattn_cpu_exec); }

    /// The caller's threads, such as a thread_pool. It must outlive the calls.
    explicit cpu_exec(const hyperattn_threadpool &threads) noexcept : cpu_exec() { pool = &threads; }
    explicit cpu_exec(const hyperattn_threadpool &&) = delete;
};

/// hyperattn_cuda_exec: a cudaStream_t or CUstream (nullptr is the legacy default stream), and device memory as
/// scratch space; without it the stream allocates.
struct cuda_exec : hyperattn_cuda_exec {
    /// The stream that the call is enqueued on, and scratch space.
    explicit cuda_exec(void *cuda_stream = nullptr, hyperattn_buffer device_workspace = {}) noexcept
        : hyperattn_cuda_exec{}
    {
        struct_size = sizeof(hyperattn_cuda_exec);
        workspace = device_workspace;
        stream = static_cast<CUstream_st *>(cuda_stream);
    }
};

static_assert(sizeof(params) == sizeof(hyperattn_params) && sizeof(tensors) == sizeof(hyperattn_tensors) &&
                  sizeof(view) == sizeof(hyperattn_tensor) && sizeof(const_view) == sizeof(hyperattn_tensor),
              "the types add no fields");

/// The work that a thread pool's callable is given: task(i) runs the i-th piece, on any thread. Good until the
/// callable returns; a copy is two pointers.
class task {
  public:
    /// C's pair of a function and its first argument.
    task(void (*function)(void *, std::size_t), void *context) noexcept : function_(function), context_(context) {}

    /// Runs piece `index`.
    void operator()(std::size_t index) const noexcept { function_(context_, index); }

  private:
    void (*function_)(void *, std::size_t);
    void *context_;
};

// ------------------------------------------------------------------------------------ What depends on the error model

// Two namespaces, so that files with and without exceptions do not define one function in two ways.
#ifdef HYPERATTN_NO_EXCEPTIONS
/// What functions that can fail return.
#define HYPERATTN_OUTCOME [[nodiscard]] hyperattn_status
inline namespace returning {
#else
/// What functions that can fail return.
#define HYPERATTN_OUTCOME void
inline namespace throwing {

/// A call that did not do what it says. what() is the sentence that names the argument and the values.
class error : public std::runtime_error {
  public:
    /// A call's status, not OK, and hyperattn_last_error() of its thread.
    error(hyperattn_status status, const std::string &sentence) : std::runtime_error(sentence), status_(status) {}

    /// One of HYPERATTN_STATUS_*.
    [[nodiscard]] hyperattn_status status() const noexcept { return status_; }

  private:
    hyperattn_status status_;
};
#endif

namespace boundary {

#ifdef HYPERATTN_NO_EXCEPTIONS
inline hyperattn_status conclude(hyperattn_status status) noexcept
{
    return status;
}

inline hyperattn_tensor reject(const char *, std::int64_t, const char *) noexcept
{
    return detail::unusable();
}
#else
inline void conclude(hyperattn_status status)
{
    if (status != HYPERATTN_STATUS_OK) {
        throw error(status, hyperattn_last_error());
    }
}

[[noreturn]] inline hyperattn_tensor reject(const char *before, std::int64_t value, const char *after)
{
    throw error(HYPERATTN_STATUS_INVALID_ARGUMENT, before + std::to_string(value) + after);
}
#endif

template <class R>
view_of<detail::range_element<R>> checked(const R &range, const hyperattn_tensor &tensor)
{
    const auto count = static_cast<std::uint64_t>(range.size());
    using view_type = view_of<detail::range_element<R>>;
    return view_type(detail::lies_within(tensor, count)
                         ? tensor
                         : reject("the range has ", static_cast<std::int64_t>(count),
                                  " elements: shape and strides reach beyond them"));
}

template <class R>
view_of<detail::range_element<R>> from_range(detail::order memory_order, R &range, std::int64_t batch,
                                             std::int64_t heads, std::int64_t sequence, std::int64_t head_dim)
{
    using T = detail::range_element<R>;
    return checked<R>(range, detail::packed(memory_order, range.data(), detail::element_dtype<T>(), batch, heads,
                                            sequence, head_dim));
}

// Numbers of the DLPack ABI.
enum : int { dl_cpu = 1, dl_cuda = 2, dl_cuda_host = 3, dl_cuda_managed = 13, dl_float = 2, dl_bfloat = 4 };

template <class D>
hyperattn_tensor from_dltensor(detail::order memory_order, const D &tensor, memory where)
{
    const int device = static_cast<int>(tensor.device.device_type);
    const bool reachable =
        device == (where == memory::host ? dl_cpu : dl_cuda) || device == dl_cuda_host || device == dl_cuda_managed;
    if (!reachable) {
        return reject("DLTensor.device.device_type = ", device,
                      where == memory::host ? " is not host memory" : " is not memory of a CUDA device");
    }
    if (tensor.ndim < 2 || tensor.ndim > 4) {
        return reject("DLTensor.ndim = ", tensor.ndim, ", 2 to 4 is supported");
    }
    const int code = tensor.dtype.code, bits = tensor.dtype.bits;
    const hyperattn_dtype dtype = code == dl_float && bits == 32    ? HYPERATTN_DTYPE_F32
                                  : code == dl_float && bits == 16  ? HYPERATTN_DTYPE_F16
                                  : code == dl_bfloat && bits == 16 ? HYPERATTN_DTYPE_BF16
                                                                    : 0;
    if (dtype == 0) {
        return reject("DLTensor.dtype has code ", code, " with bits that make it none of f32, f16 and bf16");
    }
    if (tensor.dtype.lanes != 1) {
        return reject("DLTensor.dtype.lanes = ", tensor.dtype.lanes, ", 1 is supported");
    }
    const auto rank = static_cast<std::size_t>(tensor.ndim);
    const auto extent = [&](std::size_t dimension) { return tensor.shape[dimension]; };
    const auto stride = [&](std::size_t dimension) {
        if (tensor.strides != nullptr) {
            return tensor.strides[dimension];
        }
        std::int64_t product = 1;
        for (std::size_t inner = dimension + 1; inner < rank; ++inner) {
            product *= tensor.shape[inner];
        }
        return product;
    };
    const void *data = tensor.data;
    if (data != nullptr) {
        data = static_cast<const char *>(data) + tensor.byte_offset;
    }
    return detail::ranked(memory_order, data, dtype, rank, extent, stride);
}

} // namespace boundary

// Views that are checked where they are made. Without exceptions a view that cannot be made is one that every call
// rejects with HYPERATTN_STATUS_INVALID_ARGUMENT (its dtype is 0).

/// A view of packed memory that a std::span, a std::vector or another object with data() and size() refers to. Throws
/// INVALID_ARGUMENT when the range has too few elements.
///
///     hyperattn::const_view q = hyperattn::bhsd(std::span<const float>(pointer, count), 1, 8, n, 64);
template <class R, detail::if_range<R> = 0>
[[nodiscard]] auto bhsd(R &&range, std::int64_t batch, std::int64_t heads, std::int64_t sequence,
                        std::int64_t head_dim)
{
    static_assert(detail::outlives_expression<R>, "the container is gone before the view is used");
    return boundary::from_range(detail::order::bhsd, range, batch, heads, sequence, head_dim);
}

/// See bhsd().
template <class R, detail::if_range<R> = 0>
[[nodiscard]] auto bshd(R &&range, std::int64_t batch, std::int64_t heads, std::int64_t sequence,
                        std::int64_t head_dim)
{
    static_assert(detail::outlives_expression<R>, "the container is gone before the view is used");
    return boundary::from_range(detail::order::bshd, range, batch, heads, sequence, head_dim);
}

/// A view with any strides from the first element of a range. Throws INVALID_ARGUMENT when it reaches outside of it,
/// so that negative strides need the form that takes a pointer.
template <class R, detail::if_range<R> = 0>
[[nodiscard]] auto strided(R &&range, const std::int64_t (&shape)[4], const std::int64_t (&stride)[4])
{
    static_assert(detail::outlives_expression<R>, "the container is gone before the view is used");
    using T = detail::range_element<std::remove_reference_t<R>>;
    return boundary::checked<std::remove_reference_t<R>>(
        range, detail::strided(range.data(), detail::element_dtype<T>(), shape, stride));
}

/// A view of a DLPack DLTensor (for a DLManagedTensor, of its dl_tensor), whose memory must outlive the view.
/// Dimensions are [batch, heads, sequence, head_dim]; leading ones may be missing and have the extent 1. Throws
/// INVALID_ARGUMENT when the memory is not where it should be, and for other dtypes and ranks. DLPack does not tell
/// whether memory may be written: the caller knows.
///
///     hyperattn::view q = hyperattn::bhsd(managed->dl_tensor, hyperattn::memory::cuda);
template <class D, detail::if_dltensor<D> = 0>
[[nodiscard]] view bhsd(const D &tensor, memory where = memory::host)
{
    return view(boundary::from_dltensor(detail::order::bhsd, tensor, where));
}

/// The same with the dimensions (batch, token, head, head_dim).
template <class D, detail::if_dltensor<D> = 0>
[[nodiscard]] view bshd(const D &tensor, memory where = memory::host)
{
    return view(boundary::from_dltensor(detail::order::bshd, tensor, where));
}

// ---------------------------------------------------------------------------------------------------------- Threads

namespace boundary {

/// What thread pools of all callables have in common.
class pool : public hyperattn_threadpool {
  public:
    pool(const pool &) = delete;
    pool &operator=(const pool &) = delete;

    void run(std::size_t count, task work) { run_(*this, count, work); }

    /// C's way in. noexcept: what the callable throws ends the program rather than unwind through the library.
    static void enter(void *context, std::size_t count, void (*function)(void *, std::size_t),
                      void *task_context) noexcept
    {
        static_cast<pool *>(context)->run(count, task(function, task_context));
    }

  protected:
    using runner = void (*)(pool &, std::size_t, task);

    pool(std::uint32_t concurrency, runner function) noexcept
        : hyperattn_threadpool{}, concurrency_(concurrency), run_(function)
    {
        struct_size = sizeof(hyperattn_threadpool);
        ctx = this;
        num_threads = [](void *context) { return static_cast<pool *>(context)->concurrency_; };
        parallel_for = enter;
    }
    ~pool() = default;

  private:
    std::uint32_t concurrency_;
    runner run_;
};

#ifdef HYPERATTN_NO_EXCEPTIONS
template <class Call>
hyperattn_status with_threads(const hyperattn_cpu_exec &exec, Call call)
{
    return call(exec);
}
#else
/// One call's way into a pool: keeps what the callable throws until the library has returned.
struct passage {
    pool *threads;
    std::exception_ptr thrown;

    static std::uint32_t num_threads(void *context)
    {
        pool *threads = static_cast<passage *>(context)->threads;
        return threads->num_threads(threads->ctx);
    }

    static void parallel_for(void *context, std::size_t count, void (*function)(void *, std::size_t),
                             void *task_context) noexcept
    {
        passage &self = *static_cast<passage *>(context);
        if (self.thrown) {
            return;
        }
        try {
            self.threads->run(count, task(function, task_context));
        } catch (...) {
            self.thrown = std::current_exception();
        }
    }
};

/// call(exec); afterwards throws what the callable of a thread_pool in exec has thrown.
template <class Call>
hyperattn_status with_threads(const hyperattn_cpu_exec &exec, Call call)
{
    if (exec.pool == nullptr || exec.pool->parallel_for != pool::enter) {
        return call(exec);
    }
    passage way = {static_cast<pool *>(exec.pool->ctx), nullptr};
    hyperattn_threadpool threads = *exec.pool;
    threads.ctx = &way;
    threads.num_threads = passage::num_threads;
    threads.parallel_for = passage::parallel_for;
    hyperattn_cpu_exec own = exec;
    own.pool = &threads;
    const hyperattn_status status = call(own);
    if (way.thrown) {
        std::rethrow_exception(way.thrown);
    }
    return status;
}
#endif

} // namespace boundary

/// A hyperattn_threadpool that runs on the caller's threads through a callable: callable(count, task) calls task(i)
/// once for every i below count, on any threads and in any order, and returns when all have returned. It is kept by
/// value (std::ref for one that lives elsewhere). Only the thread that called the library calls it; where several
/// threads call the library with one pool, it is called by all of them at the same time. concurrency is how many
/// tasks can run at the same time, at least 1.
///
///     hyperattn::thread_pool pool(engine.size(), [&](std::size_t count, hyperattn::task task) {
///         engine.parallel_for(count, task);
///     });
///     hyperattn::forward(params, tensors, hyperattn::cpu_exec(pool));
///
/// What the callable throws, forward(), backward() and diagnose() throw once the library has returned; the outputs then mean
/// nothing. As it may not return, so it may not throw while a task runs or is still to run elsewhere. An exception
/// ends the program (std::terminate) where it cannot be passed on: under HYPERATTN_NO_EXCEPTIONS, or when a C
/// function was given the pool. Stays where it is: neither copied nor moved.
template <class Callable>
class thread_pool : public boundary::pool {
  public:
    /// `concurrency` pieces can run at the same time, at least 1.
    thread_pool(std::uint32_t concurrency, Callable callable)
        : boundary::pool(concurrency, call), callable_(std::move(callable))
    {
    }

  private:
    static void call(boundary::pool &self, std::size_t count, task work)
    {
        static_cast<thread_pool &>(self).callable_(count, work);
    }

    Callable callable_;
};

// ------------------------------------------------------------------------------------------------------------ Calls

/// Computes tensors.out, and lse and error where they are set: hyperattn_forward(). Returns when they are complete.
/// Allocates scratch memory unless exec.workspace is set. Throws as hyperattn_forward() answers.
HYPERATTN_OUTCOME inline forward(const hyperattn_params &options, const hyperattn_tensors &arguments,
                                 const hyperattn_cpu_exec &exec = cpu_exec())
{
    return boundary::conclude(boundary::with_threads(exec, [&](const hyperattn_cpu_exec &threads) {
        return hyperattn_forward(&options, &arguments, &threads);
    }));
}

/// Computes gradients.dq, dk and dv: hyperattn_backward(). arguments are those of forward(), with its out and lse, which
/// are only read. Allocates scratch memory unless exec.workspace is set. Throws as hyperattn_backward() answers.
///
///     hyperattn::backward(params, tensors, hyperattn::grads(dout, dq, dk, dv));
HYPERATTN_OUTCOME inline backward(const hyperattn_params &options, const hyperattn_tensors &arguments,
                                  const hyperattn_grads &gradients, const hyperattn_cpu_exec &exec = cpu_exec())
{
    return boundary::conclude(boundary::with_threads(exec, [&](const hyperattn_cpu_exec &threads) {
        return hyperattn_backward(&options, &arguments, &gradients, &threads);
    }));
}

/// hyperattn_cuda_forward(): enqueues what forward() does for tensors in device memory and returns before it has run.
/// Allocates in the stream's order unless exec.workspace is set.
HYPERATTN_OUTCOME inline cuda_forward(const hyperattn_params &options, const hyperattn_tensors &arguments,
                                      const hyperattn_cuda_exec &exec)
{
    return boundary::conclude(hyperattn_cuda_forward(&options, &arguments, &exec));
}

/// The same on a cudaStream_t or CUstream, without a workspace.
HYPERATTN_OUTCOME inline cuda_forward(const hyperattn_params &options, const hyperattn_tensors &arguments, void *stream)
{
    return cuda_forward(options, arguments, cuda_exec(stream));
}

#ifdef HYPERATTN_NO_EXCEPTIONS
/// Size and alignment of the workspace that forward() needs for the same arguments; need is written on success only.
HYPERATTN_OUTCOME inline forward_workspace(const hyperattn_params &options, const hyperattn_tensors &arguments,
                                           const hyperattn_cpu_exec &exec, hyperattn_layout &need)
{
    return hyperattn_forward_workspace(&options, &arguments, &exec, &need);
}

/// Size and alignment of the workspace that backward() needs for the same arguments; need is written on success only.
HYPERATTN_OUTCOME inline backward_workspace(const hyperattn_params &options, const hyperattn_tensors &arguments,
                                            const hyperattn_cpu_exec &exec, hyperattn_layout &need)
{
    return hyperattn_backward_workspace(&options, &arguments, &exec, &need);
}

/// Size and alignment of the device memory that cuda_forward() needs for the same arguments. Needs no device.
HYPERATTN_OUTCOME inline cuda_forward_workspace(const hyperattn_params &options, const hyperattn_tensors &arguments,
                                                hyperattn_layout &need)
{
    return hyperattn_cuda_forward_workspace(&options, &arguments, &need);
}
#else
/// Size and alignment of the workspace that forward() needs for the same arguments. Without exceptions a last argument
/// hyperattn_layout & gets them.
[[nodiscard]] inline hyperattn_layout forward_workspace(const hyperattn_params &options,
                                                        const hyperattn_tensors &arguments,
                                                        const hyperattn_cpu_exec &exec = cpu_exec())
{
    hyperattn_layout need = {};
    boundary::conclude(hyperattn_forward_workspace(&options, &arguments, &exec, &need));
    return need;
}

/// Size and alignment of the workspace that backward() needs for the same arguments.
[[nodiscard]] inline hyperattn_layout backward_workspace(const hyperattn_params &options,
                                                         const hyperattn_tensors &arguments,
                                                         const hyperattn_cpu_exec &exec = cpu_exec())
{
    hyperattn_layout need = {};
    boundary::conclude(hyperattn_backward_workspace(&options, &arguments, &exec, &need));
    return need;
}

/// Size and alignment of the device memory that cuda_forward() needs for the same arguments. Needs no device.
[[nodiscard]] inline hyperattn_layout cuda_forward_workspace(const hyperattn_params &options,
                                                             const hyperattn_tensors &arguments)
{
    hyperattn_layout need = {};
    boundary::conclude(hyperattn_cuda_forward_workspace(&options, &arguments, &need));
    return need;
}
#endif

/// Joins two partial results over disjoint keys; out_a and lse_a become the result: hyperattn_merge(). Allocates
/// nothing.
HYPERATTN_OUTCOME inline merge(const view &out_a, const view &lse_a, const const_view &out_b, const const_view &lse_b)
{
    return boundary::conclude(hyperattn_merge(&out_a, &lse_a, &out_b, &lse_b));
}

/// Reports about each head: hyperattn_diagnose(). heads is an array, a std::vector or a span of batch * heads_q
/// hyperattn_diagnosis; their struct_size is set here. flags: 0 or HYPERATTN_DIAGNOSE_TRUE_ERROR. Allocates, as
/// hyperattn.h says, and never uses exec.workspace.
///
///     std::vector<hyperattn_diagnosis> heads(8);
///     hyperattn::diagnose(params, tensors, heads, HYPERATTN_DIAGNOSE_TRUE_ERROR);
template <class Range>
HYPERATTN_OUTCOME diagnose(const hyperattn_params &options, const hyperattn_tensors &arguments, Range &&heads,
                           std::uint32_t flags = 0, const hyperattn_cpu_exec &exec = cpu_exec())
{
    hyperattn_diagnosis *const first = std::data(heads);
    const std::size_t count = std::size(heads);
    for (std::size_t head = 0; head < count; ++head) {
        first[head].struct_size = sizeof(hyperattn_diagnosis);
    }
    return boundary::conclude(boundary::with_threads(exec, [&](const hyperattn_cpu_exec &threads) {
        return hyperattn_diagnose(&options, &arguments, &threads, flags, first, count);
    }));
}

// -------------------------------------------------------------------------------------------------------- Workspace

/// Host memory for exec.workspace, aligned as forward() and backward() need it, and freed with the object. Allocates in
/// reserve() only. Calls that run at the same time need one each.
///
///     hyperattn::workspace workspace;
///     workspace.reserve(hyperattn::forward_workspace(params, tensors, exec));
///     exec.workspace = workspace.buffer();
class workspace {
  public:
    workspace() noexcept = default;
    /// Takes the memory; `other` holds none then.
    workspace(workspace &&other) noexcept : held_(std::exchange(other.held_, {})), align_(other.align_) {}
    /// Exchanges the memory of the two.
    workspace &operator=(workspace &&other) noexcept
    {
        std::swap(held_, other.held_);
        std::swap(align_, other.align_);
        return *this;
    }
    ~workspace() { release(); }

    /// Does nothing where the memory suffices; else frees it and allocates anew, so that buffer() changes. Throws
    /// OUT_OF_MEMORY, and then holds nothing.
    HYPERATTN_OUTCOME reserve(const hyperattn_layout &need)
    {
        if (held_.data != nullptr && held_.size >= need.size && align_ >= need.align) {
            return boundary::conclude(HYPERATTN_STATUS_OK);
        }
        release();
        void *const memory_start = ::operator new(need.size, std::align_val_t(need.align), std::nothrow);
        if (memory_start == nullptr) {
#ifdef HYPERATTN_NO_EXCEPTIONS
            return HYPERATTN_STATUS_OUT_OF_MEMORY;
#else
            throw error(HYPERATTN_STATUS_OUT_OF_MEMORY,
                        "a workspace of " + std::to_string(need.size) + " bytes could not be allocated");
#endif
        }
        held_ = {memory_start, need.size};
        align_ = need.align;
        return boundary::conclude(HYPERATTN_STATUS_OK);
    }

    /// Frees the memory.
    void release() noexcept
    {
        if (held_.data != nullptr) {
            ::operator delete(held_.data, std::align_val_t(align_));
        }
        held_ = {};
    }

    /// The memory as a call takes it; {NULL, 0}, which has a call allocate, while nothing is reserved.
    [[nodiscard]] hyperattn_buffer buffer() const noexcept { return held_; }

  private:
    hyperattn_buffer held_ = {};
    std::size_t align_ = 1;
};

// ------------------------------------------------------------------------------------------------------------ Plans

namespace boundary {

/// What a plan of either kind is: the sole owner of what C made.
template <class Plan, hyperattn_status (*Create)(const hyperattn_params *, const hyperattn_tensors *, Plan **),
          void (*Destroy)(Plan *)>
class owned_plan {
  public:
    owned_plan() noexcept = default;
    owned_plan(owned_plan &&other) noexcept : held_(std::exchange(other.held_, nullptr)) {}
    owned_plan &operator=(owned_plan &&other) noexcept
    {
        std::swap(held_, other.held_);
        return *this;
    }
    ~owned_plan() { Destroy(held_); }

    /// Makes the plan; frees the one before on success only.
    HYPERATTN_OUTCOME create(const hyperattn_params &options, const hyperattn_tensors &arguments)
    {
        Plan *made = nullptr;
        const hyperattn_status status = Create(&options, &arguments, &made);
        if (status == HYPERATTN_STATUS_OK) {
            Destroy(std::exchange(held_, made));
        }
        return conclude(status);
    }

    /// C's plan, still owned; NULL while none is made, which every call rejects.
    [[nodiscard]] const Plan *get() const noexcept { return held_; }

  private:
    Plan *held_ = nullptr;
};

} // namespace boundary

/// hyperattn_plan: a call that is checked and divided once and then run many times, by any number of threads at once.
/// Moved, not copied.
///
///     const hyperattn::plan plan(params, tensors); // without exceptions: create()
///     // On thread ith of nth:
///     const std::size_t tasks = plan.task_count();
///     plan.run_tasks(tensors, tasks * ith / nth, tasks * (ith + 1) / nth, workspaces[ith].buffer());
class plan : public boundary::owned_plan<hyperattn_plan, hyperattn_plan_create, hyperattn_plan_destroy> {
  public:
    plan() noexcept = default;
#ifndef HYPERATTN_NO_EXCEPTIONS
    /// hyperattn_plan_create(): the data of arguments are not looked at.
    plan(const hyperattn_params &options, const hyperattn_tensors &arguments) { create(options, arguments); }
#endif

    /// hyperattn_plan_run(): forward() of these tensors.
    HYPERATTN_OUTCOME run(const hyperattn_tensors &arguments, const hyperattn_cpu_exec &exec = cpu_exec()) const
    {
        return boundary::conclude(boundary::with_threads(exec, [&](const hyperattn_cpu_exec &threads) {
            return hyperattn_plan_run(get(), &arguments, &threads);
        }));
    }

    /// How many tasks there are.
    [[nodiscard]] std::size_t task_count() const noexcept { return hyperattn_plan_task_count(get()); }

    /// hyperattn_plan_run_tasks(): runs the tasks from begin up to, but not including, end on this thread.
    HYPERATTN_OUTCOME run_tasks(const hyperattn_tensors &arguments, std::size_t begin, std::size_t end,
                                const hyperattn_buffer &task_workspace = {}) const
    {
        return boundary::conclude(hyperattn_plan_run_tasks(get(), &arguments, begin, end, task_workspace));
    }

#ifdef HYPERATTN_NO_EXCEPTIONS
    /// Size and alignment of the workspace that run() needs; need is written on success only.
    HYPERATTN_OUTCOME run_workspace(const hyperattn_cpu_exec &exec, hyperattn_layout &need) const
    {
        return hyperattn_plan_workspace(get(), &exec, &need);
    }

    /// Size and alignment of the workspace that each thread needs for run_tasks().
    HYPERATTN_OUTCOME task_workspace(hyperattn_layout &need) const
    {
        return hyperattn_plan_task_workspace(get(), &need);
    }
#else
    /// Size and alignment of the workspace that run() needs. Without exceptions a last argument hyperattn_layout & gets
    /// them.
    [[nodiscard]] hyperattn_layout run_workspace(const hyperattn_cpu_exec &exec = cpu_exec()) const
    {
        hyperattn_layout need = {};
        boundary::conclude(hyperattn_plan_workspace(get(), &exec, &need));
        return need;
    }

    /// Size and alignment of the workspace that each thread needs for run_tasks().
    [[nodiscard]] hyperattn_layout task_workspace() const
    {
        hyperattn_layout need = {};
        boundary::conclude(hyperattn_plan_task_workspace(get(), &need));
        return need;
    }
#endif
};

/// hyperattn_cuda_plan: the same for cuda_forward(). Made with a current context, whose kernels it loads. Moved, not
/// copied.
class cuda_plan
    : public boundary::owned_plan<hyperattn_cuda_plan, hyperattn_cuda_plan_create, hyperattn_cuda_plan_destroy> {
  public:
    cuda_plan() noexcept = default;
#ifndef HYPERATTN_NO_EXCEPTIONS
    /// hyperattn_cuda_plan_create(): the data of arguments are not looked at.
    cuda_plan(const hyperattn_params &options, const hyperattn_tensors &arguments) { create(options, arguments); }
#endif

    /// hyperattn_cuda_plan_run(): enqueues cuda_forward() of these tensors.
    HYPERATTN_OUTCOME run(const hyperattn_tensors &arguments, const hyperattn_cuda_exec &exec) const
    {
        return boundary::conclude(hyperattn_cuda_plan_run(get(), &arguments, &exec));
    }

#ifdef HYPERATTN_NO_EXCEPTIONS
    /// Size and alignment of the device memory that run() needs; need is written on success only.
    HYPERATTN_OUTCOME run_workspace(hyperattn_layout &need) const
    {
        return hyperattn_cuda_plan_workspace(get(), &need);
    }
#else
    /// Size and alignment of the device memory that run() needs. Without exceptions an argument hyperattn_layout & gets
    /// them.
    [[nodiscard]] hyperattn_layout run_workspace() const
    {
        hyperattn_layout need = {};
        boundary::conclude(hyperattn_cuda_plan_workspace(get(), &need));
        return need;
    }
#endif
};

} // inline namespace

#undef HYPERATTN_OUTCOME

} // namespace hyperattn

#endif
