/* Wrong calls of hyperattn_merge. */
#include <string.h>

#include "bad_calls.h"

typedef struct merge_call {
    array out_a, lse_a, out_b, lse_b;
    hyperattn_tensor a, la, b, lb;
} merge_call;

static merge_call fresh_merge(void)
{
    merge_call m;
    m.out_a = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, 3, 4);
    m.lse_a = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, 3, 1);
    m.out_b = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, 3, 4);
    m.lse_b = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, 3, 1);
    m.a = m.out_a.view;
    m.la = m.lse_a.view;
    m.b = m.out_b.view;
    m.lb = m.lse_b.view;
    return m;
}

static void destroy_merge(merge_call *m)
{
    array_destroy(&m->out_a);
    array_destroy(&m->lse_a);
    array_destroy(&m->out_b);
    array_destroy(&m->lse_b);
}

static void expect_merge(const char *name, merge_call *m, hyperattn_status status, int count, const char *const *parts,
                         int line)
{
    bad_call_forget_error();
    hyperattn_status actual = hyperattn_merge(&m->a, &m->la, &m->b, &m->lb);
    bad_call_expect_error(name, actual, status, count, parts, line);
    CHECK(array_untouched(&m->out_a) && array_untouched(&m->lse_a));
    CHECK(array_untouched(&m->out_b) && array_untouched(&m->lse_b));
    destroy_merge(m);
}

#define BAD_MERGE(change, ...) \
    do { \
        merge_call m = fresh_merge(); \
        change; \
        expect_merge(#change, &m, INVALID, PARTS(__VA_ARGS__)); \
    } while (0)

static void null_arguments(void)
{
    static const char *const names[] = {"out_a", "lse_a", "out_b", "lse_b"};
    for (int i = 0; i < 4; i += 1) {
        merge_call m = fresh_merge();
        const hyperattn_tensor *arguments[] = {&m.a, &m.la, &m.b, &m.lb};
        arguments[i] = NULL;
        bad_call_forget_error();
        hyperattn_status status = hyperattn_merge(arguments[0], arguments[1], arguments[2], arguments[3]);
        bad_call_expect_error(names[i], status, INVALID, PARTS(names[i], "NULL"));
        CHECK(array_untouched(&m.out_a) && array_untouched(&m.lse_a));
        destroy_merge(&m);
    }
}

void bad_merges(void)
{
    null_arguments();
    BAD_MERGE(m.a.data = NULL, "out_a.data", "NULL");
    BAD_MERGE(m.lb.data = NULL, "lse_b.data", "NULL");
    BAD_MERGE(m.la.dtype = HYPERATTN_DTYPE_F16, "lse_a.dtype");
    BAD_MERGE(m.lb.dtype = HYPERATTN_DTYPE_BF16, "lse_b.dtype");
    BAD_MERGE(m.a.dtype = 0, "out_a.dtype", "0");
    BAD_MERGE(m.b.dtype = 8, "out_b.dtype", "8");
    BAD_MERGE(m.b.reserved = 3, "out_b.reserved", "3");
    BAD_MERGE(m.b.shape[3] = 3, "out_b.shape[3]", "3", "out_a.shape[3]", "4");
    BAD_MERGE(m.b.shape[2] = 2, "out_b.shape[2]", "2", "3");
    BAD_MERGE(m.la.shape[2] = 2, "lse_a.shape[2]", "2", "3");
    BAD_MERGE(m.lb.shape[1] = 1, "lse_b.shape[1]", "1", "2");
    BAD_MERGE(m.la.shape[3] = 4, "lse_a.shape[3]", "4", "1");
    BAD_MERGE(m.b.stride[3] = 2, "out_b.stride[3]", "2");
    BAD_MERGE(m.a.stride[2] = 0, "out_a", "overlap");
    BAD_MERGE(m.la.stride[2] = 0, "lse_a", "overlap");
    BAD_MERGE(m.b.data = m.a.data, "out_a", "out_b", "overlap");
    BAD_MERGE(m.lb.data = m.la.data, "lse_a", "lse_b", "overlap");
    BAD_MERGE(m.la.data = m.a.data, "out_a", "lse_a", "overlap");
}
