#include "threads.h"

#include "ggml.h"

#include <algorithm>
#include <cstddef>

#ifdef _OPENMP

namespace {

uint32_t team_size(void *count)
{
    return *static_cast<const uint32_t *>(count);
}

void run_on_team(void *count, size_t tasks, void (*task)(void *, size_t), void *context)
{
#pragma omp parallel for schedule(dynamic, 1) num_threads(team_size(count))
    for (size_t i = 0; i < tasks; ++i)
        task(context, i);
}

} // namespace

#endif

threads::threads() : count_(GGML_DEFAULT_N_THREADS)
{
#ifdef _OPENMP
    pool_.struct_size = sizeof pool_;
    pool_.ctx = &count_;
    pool_.num_threads = team_size;
    pool_.parallel_for = run_on_team;
#endif
}

void threads::set_count(int count)
{
    count_ = static_cast<uint32_t>(std::max(count, 1));
}

hyperattn_cpu_exec threads::exec() const
{
    hyperattn_cpu_exec exec = {};
    exec.struct_size = sizeof exec;
    exec.num_threads = count_;
#ifdef _OPENMP
    exec.pool = &pool_;
#endif
    return exec;
}
