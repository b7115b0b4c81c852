/* Wrong hyperattn_cpu_exec: size, workspace, thread pool. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bad_calls.h"
#include "workspace.h"

static void structs(void)
{
    BAD(c.exec.struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "exec.struct_size", "0");
    BAD(c.exec.struct_size = 3, HYPERATTN_STATUS_ABI_MISMATCH, "exec.struct_size", "3");
    BAD(c.exec.struct_size = 25, HYPERATTN_STATUS_ABI_MISMATCH, "exec.struct_size", "25");
    BAD(c.exec.reserved = 4, INVALID, "exec.reserved", "4");
    BAD((c.exec.pool = &c.pool, c.pool.struct_size = 0), HYPERATTN_STATUS_ABI_MISMATCH, "pool.struct_size", "0");
    BAD((c.exec.pool = &c.pool, c.pool.struct_size = 5), HYPERATTN_STATUS_ABI_MISMATCH, "pool.struct_size", "5");
    BAD((c.exec.pool = &c.pool, c.pool.num_threads = NULL), INVALID, "num_threads", "NULL");
    BAD((c.exec.pool = &c.pool, c.pool.parallel_for = NULL), INVALID, "parallel_for", "NULL");
}

static void workspaces(void)
{
    hyperattn_layout layout = {0, 0};
    bad_call c;
    bad_call_fresh_estimator(&c);
    check_case("workspace of the unchanged call");
    CHECK_OK(hyperattn_forward_workspace(&c.params, &c.tensors, &c.exec, &layout));
    CHECK(layout.size > 0 && layout.align > 1);
    workspace w = workspace_create(layout, 0xff);

    c.exec.workspace = w.buffer;
    check_case("exactly the workspace that was asked for");
    CHECK_OK(hyperattn_forward(&c.params, &c.tensors, &c.exec));

    c.exec.workspace.size = layout.size - 1;
    bad_call_expect_forward("one byte short", &c, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace.size"));
    c.exec.workspace.size = 1;
    bad_call_expect_forward("one byte", &c, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace.size", "1"));
    c.exec.workspace.size = 0;
    bad_call_expect_forward("data without size", &c, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
                            PARTS("workspace.size", "0"));
    /* The size is right, the address is not. */
    hyperattn_layout larger = {layout.size + 1, layout.align};
    workspace shifted = workspace_create(larger, 0xff);
    c.exec.workspace.data = (unsigned char *)shifted.buffer.data + 1;
    c.exec.workspace.size = layout.size;
    char alignment[32];
    snprintf(alignment, sizeof alignment, "%zu", layout.align);
    bad_call_expect_forward("misaligned", &c, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace.data", alignment));
    CHECK(workspace_surroundings_unchanged(&shifted));

    c.exec.workspace.data = NULL;
    bad_call_expect_forward("size without data", &c, INVALID, PARTS("workspace.data", "NULL"));

    bad_call_fresh_estimator(&c);
    c.params.flags = HYPERATTN_FLAG_NO_ALLOC;
    bad_call_expect_forward("NO_ALLOC without workspace", &c, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace"));
    bad_call_fresh_estimator(&c);
    c.params.flags = HYPERATTN_FLAG_NO_ALLOC;
    c.exec_argument = NULL;
    bad_call_expect_forward("NO_ALLOC without exec", &c, HYPERATTN_STATUS_WORKSPACE_TOO_SMALL, PARTS("workspace"));

    check_case("NO_ALLOC with a workspace");
    c.exec_argument = &c.exec;
    c.exec.workspace = w.buffer;
    CHECK_OK(hyperattn_forward(&c.params, &c.tensors, &c.exec));
    CHECK(workspace_surroundings_unchanged(&w));
    workspace_destroy(&w);
    workspace_destroy(&shifted);

    bad_call_fresh(&c);
    bad_call_forget_error();
    hyperattn_status status = hyperattn_forward_workspace(&c.params, &c.tensors, &c.exec, NULL);
    bad_call_expect_error("no place for the layout", status, INVALID, PARTS("out", "NULL"));
}

static void drop_every_task(void *context, size_t count, void (*task)(void *, size_t), void *task_context)
{
    (void)context;
    (void)count;
    (void)task;
    (void)task_context;
}

static uint32_t four_threads(void *context)
{
    (void)context;
    return 4;
}

/* A pool that breaks its promise must not pass for success. */
static void forgetful_pool(void)
{
    bad_call c;
    bad_call_fresh_estimator(&c);
    c.pool.num_threads = four_threads;
    c.pool.parallel_for = drop_every_task;
    c.exec.pool = &c.pool;
    bad_call_forget_error();
    check_case("a pool that runs no task");
    CHECK(hyperattn_forward(&c.params, &c.tensors, &c.exec) != HYPERATTN_STATUS_OK);
    CHECK_CONTAINS(hyperattn_last_error(), "pool");
}

void bad_exec(void)
{
    structs();
    workspaces();
    forgetful_pool();
}
