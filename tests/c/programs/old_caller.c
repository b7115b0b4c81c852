/* Callers compiled against an older or a newer header: struct_size says which fields they have. */
#include <hyperattn/hyperattn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "pool.h"
#include "problem.h"

/* Above the default min_seq_len the fields before it have an effect under METHOD_PAPER, below it the field itself. */
static const problem_shape SHAPES[] = {{1, 2, 1, 96, 4500, 8, 8}, {1, 2, 1, 96, 4000, 8, 8}};

/* The end of every field of hyperattn_params, in order. */
#define END(field) (offsetof(hyperattn_params, field) + sizeof(((hyperattn_params *)0)->field))
static const struct boundary {
    const char *last;
    size_t size;
} BOUNDARIES[] = {
    {"struct_size", END(struct_size)},
    {"method", END(method)},
    {"mask", END(mask)},
    {"scale", END(scale)},
    {"residual", END(residual)},
    {"lsh_num_projs", END(lsh_num_projs)},
    {"block_size", END(block_size)},
    {"sample_size", END(sample_size)},
    {"flags", END(flags)},
    {"min_seq_len", END(min_seq_len)},
    {"seed", END(seed)},
    {"offset", END(offset)},
    {"approx_d_epsilon", END(approx_d_epsilon)},
    {"approx_d_kappa", END(approx_d_kappa)},
    {"budget", END(budget)},
    {"num_first_keys", END(num_first_keys)},
    {"band", END(band)},
    {"target_error", END(target_error)},
};
enum { BOUNDARY_COUNT = sizeof BOUNDARIES / sizeof BOUNDARIES[0] };

/* No field has its default, and every one changes the result of PAPER or of REFINED. */
static hyperattn_params unusual_params(hyperattn_method method)
{
    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    params.method = method;
    params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    /* Under REFINED nearly equal weights, which a few keys and a column estimate well. */
    params.scale = method == HYPERATTN_METHOD_PAPER ? 0.3f : 0.003f;
    params.residual = HYPERATTN_RESIDUAL_ROW_NORM;
    params.lsh_num_projs = 4;
    params.block_size = 100;
    params.sample_size = 90;
    params.flags = 0;
    params.min_seq_len = 1000;
    params.seed = 99;
    params.offset = 5;
    params.approx_d_epsilon = 0.003f;
    params.approx_d_kappa = 3.0f;
    params.budget = 300;
    params.num_first_keys = 40;
    params.band = 300;
    params.target_error = 1e-7f;
    return params;
}

/* The exact bytes of an old struct on the heap, where a sanitizer sees a read past its end. */
static hyperattn_params *old_params(const hyperattn_params *full, size_t size)
{
    hyperattn_params *old = (hyperattn_params *)malloc(size);
    if (old == NULL) {
        exit(EXIT_FAILURE);
    }
    memcpy(old, full, size);
    memcpy(old, &size, sizeof size);
    return old;
}

/* A short struct gives what the full struct gives with defaults in the fields it lacks. Sets has_effect[i] when the field
 * before boundary i changed the result: without that the comparison would show nothing. */
static void missing_parameters_have_defaults(const problem_shape *shape, hyperattn_method method, bool *has_effect,
                                             random_source *source)
{
    problem p = problem_create(shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    /* Far from zero on average: what REFINED makes of the values is then within the default target. */
    for (int64_t i = 0; i < tensor_elements(&p.v.view); i += 1) {
        ((float *)p.v.view.data)[i] += 3.0f;
    }
    array expected = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, shape->batch, shape->heads_q, shape->n_q, shape->d_v);
    array previous = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, shape->batch, shape->heads_q, shape->n_q, shape->d_v);
    hyperattn_tensors into_expected = p.tensors;
    into_expected.out = expected.view;
    memset(&into_expected.lse, 0, sizeof into_expected.lse);
    const hyperattn_params unusual = unusual_params(method);
    for (int i = 0; i < BOUNDARY_COUNT; i += 1) {
        check_case("method %u, %d keys, params end after %s", method, (int)shape->n_k, BOUNDARIES[i].last);
        hyperattn_params full;
        hyperattn_params_init(&full, sizeof full);
        memcpy(&full, &unusual, BOUNDARIES[i].size);
        full.struct_size = sizeof full;
        CHECK_OK(hyperattn_forward(&full, &into_expected, NULL));

        hyperattn_params *old = old_params(&unusual, BOUNDARIES[i].size);
        problem_poison_outputs(&p);
        CHECK_OK(hyperattn_forward(old, &p.tensors, NULL));
        CHECK(tensor_same_bits(&p.out.view, &expected.view));
        hyperattn_layout layout = {0, 0};
        CHECK_OK(hyperattn_forward_workspace(old, &p.tensors, NULL, &layout));
        free(old);

        has_effect[i] = has_effect[i] || !tensor_same_bits(&previous.view, &expected.view);
        memcpy(previous.view.data, expected.view.data, (size_t)tensor_elements(&expected.view) * sizeof(float));
    }
    array_destroy(&previous);
    array_destroy(&expected);
    problem_destroy(&p);
}

static void every_field_is_read(random_source *source)
{
    bool has_effect[BOUNDARY_COUNT] = {false};
    missing_parameters_have_defaults(&SHAPES[0], HYPERATTN_METHOD_PAPER, has_effect, source);
    missing_parameters_have_defaults(&SHAPES[1], HYPERATTN_METHOD_PAPER, has_effect, source);
    missing_parameters_have_defaults(&SHAPES[0], HYPERATTN_METHOD_REFINED, has_effect, source);
    for (int i = 0; i < BOUNDARY_COUNT; i += 1) {
        check_case("effect of %s", BOUNDARIES[i].last);
        /* No value of flags changes a result, and AUTO may be what the method asks for. */
        size_t end = BOUNDARIES[i].size;
        CHECK(has_effect[i] || end == END(method) || end == END(flags));
    }
}

/* params_init writes the caller's bytes and not one more. */
static void params_init_respects_the_size(void)
{
    hyperattn_params defaults;
    hyperattn_params_init(&defaults, sizeof defaults);
    for (int i = 0; i < BOUNDARY_COUNT; i += 1) {
        check_case("params_init up to %s", BOUNDARIES[i].last);
        unsigned char memory[sizeof(hyperattn_params) + 1], expected[sizeof(hyperattn_params) + 1];
        memset(memory, 0xa5, sizeof memory);
        memset(expected, 0xa5, sizeof expected);
        memcpy(expected, &defaults, BOUNDARIES[i].size);
        memcpy(expected, &BOUNDARIES[i].size, sizeof BOUNDARIES[i].size);
        hyperattn_params *aligned = (hyperattn_params *)malloc(sizeof memory);
        if (aligned == NULL) {
            exit(EXIT_FAILURE);
        }
        memcpy(aligned, memory, sizeof memory);
        hyperattn_params_init(aligned, BOUNDARIES[i].size);
        CHECK_BYTES(aligned, expected, sizeof expected);
        free(aligned);
    }
    check_case("params_init of a newer caller");
    struct {
        hyperattn_params known;
        uint64_t unknown[2];
    } newer;
    memset(&newer, 0xa5, sizeof newer);
    hyperattn_params_init(&newer.known, sizeof newer);
    CHECK_INT(newer.known.struct_size, sizeof newer);
    CHECK_INT(newer.known.block_size, 256);
    CHECK(newer.unknown[0] == 0 && newer.unknown[1] == 0);
}

/* The end of tensors, exec, pool and block mask may be missing as well. */
static void other_structs_may_be_short(random_source *source)
{
    const problem_shape shape = {1, 2, 1, 20, 30, 8, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);

    check_case("the first release's params and tensors");
    if (sizeof(void *) == 8) {
        CHECK_INT(offsetof(hyperattn_params, budget), 72);
        CHECK_INT(offsetof(hyperattn_tensors, error), 416);
        CHECK_INT(offsetof(hyperattn_tensors, mask), 496);
    }

    check_case("tensors without block_mask");
    hyperattn_tensors tensors = p.tensors;
    tensors.struct_size = offsetof(hyperattn_tensors, block_mask);
    tensors.block_mask = (const hyperattn_block_mask *)16; /* must not be looked at */
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    CHECK(tensor_all_finite(&p.lse.view));

    check_case("tensors without lse");
    problem_poison_outputs(&p);
    tensors.struct_size = offsetof(hyperattn_tensors, lse);
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    CHECK(tensor_all_finite(&p.out.view));
    CHECK(array_untouched(&p.lse));

    check_case("tensors without error");
    problem_poison_outputs(&p);
    problem_want_error(&p);
    tensors = p.tensors;
    tensors.struct_size = offsetof(hyperattn_tensors, error);
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    CHECK(array_untouched(&p.error));
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    CHECK(!array_untouched(&p.error));

    check_case("tensors without mask");
    problem_poison_outputs(&p);
    tensors = p.tensors;
    memset(&tensors.mask, 0xa5, sizeof tensors.mask); /* must not be looked at */
    tensors.struct_size = offsetof(hyperattn_tensors, mask);
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    CHECK(tensor_all_finite(&p.out.view));

    check_case("exec without pool");
    hyperattn_cpu_exec exec = problem_exec(1);
    exec.struct_size = offsetof(hyperattn_cpu_exec, pool);
    exec.pool = (const hyperattn_threadpool *)16;
    CHECK_OK(hyperattn_forward(&params, &p.tensors, &exec));

    check_case("exec with nothing but its size");
    exec.struct_size = sizeof exec.struct_size;
    exec.workspace.size = 12345;
    CHECK_OK(hyperattn_forward(&params, &p.tensors, &exec));

    check_case("block mask without head stride");
    static const int64_t row_offsets[] = {0, 1};
    static const int32_t columns[] = {0};
    hyperattn_block_mask mask;
    memset(&mask, 0, sizeof mask);
    mask.struct_size = offsetof(hyperattn_block_mask, row_offsets_head_stride);
    mask.query_block = 32;
    mask.key_block = 32;
    mask.num_query_blocks = 1;
    mask.num_key_blocks = 1;
    mask.row_offsets = row_offsets;
    mask.columns = columns;
    mask.row_offsets_head_stride = INT64_C(1) << 40;
    tensors = p.tensors;
    tensors.block_mask = &mask;
    params.method = HYPERATTN_METHOD_PAPER;
    params.min_seq_len = 0;
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    problem_destroy(&p);
}

/* Entries of hyperattn_diagnosis from an older or a newer header: each gets the fields it has, and no more. */
static void diagnoses_of_any_size(random_source *source)
{
    enum { HEADS = 6 };
    const problem_shape shape = {2, 3, 1, 20, 30, 8, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    hyperattn_diagnosis full[HEADS];
    memset(full, 0, sizeof full);
    for (int h = 0; h < HEADS; h += 1) {
        full[h].struct_size = sizeof full[h];
    }
    CHECK_OK(hyperattn_diagnose(&params, &p.tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, full, HEADS));
    for (size_t size = sizeof(size_t); size <= sizeof(hyperattn_diagnosis) + 16; size += sizeof(double)) {
        check_case("entries of %zu bytes", size);
        /* On the heap and as long as the entries, where a sanitizer sees a step beyond. */
        unsigned char *entries = (unsigned char *)malloc(HEADS * size);
        if (entries == NULL) {
            exit(EXIT_FAILURE);
        }
        memset(entries, 0, HEADS * size);
        for (size_t h = 0; h < HEADS; h += 1) {
            memcpy(entries + h * size, &size, sizeof size);
        }
        CHECK_OK(hyperattn_diagnose(&params, &p.tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR,
                                    (hyperattn_diagnosis *)entries, HEADS));
        for (size_t h = 0; h < HEADS; h += 1) {
            unsigned char expected[sizeof full[0] + 16] = {0};
            memcpy(expected, &full[h], size < sizeof full[h] ? size : sizeof full[h]);
            memcpy(expected, &size, sizeof size);
            CHECK_BYTES(entries + h * size, expected, size);
        }
        free(entries);
    }
    problem_destroy(&p);
}

/* Fields that this library does not know are fine while they are zero. */
static void newer_structs(random_source *source)
{
    const problem_shape shape = {1, 2, 1, 20, 30, 8, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    struct {
        hyperattn_params known;
        unsigned char unknown[24];
    } params;
    struct {
        hyperattn_tensors known;
        unsigned char unknown[24];
    } tensors;
    struct {
        hyperattn_cpu_exec known;
        unsigned char unknown[24];
    } exec;
    struct {
        hyperattn_threadpool known;
        unsigned char unknown[24];
    } pool;
    reverse_pool own = {2, 0};
    unsigned char *tails[] = {params.unknown, tensors.unknown, exec.unknown, pool.unknown};
    static const char *const names[] = {"params", "tensors", "exec", "pool"};
    memset(&params, 0, sizeof params);
    memset(&tensors, 0, sizeof tensors);
    memset(&exec, 0, sizeof exec);
    memset(&pool, 0, sizeof pool);
    params.known = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    params.known.struct_size = sizeof params;
    tensors.known = p.tensors;
    tensors.known.struct_size = sizeof tensors;
    pool.known = reverse_pool_interface(&own);
    pool.known.struct_size = sizeof pool;
    exec.known = problem_exec(0);
    exec.known.struct_size = sizeof exec;
    exec.known.pool = &pool.known;

    check_case("unknown fields are zero");
    CHECK_OK(hyperattn_forward(&params.known, &tensors.known, &exec.known));
    for (int i = 0; i < 4; i += 1) {
        for (size_t at = 0; at < sizeof params.unknown; at += 23) {
            check_case("byte %zu behind %s is not zero", at, names[i]);
            tails[i][at] = 1;
            problem_poison_outputs(&p);
            CHECK_STATUS(hyperattn_forward(&params.known, &tensors.known, &exec.known),
                         HYPERATTN_STATUS_ABI_MISMATCH);
            CHECK_CONTAINS(hyperattn_last_error(), names[i]);
            CHECK(array_untouched(&p.out));
            tails[i][at] = 0;
        }
    }
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("old_caller", argc, argv)};
    every_field_is_read(&source);
    params_init_respects_the_size();
    other_structs_may_be_short(&source);
    diagnoses_of_any_size(&source);
    newer_structs(&source);
    return check_finish();
}
