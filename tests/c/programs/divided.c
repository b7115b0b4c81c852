/* Sequences of different lengths in one call, and heads with methods of their own: the bits of calls by themselves. */
#include <hyperattn/hyperattn.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "workspace.h"

enum { SEQUENCES = 5, HEADS = 4 };
static const problem_shape SHAPE = {1, HEADS, 2, 400, 520, 24, 16};
/* One without queries, one without keys, one where there are more queries than keys. */
static const int32_t STARTS_Q[SEQUENCES + 1] = {0, 90, 90, 130, 300, 400};
static const int32_t STARTS_K[SEQUENCES + 1] = {0, 200, 230, 230, 500, 520};

static hyperattn_tensor rows_of(const hyperattn_tensor *view, int64_t start, int64_t end)
{
    hyperattn_tensor rows = *view;
    rows.data = (char *)view->data + (size_t)(start * view->stride[2]) * dtype_size(view->dtype);
    rows.shape[2] = end - start;
    return rows;
}

static hyperattn_tensor item_of(const hyperattn_tensor *view, int64_t item)
{
    hyperattn_tensor one = *view;
    one.data = (char *)view->data + (size_t)(item * view->stride[0]) * dtype_size(view->dtype);
    one.shape[0] = 1;
    return one;
}

/* One call for each sequence, into the tensors that `t` describes. */
static void run_each(const hyperattn_params *params, const hyperattn_tensors *t)
{
    for (int i = 0; i < SEQUENCES; i += 1) {
        hyperattn_tensors one = *t;
        one.num_sequences = 0;
        one.q = rows_of(&t->q, STARTS_Q[i], STARTS_Q[i + 1]);
        one.k = rows_of(&t->k, STARTS_K[i], STARTS_K[i + 1]);
        one.v = rows_of(&t->v, STARTS_K[i], STARTS_K[i + 1]);
        one.out = rows_of(&t->out, STARTS_Q[i], STARTS_Q[i + 1]);
        one.lse = rows_of(&t->lse, STARTS_Q[i], STARTS_Q[i + 1]);
        one.error = item_of(&t->error, i);
        CHECK_OK(hyperattn_forward(params, &one, NULL));
    }
}

static void run_forward(const hyperattn_params *params, const hyperattn_tensors *tensors)
{
    for (uint32_t threads = 1; threads <= 2; threads += 1) {
        hyperattn_cpu_exec exec = problem_exec(threads);
        hyperattn_layout layout = {0, 0};
        CHECK_OK(hyperattn_forward_workspace(params, tensors, &exec, &layout));
        workspace memory = workspace_create(layout, 0xff);
        exec.workspace = memory.buffer;
        CHECK_OK(hyperattn_forward(params, tensors, &exec));
        CHECK(workspace_surroundings_unchanged(&memory));
        workspace_destroy(&memory);
    }
}

static void run_tasks(const hyperattn_params *params, const hyperattn_tensors *tensors)
{
    const hyperattn_buffer none = {NULL, 0};
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(params, tensors, &plan));
    size_t half = hyperattn_plan_task_count(plan) / 2;
    CHECK_OK(hyperattn_plan_run_tasks(plan, tensors, half, hyperattn_plan_task_count(plan), none));
    CHECK_OK(hyperattn_plan_run_tasks(plan, tensors, 0, half, none));
    hyperattn_plan_destroy(plan);
}

static void sequences(random_source *source)
{
    for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
        problem p = problem_create(&SHAPE, t, t, ARRAY_BSHD, source);
        problem alone = problem_create(&SHAPE, t, t, ARRAY_BHSD, source);
        array errors = array_create(HYPERATTN_DTYPE_F32, ARRAY_PADDED, SEQUENCES, HEADS, 1, 1);
        array errors_alone = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, SEQUENCES, HEADS, 1, 1);
        p.tensors.error = errors.view;
        hyperattn_tensors into_alone = p.tensors;
        into_alone.out = alone.out.view;
        into_alone.lse = alone.lse.view;
        into_alone.error = errors_alone.view;
        p.tensors.num_sequences = SEQUENCES;
        p.tensors.cu_seqlens_q = STARTS_Q;
        p.tensors.cu_seqlens_k = STARTS_K;
        for (hyperattn_method method = HYPERATTN_METHOD_AUTO; method <= HYPERATTN_METHOD_REFINED; method += 1) {
            for (hyperattn_mask mask = 0; mask < 3; mask += 1) {
                check_case("sequences %s method %u mask %s", dtype_name(t), method, mask_name(mask));
                hyperattn_params params = problem_small_params(method, mask, 30);
                problem_poison_outputs(&alone);
                run_each(&params, &into_alone);
                for (int way = 0; way < 2; way += 1) {
                    problem_poison_outputs(&p);
                    array_poison(&errors);
                    (way == 0 ? run_forward : run_tasks)(&params, &p.tensors);
                    CHECK(tensor_same_bits(&p.out.view, &alone.out.view));
                    CHECK(tensor_same_bits(&p.lse.view, &alone.lse.view));
                    CHECK(tensor_same_bits(&errors.view, &errors_alone.view));
                    CHECK_INT(array_changed_outside(&errors), 0);
                }
            }
        }
        array_destroy(&errors);
        array_destroy(&errors_alone);
        problem_destroy(&p);
        problem_destroy(&alone);
    }
}

static bool same_head(const hyperattn_tensor *a, const hyperattn_tensor *b, int64_t head)
{
    hyperattn_tensor one[2] = {*a, *b};
    for (int i = 0; i < 2; i += 1) {
        one[i].data = (char *)one[i].data + (size_t)(head * one[i].stride[1]) * dtype_size(one[i].dtype);
        one[i].shape[1] = 1;
    }
    return tensor_same_bits(&one[0], &one[1]);
}

static void methods_of_heads(random_source *source)
{
    const problem_shape shape = {2, HEADS, 2, 300, 300, 24, 16};
    static const hyperattn_method mixes[][HEADS] = {
        {HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_PAPER},
        {HYPERATTN_METHOD_REFINED, HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_AUTO, HYPERATTN_METHOD_REFINED},
        {HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_PAPER},
    };
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F16, ARRAY_BSHD, source);
    problem_want_error(&p);
    problem whole = problem_create(&shape, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F16, ARRAY_BHSD, source);
    hyperattn_tensors into_whole = p.tensors;
    into_whole.out = whole.out.view;
    into_whole.lse = whole.lse.view;
    into_whole.error = whole.error.view;
    for (size_t m = 0; m < sizeof mixes / sizeof mixes[0]; m += 1) {
        for (hyperattn_mask mask = 0; mask < 3; mask += 1) {
            check_case("mix %zu of methods, mask %s", m, mask_name(mask));
            /* The method for all does not count. */
            hyperattn_params mixed = problem_small_params(HYPERATTN_METHOD_EXACT, mask, 30);
            mixed.head_methods = mixes[m];
            for (int way = 0; way < 2; way += 1) {
                problem_poison_outputs(&p);
                (way == 0 ? run_forward : run_tasks)(&mixed, &p.tensors);
                for (int64_t head = 0; head < HEADS; head += 1) {
                    hyperattn_params of_head = problem_small_params(mixes[m][head], mask, 30);
                    CHECK_OK(hyperattn_forward(&of_head, &into_whole, NULL));
                    CHECK(same_head(&p.out.view, &whole.out.view, head));
                    CHECK(same_head(&p.lse.view, &whole.lse.view, head));
                    CHECK(same_head(&p.error.view, &whole.error.view, head));
                }
            }
        }
    }
    problem_destroy(&p);
    problem_destroy(&whole);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("divided", argc, argv)};
    sequences(&source);
    methods_of_heads(&source);
    return check_finish();
}
