/* Wrong calls of the plan's functions. */
#include <stdint.h>
#include <string.h>

#include "bad_calls.h"

static const hyperattn_buffer NONE = {NULL, 0};

/* A call whose plan is made of the unchanged problem. */
static void fresh_plan(bad_call *c, hyperattn_plan **plan)
{
    bad_call_fresh_estimator(c);
    *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&c->params, &c->tensors, plan));
}

/* `change` is an expression on `c`, whose plan cannot be made. */
#define BAD_PLAN(change, status, ...) \
    do { \
        bad_call c; \
        bad_call_fresh_block_mask(&c); \
        hyperattn_plan *plan = (hyperattn_plan *)&c; \
        change; \
        bad_call_forget_error(); \
        hyperattn_status actual = hyperattn_plan_create(c.params_argument, c.tensors_argument, &plan); \
        bad_call_expect_error(#change, actual, status, PARTS(__VA_ARGS__)); \
        CHECK(plan == (hyperattn_plan *)&c); \
    } while (0)

/* `change` is an expression on `c`, `begin`, `end` and `workspace`: a run that does not fit the plan. */
#define BAD_RUN(change, status, ...) \
    do { \
        bad_call c; \
        hyperattn_plan *plan; \
        fresh_plan(&c, &plan); \
        size_t begin = 0, end = hyperattn_plan_task_count(plan); \
        hyperattn_buffer workspace = NONE; \
        change; \
        bad_call_forget_error(); \
        problem_poison_outputs(&bad_call_problem); \
        hyperattn_status actual = hyperattn_plan_run_tasks(plan, c.tensors_argument, begin, end, workspace); \
        bad_call_expect_error(#change, actual, status, PARTS(__VA_ARGS__)); \
        outputs_untouched(); \
        hyperattn_plan_destroy(plan); \
    } while (0)

/* The same for the tensors of both ways to run a plan. */
#define BAD_TENSORS(change, ...) \
    do { \
        BAD_RUN(change, INVALID, __VA_ARGS__); \
        bad_call c; \
        hyperattn_plan *plan; \
        fresh_plan(&c, &plan); \
        change; \
        bad_call_forget_error(); \
        hyperattn_status actual = hyperattn_plan_run(plan, c.tensors_argument, NULL); \
        bad_call_expect_error("run: " #change, actual, INVALID, PARTS(__VA_ARGS__)); \
        outputs_untouched(); \
        hyperattn_plan_destroy(plan); \
    } while (0)

static void outputs_untouched(void)
{
    CHECK(array_untouched(&bad_call_problem.out));
    CHECK(array_untouched(&bad_call_problem.lse));
    CHECK(array_untouched(&bad_call_problem.error));
}

static void plans_that_cannot_be_made(void)
{
    BAD_PLAN(c.params_argument = NULL, INVALID, "params is NULL");
    BAD_PLAN(c.tensors_argument = NULL, INVALID, "tensors is NULL");
    BAD_PLAN(c.params.lsh_num_projs = 99, INVALID, "lsh_num_projs", "99");
    BAD_PLAN(c.tensors.k.shape[3] = 15, INVALID, "k.shape[3]", "15");
    BAD_PLAN(c.tensors.lse.shape[2] = 4, INVALID, "lse.shape[2]", "4");
    BAD_PLAN(c.params.method = HYPERATTN_METHOD_AUTO, INVALID, "block_mask", "AUTO");
    BAD_PLAN(c.columns[1] = -1, INVALID, "block_mask.columns", "-1");
    BAD_PLAN(c.tensors.num_sequences = 1, INVALID, "cu_seqlens_q", "NULL");
    bad_call c;
    bad_call_fresh(&c);
    bad_call_forget_error();
    bad_call_expect_error("plan to nowhere", hyperattn_plan_create(&c.params, &c.tensors, NULL), INVALID,
                          PARTS("out is NULL"));
}

static void no_plan(void)
{
    bad_call c;
    bad_call_fresh(&c);
    hyperattn_layout layout = {77, 88};
    bad_call_forget_error();
    bad_call_expect_error("run of nothing", hyperattn_plan_run(NULL, &c.tensors, NULL), INVALID, PARTS("plan is NULL"));
    bad_call_forget_error();
    bad_call_expect_error("tasks of nothing", hyperattn_plan_run_tasks(NULL, &c.tensors, 0, 0, NONE), INVALID,
                          PARTS("plan is NULL"));
    bad_call_forget_error();
    bad_call_expect_error("workspace of nothing", hyperattn_plan_workspace(NULL, NULL, &layout), INVALID,
                          PARTS("plan is NULL"));
    bad_call_forget_error();
    bad_call_expect_error("task workspace of nothing", hyperattn_plan_task_workspace(NULL, &layout), INVALID,
                          PARTS("plan is NULL"));
    CHECK(layout.size == 77 && layout.align == 88);
    hyperattn_plan *plan;
    fresh_plan(&c, &plan);
    bad_call_forget_error();
    bad_call_expect_error("workspace to nowhere", hyperattn_plan_workspace(plan, NULL, NULL), INVALID,
                          PARTS("out is NULL"));
    bad_call_forget_error();
    bad_call_expect_error("task workspace to nowhere", hyperattn_plan_task_workspace(plan, NULL), INVALID,
                          PARTS("out is NULL"));
    hyperattn_plan_destroy(plan);
}

static void tensors_that_do_not_fit(void)
{
    static hyperattn_block_mask mask;
    static const int32_t starts[] = {0, 5};
    BAD_TENSORS(c.tensors_argument = NULL, "tensors is NULL");
    BAD_TENSORS(c.tensors.q.data = NULL, "q.data is NULL");
    BAD_TENSORS((c.tensors.q.dtype = HYPERATTN_DTYPE_F16, c.tensors.k.dtype = HYPERATTN_DTYPE_F16), "q.dtype", "F16",
                "F32");
    BAD_TENSORS(c.tensors.q.shape[2] = 4, "q.shape[2] = 4", "5");
    BAD_TENSORS(c.tensors.v.shape[3] = 7, "v.shape[3] = 7", "8");
    BAD_TENSORS(c.tensors.out.shape[0] = 1, "out.shape[0] = 1", "2");
    BAD_TENSORS(c.tensors.lse.shape[1] = 3, "lse.shape[1] = 3", "4");
    BAD_TENSORS(c.tensors.error.shape[1] = 3, "error.shape[1] = 3", "4");
    BAD_TENSORS((mask = c.block_mask, mask.row_offsets = c.row_offsets, mask.columns = c.columns,
                 c.tensors.block_mask = &mask),
                "block_mask.query_block = 2", "0");
    BAD_TENSORS((c.tensors.num_sequences = 1, c.tensors.cu_seqlens_q = starts, c.tensors.cu_seqlens_k = starts),
                "num_sequences = 1", "0");
    /* Fits the plan, but is wrong in itself. */
    BAD_TENSORS(c.tensors.out.data = c.tensors.q.data, "overlap");
    BAD_TENSORS(c.tensors.out.stride[2] = 0, "out.stride");
}

static void lse_that_was_not_planned(void)
{
    bad_call c;
    bad_call_fresh_estimator(&c);
    hyperattn_tensors shapes = c.tensors;
    memset(&shapes.lse, 0, sizeof shapes.lse);
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&c.params, &shapes, &plan));
    bad_call_forget_error();
    problem_poison_outputs(&bad_call_problem);
    bad_call_expect_error("lse", hyperattn_plan_run(plan, &c.tensors, NULL), INVALID, PARTS("lse", "lse.dtype = 0"));
    outputs_untouched();
    hyperattn_plan_destroy(plan);
}

static void other_sequences(void)
{
    bad_call c;
    bad_call_fresh_estimator(&c);
    static const int32_t starts_q[] = {0, 2, 5}, starts_k[] = {0, 3, 7}, other[] = {0, 4, 7};
    c.tensors.q.shape[0] = c.tensors.k.shape[0] = c.tensors.v.shape[0] = 1;
    c.tensors.out.shape[0] = c.tensors.lse.shape[0] = 1;
    c.tensors.num_sequences = 2;
    c.tensors.cu_seqlens_q = starts_q;
    c.tensors.cu_seqlens_k = starts_k;
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&c.params, &c.tensors, &plan));
    c.tensors.cu_seqlens_k = other;
    bad_call_forget_error();
    problem_poison_outputs(&bad_call_problem);
    bad_call_expect_error("other sequences", hyperattn_plan_run(plan, &c.tensors, NULL), INVALID,
                          PARTS("cu_seqlens_k[1] = 4", "3"));
    outputs_untouched();
    hyperattn_plan_destroy(plan);
}

static void ranges_and_workspaces(void)
{
    BAD_RUN(end += 1, INVALID, "end", "tasks");
    BAD_RUN((begin = 2, end = 1), INVALID, "begin = 2", "end = 1");
    BAD_RUN(begin = SIZE_MAX, INVALID, "begin", "tasks");
    BAD_RUN(workspace.size = 1, INVALID, "workspace.data is NULL", "1");
    static unsigned char memory[128];
    unsigned char *aligned = memory + (64 - (uintptr_t)memory % 64) % 64;
    BAD_RUN((workspace.data = aligned, workspace.size = 64), HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
            "workspace.size = 64");
    BAD_RUN((workspace.data = aligned + 1, workspace.size = SIZE_MAX / 4), HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
            "workspace.data");

    bad_call c;
    bad_call_fresh_estimator(&c);
    c.params.flags = HYPERATTN_FLAG_NO_ALLOC;
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&c.params, &c.tensors, &plan));
    bad_call_forget_error();
    problem_poison_outputs(&bad_call_problem);
    bad_call_expect_error("NO_ALLOC", hyperattn_plan_run_tasks(plan, &c.tensors, 0, 1, NONE),
                          HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("NO_ALLOC"));
    outputs_untouched();
    hyperattn_plan_destroy(plan);
}

void bad_plans(void)
{
    plans_that_cannot_be_made();
    no_plan();
    tensors_that_do_not_fit();
    lse_that_was_not_planned();
    other_sequences();
    ranges_and_workspaces();
}
