/* A plan run as a whole and task by task, on threads that share it: the bits of hyperattn_forward. */
#define _POSIX_C_SOURCE 200809L
#include <hyperattn/hyperattn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "workspace.h"

enum { THREADS = 3 };

/* As many queries as keys, a chunk of queries at the end of a longer cache, and no queries. */
static const struct test_problem {
    problem_shape shape;
    hyperattn_dtype dtype;
} PROBLEMS[] = {
    {{2, 6, 2, 310, 310, 24, 16}, HYPERATTN_DTYPE_BF16},
    {{1, 4, 1, 130, 700, 32, 40}, HYPERATTN_DTYPE_F16},
    {{1, 3, 3, 270, 290, 16, 8}, HYPERATTN_DTYPE_F32},
    {{1, 3, 3, 0, 9, 8, 8}, HYPERATTN_DTYPE_F32},
};

/* One of the engine's threads: number ith of nth. */
typedef struct share {
    const hyperattn_plan *plan;
    const hyperattn_tensors *tensors;
    size_t ith, nth;
    workspace memory;
    hyperattn_status status;
} share;

static void *run_share(void *context)
{
    share *s = (share *)context;
    size_t tasks = hyperattn_plan_task_count(s->plan);
    s->status = hyperattn_plan_run_tasks(s->plan, s->tensors, tasks * s->ith / s->nth, tasks * (s->ith + 1) / s->nth,
                                         s->memory.buffer);
    return NULL;
}

static void run_on_threads(const hyperattn_plan *plan, const hyperattn_tensors *tensors)
{
    hyperattn_layout layout = {0, 0};
    CHECK_OK(hyperattn_plan_task_workspace(plan, &layout));
    share shares[THREADS];
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i += 1) {
        shares[i] = (share){plan, tensors, i, THREADS, workspace_create(layout, 0xff), -1};
        CHECK_INT(pthread_create(&threads[i], NULL, run_share, &shares[i]), 0);
    }
    for (size_t i = 0; i < THREADS; i += 1) {
        pthread_join(threads[i], NULL);
        CHECK_OK(shares[i].status);
        CHECK(workspace_surroundings_unchanged(&shares[i].memory));
        workspace_destroy(&shares[i].memory);
    }
}

/* Every task by itself, the last first. */
static void run_backwards(const hyperattn_plan *plan, const hyperattn_tensors *tensors)
{
    const hyperattn_buffer none = {NULL, 0};
    for (size_t task = hyperattn_plan_task_count(plan); task > 0; task -= 1) {
        CHECK_OK(hyperattn_plan_run_tasks(plan, tensors, task - 1, task, none));
    }
}

static void run_whole(const hyperattn_plan *plan, const hyperattn_tensors *tensors)
{
    hyperattn_cpu_exec exec = problem_exec(2);
    hyperattn_layout layout = {0, 0};
    CHECK_OK(hyperattn_plan_workspace(plan, &exec, &layout));
    workspace memory = workspace_create(layout, 0xff);
    exec.workspace = memory.buffer;
    CHECK_OK(hyperattn_plan_run(plan, tensors, &exec));
    CHECK(workspace_surroundings_unchanged(&memory));
    workspace_destroy(&memory);
}

static void (*const WAYS[])(const hyperattn_plan *, const hyperattn_tensors *) = {run_whole, run_on_threads,
                                                                                  run_backwards};

/* The data of `p` as it lies elsewhere, with other strides. */
static problem rearranged(const problem_shape *shape, const problem *p, array_layout layout)
{
    random_source unused = {0};
    problem other = problem_create(shape, p->q.view.dtype, p->out.view.dtype, layout, &unused);
    const hyperattn_tensor *from[] = {&p->q.view, &p->k.view, &p->v.view};
    const hyperattn_tensor *to[] = {&other.q.view, &other.k.view, &other.v.view};
    for (int i = 0; i < 3; i += 1) {
        for (int64_t b = 0; b < from[i]->shape[0]; b += 1) {
            for (int64_t h = 0; h < from[i]->shape[1]; h += 1) {
                for (int64_t r = 0; r < from[i]->shape[2]; r += 1) {
                    for (int64_t c = 0; c < from[i]->shape[3]; c += 1) {
                        tensor_set(to[i], b, h, r, c, tensor_get(from[i], b, h, r, c));
                    }
                }
            }
        }
    }
    return other;
}

static void expect_the_bits_of_forward(const hyperattn_params *params, const problem_shape *shape, problem *p)
{
    problem_want_error(p);
    problem_poison_outputs(p);
    CHECK_OK(hyperattn_forward(params, &p->tensors, NULL));

    /* Made from shapes alone. */
    hyperattn_tensors shapes = p->tensors;
    shapes.q.data = shapes.k.data = shapes.v.data = shapes.out.data = shapes.lse.data = shapes.error.data = NULL;
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(params, &shapes, &plan));
    CHECK(hyperattn_plan_task_count(plan) > 0);
    for (int way = 0; way < 3; way += 1) {
        problem other = rearranged(shape, p, (array_layout)way);
        problem_want_error(&other);
        WAYS[way](plan, &other.tensors);
        CHECK(tensor_same_bits(&other.out.view, &p->out.view));
        CHECK(tensor_same_bits(&other.lse.view, &p->lse.view));
        CHECK(tensor_same_bits(&other.error.view, &p->error.view));
        CHECK_INT(array_changed_outside(&other.out), 0);
        CHECK_INT(array_changed_outside(&other.lse), 0);
        problem_destroy(&other);
    }
    check_case("a run without lse and error");
    problem other = rearranged(shape, p, ARRAY_BHSD);
    memset(&other.tensors.lse, 0, sizeof other.tensors.lse);
    run_on_threads(plan, &other.tensors);
    CHECK(tensor_same_bits(&other.out.view, &p->out.view));
    CHECK(array_untouched(&other.lse));
    problem_destroy(&other);
    hyperattn_plan_destroy(plan);
}

static void every_method(random_source *source)
{
    for (size_t i = 0; i < sizeof PROBLEMS / sizeof PROBLEMS[0]; i += 1) {
        const problem_shape *shape = &PROBLEMS[i].shape;
        problem p = problem_create(shape, PROBLEMS[i].dtype, PROBLEMS[i].dtype, ARRAY_BSHD, source);
        for (hyperattn_method method = HYPERATTN_METHOD_AUTO; method <= HYPERATTN_METHOD_REFINED; method += 1) {
            for (hyperattn_mask mask = 0; mask < 3; mask += 1) {
                check_case("problem %zu %s method %u mask %s", i, dtype_name(PROBLEMS[i].dtype), method,
                           mask_name(mask));
                hyperattn_params params = problem_small_params(method, mask, 40);
                expect_the_bits_of_forward(&params, shape, &p);
            }
        }
        problem_destroy(&p);
    }
}

/* The params, the methods and the blocks that a plan was made with may be gone; its runs bring their own blocks. */
static void a_plan_keeps_what_it_needs(random_source *source)
{
    check_case("copies");
    const problem_shape shape = {1, 2, 1, 64, 64, 16, 16};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    int64_t row_offsets[] = {0, 1, 2};
    int32_t columns[] = {0, 1};
    hyperattn_block_mask mask = {sizeof mask, 32, 32, 2, 2, row_offsets, columns, 0};
    hyperattn_method methods[] = {HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_EXACT};
    hyperattn_params params = problem_small_params(HYPERATTN_METHOD_PAPER, HYPERATTN_MASK_NONE, 40);
    params.head_methods = methods;
    p.tensors.block_mask = &mask;
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&params, &p.tensors, &plan));

    array expected = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, 64, 16);
    hyperattn_tensors into_expected = p.tensors;
    into_expected.out = expected.view;
    for (int32_t first = 0; first < 2; first += 1) {
        columns[0] = first;
        CHECK_OK(hyperattn_forward(&params, &into_expected, NULL));
        hyperattn_params copy = params;
        hyperattn_method methods_before[] = {methods[0], methods[1]};
        memset(&params, 0x77, sizeof params);
        memset(methods, 0x77, sizeof methods);
        problem_poison_outputs(&p);
        run_on_threads(plan, &p.tensors);
        CHECK(tensor_same_bits(&p.out.view, &expected.view));
        problem_poison_outputs(&p);
        run_whole(plan, &p.tensors);
        CHECK(tensor_same_bits(&p.out.view, &expected.view));
        params = copy;
        memcpy(methods, methods_before, sizeof methods);
    }
    hyperattn_plan_destroy(plan);
    array_destroy(&expected);
    problem_destroy(&p);
}

/* Under a causal mask equal ranges of the tasks of an exact head see about as many keys. */
static void equal_ranges_are_equal_shares(void)
{
    check_case("tasks of a long exact head");
    const problem_shape shape = {1, 2, 1, 4096, 4096, 16, 16};
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    hyperattn_tensors tensors;
    memset(&tensors, 0, sizeof tensors);
    tensors.struct_size = sizeof tensors;
    tensors.q = hyperattn_tensor_bhsd(NULL, HYPERATTN_DTYPE_F32, 1, shape.heads_q, shape.n_q, shape.d);
    tensors.k = hyperattn_tensor_bhsd(NULL, HYPERATTN_DTYPE_F32, 1, shape.heads_kv, shape.n_k, shape.d);
    tensors.v = hyperattn_tensor_bhsd(NULL, HYPERATTN_DTYPE_F32, 1, shape.heads_kv, shape.n_k, shape.d_v);
    tensors.out = hyperattn_tensor_bhsd(NULL, HYPERATTN_DTYPE_F32, 1, shape.heads_q, shape.n_q, shape.d_v);
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&params, &tensors, &plan));
    /* Two heads of 128 queries each in a tile. */
    CHECK_INT(hyperattn_plan_task_count(plan), 32);
    hyperattn_plan_destroy(plan);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("plan", argc, argv)};
    every_method(&source);
    a_plan_keeps_what_it_needs(&source);
    equal_ranges_are_equal_shares();
    hyperattn_plan_destroy(NULL);
    CHECK_INT(hyperattn_plan_task_count(NULL), 0);
    return check_finish();
}
