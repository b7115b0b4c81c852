/* METHOD_EXACT with a mask tensor: as an engine passes it, and against loops in double precision over dtypes, extents that
 * serve all, layouts and causal masks. Masks end at an unreadable page like all arrays. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "check.h"
#include "half.h"
#include "problem.h"
#include "reference.h"

/* The last tokens of a prompt over a key-value cache. Its cells beyond the prompt hold anything; the mask hides them, and
 * from each token the ones after it. The call that has no such cells and a causal mask gives the same bits. */
static void as_an_engine_calls(random_source *source)
{
    enum { HEADS = 8, KV_HEADS = 2, PAST = 240, TOKENS = 61, KEYS = PAST + TOKENS, CELLS = 512, HEAD_DIM = 64 };
    check_case("a mask over cache cells");
    const problem_shape shape = {1, HEADS, KV_HEADS, TOKENS, CELLS, HEAD_DIM, HEAD_DIM};
    const problem_dtypes dtypes = {HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F32};
    problem p = problem_create_mixed(&shape, dtypes, ARRAY_BHSD, source);
    for (int64_t h = 0; h < KV_HEADS; h += 1) {
        for (int64_t cell = KEYS; cell < CELLS; cell += 1) {
            for (int64_t c = 0; c < HEAD_DIM; c += 1) {
                tensor_set(&p.tensors.k, 0, h, cell, c, NAN);
                tensor_set(&p.tensors.v, 0, h, cell, c, INFINITY);
            }
        }
    }
    uint16_t *mask = (uint16_t *)malloc(TOKENS * CELLS * sizeof *mask);
    if (mask == NULL) {
        exit(EXIT_FAILURE);
    }
    for (int i = 0; i < TOKENS; i += 1) {
        for (int j = 0; j < CELLS; j += 1) {
            mask[i * CELLS + j] = f16_from_float(j <= PAST + i ? 0.0f : -INFINITY);
        }
    }
    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    params.method = HYPERATTN_METHOD_EXACT;
    /* One for all heads: [1, 1, n_q, n_k]. */
    p.tensors.mask = hyperattn_tensor_bhsd(mask, HYPERATTN_DTYPE_F16, 1, 1, TOKENS, CELLS);
    reference_expect_exact(&p, &params);

    array out = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, HEADS, TOKENS, HEAD_DIM);
    hyperattn_tensors causal = p.tensors;
    memset(&causal.mask, 0, sizeof causal.mask);
    causal.k.shape[2] = causal.v.shape[2] = KEYS;
    causal.out = out.view;
    causal.lse.data = NULL;
    params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    CHECK_OK(hyperattn_forward(&params, &causal, NULL));
    CHECK(tensor_same_bits(&p.out.view, &out.view));
    array_destroy(&out);
    free(mask);
    problem_destroy(&p);
}

/* Rows that are 0, hide a part, all, or have any number: entries of one row are of one kind for some keys. */
static void fill_mask(const hyperattn_tensor *mask, random_source *source)
{
    for (int64_t b = 0; b < mask->shape[0]; b += 1) {
        for (int64_t h = 0; h < mask->shape[1]; h += 1) {
            for (int64_t i = 0; i < mask->shape[2]; i += 1) {
                for (int64_t j = 0; j < mask->shape[3]; j += 1) {
                    unsigned kind = (unsigned)((i / 40 + j / 90 + h) % 5);
                    double number = random_gaussian(source);
                    double hidden = mask->dtype == HYPERATTN_DTYPE_F32 && number > 0.0 ? -3e38 : -INFINITY;
                    double entry = kind == 0   ? 0.0
                                   : kind == 1 ? (j % 90 > i ? hidden : 0.0)
                                   : kind == 2 ? (number > 0.5 ? hidden : 0.0)
                                   : kind == 3 ? hidden
                                               : number;
                    tensor_set(mask, b, h, i, j, i == 7 ? hidden : entry);
                }
            }
        }
    }
}

/* Every dtype and layout of the mask with every form of extents; the tensors' dtypes and the causal mask take turns. */
static void sweep(random_source *source)
{
    static const problem_shape shapes[] = {{2, 4, 2, 49, 203, 24, 16}, {1, 3, 1, 1, 130, 64, 64}, {2, 2, 2, 83, 64, 16, 7}};
    unsigned turn = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (hyperattn_dtype dtype = HYPERATTN_DTYPE_F32; dtype <= HYPERATTN_DTYPE_BF16; dtype += 1) {
            for (int layout = 0; layout < ARRAY_LAYOUTS; layout += 1) {
                for (int form = 0; form < 8; form += 1) {
                    const problem_shape *shape = &shapes[s];
                    const problem_dtypes dtypes = legal_dtypes[turn % LEGAL_DTYPES];
                    hyperattn_mask causal = turn / LEGAL_DTYPES % 3;
                    check_case("shape %zu, mask %s layout %d form %d, %s over %s, %s", s, dtype_name(dtype), layout, form,
                               dtype_name(dtypes.q), dtype_name(dtypes.kv), mask_name(causal));
                    problem p = problem_create_mixed(shape, dtypes, ARRAY_BSHD, source);
                    array mask = array_create(dtype, (array_layout)layout, form & 1 ? 1 : shape->batch,
                                              form & 2 ? 1 : shape->heads_q, form & 4 ? 1 : shape->n_q, shape->n_k);
                    fill_mask(&mask.view, source);
                    uint64_t hash = array_hash(&mask);
                    p.tensors.mask = mask.view;
                    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, causal);
                    reference_expect_exact(&p, &params);
                    CHECK(array_hash(&mask) == hash);
                    array_destroy(&mask);
                    problem_destroy(&p);
                    turn += 1;
                }
            }
        }
    }
}

/* The same bits for every number of threads and through AUTO, and an error of 0. */
static void threads_and_error(random_source *source)
{
    const problem_shape shape = {1, 4, 2, 300, 700, 32, 32};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    array mask = array_create(HYPERATTN_DTYPE_F16, ARRAY_PADDED, 1, 4, 300, 700);
    fill_mask(&mask.view, source);
    p.tensors.mask = mask.view;
    problem_want_error(&p);
    array first = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 4, 300, 32);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    hyperattn_tensors into_first = p.tensors;
    into_first.out = first.view;
    CHECK_OK(hyperattn_forward(&params, &into_first, NULL));
    for (uint32_t threads = 1; threads < 5; threads += 1) {
        check_case("%u threads", threads);
        hyperattn_cpu_exec exec = problem_exec(threads);
        params.method = threads % 2 == 0 ? HYPERATTN_METHOD_AUTO : HYPERATTN_METHOD_EXACT;
        problem_poison_outputs(&p);
        CHECK_OK(hyperattn_forward(&params, &p.tensors, &exec));
        CHECK(tensor_same_bits(&p.out.view, &first.view));
        for (int64_t h = 0; h < 4; h += 1) {
            CHECK(tensor_get(&p.error.view, 0, h, 0, 0) == 0.0);
        }
    }
    array_destroy(&first);
    array_destroy(&mask);
    problem_destroy(&p);
}

/* Two sequences in the rows of one call meet the parts of the mask that are theirs, with the bits that each has alone; and
 * so does a plan, task by task, which needs its mask in every run. */
static void sequences_and_plans(random_source *source)
{
    enum { HEADS = 4, DIM = 16, FIRST_Q = 70, FIRST_K = 210, QUERIES = 130, KEYS = 500 };
    const problem_shape shape = {1, HEADS, 2, QUERIES, KEYS, DIM, DIM};
    const int32_t starts_q[] = {0, FIRST_Q, QUERIES}, starts_k[] = {0, FIRST_K, KEYS};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    array mask = array_create(HYPERATTN_DTYPE_F16, ARRAY_PADDED, 1, HEADS, QUERIES, KEYS);
    array alone = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, HEADS, QUERIES, DIM);
    fill_mask(&mask.view, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_AUTO, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    for (int i = 0; i < 2; i += 1) {
        check_case("sequence %d alone", i);
        hyperattn_tensors part = p.tensors;
        part.mask = mask.view;
        part.out = alone.view;
        part.lse.data = NULL;
        hyperattn_tensor *const rows[] = {&part.q, &part.out, &part.mask}, *const keys[] = {&part.k, &part.v};
        for (int t = 0; t < 3; t += 1) {
            rows[t]->data = (char *)rows[t]->data + (size_t)(starts_q[i] * rows[t]->stride[2]) * dtype_size(rows[t]->dtype);
            rows[t]->shape[2] = starts_q[i + 1] - starts_q[i];
        }
        for (int t = 0; t < 2; t += 1) {
            keys[t]->data = (float *)keys[t]->data + starts_k[i] * keys[t]->stride[2];
            keys[t]->shape[2] = starts_k[i + 1] - starts_k[i];
        }
        part.mask.data = (uint16_t *)part.mask.data + starts_k[i];
        part.mask.shape[3] = starts_k[i + 1] - starts_k[i];
        CHECK_OK(hyperattn_forward(&params, &part, NULL));
    }
    check_case("both sequences");
    p.tensors.mask = mask.view;
    p.tensors.num_sequences = 2;
    p.tensors.cu_seqlens_q = starts_q;
    p.tensors.cu_seqlens_k = starts_k;
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    CHECK(tensor_same_bits(&p.out.view, &alone.view));

    check_case("a plan, task by task");
    hyperattn_plan *plan = NULL;
    CHECK_OK(hyperattn_plan_create(&params, &p.tensors, &plan));
    problem_poison_outputs(&p);
    for (size_t task = hyperattn_plan_task_count(plan); task > 0; task -= 1) {
        CHECK_OK(hyperattn_plan_run_tasks(plan, &p.tensors, task - 1, task, (hyperattn_buffer){NULL, 0}));
    }
    CHECK(tensor_same_bits(&p.out.view, &alone.view));
    p.tensors.mask.data = NULL;
    CHECK_STATUS(hyperattn_plan_run(plan, &p.tensors, NULL), HYPERATTN_STATUS_INVALID_ARGUMENT);
    CHECK_CONTAINS(hyperattn_last_error(), "tensors.mask");
    hyperattn_plan_destroy(plan);
    array_destroy(&alone);
    array_destroy(&mask);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("additive_mask", argc, argv)};
    as_an_engine_calls(&source);
    sweep(&source);
    threads_and_error(&source);
    sequences_and_plans(&source);
    return check_finish();
}
