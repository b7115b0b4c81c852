/* Wrong mask tensors, and methods that take none. */
#include "bad_calls.h"

#include <string.h>

static array mask;

/* EXACT with a mask [2, 4, 5, 7] of f32. */
static void fresh(bad_call *c)
{
    bad_call_fresh(c);
    c->params.method = HYPERATTN_METHOD_EXACT;
    c->tensors.mask = mask.view;
}

/* `change` is an expression on `c`. */
#define BAD_MASK(change, status, ...) \
    do { \
        bad_call c; \
        fresh(&c); \
        change; \
        bad_call_expect(#change, &c, status, PARTS(__VA_ARGS__)); \
    } while (0)

static void views(void)
{
    BAD_MASK(c.tensors.mask.dtype = 0, INVALID, "tensors.mask.dtype = 0");
    BAD_MASK(c.tensors.mask.dtype = 4, INVALID, "tensors.mask.dtype = 4");
    BAD_MASK(c.tensors.mask.reserved = 9, INVALID, "tensors.mask.reserved = 9");
    BAD_MASK(c.tensors.mask.shape[0] = 0, INVALID, "tensors.mask.shape[0]", "0", "1");
    BAD_MASK(c.tensors.mask.shape[2] = -1, INVALID, "tensors.mask.shape[2] (queries) = -1");
    BAD_MASK(c.tensors.mask.shape[3] = -7, INVALID, "tensors.mask.shape[3] (keys) = -7");
    BAD_MASK(c.tensors.mask.shape[3] = INT64_C(1) << 31, INVALID, "tensors.mask.shape[3]", "2147483648", "2147483647");
    BAD_MASK(c.tensors.mask.shape[0] = 3, INVALID, "tensors.mask.shape[0] = 3", "q.shape[0] = 2");
    BAD_MASK(c.tensors.mask.shape[1] = 2, INVALID, "tensors.mask.shape[1] = 2", "q.shape[1] = 4");
    BAD_MASK(c.tensors.mask.shape[2] = 0, INVALID, "tensors.mask.shape[2] = 0", "q.shape[2] = 5");
    BAD_MASK(c.tensors.mask.shape[2] = 6, INVALID, "tensors.mask.shape[2] = 6", "q.shape[2] = 5");
    BAD_MASK(c.tensors.mask.shape[3] = 1, INVALID, "tensors.mask.shape[3] = 1", "k.shape[2] = 7");
    BAD_MASK(c.tensors.mask.shape[3] = 8, INVALID, "tensors.mask.shape[3] = 8", "k.shape[2] = 7");
    BAD_MASK(c.tensors.mask.stride[3] = 2, INVALID, "tensors.mask.stride[3] = 2");
    BAD_MASK(c.tensors.mask.stride[3] = 0, INVALID, "tensors.mask.stride[3] = 0");
    BAD_MASK(c.tensors.mask.stride[2] = INT64_MAX / 4, INVALID, "tensors.mask.stride");
}

/* Overlaps depend on addresses, which the workspace does not. */
static void overlaps(void)
{
    static const char *const names[] = {"out", "lse", "error"};
    for (int i = 0; i < 3; i += 1) {
        bad_call c;
        fresh(&c);
        const hyperattn_tensor *const outputs[] = {&c.tensors.out, &c.tensors.lse, &c.tensors.error};
        c.tensors.mask.data = outputs[i]->data;
        bad_call_expect_forward(names[i], &c, INVALID, PARTS("tensors.mask", names[i], "overlap"));
    }
}

static void methods(void)
{
    const hyperattn_status unsupported = HYPERATTN_STATUS_UNSUPPORTED;
    BAD_MASK(c.params.method = HYPERATTN_METHOD_PAPER, unsupported, "tensors.mask", "params.method = PAPER");
    BAD_MASK(c.params.method = HYPERATTN_METHOD_REFINED, unsupported, "tensors.mask", "params.method = REFINED");
    BAD_MASK((c.params.method = HYPERATTN_METHOD_AUTO, c.tensors.block_mask = &c.block_mask), unsupported,
             "tensors.mask", "block_mask");
    hyperattn_diagnosis heads[8];
    memset(heads, 0, sizeof heads);
    for (int h = 0; h < 8; h += 1) {
        heads[h].struct_size = sizeof heads[h];
        heads[h].alpha = -5.0;
    }
    bad_call c;
    fresh(&c);
    bad_call_forget_error();
    hyperattn_status status = hyperattn_diagnose(&c.params, &c.tensors, &c.exec, 0, heads, 8);
    bad_call_expect_error("diagnose", status, unsupported, PARTS("tensors.mask"));
    CHECK(heads[0].alpha == -5.0 && heads[7].alpha == -5.0);
}

/* Without a change the call succeeds; without data nothing of the mask is looked at. */
static void right_calls(void)
{
    bad_call c;
    check_case("a mask of zeros");
    fresh(&c);
    CHECK_OK(hyperattn_forward(&c.params, &c.tensors, &c.exec));
    check_case("no mask");
    memset(&c.tensors.mask, 0xa5, sizeof c.tensors.mask);
    c.tensors.mask.data = NULL;
    CHECK_OK(hyperattn_forward(&c.params, &c.tensors, &c.exec));
    c.params.method = HYPERATTN_METHOD_PAPER;
    CHECK_OK(hyperattn_forward(&c.params, &c.tensors, &c.exec));
}

void bad_masks(void)
{
    mask = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 5, 7);
    memset(mask.view.data, 0, (size_t)tensor_elements(&mask.view) * sizeof(float));
    right_calls();
    views();
    overlaps();
    methods();
    right_calls();
    array_destroy(&mask);
}
