// Plans, sequences and methods of heads: results and errors.
#include "small.hpp"

#include <array>
#include <thread>
#include <type_traits>

static_assert(!std::is_copy_constructible_v<hyperattn::plan> && !std::is_copy_assignable_v<hyperattn::plan>,
              "a plan has one owner");
static_assert(std::is_nothrow_move_constructible_v<hyperattn::plan>, "a plan moves");
static_assert(std::is_nothrow_move_constructible_v<hyperattn::cuda_plan>, "a plan moves");

static hyperattn_layout task_workspace_of(const hyperattn::plan &plan)
{
    hyperattn_layout need = {};
#ifdef HYPERATTN_NO_EXCEPTIONS
    CHECK_OK(plan.task_workspace(need));
#else
    need = plan.task_workspace();
#endif
    return need;
}

static hyperattn_layout run_workspace_of(const hyperattn::plan &plan, const hyperattn::cpu_exec &exec)
{
    hyperattn_layout need = {};
#ifdef HYPERATTN_NO_EXCEPTIONS
    CHECK_OK(plan.run_workspace(exec, need));
#else
    need = plan.run_workspace(exec);
#endif
    return need;
}

/// Two threads share a plan, each with a share of the tasks and a workspace of its own.
static void tasks_on_threads()
{
    large problem;
    const hyperattn::tensors tensors = problem.tensors();
    hyperattn::plan made;
    CHECK_OK(made.create(problem.params, tensors));
    const hyperattn::plan plan = std::move(made);
    CHECK(made.get() == nullptr && made.task_count() == 0 && plan.task_count() > 1);
    constexpr std::size_t nth = 2;
    std::array<hyperattn::workspace, nth> workspaces;
    std::array<result, nth> results;
    std::array<std::thread, nth> threads;
    for (std::size_t ith = 0; ith < nth; ++ith) {
        CHECK_OK(workspaces[ith].reserve(task_workspace_of(plan)));
        threads[ith] = std::thread([&, ith] {
            const std::size_t tasks = plan.task_count();
            results[ith] = result_of([&] {
                return plan.run_tasks(tensors, tasks * ith / nth, tasks * (ith + 1) / nth, workspaces[ith].buffer());
            });
        });
    }
    for (std::size_t ith = 0; ith < nth; ++ith) {
        threads[ith].join();
        CHECK(results[ith].status == HYPERATTN_STATUS_OK);
    }
    CHECK(problem.complete());
}

static void whole_plans()
{
    large problem;
    hyperattn::plan plan;
    CHECK_OK(plan.create(problem.params, problem.tensors()));
    hyperattn::cpu_exec exec;
    hyperattn::workspace workspace;
    CHECK_OK(workspace.reserve(run_workspace_of(plan, exec)));
    exec.workspace = workspace.buffer();
    CHECK_OK(plan.run(problem.tensors(), exec));
    CHECK(problem.complete());
    // What was held before goes only when there is something new.
    const hyperattn_plan *const before = plan.get();
    problem.params.lsh_num_projs = 99;
    CHECK_FAILS(plan.create(problem.params, problem.tensors()), HYPERATTN_STATUS_INVALID_ARGUMENT, "lsh_num_projs");
    CHECK(plan.get() == before);
    CHECK_FAILS(plan.run_tasks(problem.tensors(), 0, plan.task_count() + 1), HYPERATTN_STATUS_INVALID_ARGUMENT, "end");
    small other;
    CHECK_FAILS(plan.run(other.tensors()), HYPERATTN_STATUS_INVALID_ARGUMENT, "q.shape[1] = 2");
    CHECK_FAILS(hyperattn::plan().run(other.tensors()), HYPERATTN_STATUS_INVALID_ARGUMENT, "plan is NULL");
}

static void sequences()
{
    small problem;
    hyperattn::tensors tensors = problem.tensors();
    // Each query sees one key: its value is the output, and its logit the sum's logarithm.
    const std::vector<std::int32_t> starts = {0, 1, 2};
    tensors.set_sequences(starts, starts);
    CHECK(tensors.num_sequences == 2);
    CHECK_OK(hyperattn::forward(problem.params, tensors));
    const double expected[8] = {4, 0, 0, 8, 4, 0, 0, 8};
    const double lse[4] = {std::log(3.0), std::log(3.0), 0.0, 0.0};
    for (std::size_t i = 0; i < 8; ++i) {
        CHECK_NEAR(static_cast<double>(problem.out[i]), expected[i], 1e-5);
    }
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK_NEAR(static_cast<double>(problem.lse[i]), lse[i], 1e-5);
    }
    const std::int32_t one[] = {0, 2};
    tensors.set_sequences(starts, one);
    CHECK_FAILS(hyperattn::forward(problem.params, tensors), HYPERATTN_STATUS_INVALID_ARGUMENT, "num_sequences");
}

static void head_methods()
{
    small problem;
    problem.params.method = HYPERATTN_METHOD_PAPER;
    const hyperattn_method methods[] = {HYPERATTN_METHOD_EXACT, 77};
    problem.params.set_head_methods(methods);
    CHECK_FAILS(hyperattn::forward(problem.params, problem.tensors()), HYPERATTN_STATUS_INVALID_ARGUMENT,
                "head_methods[1] = 77");
    const std::vector<hyperattn_method> exact(2, HYPERATTN_METHOD_EXACT);
    problem.params.set_head_methods(exact);
    CHECK_OK(hyperattn::forward(problem.params, problem.tensors()));
    check_small_out(problem.out.data());
}

/// Wrong arguments are told before a device is looked for.
static void cuda_plans()
{
    small problem;
    hyperattn::tensors wrong = problem.tensors();
    wrong.k = hyperattn::bhsd(problem.k, 1, 1, 4, 1);
    hyperattn::cuda_plan plan;
    CHECK_FAILS(plan.create(problem.params, wrong), HYPERATTN_STATUS_INVALID_ARGUMENT, "k.shape[3]");
    CHECK_FAILS(plan.run(problem.tensors(), hyperattn::cuda_exec()), HYPERATTN_STATUS_INVALID_ARGUMENT, "plan is NULL");
}

void check_plans()
{
    tasks_on_threads();
    whole_plans();
    sequences();
    head_methods();
    cuda_plans();
}
