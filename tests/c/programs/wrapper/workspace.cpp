// class workspace: size, alignment, growth, errors.
#include "small.hpp"

#include <cstdint>

static hyperattn_layout need_of(large &problem, const hyperattn::cpu_exec &exec)
{
    hyperattn_layout need = {};
#ifdef HYPERATTN_NO_EXCEPTIONS
    CHECK_OK(hyperattn::forward_workspace(problem.params, problem.tensors(), exec, need));
#else
    need = hyperattn::forward_workspace(problem.params, problem.tensors(), exec);
#endif
    return need;
}

static void forward_allocates_nothing()
{
    large problem;
    problem.params.flags = HYPERATTN_FLAG_NO_ALLOC;
    hyperattn::cpu_exec exec;
    exec.num_threads = 1;
    const hyperattn_layout need = need_of(problem, exec);
    hyperattn::workspace workspace;
    CHECK(workspace.buffer().data == nullptr && workspace.buffer().size == 0);
    CHECK_OK(workspace.reserve(need));
    exec.workspace = workspace.buffer();
    CHECK(exec.workspace.size == need.size);
    CHECK(reinterpret_cast<std::uintptr_t>(exec.workspace.data) % need.align == 0);
    CHECK_OK(hyperattn::forward(problem.params, problem.tensors(), exec));
    CHECK(problem.complete());
    exec.workspace.size -= 1;
    CHECK_FAILS(hyperattn::forward(problem.params, problem.tensors(), exec), HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
                "workspace");
}

static void grows()
{
    hyperattn::workspace workspace;
    CHECK_OK(workspace.reserve({1000, 64}));
    const void *first = workspace.buffer().data;
    CHECK_OK(workspace.reserve({900, 16}));
    CHECK(workspace.buffer().data == first && workspace.buffer().size == 1000);
    CHECK_OK(workspace.reserve({10, 4096}));
    CHECK(reinterpret_cast<std::uintptr_t>(workspace.buffer().data) % 4096 == 0);
    std::memset(workspace.buffer().data, 1, workspace.buffer().size);

    const void *held = workspace.buffer().data;
    hyperattn::workspace moved(std::move(workspace));
    CHECK(moved.buffer().data == held);
    hyperattn::workspace assigned;
    assigned = std::move(moved);
    CHECK(assigned.buffer().data == held);
    assigned.release();
    CHECK(assigned.buffer().data == nullptr && assigned.buffer().size == 0);

    const result impossible = result_of([&] { return assigned.reserve({SIZE_MAX / 2, 64}); });
    CHECK(impossible.status == HYPERATTN_STATUS_OUT_OF_MEMORY);
    CHECK(assigned.buffer().data == nullptr && assigned.buffer().size == 0);
}

#ifndef HYPERATTN_NO_EXCEPTIONS
static void query_throws()
{
    large problem;
    hyperattn::tensors tensors = problem.tensors();
    tensors.q.shape[1] = 3;
    CHECK_FAILS(hyperattn::forward_workspace(problem.params, tensors), HYPERATTN_STATUS_INVALID_ARGUMENT,
                "out.shape[1] = 4 but q.shape[1] = 3");
}
#endif

void check_workspace()
{
    forward_allocates_nothing();
    grows();
#ifndef HYPERATTN_NO_EXCEPTIONS
    query_throws();
#endif
}
