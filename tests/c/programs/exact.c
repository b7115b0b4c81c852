/* METHOD_EXACT against loops in double precision, over shapes, masks, dtypes, layouts and scales. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "half.h"
#include "problem.h"
#include "reference.h"

/* One call on freshly made tensors: results, untouched surroundings, untouched inputs. */
static void run_case(const problem_shape *s, problem_dtypes dtypes, array_layout layout, hyperattn_mask mask,
                     float scale, bool want_lse, random_source *source)
{
    check_case("b%d h%d/%d n_q %d n_k %d d %d d_v %d %s %s->%s layout %d mask %s scale %g lse %d", (int)s->batch,
               (int)s->heads_q, (int)s->heads_kv, (int)s->n_q, (int)s->n_k, (int)s->d, (int)s->d_v, dtype_name(dtypes.q),
               dtype_name(dtypes.kv), dtype_name(dtypes.out), (int)layout, mask_name(mask), (double)scale, (int)want_lse);
    problem p = problem_create_mixed(s, dtypes, layout, source);
    if (!want_lse) {
        /* Not wanted, so nothing else of it is looked at. */
        memset(&p.tensors.lse, 0xa5, sizeof p.tensors.lse);
        p.tensors.lse.data = NULL;
    }
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, mask);
    params.scale = scale;
    uint64_t inputs = array_hash(&p.q) ^ array_hash(&p.k) ^ array_hash(&p.v);

    reference_expect_exact(&p, &params);

    CHECK((array_hash(&p.q) ^ array_hash(&p.k) ^ array_hash(&p.v)) == inputs);
    if (!want_lse) {
        CHECK(array_untouched(&p.lse));
    }
    problem_destroy(&p);
}

/* Every shape with every mask and dtype; layouts, scales and the wish for lse take turns. */
static void sweep(random_source *source)
{
    static const problem_shape shapes[] = {
        /* batch, heads_q, heads_kv, n_q, n_k, d, d_v */
        {1, 1, 1, 1, 1, 64, 64},    {1, 1, 1, 1, 1, 1, 1},      {1, 1, 1, 17, 17, 1, 1},     {1, 2, 2, 31, 31, 3, 3},
        {1, 2, 1, 64, 64, 64, 64},  {2, 2, 2, 127, 127, 64, 64}, {1, 1, 1, 251, 251, 80, 80}, {1, 1, 1, 101, 101, 128, 128},
        {1, 1, 1, 67, 67, 256, 256}, {2, 6, 2, 61, 61, 64, 64},  {2, 6, 2, 13, 97, 80, 64},   {1, 6, 2, 97, 13, 64, 80},
        {2, 3, 3, 1, 129, 128, 64}, {2, 3, 3, 129, 1, 64, 128}, {2, 2, 1, 5, 0, 64, 64},     {2, 2, 1, 0, 5, 64, 64},
        {1, 1, 1, 0, 0, 8, 8},      {2, 4, 4, 33, 65, 3, 256},  {1, 4, 4, 65, 33, 256, 3},   {1, 2, 2, 40, 70, 1, 64},
        {1, 2, 2, 70, 40, 64, 1},   {2, 1, 1, 19, 23, 128, 80}, {1, 6, 2, 1, 1, 80, 80},     {3, 6, 1, 7, 200, 64, 64},
        {1, 2, 1, 509, 503, 64, 64}, {1, 1, 1, 15, 16, 24, 40}, {1, 1, 1, 8, 9, 255, 255},   {1, 2, 2, 300, 2, 16, 8},
    };
    static const float scales[] = {0.0f, 0.25f, -0.125f};
    unsigned turn = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            for (int t = 0; t < LEGAL_DTYPES; t += 1) {
                array_layout layout = (array_layout)(turn % ARRAY_LAYOUTS);
                run_case(&shapes[s], legal_dtypes[t], layout, mask, scales[turn % 3], turn % 11 != 0, source);
                turn += 1;
            }
        }
        turn += 2; /* 23 turns a shape: no mask or dtype always meets the same layout or scale */
    }
}

/* Every layout with every mask, without turns. */
static void layouts(random_source *source)
{
    const problem_shape shape = {2, 6, 2, 29, 43, 64, 80};
    for (int layout = 0; layout < ARRAY_LAYOUTS; layout += 1) {
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            for (int t = 0; t < LEGAL_DTYPES; t += 1) {
                run_case(&shape, legal_dtypes[t], (array_layout)layout, mask, 0.0f, true, source);
            }
        }
    }
}

/* Longer than any tile, with a length that is a multiple of nothing. */
static void long_sequences(random_source *source)
{
    const problem_shape shape = {1, 2, 1, 601, 1201, 64, 64};
    const problem_dtypes f32 = {HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32};
    const problem_dtypes bf16 = {HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16};
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        run_case(&shape, f32, ARRAY_BSHD, mask, 0.0f, true, source);
    }
    run_case(&shape, bf16, ARRAY_PADDED, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, 0.0f, true, source);
}

/* As llama.cpp calls: f32 queries and output, a 16-bit cache of keys and values, all of them token by token. The
 * queries are the last tokens, down to the one of decoding. */
static void sixteen_bit_cache(random_source *source)
{
    static const problem_shape shapes[] = {
        {1, 8, 2, 211, 701, 64, 64}, {2, 6, 2, 37, 90, 128, 80}, {1, 8, 1, 1, 513, 128, 128}, {2, 3, 3, 5, 9, 7, 11}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        const problem_shape shape = shapes[s];
        for (hyperattn_dtype kv = HYPERATTN_DTYPE_F16; kv <= HYPERATTN_DTYPE_BF16; kv += 1) {
            check_case("f32 queries over %s, shape %zu", dtype_name(kv), s);
            const problem_dtypes dtypes = {HYPERATTN_DTYPE_F32, kv, HYPERATTN_DTYPE_F32};
            problem p = problem_create_mixed(&shape, dtypes, ARRAY_BSHD, source);
            p.tensors.q =
                hyperattn_tensor_bshd(p.q.view.data, dtypes.q, shape.batch, shape.heads_q, shape.n_q, shape.d);
            p.tensors.k = hyperattn_tensor_bshd(p.k.view.data, kv, shape.batch, shape.heads_kv, shape.n_k, shape.d);
            p.tensors.v = hyperattn_tensor_bshd(p.v.view.data, kv, shape.batch, shape.heads_kv, shape.n_k, shape.d_v);
            p.tensors.out =
                hyperattn_tensor_bshd(p.out.view.data, dtypes.out, shape.batch, shape.heads_q, shape.n_q, shape.d_v);
            hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
            reference_expect_exact(&p, &params);
            problem_destroy(&p);
        }
    }
}

/* Keys of every head through one row: sequence and head strides of 0 are legal for inputs too. */
static void broadcast_rows_and_heads(random_source *source)
{
    check_case("strides of 0 over heads and rows");
    const problem_shape shape = {2, 4, 2, 9, 21, 16, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    p.tensors.k.stride[1] = 0;
    p.tensors.v.stride[1] = 0;
    p.tensors.v.stride[2] = 0;
    p.tensors.q.stride[2] = 0;
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    reference_expect_exact(&p, &params);
    problem_destroy(&p);
}

/* Rows and heads from the last to the first, for inputs and outputs. */
static void negative_strides(random_source *source)
{
    check_case("negative strides");
    const problem_shape shape = {2, 2, 2, 11, 17, 16, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_PADDED, source);
    hyperattn_tensor *views[] = {&p.tensors.q, &p.tensors.k, &p.tensors.v, &p.tensors.out, &p.tensors.lse};
    for (int i = 0; i < 5; i += 1) {
        for (int axis = i == 0 ? 1 : 2; axis < 3; axis += 1) {
            views[i]->data = (float *)views[i]->data + (views[i]->shape[axis] - 1) * views[i]->stride[axis];
            views[i]->stride[axis] = -views[i]->stride[axis];
        }
    }
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    reference_expect_exact(&p, &params);
    problem_destroy(&p);
}

/* The harness's own conversions: every 16-bit value survives the way to float and back. */
static void half_conversions(void)
{
    check_case("half conversions");
    unsigned wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; bits += 1) {
        float wide = float_from_f16((uint16_t)bits);
        wrong += !isnan(wide) && f16_from_float(wide) != bits;
        wide = float_from_bf16((uint16_t)bits);
        wrong += !isnan(wide) && bf16_from_float(wide) != bits;
    }
    CHECK_INT(wrong, 0);
    /* Halfway cases go to the even neighbour, and the largest finite value is not rounded to infinity. */
    CHECK_INT(f16_from_float(1.0f + 0x1p-11f), 0x3c00);
    CHECK_INT(f16_from_float(1.0f + 3 * 0x1p-11f), 0x3c02);
    CHECK_INT(f16_from_float(0x1p-25f), 0x0000);
    CHECK_INT(f16_from_float(3 * 0x1p-25f), 0x0002);
    CHECK_INT(f16_from_float(65519.0f), 0x7bff);
    CHECK_INT(f16_from_float(65520.0f), 0x7c00);
    CHECK_INT(bf16_from_float(1.0f + 0x1p-8f), 0x3f80);
    CHECK_INT(bf16_from_float(1.0f + 3 * 0x1p-8f), 0x3f82);
}

/* A tensor without elements needs no memory. */
static void null_data_of_empty_tensors(random_source *source)
{
    check_case("no keys, k.data and v.data NULL");
    problem_shape shape = {1, 2, 1, 5, 0, 16, 16};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    p.tensors.k.data = NULL;
    p.tensors.v.data = NULL;
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    reference_expect_exact(&p, &params);
    problem_destroy(&p);

    check_case("no queries, q.data and out.data NULL");
    shape.n_q = 0;
    shape.n_k = 5;
    p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    p.tensors.q.data = NULL;
    p.tensors.out.data = NULL;
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    CHECK(array_untouched(&p.lse));
    problem_destroy(&p);
}

/* AUTO on a short problem is exact. */
static void automatic(random_source *source)
{
    check_case("METHOD_AUTO, short");
    const problem_shape shape = {1, 2, 2, 111, 111, 64, 64};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_AUTO, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    reference_expect_exact(&p, &params);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("exact", argc, argv)};
    half_conversions();
    sweep(&source);
    layouts(&source);
    long_sequences(&source);
    sixteen_bit_cache(&source);
    broadcast_rows_and_heads(&source);
    negative_strides(&source);
    null_data_of_empty_tensors(&source);
    automatic(&source);
    return check_finish();
}
