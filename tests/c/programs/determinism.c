/* One seed, one result: bitwise the same for every number of threads, pool and workspace. */
#include <dirent.h>
#include <hyperattn/hyperattn.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "pool.h"
#include "problem.h"
#include "workspace.h"

typedef struct variant {
    const char *name;
    hyperattn_method method;
    hyperattn_residual residual;
    float target_error;
} variant;

static const variant VARIANTS[] = {
    {"exact", HYPERATTN_METHOD_EXACT, HYPERATTN_RESIDUAL_UNIFORM, 0.05f},
    {"auto", HYPERATTN_METHOD_AUTO, HYPERATTN_RESIDUAL_UNIFORM, 0.05f},
    {"paper uniform", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_UNIFORM, 0.0f},
    {"paper row-norm", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_ROW_NORM, 0.0f},
    {"paper blocks", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_NONE, 0.0f},
    {"refined", HYPERATTN_METHOD_REFINED, HYPERATTN_RESIDUAL_UNIFORM, 0.0f},
    /* About where the heads of these inputs lie, so that some keep their budget and others do not. */
    {"refined to a target", HYPERATTN_METHOD_REFINED, HYPERATTN_RESIDUAL_UNIFORM, 0.6f},
};
enum { VARIANT_COUNT = sizeof VARIANTS / sizeof VARIANTS[0] };

static const problem_shape SHAPE = {2, 6, 2, 150, 210, 32, 24};

static hyperattn_params variant_params(const variant *v, hyperattn_mask mask)
{
    hyperattn_params params = problem_params(v->method, mask);
    params.residual = v->residual;
    params.min_seq_len = 60;
    params.block_size = 32;
    params.sample_size = 48;
    params.budget = 64;
    params.num_first_keys = 4;
    params.band = 16;
    params.target_error = v->target_error;
    params.seed = 11;
    return params;
}

/* The number of threads of this process; -1 where the system does not say. */
static int count_threads(void)
{
    DIR *directory = opendir("/proc/self/task");
    if (directory == NULL) {
        return -1;
    }
    int count = 0;
    for (struct dirent *entry = readdir(directory); entry != NULL; entry = readdir(directory)) {
        count += entry->d_name[0] != '.';
    }
    closedir(directory);
    return count;
}

/* Must come first: once a call has used the library's threads, they stay. */
static void one_thread_and_a_pool_start_no_thread(random_source *source)
{
    check_case("threads of the process");
    int before = count_threads();
    if (before < 0) {
        printf("SKIPPED: no /proc/self/task on this system\n");
        return;
    }
    CHECK_INT(before, 1);
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    reverse_pool own = {4, 0};
    hyperattn_threadpool interface = reverse_pool_interface(&own);
    for (int v = 0; v < VARIANT_COUNT; v += 1) {
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            hyperattn_params params = variant_params(&VARIANTS[v], mask);
            hyperattn_cpu_exec exec = problem_exec(1);
            CHECK_OK(hyperattn_forward(&params, &p.tensors, &exec));
            CHECK_INT(count_threads(), before);
            exec.num_threads = 0;
            exec.pool = &interface;
            unsigned long tasks = own.tasks;
            CHECK_OK(hyperattn_forward(&params, &p.tensors, &exec));
            CHECK_INT(count_threads(), before);
            CHECK(own.tasks > tasks);
        }
    }
    problem_destroy(&p);
}

/* Runs with `exec` and compares with `expected`; a workspace is made when `fill` is not negative. */
static void expect_same(problem *p, const problem *expected, const hyperattn_params *params, hyperattn_cpu_exec exec,
                        int fill)
{
    workspace w;
    if (fill >= 0) {
        hyperattn_layout layout = {0, 0};
        CHECK_OK(hyperattn_forward_workspace(params, &p->tensors, &exec, &layout));
        CHECK(layout.align > 0 && (layout.align & (layout.align - 1)) == 0);
        w = workspace_create(layout, (unsigned char)fill);
        exec.workspace = w.buffer;
    }
    problem_poison_outputs(p);
    CHECK_OK(hyperattn_forward(params, &p->tensors, &exec));
    CHECK(tensor_same_bits(&p->out.view, &expected->out.view));
    CHECK(tensor_same_bits(&p->lse.view, &expected->lse.view));
    CHECK(tensor_same_bits(&p->error.view, &expected->error.view));
    if (fill >= 0) {
        CHECK(workspace_surroundings_unchanged(&w));
        workspace_destroy(&w);
    }
}

static void same_bits_however_it_runs(random_source *source)
{
    worker_pool *workers = worker_pool_create(4);
    hyperattn_threadpool worker_interface = worker_pool_interface(workers);
    reverse_pool reverse = {3, 0};
    hyperattn_threadpool reverse_interface = reverse_pool_interface(&reverse);
    static const uint32_t thread_counts[] = {1, 2, 3, 5, 0};

    for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
        problem p = problem_create(&SHAPE, t, t, ARRAY_BSHD, source);
        problem_want_error(&p);
        problem expected = p; /* the same inputs, its own outputs */
        expected.out = array_create(t, ARRAY_BHSD, SHAPE.batch, SHAPE.heads_q, SHAPE.n_q, SHAPE.d_v);
        expected.lse = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, SHAPE.batch, SHAPE.heads_q, SHAPE.n_q, 1);
        expected.error = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, SHAPE.batch, SHAPE.heads_q, 1, 1);
        expected.tensors.out = expected.out.view;
        expected.tensors.lse = expected.lse.view;
        expected.tensors.error = expected.error.view;
        for (int v = 0; v < VARIANT_COUNT; v += 1) {
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                hyperattn_params params = variant_params(&VARIANTS[v], mask);
                hyperattn_cpu_exec exec = problem_exec(1);
                problem_poison_outputs(&expected);
                CHECK_OK(hyperattn_forward(&params, &expected.tensors, &exec));

                for (size_t i = 0; i < sizeof thread_counts / sizeof thread_counts[0]; i += 1) {
                    check_case("%s mask %s %s, %u threads", VARIANTS[v].name, mask_name(mask), dtype_name(t),
                               thread_counts[i]);
                    exec = problem_exec(thread_counts[i]);
                    expect_same(&p, &expected, &params, exec, -1);
                    /* What the workspace held before must not matter: zeros, then NaN. */
                    expect_same(&p, &expected, &params, exec, i % 2 == 0 ? 0x00 : 0xff);
                }
                check_case("%s mask %s %s, no exec", VARIANTS[v].name, mask_name(mask), dtype_name(t));
                problem_poison_outputs(&p);
                CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                CHECK(tensor_same_bits(&p.out.view, &expected.out.view));

                check_case("%s mask %s %s, worker pool", VARIANTS[v].name, mask_name(mask), dtype_name(t));
                exec = problem_exec(0);
                exec.pool = &worker_interface;
                expect_same(&p, &expected, &params, exec, -1);
                expect_same(&p, &expected, &params, exec, 0xff);
                /* A pool overrides num_threads. */
                exec.num_threads = 1;
                unsigned long tasks = worker_pool_tasks(workers);
                expect_same(&p, &expected, &params, exec, -1);
                CHECK(worker_pool_tasks(workers) > tasks);

                check_case("%s mask %s %s, reverse pool", VARIANTS[v].name, mask_name(mask), dtype_name(t));
                exec = problem_exec(0);
                exec.pool = &reverse_interface;
                expect_same(&p, &expected, &params, exec, -1);
                expect_same(&p, &expected, &params, exec, 0x00);
            }
        }
        array_destroy(&expected.out);
        array_destroy(&expected.lse);
        array_destroy(&expected.error);
        problem_destroy(&p);
    }
    worker_pool_destroy(workers);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("determinism", argc, argv)};
    one_thread_and_a_pool_start_no_thread(&source);
    same_bits_however_it_runs(&source);
    return check_finish();
}
