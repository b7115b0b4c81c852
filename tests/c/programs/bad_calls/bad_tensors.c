/* Wrong hyperattn_tensors: sizes, dtypes, extents, strides, overlaps. */
#include <stdio.h>
#include <string.h>

#include "bad_calls.h"

static void structs(void)
{
    BAD(c.tensors_argument = NULL, INVALID, "tensors", "NULL");
    BAD(c.tensors.struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "tensors.struct_size", "0");
    BAD(c.tensors.struct_size = 9, HYPERATTN_STATUS_ABI_MISMATCH, "tensors.struct_size", "9");
    BAD(c.tensors.struct_size = 100, HYPERATTN_STATUS_ABI_MISMATCH, "tensors.struct_size", "100");
}

static void pointers_and_types(void)
{
    /* The workspace depends on shapes alone, so only the call that touches memory asks for data. */
    static const struct {
        const char *name;
        size_t offset;
    } needed[] = {{"q.data", offsetof(hyperattn_tensors, q.data)},
                  {"k.data", offsetof(hyperattn_tensors, k.data)},
                  {"v.data", offsetof(hyperattn_tensors, v.data)},
                  {"out.data", offsetof(hyperattn_tensors, out.data)}};
    for (int i = 0; i < 4; i += 1) {
        bad_call call;
        bad_call_fresh(&call);
        memset((char *)&call.tensors + needed[i].offset, 0, sizeof(void *));
        bad_call_expect_forward(needed[i].name, &call, INVALID, PARTS(needed[i].name, "NULL"));
    }

    BAD(c.tensors.q.reserved = 1, INVALID, "q.reserved", "1");
    BAD(c.tensors.v.reserved = 5, INVALID, "v.reserved", "5");
    BAD(c.tensors.lse.reserved = 2, INVALID, "lse.reserved", "2");
    BAD(c.tensors.error.reserved = 3, INVALID, "error.reserved", "3");
    BAD(c.tensors.q.dtype = 0, INVALID, "q.dtype", "0");
    BAD(c.tensors.k.dtype = 4, INVALID, "k.dtype", "4");
    BAD(c.tensors.out.dtype = 99, INVALID, "out.dtype", "99");
    BAD(c.tensors.lse.dtype = HYPERATTN_DTYPE_F16, INVALID, "lse.dtype");
    BAD(c.tensors.error.dtype = HYPERATTN_DTYPE_BF16, INVALID, "error.dtype");
    BAD(c.tensors.error.dtype = 0, INVALID, "error.dtype", "0");
}

static bool is_legal(problem_dtypes dtypes)
{
    for (int i = 0; i < LEGAL_DTYPES; i += 1) {
        if (memcmp(&dtypes, &legal_dtypes[i], sizeof dtypes) == 0) {
            return true;
        }
    }
    return false;
}

/* A call whose tensors have these dtypes; the memory is that of f32 tensors, enough for all. */
static void expect_dtypes(hyperattn_dtype q, hyperattn_dtype k, hyperattn_dtype v, hyperattn_dtype out)
{
    static const char *const names[] = {NULL, "F32", "F16", "BF16"};
    bad_call c;
    bad_call_fresh(&c);
    c.tensors.q.dtype = q;
    c.tensors.k.dtype = k;
    c.tensors.v.dtype = v;
    c.tensors.out.dtype = out;
    char name[64];
    snprintf(name, sizeof name, "dtypes q %s k %s v %s out %s", names[q], names[k], names[v], names[out]);
    const problem_dtypes dtypes = {q, k, out};
    if (v == k && is_legal(dtypes)) {
        check_case("%s", name);
        CHECK_OK(hyperattn_forward(&c.params, &c.tensors, NULL));
        return;
    }
    /* The sentence names the first two that do not go together. */
    char first[32], second[32];
    snprintf(second, sizeof second, "k.dtype = %s", names[k]);
    if (v != k) {
        snprintf(first, sizeof first, "v.dtype = %s", names[v]);
    } else if (q != k && q != HYPERATTN_DTYPE_F32) {
        snprintf(first, sizeof first, "q.dtype = %s", names[q]);
    } else {
        snprintf(first, sizeof first, "out.dtype = %s", names[out]);
        snprintf(second, sizeof second, "q.dtype = %s", names[q]);
    }
    bad_call_expect(name, &c, INVALID, PARTS(first, second));
}

static void dtype_combinations(void)
{
    for (hyperattn_dtype q = HYPERATTN_DTYPE_F32; q <= HYPERATTN_DTYPE_BF16; q += 1) {
        for (hyperattn_dtype k = HYPERATTN_DTYPE_F32; k <= HYPERATTN_DTYPE_BF16; k += 1) {
            for (hyperattn_dtype v = HYPERATTN_DTYPE_F32; v <= HYPERATTN_DTYPE_BF16; v += 1) {
                for (hyperattn_dtype out = HYPERATTN_DTYPE_F32; out <= HYPERATTN_DTYPE_BF16; out += 1) {
                    expect_dtypes(q, k, v, out);
                }
            }
        }
    }
}

static void extents(void)
{
    BAD(c.tensors.q.shape[0] = 0, INVALID, "q.shape[0]", "0");
    BAD(c.tensors.q.shape[1] = -1, INVALID, "q.shape[1]", "-1");
    BAD(c.tensors.q.shape[2] = -5, INVALID, "q.shape[2]", "-5");
    BAD(c.tensors.q.shape[3] = 0, INVALID, "q.shape[3]", "0");
    BAD(c.tensors.k.shape[1] = 0, INVALID, "k.shape[1]", "0");
    BAD(c.tensors.v.shape[3] = 0, INVALID, "v.shape[3]", "0");
    BAD(c.tensors.out.shape[3] = -8, INVALID, "out.shape[3]", "-8");
    BAD(c.tensors.k.shape[2] = INT64_MIN, INVALID, "k.shape[2]", "-9223372036854775808");

    BAD(c.tensors.k.shape[0] = 3, INVALID, "k.shape[0]", "3", "q.shape[0]", "2");
    BAD(c.tensors.v.shape[0] = 1, INVALID, "v.shape[0]", "1", "2");
    BAD(c.tensors.out.shape[0] = 1, INVALID, "out.shape[0]", "1", "2");
    BAD(c.tensors.k.shape[3] = 15, INVALID, "k.shape[3]", "15", "q.shape[3]", "16");
    BAD(c.tensors.v.shape[1] = 1, INVALID, "v.shape[1]", "1", "k.shape[1]", "2");
    BAD(c.tensors.v.shape[2] = 6, INVALID, "v.shape[2]", "6", "k.shape[2]", "7");
    BAD(c.tensors.out.shape[1] = 2, INVALID, "out.shape[1]", "2", "q.shape[1]", "4");
    BAD(c.tensors.out.shape[2] = 4, INVALID, "out.shape[2]", "4", "q.shape[2]", "5");
    BAD(c.tensors.out.shape[3] = 7, INVALID, "out.shape[3]", "7", "v.shape[3]", "8");
    BAD(c.tensors.lse.shape[0] = 1, INVALID, "lse.shape[0]", "1", "2");
    BAD(c.tensors.lse.shape[1] = 3, INVALID, "lse.shape[1]", "3", "q.shape[1]", "4");
    BAD(c.tensors.lse.shape[2] = 4, INVALID, "lse.shape[2]", "4", "q.shape[2]", "5");
    BAD(c.tensors.lse.shape[3] = 2, INVALID, "lse.shape[3]", "2", "1");
    BAD(c.tensors.error.shape[0] = 1, INVALID, "error.shape[0]", "1", "q.shape[0]", "2");
    BAD(c.tensors.error.shape[1] = 2, INVALID, "error.shape[1]", "2", "q.shape[1]", "4");
    BAD((c.tensors.error.shape[2] = 5, c.tensors.error.stride[1] = 5, c.tensors.error.stride[0] = 20), INVALID,
        "error.shape[2]", "5", "1");
    BAD(c.tensors.error.shape[2] = 0, INVALID, "error.shape[2]", "0", "1");
    BAD(c.tensors.error.shape[3] = 8, INVALID, "error.shape[3]", "8", "1");
    BAD((c.tensors.k.shape[1] = 3, c.tensors.v.shape[1] = 3, c.tensors.k.stride[1] = 0, c.tensors.v.stride[1] = 0), INVALID,
        "q.shape[1]", "4", "k.shape[1]", "3");
}

static void limits(void)
{
    /* Strides of 0 make any extent legal memory, so only the limits can object. */
    BAD((c.tensors.q.shape[3] = 257, c.tensors.k.shape[3] = 257, c.tensors.q.stride[2] = 0, c.tensors.k.stride[2] = 0),
        INVALID, "q.shape[3]", "257", "256");
    BAD((c.tensors.v.shape[3] = 300, c.tensors.out.shape[3] = 300, c.tensors.v.stride[2] = 0,
         c.tensors.out.stride[2] = 300, c.tensors.out.stride[1] = 1500, c.tensors.out.stride[0] = 6000),
        INVALID, "v.shape[3]", "300", "256");
    const int64_t too_long = INT64_C(2147483648);
    BAD((c.tensors.k.shape[2] = too_long, c.tensors.v.shape[2] = too_long, c.tensors.k.stride[2] = 0,
         c.tensors.v.stride[2] = 0),
        INVALID, "k.shape[2]", "2147483648", "2147483647");
    BAD((c.tensors.q.shape[2] = too_long, c.tensors.q.stride[2] = 0), INVALID, "q.shape[2]", "2147483648", "2147483647");

    const int64_t huge = INT64_C(1) << 40;
    BAD((c.tensors.q.shape[0] = huge, c.tensors.q.shape[1] = huge, c.tensors.q.stride[0] = 0, c.tensors.q.stride[1] = 0),
        INVALID, "q.shape", "1099511627776");
    BAD(c.tensors.k.stride[0] = INT64_MAX, INVALID, "k.stride");
    BAD(c.tensors.v.stride[2] = INT64_MAX / 4, INVALID, "v.stride");
    BAD(c.tensors.q.stride[1] = INT64_MIN, INVALID, "q.stride");
    BAD((c.tensors.k.stride[0] = INT64_MAX / 8, c.tensors.k.stride[1] = INT64_MAX / 8), INVALID, "k.stride");
}

static void strides_and_overlaps(void)
{
    BAD(c.tensors.q.stride[3] = 2, INVALID, "q.stride[3]", "2");
    BAD(c.tensors.k.stride[3] = 0, INVALID, "k.stride[3]", "0");
    BAD(c.tensors.v.stride[3] = -1, INVALID, "v.stride[3]", "-1");
    BAD(c.tensors.out.stride[3] = 3, INVALID, "out.stride[3]", "3");

    BAD(c.tensors.out.stride[0] = 0, INVALID, "out", "overlap");
    BAD(c.tensors.out.stride[1] = 0, INVALID, "out", "overlap");
    BAD(c.tensors.out.stride[2] = 4, INVALID, "out", "overlap");
    BAD(c.tensors.lse.stride[2] = 0, INVALID, "lse", "overlap");
    BAD(c.tensors.lse.stride[1] = 4, INVALID, "lse", "overlap");
    BAD(c.tensors.error.stride[0] = 0, INVALID, "error", "overlap");
    BAD(c.tensors.error.stride[1] = 0, INVALID, "error", "overlap");

    /* Overlaps of two tensors depend on addresses, which the workspace does not. */
    static const struct {
        const char *name;
        size_t offset;
    } others[] = {{"q", offsetof(hyperattn_tensors, q)},
                  {"k", offsetof(hyperattn_tensors, k)},
                  {"v", offsetof(hyperattn_tensors, v)},
                  {"lse", offsetof(hyperattn_tensors, lse)},
                  {"error", offsetof(hyperattn_tensors, error)}};
    for (int i = 0; i < 5; i += 1) {
        bad_call c;
        bad_call_fresh(&c);
        hyperattn_tensor other;
        memcpy(&other, (const char *)&c.tensors + others[i].offset, sizeof other);
        /* The other tensor's last element is inside of out. */
        int64_t last = tensor_offset(&other, other.shape[0] - 1, other.shape[1] - 1, other.shape[2] - 1,
                                     other.shape[3] - 1);
        other.data = (float *)c.tensors.out.data - last;
        memcpy((char *)&c.tensors + others[i].offset, &other, sizeof other);
        bad_call_expect_forward(others[i].name, &c, INVALID, PARTS("out", others[i].name, "overlap"));
    }
    for (int i = 0; i < 3; i += 1) {
        bad_call c;
        bad_call_fresh(&c);
        hyperattn_tensor other;
        memcpy(&other, (const char *)&c.tensors + others[i].offset, sizeof other);
        c.tensors.lse.data = other.data;
        bad_call_expect_forward("lse on an input", &c, INVALID, PARTS("lse", others[i].name, "overlap"));
        bad_call_fresh(&c);
        c.tensors.error.data = other.data;
        bad_call_expect_forward("error on an input", &c, INVALID, PARTS("error", others[i].name, "overlap"));
    }
    bad_call c;
    bad_call_fresh(&c);
    c.tensors.error.data = (float *)c.tensors.lse.data + 1;
    bad_call_expect_forward("error on lse", &c, INVALID, PARTS("error", "lse", "overlap"));
}

void bad_tensors(void)
{
    structs();
    pointers_and_types();
    dtype_combinations();
    extents();
    limits();
    strides_and_overlaps();
}
