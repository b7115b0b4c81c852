// thread_pool: callables of several kinds, and where what they throw goes.
#include "small.hpp"

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

/// Starts its threads for every call: slow, but as an engine's pool behaves.
struct engine_threads {
    std::atomic<std::size_t> tasks{0};

    void operator()(std::size_t count, hyperattn::task task)
    {
        std::atomic<std::size_t> next{0};
        const auto work = [&] {
            for (std::size_t i = next++; i < count; i = next++) {
                task(i);
                tasks += 1;
            }
        };
        std::thread other(work);
        work();
        other.join();
    }
};

static void callables()
{
    large problem;
    engine_threads engine;
    hyperattn::thread_pool by_reference(2, std::ref(engine));
    CHECK_OK(hyperattn::forward(problem.params, problem.tensors(), hyperattn::cpu_exec(by_reference)));
    CHECK(problem.complete() && engine.tasks > 1);

    large again;
    std::size_t calls = 0;
    hyperattn::thread_pool backwards(3, [&calls](std::size_t count, hyperattn::task task) {
        calls += 1;
        for (std::size_t i = count; i > 0; --i) {
            task(i - 1);
        }
    });
    CHECK_OK(hyperattn::forward(again.params, again.tensors(), hyperattn::cpu_exec(backwards)));
    CHECK(again.complete() && calls > 0);
    CHECK(std::memcmp(again.out.data(), problem.out.data(), again.out.size() * sizeof(float)) == 0);

    std::vector<hyperattn_diagnosis> heads(4);
    calls = 0;
    CHECK_OK(hyperattn::diagnose(again.params, again.tensors(), heads, 0, hyperattn::cpu_exec(backwards)));
    CHECK(calls > 0);

    std::function<void(std::size_t, hyperattn::task)> function = std::ref(engine);
    hyperattn::thread_pool<decltype(function)> erased(2, function);
    CHECK_OK(hyperattn::forward(again.params, again.tensors(), hyperattn::cpu_exec(erased)));

    auto owned = std::make_unique<engine_threads>();
    engine_threads &inside = *owned;
    hyperattn::thread_pool move_only(2, [held = std::move(owned)](std::size_t count, hyperattn::task task) {
        (*held)(count, task);
    });
    CHECK_OK(hyperattn::forward(again.params, again.tensors(), hyperattn::cpu_exec(move_only)));
    CHECK(inside.tasks > 0);

    // C functions take it too.
    const hyperattn::tensors tensors = again.tensors();
    const hyperattn::cpu_exec exec(backwards);
    calls = 0;
    CHECK(hyperattn_forward(&again.params, &tensors, &exec) == HYPERATTN_STATUS_OK && calls > 0);
}

static void bad_pools()
{
    large problem;
    hyperattn::thread_pool lazy(2, [](std::size_t, hyperattn::task) {});
    CHECK_FAILS(hyperattn::forward(problem.params, problem.tensors(), hyperattn::cpu_exec(lazy)),
                HYPERATTN_STATUS_INVALID_ARGUMENT, "");
    hyperattn::thread_pool none(0, [](std::size_t, hyperattn::task) {});
    CHECK_FAILS(hyperattn::forward(problem.params, problem.tensors(), hyperattn::cpu_exec(none)),
                HYPERATTN_STATUS_INVALID_ARGUMENT, "num_threads");
}

#ifndef HYPERATTN_NO_EXCEPTIONS
struct interrupted {
    std::size_t after;
};

/// What the callable throws reaches the caller as it is, wherever it is thrown.
static void thrown()
{
    for (const bool run_first : {false, true}) {
        large problem;
        std::size_t calls = 0;
        hyperattn::thread_pool pool(2, [&](std::size_t count, hyperattn::task task) {
            calls += 1;
            for (std::size_t i = 0; run_first && i < count; ++i) {
                task(i);
            }
            throw interrupted{calls};
        });
        bool caught = false;
        try {
            hyperattn::forward(problem.params, problem.tensors(), hyperattn::cpu_exec(pool));
        } catch (const interrupted &exception) {
            caught = exception.after == 1;
        }
        // The callable is not called again once it has thrown.
        CHECK(caught && calls == 1);
        std::vector<hyperattn_diagnosis> heads(4);
        caught = false;
        try {
            hyperattn::diagnose(problem.params, problem.tensors(), heads, 0, hyperattn::cpu_exec(pool));
        } catch (const interrupted &) {
            caught = true;
        }
        CHECK(caught);
        // Nothing stays behind.
        CHECK_OK(hyperattn::forward(problem.params, problem.tensors()));
        CHECK(problem.complete());
    }
}

/// Two threads, one pool: each gets its own exception.
static void thrown_on_two_threads()
{
    hyperattn::thread_pool pool(2, [](std::size_t, hyperattn::task) { throw std::this_thread::get_id(); });
    std::atomic<int> right{0};
    const auto work = [&] {
        large problem;
        for (int round = 0; round < 50; ++round) {
            try {
                hyperattn::forward(problem.params, problem.tensors(), hyperattn::cpu_exec(pool));
            } catch (const std::thread::id &thread) {
                right += thread == std::this_thread::get_id() ? 1 : 0;
            }
        }
    };
    std::thread other(work);
    work();
    other.join();
    CHECK(right == 100);
}
#endif

void check_threads()
{
    callables();
    bad_pools();
#ifndef HYPERATTN_NO_EXCEPTIONS
    thrown();
    thrown_on_two_threads();
#endif
}
