/* With a workspace given, a forward call allocates nothing. Linked with --wrap for the functions below, so that calls
 * from the library come here. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <hyperattn/hyperattn.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "pool.h"
#include "problem.h"
#include "workspace.h"

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
int __real_posix_memalign(void **memory, size_t align, size_t size);
void *__real_aligned_alloc(size_t align, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);
int __wrap_posix_memalign(void **memory, size_t align, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size);

static long allocations;
/* Allocations that still succeed; after these, none does. */
static long left = LONG_MAX;

/* Counts one allocation; false when it is to fail. */
static bool count(void)
{
    __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
    return __atomic_fetch_sub(&left, 1, __ATOMIC_RELAXED) > 0;
}

static long counted(void)
{
    return __atomic_load_n(&allocations, __ATOMIC_RELAXED);
}

void *__wrap_malloc(size_t size)
{
    return count() ? __real_malloc(size) : NULL;
}

void *__wrap_calloc(size_t number, size_t size)
{
    return count() ? __real_calloc(number, size) : NULL;
}

void *__wrap_realloc(void *memory, size_t size)
{
    return count() ? __real_realloc(memory, size) : NULL;
}

int __wrap_posix_memalign(void **memory, size_t align, size_t size)
{
    return count() ? __real_posix_memalign(memory, align, size) : ENOMEM;
}

void *__wrap_aligned_alloc(size_t align, size_t size)
{
    return count() ? __real_aligned_alloc(align, size) : NULL;
}

static const problem_shape SHAPE = {1, 4, 2, 200, 240, 32, 24};

static hyperattn_params estimator_params(hyperattn_method method, hyperattn_mask mask, hyperattn_residual residual)
{
    hyperattn_params params = problem_params(method, mask);
    params.residual = residual;
    params.min_seq_len = 30;
    params.block_size = 32;
    params.sample_size = 32;
    params.budget = 64;
    params.band = 16;
    return params;
}

/* The counter must count what the library does: without a workspace it has to allocate one. */
static void counter_sees_the_library(problem *p)
{
    check_case("no workspace");
    hyperattn_params params = estimator_params(HYPERATTN_METHOD_PAPER, HYPERATTN_MASK_NONE, 0);
    hyperattn_cpu_exec exec = problem_exec(1);
    long before = counted();
    CHECK_OK(hyperattn_forward(&params, &p->tensors, &exec));
    CHECK(counted() > before);
}

/* Allocations of `calls` calls, after one to warm up. */
static long allocations_of(problem *p, const hyperattn_params *params, hyperattn_cpu_exec exec, int calls)
{
    hyperattn_layout layout = {0, 0};
    CHECK_OK(hyperattn_forward_workspace(params, &p->tensors, &exec, &layout));
    workspace w = workspace_create(layout, 0);
    exec.workspace = w.buffer;
    CHECK_OK(hyperattn_forward(params, &p->tensors, &exec));
    long before = counted();
    int32_t status = HYPERATTN_STATUS_OK;
    for (int i = 0; i < calls; i += 1) {
        status |= hyperattn_forward(params, &p->tensors, &exec);
        hyperattn_layout again;
        status |= hyperattn_forward_workspace(params, &p->tensors, &exec, &again);
    }
    long after = counted();
    CHECK_OK(status);
    workspace_destroy(&w);
    return after - before;
}

static void nothing_with_a_workspace(random_source *source)
{
    worker_pool *workers = worker_pool_create(3);
    hyperattn_threadpool interface = worker_pool_interface(workers);
    for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
        problem p = problem_create(&SHAPE, t, t, ARRAY_BSHD, source);
        problem_want_error(&p);
        counter_sees_the_library(&p);
        for (hyperattn_method method = HYPERATTN_METHOD_AUTO; method <= HYPERATTN_METHOD_REFINED; method += 1) {
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                for (uint32_t residual = 0; residual < 3; residual += 1) {
                    hyperattn_params params = estimator_params(method, mask, residual);
                    params.flags = HYPERATTN_FLAG_NO_ALLOC;
                    check_case("method %u mask %s residual %u %s, one thread", method, mask_name(mask), residual,
                               dtype_name(t));
                    CHECK_INT(allocations_of(&p, &params, problem_exec(1), 3), 0);
                    check_case("method %u mask %s residual %u %s, the caller's pool", method, mask_name(mask), residual,
                               dtype_name(t));
                    hyperattn_cpu_exec exec = problem_exec(0);
                    exec.pool = &interface;
                    CHECK_INT(allocations_of(&p, &params, exec, 3), 0);
                }
            }
        }
        problem_destroy(&p);
    }
    worker_pool_destroy(workers);
}

/* A plan's tasks need nothing but their workspace, and a plan that finds no memory is a status. */
static void plans(random_source *source)
{
    enum { MOST = 200 };
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BSHD, source);
    static const int32_t starts_q[] = {0, 50, 200}, starts_k[] = {0, 100, 240};
    static const hyperattn_method methods[] = {HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_REFINED,
                                               HYPERATTN_METHOD_REFINED};
    p.tensors.num_sequences = 2;
    p.tensors.cu_seqlens_q = starts_q;
    p.tensors.cu_seqlens_k = starts_k;
    hyperattn_params params = estimator_params(HYPERATTN_METHOD_AUTO, HYPERATTN_MASK_NONE, HYPERATTN_RESIDUAL_UNIFORM);
    params.head_methods = methods;
    hyperattn_plan *plan = NULL;
    long granted = 0;
    for (; granted < MOST; granted += 1) {
        check_case("hyperattn_plan_create with %ld allocations", granted);
        left = granted;
        int32_t status = hyperattn_plan_create(&params, &p.tensors, &plan);
        left = LONG_MAX;
        if (status == HYPERATTN_STATUS_OK) {
            break;
        }
        CHECK_STATUS(status, HYPERATTN_STATUS_OUT_OF_MEMORY);
        CHECK(plan == NULL);
    }
    /* Methods, the sequences' queries and keys, the plan. */
    CHECK_INT(granted, 4);
    check_case("tasks");
    hyperattn_layout layout = {0, 0};
    CHECK_OK(hyperattn_plan_task_workspace(plan, &layout));
    workspace w = workspace_create(layout, 0);
    long before = counted();
    CHECK_OK(hyperattn_plan_run_tasks(plan, &p.tensors, 0, hyperattn_plan_task_count(plan), w.buffer));
    CHECK_INT(counted() - before, 0);
    workspace_destroy(&w);
    check_case("no memory for a workspace of tasks");
    problem_poison_outputs(&p);
    left = 0;
    int32_t status = hyperattn_plan_run_tasks(plan, &p.tensors, 0, 1, (hyperattn_buffer){NULL, 0});
    left = LONG_MAX;
    CHECK_STATUS(status, HYPERATTN_STATUS_OUT_OF_MEMORY);
    CHECK(array_untouched(&p.out));
    hyperattn_plan_destroy(plan);
    problem_destroy(&p);
}

/* The library's threads take work from queues that may grow by a block now and then. */
static void at_most_one_a_call_with_own_threads(random_source *source)
{
    enum { CALLS = 100 };
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    for (hyperattn_method method = HYPERATTN_METHOD_EXACT; method <= HYPERATTN_METHOD_REFINED; method += 1) {
        for (uint32_t threads = 0; threads <= 2; threads += 2) {
            check_case("method %u, %u library threads", method, threads);
            hyperattn_params params = estimator_params(method, HYPERATTN_MASK_NONE, HYPERATTN_RESIDUAL_UNIFORM);
            long count_of_all = allocations_of(&p, &params, problem_exec(threads), CALLS);
            printf("method %u, num_threads %u: %ld allocations in %d calls\n", method, threads, count_of_all,
                   (int)CALLS);
            CHECK(count_of_all <= CALLS);
        }
    }
    problem_destroy(&p);
}

/* A caller's mistake must not cost memory either: engines probe with calls that fail. */
static void nothing_for_an_error(random_source *source)
{
    check_case("a failing call");
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, 77);
    CHECK_STATUS(hyperattn_forward(&params, &p.tensors, NULL), HYPERATTN_STATUS_INVALID_ARGUMENT);
    long before = counted();
    for (int i = 0; i < 100; i += 1) {
        CHECK_STATUS(hyperattn_forward(&params, &p.tensors, NULL), HYPERATTN_STATUS_INVALID_ARGUMENT);
    }
    CHECK_INT(counted() - before, 0);
    problem_destroy(&p);
}

/* Where memory runs out, whichever allocation that is: a status, and outputs as they were. */
static void out_of_memory_is_a_status(random_source *source)
{
    enum { HEADS = 4, MOST = 200 };
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_cpu_exec exec = problem_exec(1);
    for (hyperattn_method method = HYPERATTN_METHOD_EXACT; method <= HYPERATTN_METHOD_REFINED; method += 1) {
        hyperattn_params params = estimator_params(method, HYPERATTN_MASK_NONE, HYPERATTN_RESIDUAL_UNIFORM);
        check_case("method %u, no memory for a workspace", method);
        problem_poison_outputs(&p);
        left = 0;
        int32_t status = hyperattn_forward(&params, &p.tensors, &exec);
        left = LONG_MAX;
        CHECK_STATUS(status, HYPERATTN_STATUS_OUT_OF_MEMORY);
        CHECK(array_untouched(&p.out));

        hyperattn_diagnosis heads[HEADS], before[HEADS];
        memset(heads, 0, sizeof heads);
        for (int h = 0; h < HEADS; h += 1) {
            heads[h].struct_size = sizeof heads[h];
        }
        memcpy(before, heads, sizeof heads);
        long granted = 0;
        for (; granted < MOST; granted += 1) {
            check_case("method %u, hyperattn_diagnose with %ld allocations", method, granted);
            left = granted;
            status = hyperattn_diagnose(&params, &p.tensors, &exec, HYPERATTN_DIAGNOSE_TRUE_ERROR, heads, HEADS);
            left = LONG_MAX;
            if (status == HYPERATTN_STATUS_OK) {
                break;
            }
            CHECK_STATUS(status, HYPERATTN_STATUS_OUT_OF_MEMORY);
            CHECK_CONTAINS(hyperattn_last_error(), "could not be allocated");
            CHECK_BYTES(heads, before, sizeof heads);
        }
        /* Outputs, errors, figures, workspaces. */
        CHECK(granted >= 5 && granted < MOST);
    }
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("allocation", argc, argv)};
    nothing_with_a_workspace(&source);
    at_most_one_a_call_with_own_threads(&source);
    nothing_for_an_error(&source);
    out_of_memory_is_a_status(&source);
    plans(&source);
    return check_finish();
}
