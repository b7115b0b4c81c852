// Views from pointers, ranges, spans, mdspans, DLTensors: what they describe, what is rejected, that calls take them.
#include "small.hpp"

#include <array>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#if __has_include(<version>)
#include <version>
#endif
#ifdef __cpp_lib_span
#include <span>
#endif
#ifdef __cpp_lib_mdspan
#include <mdspan>
#endif

/// An engine's own half precision.
struct engine_half {
    std::uint16_t bits;
};

template <>
struct hyperattn::dtype_of<engine_half> {
    static constexpr hyperattn_dtype value = HYPERATTN_DTYPE_F16;
};

static bool describes(const hyperattn_tensor &tensor, const void *data, hyperattn_dtype dtype,
                      std::array<std::int64_t, 4> shape, std::array<std::int64_t, 4> stride)
{
    bool same = tensor.data == data && tensor.dtype == dtype && tensor.reserved == 0;
    for (std::size_t i = 0; i < 4; ++i) {
        // The distance between elements of which there is one does not matter.
        same = same && tensor.shape[i] == shape[i] && (shape[i] == 1 || tensor.stride[i] == stride[i]);
    }
    return same;
}

// What may be written, and what outlives the expression, is decided by types.
static_assert(std::is_same_v<decltype(hyperattn::bhsd(static_cast<const float *>(nullptr), 1, 1, 1, 1)),
                             hyperattn::const_view>);
static_assert(std::is_same_v<decltype(hyperattn::bhsd(static_cast<float *>(nullptr), 1, 1, 1, 1)), hyperattn::view>);
static_assert(std::is_convertible_v<hyperattn::view, hyperattn::const_view>);
static_assert(!std::is_constructible_v<hyperattn::view, hyperattn::const_view>);
static_assert(!std::is_convertible_v<hyperattn_tensor, hyperattn::view>);
static_assert(std::is_convertible_v<hyperattn_tensor, hyperattn::const_view>);
static_assert(!hyperattn::detail::outlives_expression<std::vector<float>>);
static_assert(hyperattn::detail::outlives_expression<std::vector<float> &>);

static void pointers()
{
    float data[48] = {};
    engine_half halves[4] = {};
    const float *read_only = data;
    CHECK(describes(hyperattn::bhsd(data, 2, 3, 4, 2), data, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 8, 2, 1}));
    CHECK(describes(hyperattn::bshd(data, 2, 3, 4, 2), data, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 2, 6, 1}));
    CHECK(describes(hyperattn::bshd(read_only, 2, 3, 4, 2), data, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 2, 6, 1}));
    CHECK(describes(hyperattn::bhsd(halves, 1, 1, 2, 2), halves, HYPERATTN_DTYPE_F16, {1, 1, 2, 2}, {4, 4, 2, 1}));
    CHECK(describes(hyperattn::bhsd(halves, HYPERATTN_DTYPE_BF16, 1, 1, 2, 2), halves, HYPERATTN_DTYPE_BF16,
                    {1, 1, 2, 2}, {4, 4, 2, 1}));
    const void *untyped = data;
    CHECK(describes(hyperattn::bshd(untyped, HYPERATTN_DTYPE_F32, 1, 2, 2, 2), data, HYPERATTN_DTYPE_F32, {1, 2, 2, 2},
                    {8, 2, 4, 1}));
    CHECK(describes(hyperattn::strided(read_only, {1, 2, 3, 4}, {0, 12, -4, 1}), data, HYPERATTN_DTYPE_F32,
                    {1, 2, 3, 4}, {0, 12, -4, 1}));
    CHECK(describes(hyperattn::strided(untyped, HYPERATTN_DTYPE_F32, {1, 2, 3, 4}, {0, 0, 4, 1}), data,
                    HYPERATTN_DTYPE_F32, {1, 2, 3, 4}, {0, 0, 4, 1}));
}

/// Two heads side by side in rows of 5, from the last query to the first, and keys that one row serves.
static void strided_by_hand()
{
    small problem;
    const float rows[10] = {0, 1, 2, 0, 99, 1, 0, 0, 0, 99};
    float out[10];
    for (float &value : out) {
        value = -1.0f;
    }
    hyperattn::tensors tensors = problem.tensors();
    tensors.q = hyperattn::strided(rows + 5, {1, 2, 2, 2}, {0, 2, -5, 1});
    tensors.out = hyperattn::strided(out, {1, 2, 2, 2}, {10, 2, 5, 1});
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    for (std::size_t head = 0; head < 2; ++head) {
        for (std::size_t query = 0; query < 2; ++query) {
            for (std::size_t i = 0; i < 2; ++i) {
                const float actual = out[query * 5 + head * 2 + i];
                CHECK_NEAR(static_cast<double>(actual), small_out[head * 4 + query * 2 + i], 1e-5);
            }
        }
    }
    CHECK(out[4] == -1.0f && out[9] == -1.0f);

    tensors = problem.tensors();
    tensors.v = hyperattn::strided(problem.v, {1, 1, 2, 2}, {0, 0, 0, 1});
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    CHECK_NEAR(static_cast<double>(problem.out[6]), 4.0, 1e-5);
}

/// What cannot be made throws, or is a view that calls reject.
template <class Make>
static bool is_rejected(Make make, const char *part)
{
#ifdef HYPERATTN_NO_EXCEPTIONS
    static_cast<void>(part);
    small problem;
    hyperattn::tensors tensors = problem.tensors();
    const hyperattn_tensor made = make();
    tensors.q = made;
    bool rejected = hyperattn::forward(problem.params, tensors) == HYPERATTN_STATUS_INVALID_ARGUMENT;
    tensors = problem.tensors();
    tensors.lse = made;
    rejected = rejected && hyperattn::forward(problem.params, tensors) == HYPERATTN_STATUS_INVALID_ARGUMENT;
    return rejected && std::isnan(problem.out[0]);
#else
    try {
        static_cast<void>(make());
    } catch (const hyperattn::error &error) {
        return error.status() == HYPERATTN_STATUS_INVALID_ARGUMENT && std::strstr(error.what(), part) != nullptr;
    }
    return false;
#endif
}

static void ranges()
{
    std::vector<float> data(24);
    const std::vector<float> &read_only = data;
    static_assert(std::is_same_v<decltype(hyperattn::bhsd(read_only, 1, 1, 1, 1)), hyperattn::const_view>);
    CHECK(describes(hyperattn::bhsd(data, 1, 3, 4, 2), data.data(), HYPERATTN_DTYPE_F32, {1, 3, 4, 2}, {24, 8, 2, 1}));
    CHECK(describes(hyperattn::bshd(read_only, 1, 3, 4, 2), data.data(), HYPERATTN_DTYPE_F32, {1, 3, 4, 2},
                    {24, 2, 6, 1}));
    CHECK(is_rejected([&] { return hyperattn::bhsd(data, 1, 3, 4, 3); }, "24 elements"));
    CHECK(is_rejected([&] { return hyperattn::bshd(data, 2, 3, 4, 2); }, "24 elements"));
    CHECK(is_rejected([&] { return hyperattn::bhsd(data, INT64_MAX, INT64_MAX, INT64_MAX, 64); }, "24 elements"));
    std::vector<float> empty;
    CHECK(is_rejected([&] { return hyperattn::bhsd(empty, 1, 1, 1, 1); }, "0 elements"));
    CHECK(describes(hyperattn::bhsd(empty, 1, 1, 0, 8), empty.data(), HYPERATTN_DTYPE_F32, {1, 1, 0, 8}, {0, 0, 8, 1}));

    CHECK(describes(hyperattn::strided(data, {1, 2, 3, 4}, {0, 12, 4, 1}), data.data(), HYPERATTN_DTYPE_F32,
                    {1, 2, 3, 4}, {0, 12, 4, 1}));
    CHECK(is_rejected([&] { return hyperattn::strided(data, {1, 2, 3, 4}, {0, 13, 4, 1}); }, "24 elements"));
    CHECK(is_rejected([&] { return hyperattn::strided(data, {1, 2, 3, 4}, {0, 4, -4, 1}); }, "24 elements"));
    CHECK(is_rejected([&] { return hyperattn::strided(data, {1, 2, 3, 4}, {0, INT64_MAX, 4, 1}); }, "24 elements"));
}

#ifdef __cpp_lib_span
static void spans()
{
    small problem;
    const std::span<const float> q(problem.q), k(problem.k), v(problem.v);
    static_assert(std::is_same_v<decltype(hyperattn::bhsd(q, 1, 2, 2, 2)), hyperattn::const_view>);
    const hyperattn::tensors tensors(hyperattn::bhsd(q, 1, 2, 2, 2), hyperattn::bhsd(k, 1, 1, 2, 2),
                                     hyperattn::bhsd(v, 1, 1, 2, 2),
                                     hyperattn::bhsd(std::span(problem.out), 1, 2, 2, 2));
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    check_small_out(problem.out.data());
    CHECK(is_rejected([&] { return hyperattn::bhsd(q.first(7), 1, 2, 2, 2); }, "7 elements"));
}
#endif

/// The members of std::mdspan, for libraries that have none. Packed, the last index fastest.
template <class T, std::size_t Rank>
struct packed_mdspan {
    using element_type = T;
    using reference = T &;
    using rank_type = std::size_t;
    using layout_type = void;
    using accessor_type = void;

    T *handle;
    std::size_t extents[Rank];

    static constexpr std::size_t rank() { return Rank; }
    static constexpr bool is_always_strided() { return true; }
    T *const &data_handle() const { return handle; }
    std::size_t extent(std::size_t dimension) const { return extents[dimension]; }
    std::size_t stride(std::size_t dimension) const
    {
        std::size_t product = 1;
        for (std::size_t inner = dimension + 1; inner < Rank; ++inner) {
            product *= extents[inner];
        }
        return product;
    }
};

static void mdspans()
{
    float data[48] = {};
    const packed_mdspan<float, 4> four = {data, {2, 3, 4, 2}};
    const packed_mdspan<const float, 3> three = {data, {3, 4, 2}};
    const packed_mdspan<float, 2> two = {data, {4, 2}};
    static_assert(std::is_same_v<decltype(hyperattn::bhsd(three)), hyperattn::const_view>);
    CHECK(describes(hyperattn::bhsd(four), data, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 8, 2, 1}));
    CHECK(describes(hyperattn::bshd(four), data, HYPERATTN_DTYPE_F32, {2, 4, 3, 2}, {24, 2, 8, 1}));
    CHECK(describes(hyperattn::bhsd(three), data, HYPERATTN_DTYPE_F32, {1, 3, 4, 2}, {0, 8, 2, 1}));
    CHECK(describes(hyperattn::bshd(three), data, HYPERATTN_DTYPE_F32, {1, 4, 3, 2}, {0, 2, 8, 1}));
    CHECK(describes(hyperattn::bhsd(two), data, HYPERATTN_DTYPE_F32, {1, 1, 4, 2}, {0, 0, 2, 1}));

    small problem;
    hyperattn::tensors tensors = problem.tensors();
    tensors.q = hyperattn::bhsd(packed_mdspan<const float, 3>{problem.q.data(), {2, 2, 2}});
    tensors.out = hyperattn::bhsd(packed_mdspan<float, 3>{problem.out.data(), {2, 2, 2}});
    tensors.k = hyperattn::bhsd(packed_mdspan<float, 2>{problem.k.data(), {2, 2}});
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    check_small_out(problem.out.data());

#ifdef __cpp_lib_mdspan
    const std::mdspan packed(data, std::extents<int, 2, 3, 4, 2>());
    CHECK(describes(hyperattn::bhsd(packed), data, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 8, 2, 1}));
    CHECK(describes(hyperattn::bshd(packed), data, HYPERATTN_DTYPE_F32, {2, 4, 3, 2}, {24, 2, 8, 1}));
    const std::mdspan<const float, std::dextents<std::size_t, 2>> rows(data, 6, 8);
    CHECK(describes(hyperattn::bhsd(rows), data, HYPERATTN_DTYPE_F32, {1, 1, 6, 8}, {0, 0, 8, 1}));
#endif
}

// The members of DLPack's structs, under other names.
enum fake_device_type { fake_cpu = 1, fake_cuda = 2, fake_cuda_host = 3, fake_vulkan = 7 };
struct fake_tensor {
    void *data;
    struct {
        fake_device_type device_type;
        std::int32_t device_id;
    } device;
    std::int32_t ndim;
    struct {
        std::uint8_t code, bits;
        std::uint16_t lanes;
    } dtype;
    std::int64_t *shape;
    std::int64_t *strides;
    std::uint64_t byte_offset;
};

static void dltensors()
{
    float data[48] = {};
    std::int64_t shape[4] = {2, 3, 4, 2}, strides[4] = {24, 2, 6, 1}, five[5] = {1, 1, 1, 1, 1};
    fake_tensor tensor = {data, {fake_cpu, 0}, 4, {2, 32, 1}, shape, nullptr, 0};
    CHECK(describes(hyperattn::bhsd(tensor), data, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 8, 2, 1}));
    CHECK(describes(hyperattn::bshd(tensor), data, HYPERATTN_DTYPE_F32, {2, 4, 3, 2}, {24, 2, 8, 1}));
    tensor.strides = strides;
    tensor.byte_offset = 8;
    CHECK(describes(hyperattn::bhsd(tensor), data + 2, HYPERATTN_DTYPE_F32, {2, 3, 4, 2}, {24, 2, 6, 1}));
    tensor.strides = nullptr;
    tensor.ndim = 3;
    tensor.shape = shape + 1;
    tensor.dtype.bits = 16;
    CHECK(describes(hyperattn::bhsd(tensor), data + 2, HYPERATTN_DTYPE_F16, {1, 3, 4, 2}, {0, 8, 2, 1}));
    tensor.dtype.code = 4;
    CHECK(describes(hyperattn::bhsd(tensor), data + 2, HYPERATTN_DTYPE_BF16, {1, 3, 4, 2}, {0, 8, 2, 1}));

    const auto rejected = [&](const char *part, hyperattn::memory where = hyperattn::memory::host) {
        return is_rejected([&] { return hyperattn::bhsd(tensor, where); }, part);
    };
    CHECK(rejected("device_type = 1", hyperattn::memory::cuda));
    tensor.device.device_type = fake_cuda;
    CHECK(rejected("device_type = 2 is not host memory"));
    CHECK(hyperattn::bhsd(tensor, hyperattn::memory::cuda).data == data + 2);
    tensor.device.device_type = fake_vulkan;
    CHECK(rejected("device_type = 7") && rejected("device_type = 7", hyperattn::memory::cuda));
    tensor.device.device_type = fake_cuda_host;
    CHECK(hyperattn::bhsd(tensor).data == hyperattn::bhsd(tensor, hyperattn::memory::cuda).data);
    tensor.dtype.bits = 64;
    CHECK(rejected("code 4"));
    tensor.dtype = {2, 32, 4};
    CHECK(rejected("lanes = 4"));
    tensor.dtype = {2, 32, 1};
    tensor.shape = five;
    tensor.ndim = 5;
    CHECK(rejected("ndim = 5"));
    tensor.ndim = 1;
    CHECK(rejected("ndim = 1"));

    small problem;
    std::int64_t q_shape[3] = {2, 2, 2};
    fake_tensor q = {problem.q.data(), {fake_cpu, 0}, 3, {2, 32, 1}, q_shape, nullptr, 0};
    fake_tensor out = q;
    out.data = problem.out.data();
    hyperattn::tensors tensors = problem.tensors();
    tensors.q = hyperattn::bhsd(q);
    tensors.out = hyperattn::bhsd(out);
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    check_small_out(problem.out.data());
}

void check_views()
{
    pointers();
    strided_by_hand();
    ranges();
#ifdef __cpp_lib_span
    spans();
#endif
    mdspans();
    dltensors();
}
