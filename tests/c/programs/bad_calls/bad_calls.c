/* Wrong calls of every kind: the right status, a sentence that names the argument and the values, untouched outputs. */
#include "bad_calls.h"

#include <stdio.h>
#include <string.h>

problem bad_call_problem;
static int cases;

static uint32_t pool_num_threads(void *context)
{
    (void)context;
    return 1;
}

static void pool_parallel_for(void *context, size_t count, void (*task)(void *, size_t), void *task_context)
{
    (void)context;
    for (size_t i = 0; i < count; i += 1) {
        task(task_context, i);
    }
}

void bad_call_fresh(bad_call *call)
{
    memset(call, 0, sizeof *call);
    hyperattn_params_init(&call->params, sizeof call->params);
    call->tensors = bad_call_problem.tensors;
    call->exec = problem_exec(1);
    call->pool.struct_size = sizeof call->pool;
    call->pool.num_threads = pool_num_threads;
    call->pool.parallel_for = pool_parallel_for;
    call->block_mask.struct_size = sizeof call->block_mask;
    call->block_mask.query_block = 2;
    call->block_mask.key_block = 4;
    call->block_mask.num_query_blocks = 3;
    call->block_mask.num_key_blocks = 2;
    static const int64_t row_offsets[] = {0, 1, 3, 4};
    static const int32_t columns[] = {0, 0, 1, 1};
    memcpy(call->row_offsets, row_offsets, sizeof row_offsets);
    memcpy(call->columns, columns, sizeof columns);
    call->block_mask.row_offsets = call->row_offsets;
    call->block_mask.columns = call->columns;
    call->params_argument = &call->params;
    call->tensors_argument = &call->tensors;
    call->exec_argument = &call->exec;
}

void bad_call_fresh_estimator(bad_call *call)
{
    bad_call_fresh(call);
    call->params.method = HYPERATTN_METHOD_PAPER;
    call->params.min_seq_len = 0;
    call->params.block_size = 4;
    call->params.sample_size = 2;
}

void bad_call_fresh_block_mask(bad_call *call)
{
    bad_call_fresh_estimator(call);
    call->tensors.block_mask = &call->block_mask;
}

void bad_call_forget_error(void)
{
    hyperattn_forward_workspace(NULL, NULL, NULL, NULL);
}

static void expect_sentence(int count, const char *const *parts)
{
    const char *sentence = hyperattn_last_error();
    for (int i = 0; i < count; i += 1) {
        CHECK_CONTAINS(sentence, parts[i]);
    }
    /* "Error 1" would be no help. */
    CHECK(sentence != NULL && strlen(sentence) >= 8);
}

void bad_call_expect_error(const char *name, hyperattn_status actual, hyperattn_status status, int count,
                           const char *const *parts, int line)
{
    cases += 1;
    check_case("line %d: %s", line, name);
    CHECK_STATUS(actual, status);
    expect_sentence(count, parts);
}

void bad_call_expect_forward(const char *name, const bad_call *call, hyperattn_status status, int count,
                             const char *const *parts, int line)
{
    bad_call_forget_error();
    problem_poison_outputs(&bad_call_problem);
    hyperattn_status actual = hyperattn_forward(call->params_argument, call->tensors_argument, call->exec_argument);
    bad_call_expect_error(name, actual, status, count, parts, line);
    CHECK(array_untouched(&bad_call_problem.out));
    CHECK(array_untouched(&bad_call_problem.lse));
    CHECK(array_untouched(&bad_call_problem.error));
}

void bad_call_expect(const char *name, const bad_call *call, hyperattn_status status, int count,
                     const char *const *parts, int line)
{
    bad_call_expect_forward(name, call, status, count, parts, line);
    bad_call_forget_error();
    hyperattn_layout layout = {77, 88};
    CHECK_STATUS(hyperattn_forward_workspace(call->params_argument, call->tensors_argument, call->exec_argument, &layout),
                 status);
    expect_sentence(count, parts);
    CHECK(layout.size == 77 && layout.align == 88);
}

int bad_call_cases(void)
{
    return cases;
}

/* Without any change the calls succeed: otherwise the cases would show nothing. */
static void fresh_calls_succeed(void)
{
    static void (*const makers[])(bad_call *) = {bad_call_fresh, bad_call_fresh_estimator, bad_call_fresh_block_mask};
    for (int i = 0; i < 3; i += 1) {
        check_case("unchanged call %d", i);
        bad_call c;
        makers[i](&c);
        CHECK_OK(hyperattn_forward(c.params_argument, c.tensors_argument, c.exec_argument));
        CHECK(!array_untouched(&bad_call_problem.out));
        CHECK(!array_untouched(&bad_call_problem.error));
        c.exec.pool = &c.pool;
        CHECK_OK(hyperattn_forward(c.params_argument, c.tensors_argument, c.exec_argument));
        CHECK_OK(hyperattn_forward(c.params_argument, c.tensors_argument, NULL));
    }
}

int main(int argc, char **argv)
{
    random_source source = {check_start("bad_calls", argc, argv)};
    const problem_shape shape = {2, 4, 2, 5, 7, 16, 8};
    bad_call_problem = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, &source);
    problem_want_error(&bad_call_problem);
    fresh_calls_succeed();
    bad_params();
    bad_tensors();
    bad_exec();
    bad_masks();
    bad_block_masks();
    bad_merges();
    bad_gradients();
    bad_diagnoses();
    bad_divisions();
    bad_plans();
    bad_cuda_calls();
    bad_cuda_gradients();
    /* Mistakes leave nothing behind. */
    fresh_calls_succeed();
    problem_destroy(&bad_call_problem);
    printf("%d bad calls\n", bad_call_cases());
    CHECK(bad_call_cases() >= 60);
    return check_finish();
}
