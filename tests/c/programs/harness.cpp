// The C API from C++11 and later: exact attention against loops in double precision, with std::thread as the pool.
#include <hyperattn/hyperattn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

static int failures = 0;

static void check(bool passed, const char *what, const std::string &where)
{
    if (!passed) {
        failures += 1;
        std::printf("FAILED: %s [%s] last error: %s\n", what, where.c_str(), hyperattn_last_error());
    }
}

// The header's structs are plain data in C++ too.
static_assert(std::is_trivial<hyperattn_tensors>::value && std::is_standard_layout<hyperattn_tensors>::value, "");
static_assert(std::is_trivial<hyperattn_params>::value && std::is_standard_layout<hyperattn_params>::value, "");
static_assert(std::is_same<hyperattn_status, std::int32_t>::value, "");
static_assert(std::is_same<hyperattn_dtype, std::uint32_t>::value, "");

// Starts its threads for every call: slow, but a pool that an engine might have.
struct ThreadPool {
    std::uint32_t threads;
    std::atomic<unsigned> calls;

    explicit ThreadPool(std::uint32_t count) : threads(count), calls(0) {}

    static std::uint32_t num_threads(void *context) { return static_cast<ThreadPool *>(context)->threads; }

    static void parallel_for(void *context, std::size_t count, void (*task)(void *, std::size_t), void *task_context)
    {
        ThreadPool &pool = *static_cast<ThreadPool *>(context);
        pool.calls += 1;
        std::atomic<std::size_t> next(0);
        auto work = [&] {
            for (std::size_t i = next++; i < count; i = next++) {
                task(task_context, i);
            }
        };
        std::vector<std::thread> workers;
        for (std::uint32_t i = 1; i < pool.threads; ++i) {
            workers.emplace_back(work);
        }
        work();
        for (std::thread &worker : workers) {
            worker.join();
        }
    }

    hyperattn_threadpool view()
    {
        hyperattn_threadpool pool = {};
        pool.struct_size = sizeof pool;
        pool.ctx = this;
        pool.num_threads = num_threads;
        pool.parallel_for = parallel_for;
        return pool;
    }
};

struct Shape {
    std::int64_t batch, heads_q, heads_kv, n_q, n_k, d, d_v;
};

struct Problem {
    Shape s;
    std::vector<float> q, k, v, out, lse;

    Problem(const Shape &shape, std::mt19937_64 &generator) : s(shape)
    {
        std::normal_distribution<float> normal;
        auto fill = [&](std::vector<float> &values, std::int64_t count) {
            values.resize(static_cast<std::size_t>(count));
            for (float &value : values) {
                value = normal(generator);
            }
        };
        fill(q, s.batch * s.heads_q * s.n_q * s.d);
        fill(k, s.batch * s.heads_kv * s.n_k * s.d);
        fill(v, s.batch * s.heads_kv * s.n_k * s.d_v);
        out.assign(static_cast<std::size_t>(s.batch * s.heads_q * s.n_q * s.d_v), NAN);
        lse.assign(static_cast<std::size_t>(s.batch * s.heads_q * s.n_q), NAN);
    }

    hyperattn_tensors tensors()
    {
        hyperattn_tensors t = {};
        t.struct_size = sizeof t;
        t.q = hyperattn_tensor_bhsd(q.data(), HYPERATTN_DTYPE_F32, s.batch, s.heads_q, s.n_q, s.d);
        t.k = hyperattn_tensor_bhsd(k.data(), HYPERATTN_DTYPE_F32, s.batch, s.heads_kv, s.n_k, s.d);
        t.v = hyperattn_tensor_bhsd(v.data(), HYPERATTN_DTYPE_F32, s.batch, s.heads_kv, s.n_k, s.d_v);
        t.out = hyperattn_tensor_bhsd(out.data(), HYPERATTN_DTYPE_F32, s.batch, s.heads_q, s.n_q, s.d_v);
        t.lse = hyperattn_tensor_bhsd(lse.data(), HYPERATTN_DTYPE_F32, s.batch, s.heads_q, s.n_q, 1);
        return t;
    }

    // Relative Frobenius error of out, and the largest error of lse; an empty row must be (0, -inf) exactly.
    void compare(hyperattn_mask mask, double &error, double &lse_error, bool &empty_rows_exact) const
    {
        double difference = 0.0, total = 0.0;
        lse_error = 0.0;
        empty_rows_exact = true;
        std::vector<double> row(static_cast<std::size_t>(s.d_v));
        for (std::int64_t at = 0; at < s.batch * s.heads_q * s.n_q; ++at) {
            const std::int64_t i = at % s.n_q, h = at / s.n_q % s.heads_q, b = at / s.n_q / s.heads_q;
            const std::int64_t head = b * s.heads_kv + h / (s.heads_q / s.heads_kv);
            const std::int64_t last = mask == HYPERATTN_MASK_NONE               ? s.n_k - 1
                                      : mask == HYPERATTN_MASK_CAUSAL_TOP_LEFT ? std::min(i, s.n_k - 1)
                                                                               : i + s.n_k - s.n_q;
            std::vector<double> logits;
            double highest = -INFINITY;
            for (std::int64_t j = 0; j <= last; ++j) {
                double dot = 0.0;
                for (std::int64_t c = 0; c < s.d; ++c) {
                    dot += static_cast<double>(q[static_cast<std::size_t>(at * s.d + c)]) *
                           static_cast<double>(k[static_cast<std::size_t>((head * s.n_k + j) * s.d + c)]);
                }
                logits.push_back(dot / std::sqrt(static_cast<double>(s.d)));
                highest = std::max(highest, logits.back());
            }
            double sum = 0.0;
            std::fill(row.begin(), row.end(), 0.0);
            for (std::size_t j = 0; j < logits.size(); ++j) {
                const double weight = std::exp(logits[j] - highest);
                sum += weight;
                for (std::size_t c = 0; c < row.size(); ++c) {
                    const std::size_t value = static_cast<std::size_t>(head * s.n_k) + j;
                    row[c] += weight * static_cast<double>(v[value * row.size() + c]);
                }
            }
            const double got_lse = static_cast<double>(lse[static_cast<std::size_t>(at)]);
            for (std::size_t c = 0; c < row.size(); ++c) {
                const double got = static_cast<double>(out[static_cast<std::size_t>(at) * row.size() + c]);
                const double want = logits.empty() ? 0.0 : row[c] / sum;
                empty_rows_exact = empty_rows_exact && (!logits.empty() || got == 0.0);
                difference += (got - want) * (got - want);
                total += want * want;
            }
            if (logits.empty()) {
                empty_rows_exact = empty_rows_exact && got_lse == -INFINITY;
            } else if (!(std::fabs(got_lse - highest - std::log(sum)) <= lse_error)) {
                lse_error = std::fabs(got_lse - highest - std::log(sum));
            }
        }
        error = difference == 0.0 ? 0.0 : std::sqrt(difference / total);
    }
};

static void exact_with_a_pool(std::mt19937_64 &generator, ThreadPool &pool)
{
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 64, 64}, {2, 6, 2, 67, 67, 64, 64}, {1, 2, 1, 31, 97, 80, 128},
        {1, 2, 2, 97, 31, 3, 1}, {2, 1, 1, 5, 0, 8, 8},     {1, 1, 1, 211, 211, 256, 256},
    };
    const hyperattn_threadpool view = pool.view();
    for (const Shape &shape : shapes) {
        for (hyperattn_mask mask = 0; mask < 3; ++mask) {
            const std::string where = "n_q " + std::to_string(shape.n_q) + " n_k " + std::to_string(shape.n_k) + " d " +
                                      std::to_string(shape.d) + " mask " + std::to_string(mask);
            Problem problem(shape, generator);
            hyperattn_params params;
            hyperattn_params_init(&params, sizeof params);
            params.method = HYPERATTN_METHOD_EXACT;
            params.mask = mask;
            hyperattn_cpu_exec exec = {};
            exec.struct_size = sizeof exec;
            exec.pool = &view;
            hyperattn_tensors tensors = problem.tensors();
            check(hyperattn_forward(&params, &tensors, &exec) == HYPERATTN_STATUS_OK, "forward", where);
            double error = NAN, lse_error = NAN;
            bool empty_rows_exact = false;
            problem.compare(mask, error, lse_error, empty_rows_exact);
            check(error < 5e-6, "relative error below 5e-6", where);
            check(lse_error < 1e-4, "lse within 1e-4", where);
            check(empty_rows_exact, "empty rows are (0, -inf)", where);
        }
    }
    check(pool.calls > 0, "the pool was used", "exact_with_a_pool");
}

// The estimator: the pool, the library's threads and one thread agree bit by bit, with a workspace from a vector.
static void estimator_is_the_same_everywhere(std::mt19937_64 &generator, ThreadPool &pool)
{
    const Shape shape = {1, 4, 2, 500, 500, 64, 64};
    const hyperattn_threadpool view = pool.view();
    Problem problem(shape, generator);
    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    params.method = HYPERATTN_METHOD_PAPER;
    params.min_seq_len = 0;
    params.block_size = 64;
    params.sample_size = 64;
    hyperattn_tensors tensors = problem.tensors();
    std::vector<float> first;
    for (int way = 0; way < 4; ++way) {
        const std::string where = "way " + std::to_string(way);
        hyperattn_cpu_exec exec = {};
        exec.struct_size = sizeof exec;
        exec.num_threads = way == 0 ? 1 : 0;
        exec.pool = way == 2 ? &view : nullptr;
        std::vector<unsigned char> memory;
        if (way == 3) {
            hyperattn_layout layout = {};
            check(hyperattn_forward_workspace(&params, &tensors, &exec, &layout) == HYPERATTN_STATUS_OK, "workspace", where);
            memory.resize(layout.size + layout.align);
            std::size_t room = memory.size();
            void *start = memory.data();
            exec.workspace.data = std::align(layout.align, layout.size, start, room);
            exec.workspace.size = layout.size;
        }
        std::fill(problem.out.begin(), problem.out.end(), NAN);
        check(hyperattn_forward(&params, &tensors, &exec) == HYPERATTN_STATUS_OK, "forward", where);
        if (way == 0) {
            first = problem.out;
        }
        check(std::memcmp(first.data(), problem.out.data(), first.size() * sizeof(float)) == 0, "same bits", where);
    }
}

int main(int argc, char **argv)
{
    const unsigned long long seed = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 20231009ULL;
    std::printf("harness: seed %llu, C++ %ld\n", seed, static_cast<long>(__cplusplus));
    std::mt19937_64 generator(seed);
    ThreadPool pool(3);
    exact_with_a_pool(generator, pool);
    estimator_is_the_same_everywhere(generator, pool);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
