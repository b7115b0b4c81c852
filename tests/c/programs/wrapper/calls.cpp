// forward, merge, diagnose and the CUDA calls: results and errors.
#include "small.hpp"

#include <array>
#include <type_traits>

static_assert(std::is_same_v<decltype(hyperattn::params::method), hyperattn_method>, "fields are C's");
static_assert(std::is_base_of_v<hyperattn_params, hyperattn::params>, "params is C's struct");
static_assert(!std::is_constructible_v<hyperattn::cpu_exec, hyperattn_threadpool>, "a temporary pool is rejected");

static void defaults()
{
    hyperattn_params expected = {};
    hyperattn_params_init(&expected, sizeof expected);
    const hyperattn::params params;
    CHECK(std::memcmp(static_cast<const hyperattn_params *>(&params), &expected, sizeof expected) == 0);
    CHECK(hyperattn::tensors().struct_size == sizeof(hyperattn_tensors));
    CHECK(hyperattn::tensors().lse.data == nullptr);
    CHECK(hyperattn::cpu_exec().struct_size == sizeof(hyperattn_cpu_exec));
    CHECK(hyperattn::block_mask().struct_size == sizeof(hyperattn_block_mask));
    int stream = 0;
    const hyperattn::cuda_exec cuda(&stream, {&stream, 16});
    CHECK(cuda.struct_size == sizeof(hyperattn_cuda_exec));
    CHECK(static_cast<const void *>(cuda.stream) == &stream && cuda.workspace.data == &stream);
    CHECK(cuda.workspace.size == 16 && hyperattn::cuda_exec().stream == nullptr);
}

static void by_hand()
{
    small problem;
    CHECK_OK(hyperattn::forward(problem.params, problem.tensors()));
    check_small_out(problem.out.data());
    check_small_lse(problem.lse.data());
}

static void causal_by_hand()
{
    small problem;
    problem.params.mask = HYPERATTN_MASK_CAUSAL_TOP_LEFT;
    CHECK_OK(hyperattn::forward(problem.params, problem.tensors()));
    // The first query of each head sees the first key only.
    const double expected[8] = {4.0, 0.0, 1.0, 6.0, 4.0, 0.0, 3.6, 0.8};
    for (std::size_t i = 0; i < 8; ++i) {
        CHECK_NEAR(static_cast<double>(problem.out[i]), expected[i], 1e-5);
    }
}

/// The causal mask above as numbers, and one that adds to a weight, from a span of constants.
static void masked_by_hand()
{
    small problem;
    const std::vector<float> causal = {0, -INFINITY, 0, 0};
    hyperattn::tensors tensors = problem.tensors();
    CHECK(tensors.mask.data == nullptr);
    CHECK_OK(hyperattn::forward(problem.params, tensors.with_mask(hyperattn::bhsd(causal, 1, 1, 2, 2))));
    const double expected[8] = {4.0, 0.0, 1.0, 6.0, 4.0, 0.0, 3.6, 0.8};
    for (std::size_t i = 0; i < 8; ++i) {
        CHECK_NEAR(static_cast<double>(problem.out[i]), expected[i], 1e-5);
    }
    // Of the first head alone: weights (1/2, 1/2) and (1/10, 9/10).
    const float added[] = {0, std::log(3.0f), 0, 0};
    CHECK_OK(hyperattn::forward(problem.params, problem.tensors().with_mask(
                                                    hyperattn::strided(added, {1, 2, 2, 2}, {0, 2, 0, 1}))));
    CHECK_NEAR(static_cast<double>(problem.out[0]), 2.0, 1e-5);
    CHECK_NEAR(static_cast<double>(problem.out[3]), 7.2, 1e-5);
    CHECK_NEAR(static_cast<double>(problem.out[6]), 3.6, 1e-5);
    problem.params.method = HYPERATTN_METHOD_REFINED;
    CHECK_FAILS(hyperattn::forward(problem.params, tensors), HYPERATTN_STATUS_UNSUPPORTED, "tensors.mask");
}

/// The loss is the first output of the first head: of the weights 3/4 and 1/4 of 4 and 0.
static void backward_by_hand()
{
    small problem;
    std::vector<float> dout(8, 0.0f), dq(8, NAN), dk(4, NAN), dv(4, NAN);
    dout[0] = 1.0f;
    const hyperattn::tensors tensors = problem.tensors();
    const hyperattn::grads grads(hyperattn::bhsd(dout, 1, 2, 2, 2), hyperattn::bhsd(dq, 1, 2, 2, 2),
                                 hyperattn::bhsd(dk, 1, 1, 2, 2), hyperattn::bhsd(dv, 1, 1, 2, 2));
    CHECK(grads.struct_size == sizeof(hyperattn_grads) && grads.dlse.data == nullptr);
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    CHECK_OK(hyperattn::backward(problem.params, tensors, grads));
    const double slope = 0.75 * std::log(3.0);
    const double expected_dq[8] = {slope, -slope, 0, 0, 0, 0, 0, 0};
    const double expected_dk[4] = {slope, 0, -slope, 0}, expected_dv[4] = {0.75, 0, 0.25, 0};
    for (std::size_t i = 0; i < 8; ++i) {
        CHECK_NEAR(static_cast<double>(dq[i]), expected_dq[i], 1e-5);
    }
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK_NEAR(static_cast<double>(dk[i]), expected_dk[i], 1e-5);
        CHECK_NEAR(static_cast<double>(dv[i]), expected_dv[i], 1e-5);
    }
    hyperattn::cpu_exec exec;
    exec.num_threads = 1;
    problem.params.flags = HYPERATTN_FLAG_NO_ALLOC;
    CHECK_FAILS(hyperattn::backward(problem.params, tensors, grads, exec), HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
                "workspace");
    hyperattn_layout need = {};
#ifdef HYPERATTN_NO_EXCEPTIONS
    CHECK_OK(hyperattn::backward_workspace(problem.params, tensors, exec, need));
#else
    need = hyperattn::backward_workspace(problem.params, tensors, exec);
#endif
    hyperattn::workspace workspace;
    CHECK_OK(workspace.reserve(need));
    exec.workspace = workspace.buffer();
    CHECK_OK(hyperattn::backward(problem.params, tensors, grads, exec));
}

/// C's structs are accepted where the wrapper's are.
static void from_c_structs()
{
    small problem;
    const hyperattn_params params = problem.params;
    hyperattn_tensors tensors = problem.tensors();
    hyperattn_cpu_exec exec = {};
    exec.struct_size = sizeof exec;
    exec.num_threads = 1;
    CHECK_OK(hyperattn::forward(params, tensors, exec));
    check_small_out(problem.out.data());
    exec.struct_size = 1;
    CHECK_FAILS(hyperattn::forward(params, tensors, exec), HYPERATTN_STATUS_ABI_MISMATCH, "struct_size");
}

static void errors()
{
    small problem;
    hyperattn::tensors tensors = problem.tensors();
    tensors.k = hyperattn::bhsd(problem.k, 1, 1, 4, 1);
    CHECK_FAILS(hyperattn::forward(problem.params, tensors), HYPERATTN_STATUS_INVALID_ARGUMENT,
                "k.shape[3] = 1 but q.shape[3] = 2");
    tensors = problem.tensors();
    tensors.out = hyperattn_tensor{};
    CHECK_FAILS(hyperattn::forward(problem.params, tensors), HYPERATTN_STATUS_INVALID_ARGUMENT, "out.dtype = 0");
    problem.params.flags = HYPERATTN_FLAG_NO_ALLOC;
    CHECK_FAILS(hyperattn::forward(problem.params, problem.tensors()), HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
                "workspace");
    CHECK(std::isnan(problem.out[0]));
}

/// The two keys in two calls, joined.
static void merge()
{
    small problem;
    small part;
    const auto over_key = [](small &from, std::size_t key) {
        return hyperattn::tensors(hyperattn::bhsd(from.q, 1, 2, 2, 2), hyperattn::bhsd(&from.k[2 * key], 1, 1, 1, 2),
                                  hyperattn::bhsd(&from.v[2 * key], 1, 1, 1, 2), hyperattn::bhsd(from.out, 1, 2, 2, 2),
                                  hyperattn::bhsd(from.lse, 1, 2, 2, 1));
    };
    CHECK_OK(hyperattn::forward(problem.params, over_key(problem, 0)));
    CHECK_OK(hyperattn::forward(part.params, over_key(part, 1)));
    const std::vector<float> &part_out = part.out, &part_lse = part.lse;
    CHECK_OK(hyperattn::merge(hyperattn::bhsd(problem.out, 1, 2, 2, 2), hyperattn::bhsd(problem.lse, 1, 2, 2, 1),
                              hyperattn::bhsd(part_out, 1, 2, 2, 2), hyperattn::bhsd(part_lse, 1, 2, 2, 1)));
    check_small_out(problem.out.data());
    check_small_lse(problem.lse.data());
    CHECK_FAILS(hyperattn::merge(hyperattn::bhsd(problem.out, 1, 2, 2, 2), hyperattn::bhsd(problem.lse, 1, 2, 2, 1),
                                 hyperattn::bhsd(part_out, 1, 1, 2, 2), hyperattn::bhsd(part_lse, 1, 2, 2, 1)),
                HYPERATTN_STATUS_INVALID_ARGUMENT, "out_b");
}

static void diagnose()
{
    small problem;
    std::vector<hyperattn_diagnosis> heads(2);
    CHECK_OK(hyperattn::diagnose(problem.params, problem.tensors(), heads, HYPERATTN_DIAGNOSE_TRUE_ERROR));
    CHECK_NEAR(heads[1].keys_per_query, 2.0, 0.0);
    CHECK_NEAR(heads[0].captured_mass, 1.0, 0.0);
    CHECK_NEAR(heads[0].true_error, 0.0, 1e-6);
    // Weights (3/4, 1/4) and (1/4, 3/4): both columns have the squared norm 10/16.
    CHECK_NEAR(heads[0].alpha, 2.0 * 10.0 / 16.0, 1e-6);
    hyperattn_diagnosis array[2] = {};
    CHECK_OK(hyperattn::diagnose(problem.params, problem.tensors(), array));
    CHECK(array[1].struct_size == sizeof(hyperattn_diagnosis) && std::isnan(array[1].true_error));
    std::array<hyperattn_diagnosis, 1> too_few = {};
    CHECK_FAILS(hyperattn::diagnose(problem.params, problem.tensors(), too_few), HYPERATTN_STATUS_INVALID_ARGUMENT,
                "count");
}

/// Whatever this machine has: host memory never becomes a result of a CUDA call without a device, and wrong arguments
/// are told before a device is looked for.
static void cuda()
{
    small problem;
    hyperattn::tensors wrong = problem.tensors();
    wrong.k = hyperattn::bhsd(problem.k, 1, 1, 4, 1);
    const result without_device = result_of([&] {
        return hyperattn::cuda_forward(problem.params, wrong, nullptr);
    });
    CHECK(without_device.status != HYPERATTN_STATUS_OK && !without_device.sentence.empty());
    const result with_exec = result_of([&] {
        return hyperattn::cuda_forward(problem.params, wrong, hyperattn::cuda_exec(nullptr));
    });
    CHECK(with_exec.status == without_device.status && with_exec.sentence == without_device.sentence);
    CHECK(std::isnan(problem.out[0]));

    hyperattn_layout expected = {};
    const hyperattn::tensors tensors = problem.tensors();
    const hyperattn_status status = hyperattn_cuda_forward_workspace(&problem.params, &tensors, &expected);
    hyperattn_layout need = {};
#ifdef HYPERATTN_NO_EXCEPTIONS
    const result queried =
        result_of([&] { return hyperattn::cuda_forward_workspace(problem.params, tensors, need); });
#else
    const result queried = result_of([&] {
        need = hyperattn::cuda_forward_workspace(problem.params, tensors);
        return 0;
    });
#endif
    CHECK(queried.status == status && need.size == expected.size && need.align == expected.align);
}

void check_calls()
{
    defaults();
    by_hand();
    causal_by_hand();
    masked_by_hand();
    backward_by_hand();
    from_c_structs();
    errors();
    merge();
    diagnose();
    cuda();
}
