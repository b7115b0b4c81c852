/* hyperattn_diagnose: its figures against brute force and against the calls that it stands for. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "pool.h"
#include "problem.h"
#include "reference.h"
#include "topics.h"

enum { MOST_HEADS = 12, SAMPLED = 64 };

static hyperattn_status diagnose(const hyperattn_params *params, const hyperattn_tensors *tensors,
                                 const hyperattn_cpu_exec *exec, uint32_t flags, hyperattn_diagnosis *heads)
{
    for (int h = 0; h < MOST_HEADS; h += 1) {
        heads[h].struct_size = sizeof heads[h];
    }
    size_t count = (size_t)(tensors->q.shape[0] * tensors->q.shape[1]);
    return hyperattn_diagnose(params, tensors, exec, flags, heads, count);
}

static int64_t sampled_rows(int64_t n_q)
{
    return n_q < SAMPLED ? n_q : SAMPLED;
}

static int64_t sampled_row(int64_t n_q, int64_t number)
{
    return n_q < SAMPLED ? number : (2 * number + 1) * n_q / (2 * SAMPLED);
}

/* The definition, over every row or the sampled ones. */
static double alpha_of(const hyperattn_tensors *tensors, const reference *r, hyperattn_mask mask, int64_t b, int64_t h,
                       bool every_row)
{
    const hyperattn_tensor *q = &tensors->q, *k = &tensors->k;
    int64_t n_q = q->shape[2], n_k = k->shape[2], d = q->shape[3], group = q->shape[1] / k->shape[1];
    int64_t count = every_row ? n_q : sampled_rows(n_q);
    double *squares = (double *)calloc((size_t)n_k + 1, sizeof *squares);
    if (squares == NULL) {
        exit(EXIT_FAILURE);
    }
    for (int64_t number = 0; number < count; number += 1) {
        int64_t i = every_row ? number : sampled_row(n_q, number);
        double lse = r->lse[(b * q->shape[1] + h) * n_q + i];
        for (int64_t j = 0; j < n_k; j += 1) {
            if (mask_visible(mask, i, j, n_q, n_k)) {
                double dot = 0.0;
                for (int64_t c = 0; c < d; c += 1) {
                    dot += tensor_get(q, b, h, i, c) * tensor_get(k, b, h / group, j, c);
                }
                squares[j] += exp(2.0 * (dot / sqrt((double)d) - lse));
            }
        }
    }
    double largest = 0.0;
    for (int64_t j = 0; j < n_k; j += 1) {
        largest = squares[j] > largest ? squares[j] : largest;
    }
    free(squares);
    return (double)n_q * (double)n_q / (double)count * largest;
}

static double visible_keys_per_query(hyperattn_mask mask, int64_t n_q, int64_t n_k)
{
    double visible = 0.0;
    for (int64_t i = 0; i < n_q; i += 1) {
        for (int64_t j = 0; j < n_k; j += 1) {
            visible += mask_visible(mask, i, j, n_q, n_k);
        }
    }
    return visible / (double)n_q;
}

static void alpha_is_that_of_the_definition(random_source *source)
{
    static const problem_shape shapes[] = {
        {2, 6, 2, 40, 50, 8, 12}, {1, 2, 1, 300, 200, 20, 8}, {1, 2, 2, 200, 300, 64, 8}, {1, 2, 1, 65, 1, 1, 1}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
            problem p = problem_create(&shapes[s], t, t, ARRAY_PADDED, source);
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
                for (uint32_t flags = 0; flags < 2; flags += 1) {
                    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, mask);
                    hyperattn_diagnosis heads[MOST_HEADS];
                    CHECK_OK(diagnose(&params, &p.tensors, NULL, flags, heads));
                    for (int64_t head = 0; head < shapes[s].batch * shapes[s].heads_q; head += 1) {
                        check_case("alpha: shape %zu %s mask %s flags %u head %d", s, dtype_name(t), mask_name(mask), flags,
                                   (int)head);
                        int64_t b = head / shapes[s].heads_q, h = head % shapes[s].heads_q;
                        double alpha = alpha_of(&p.tensors, &r, mask, b, h, flags == HYPERATTN_DIAGNOSE_TRUE_ERROR);
                        /* Weights from f32 logits of a few units: twice 1e-6 of each. */
                        CHECK_NEAR(heads[head].alpha, alpha, 1e-5 * alpha);
                    }
                }
                reference_destroy(&r);
            }
            problem_destroy(&p);
        }
    }
}

/* Exact attention: no error, all of the mass, every visible key. */
static void exact_heads(random_source *source)
{
    const problem_shape shape = {2, 4, 2, 90, 70, 16, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F16, ARRAY_BSHD, source);
    for (hyperattn_method method = HYPERATTN_METHOD_AUTO; method <= HYPERATTN_METHOD_REFINED; method += 1) {
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            for (uint32_t flags = 0; flags < 2; flags += 1) {
                check_case("exact: method %u mask %s flags %u", method, mask_name(mask), flags);
                /* Every method is exact for so few keys. */
                hyperattn_params params = problem_params(method, mask);
                hyperattn_diagnosis heads[MOST_HEADS];
                CHECK_OK(diagnose(&params, &p.tensors, NULL, flags, heads));
                for (int h = 0; h < 8; h += 1) {
                    CHECK_INT(heads[h].struct_size, sizeof heads[h]);
                    CHECK_NEAR(heads[h].kappa, 1.0, 0.0);
                    CHECK_NEAR(heads[h].captured_mass, 1.0, 0.0);
                    CHECK_NEAR(heads[h].estimated_error, 0.0, 0.0);
                    CHECK(flags == 0 ? isnan(heads[h].true_error) : heads[h].true_error == 0.0);
                    CHECK_NEAR(heads[h].keys_per_query, visible_keys_per_query(mask, shape.n_q, shape.n_k), 1e-5);
                }
            }
        }
    }
    problem_destroy(&p);
}

/* The output of a call in f32, and its error tensor. */
static void run_in_f32(const problem *p, const hyperattn_params *params, const array *out, const array *error)
{
    hyperattn_tensors tensors = p->tensors;
    memset(&tensors.lse, 0, sizeof tensors.lse);
    tensors.out = out->view;
    if (error != NULL) {
        tensors.error = error->view;
    }
    CHECK_OK(hyperattn_forward(params, &tensors, NULL));
}

static double relative_error(const hyperattn_tensor *out, const hyperattn_tensor *exact, int64_t b, int64_t h)
{
    double difference = 0.0, whole = 0.0;
    for (int64_t i = 0; i < out->shape[2]; i += 1) {
        for (int64_t c = 0; c < out->shape[3]; c += 1) {
            double want = tensor_get(exact, b, h, i, c), off = tensor_get(out, b, h, i, c) - want;
            difference += off * off;
            whole += want * want;
        }
    }
    return sqrt(difference / whole);
}

/* What of the rows' weight lies on keys that the method meets: those that are left when the rest is dropped. Without a
 * target the budget is the caller's, so that the selection is the same. */
static void captured_mass(const problem *p, const hyperattn_params *params, const reference *r, double *mass)
{
    hyperattn_tensors tensors = p->tensors;
    int64_t heads = tensors.q.shape[1], n_q = tensors.q.shape[2];
    array out = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, tensors.q.shape[0], heads, n_q, tensors.v.shape[3]);
    array lse = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, tensors.q.shape[0], heads, n_q, 1);
    tensors.out = out.view;
    tensors.lse = lse.view;
    hyperattn_params dropping = *params;
    dropping.residual = HYPERATTN_RESIDUAL_NONE;
    CHECK_OK(hyperattn_forward(&dropping, &tensors, NULL));
    for (int64_t head = 0; head < tensors.q.shape[0] * heads; head += 1) {
        mass[head] = 0.0;
        for (int64_t number = 0; number < sampled_rows(n_q); number += 1) {
            int64_t i = sampled_row(n_q, number);
            double share = exp(tensor_get(&lse.view, head / heads, head % heads, i, 0) - r->lse[head * n_q + i]);
            mass[head] += share / (double)sampled_rows(n_q);
        }
    }
    array_destroy(&out);
    array_destroy(&lse);
}

/* An estimator's figures are those of the call that params describe, whatever the element types. */
static void estimated_heads(random_source *source)
{
    const problem_shape shape = {2, 4, 2, 500, 600, 32, 24};
    for (int t = 0; t < LEGAL_DTYPES; t += 1) {
        problem p = problem_create_mixed(&shape, legal_dtypes[t], ARRAY_PADDED, source);
        topics_fill(&p, 16, 0.6, 6.0, source);
        array out = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 500, 24);
        array exact = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 500, 24);
        array error = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 1, 1);
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
            for (hyperattn_method method = HYPERATTN_METHOD_PAPER; method <= HYPERATTN_METHOD_REFINED; method += 1) {
                hyperattn_params params = problem_params(method, mask);
                params.min_seq_len = 100;
                params.block_size = 48;
                params.sample_size = 80;
                params.budget = 128;
                params.band = 32;
                params.target_error = 0.0f;
                run_in_f32(&p, &params, &out, &error);
                hyperattn_params exact_params = problem_params(HYPERATTN_METHOD_EXACT, mask);
                run_in_f32(&p, &exact_params, &exact, NULL);
                double mass[MOST_HEADS];
                captured_mass(&p, &params, &r, mass);
                for (uint32_t flags = 0; flags < 2; flags += 1) {
                    hyperattn_diagnosis heads[MOST_HEADS];
                    problem_poison_outputs(&p);
                    check_case("method %u %s %s->%s mask %s flags %u", method, dtype_name(legal_dtypes[t].q),
                               dtype_name(legal_dtypes[t].kv), dtype_name(legal_dtypes[t].out), mask_name(mask), flags);
                    CHECK_OK(diagnose(&params, &p.tensors, NULL, flags, heads));
                    CHECK(array_untouched(&p.out) && array_untouched(&p.lse) && array_untouched(&p.error));
                    for (int64_t head = 0; head < 8; head += 1) {
                        int64_t b = head / 4, h = head % 4;
                        CHECK(heads[head].estimated_error > 0.0);
                        CHECK_NEAR(heads[head].estimated_error, tensor_get(&error.view, b, h, 0, 0), 0.0);
                        double want = relative_error(&out.view, &exact.view, b, h);
                        CHECK(flags == 0 ? isnan(heads[head].true_error)
                                         : fabs(heads[head].true_error - want) <= 1e-12 * want);
                        /* lse in f32 is within some 1e-5 of a logit of up to 20. */
                        CHECK(mass[head] > 0.01 && mass[head] < 0.999);
                        CHECK_NEAR(heads[head].captured_mass, mass[head], 1e-4);
                        CHECK(heads[head].kappa > 1.0 && isfinite(heads[head].kappa));
                    }
                    if (mask == HYPERATTN_MASK_NONE) {
                        /* Blocks and samples, or first keys, chosen keys and what stands for the rest. */
                        CHECK_NEAR(heads[0].keys_per_query, 128.0, method == HYPERATTN_METHOD_PAPER ? 1e-5 : 13.0);
                    }
                }
            }
            reference_destroy(&r);
        }
        array_destroy(&out);
        array_destroy(&exact);
        array_destroy(&error);
        problem_destroy(&p);
    }
}

/* Fills q with 0: then every key of a row has the same weight. */
static void forget_queries(const problem *p)
{
    const hyperattn_tensor *q = &p->q.view;
    for (int64_t row = 0; row < q->shape[1] * q->shape[2]; row += 1) {
        for (int64_t c = 0; c < q->shape[3]; c += 1) {
            tensor_set(q, 0, row / q->shape[2], row % q->shape[2], c, 0.0);
        }
    }
}

/* The mass is keys that are met over keys that are seen, and kappa the ratio of numbers of keys that are not met. */
static void equal_keys(random_source *source)
{
    hyperattn_diagnosis heads[MOST_HEADS];
    const problem_shape shape = {1, 2, 1, 256, 256, 16, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    forget_queries(&p);

    check_case("equal keys, PAPER without a mask");
    hyperattn_params params = problem_params(HYPERATTN_METHOD_PAPER, HYPERATTN_MASK_NONE);
    params.min_seq_len = 64;
    params.block_size = 16;
    params.sample_size = 32;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, heads));
    CHECK_NEAR(heads[1].captured_mass, 16.0 / 256.0, 1e-6);
    CHECK_NEAR(heads[1].kappa, 1.0, 1e-6);

    check_case("equal keys, PAPER, residual only");
    params.block_size = 0;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, heads));
    CHECK_NEAR(heads[1].captured_mass, 0.0, 0.0);
    CHECK_NEAR(heads[1].kappa, 1.0, 1e-6);

    check_case("equal keys, PAPER, causal");
    params.block_size = 16;
    params.mask = HYPERATTN_MASK_CAUSAL_TOP_LEFT;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, heads));
    double mass = 0.0;
    for (int64_t number = 0; number < SAMPLED; number += 1) {
        int64_t i = sampled_row(256, number);
        /* The second half meets 16 of 128 keys, and the second half of each half 16 of 64. */
        double unmet = (i >= 128 ? 112.0 : 0.0) + (i % 128 >= 64 ? 48.0 : 0.0);
        mass += 1.0 - unmet / ((double)i + 1.0);
    }
    CHECK_NEAR(heads[1].captured_mass, mass / SAMPLED, 1e-6);
    CHECK_NEAR(heads[1].kappa, 160.0 / 48.0, 1e-5);

    check_case("equal keys, PAPER, the caller's blocks");
    /* 64 queries meet no key, 64 one block of 32, 64 all but one of 8, and the last 64 all. */
    const int64_t row_offsets[] = {0, 0, 1, 8, 16};
    const int32_t columns[] = {3, 0, 1, 2, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
    hyperattn_block_mask blocks = {.struct_size = sizeof blocks,
                                   .query_block = 64,
                                   .key_block = 32,
                                   .num_query_blocks = 4,
                                   .num_key_blocks = 8,
                                   .row_offsets = row_offsets,
                                   .columns = columns};
    hyperattn_tensors tensors = p.tensors;
    tensors.block_mask = &blocks;
    params.mask = HYPERATTN_MASK_NONE;
    CHECK_OK(diagnose(&params, &tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, heads));
    CHECK_NEAR(heads[1].captured_mass, (0.0 + 1.0 / 8.0 + 7.0 / 8.0 + 1.0) / 4.0, 1e-6);
    CHECK_NEAR(heads[1].kappa, 8.0, 1e-5);

    check_case("equal keys, REFINED");
    params = problem_params(HYPERATTN_METHOD_REFINED, HYPERATTN_MASK_NONE);
    params.min_seq_len = 0;
    params.budget = 100;
    params.target_error = 0.0f;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, heads));
    /* All but the column for the rest. */
    CHECK_NEAR(heads[1].captured_mass, (heads[1].keys_per_query - 1.0) / 256.0, 1e-6);
    CHECK(heads[1].captured_mass > 0.25);
    CHECK_NEAR(heads[1].kappa, 1.0, 1e-6);

    check_case("one heavy key");
    for (int64_t row = 0; row < 512; row += 1) {
        tensor_set(&p.q.view, 0, row / 256, row % 256, 0, 1.0 + (double)(row % 3));
    }
    for (int64_t key = 0; key < 256; key += 1) {
        tensor_set(&p.k.view, 0, 0, key, 0, key == 77 ? 80.0 : 0.0);
    }
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, heads));
    /* 255 keys of weight e^-20 and less. */
    CHECK(heads[1].captured_mass > 1.0 - 255.0 * exp(-20.0) && heads[1].captured_mass < 1.0);
    CHECK_NEAR(heads[1].kappa, 1.0, 1e-6);
    problem_destroy(&p);
}

/* A target that is never met makes heads exact; a generous one leaves them estimated at another budget. */
static void budgets_that_move(random_source *source)
{
    const problem_shape shape = {1, 2, 2, 600, 2000, 32, 16};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    topics_fill(&p, 16, 0.6, 6.0, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_REFINED, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    params.min_seq_len = 0;
    params.budget = 512;
    hyperattn_diagnosis moved[MOST_HEADS], fixed[MOST_HEADS];
    check_case("a target that is never met");
    params.target_error = 1e-7f;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, moved));
    CHECK_NEAR(moved[0].captured_mass, 1.0, 0.0);
    CHECK_NEAR(moved[0].kappa, 1.0, 0.0);
    check_case("a target that is always met: a quarter of the budget");
    params.target_error = 100.0f;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, moved));
    params.target_error = 0.0f;
    params.budget = 128;
    CHECK_OK(diagnose(&params, &p.tensors, NULL, 0, fixed));
    for (int h = 0; h < 2; h += 1) {
        CHECK_NEAR(moved[h].keys_per_query, fixed[h].keys_per_query, 0.0);
        CHECK_NEAR(moved[h].captured_mass, fixed[h].captured_mass, 0.0);
        CHECK_NEAR(moved[h].kappa, fixed[h].kappa, 0.0);
    }
    problem_destroy(&p);
}

/* out, lse and error of the call need not be there: a model's Q, K and V are enough. */
static void outputs_are_not_looked_at(random_source *source)
{
    check_case("tensors without outputs");
    const problem_shape shape = {1, 2, 1, 80, 90, 16, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    hyperattn_diagnosis full[MOST_HEADS], bare[MOST_HEADS];
    memset(full, 0, sizeof full);
    memset(bare, 0, sizeof bare);
    CHECK_OK(diagnose(&params, &p.tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, full));
    hyperattn_tensors tensors = p.tensors;
    memset(&tensors.out, 0xa5, sizeof tensors.out);
    memset(&tensors.lse, 0xa5, sizeof tensors.lse);
    memset(&tensors.error, 0xa5, sizeof tensors.error);
    CHECK_OK(diagnose(&params, &tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, bare));
    CHECK_BYTES(bare, full, sizeof full);
    tensors.struct_size = offsetof(hyperattn_tensors, out);
    CHECK_OK(diagnose(&params, &tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, bare));
    CHECK_BYTES(bare, full, sizeof full);
    problem_destroy(&p);
}

static void same_figures_however_it_runs(random_source *source)
{
    const problem_shape shape = {2, 6, 2, 300, 400, 32, 24};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BSHD, source);
    reverse_pool own = {3, 0};
    hyperattn_threadpool interface = reverse_pool_interface(&own);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_PAPER, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    params.min_seq_len = 100;
    params.block_size = 32;
    params.sample_size = 32;
    hyperattn_diagnosis expected[MOST_HEADS], got[MOST_HEADS];
    hyperattn_cpu_exec exec = problem_exec(1);
    CHECK_OK(diagnose(&params, &p.tensors, &exec, HYPERATTN_DIAGNOSE_TRUE_ERROR, expected));
    for (uint32_t threads = 0; threads <= 4; threads += 2) {
        check_case("%u threads", threads);
        exec = problem_exec(threads);
        CHECK_OK(diagnose(&params, &p.tensors, &exec, HYPERATTN_DIAGNOSE_TRUE_ERROR, got));
        CHECK_BYTES(got, expected, sizeof expected);
    }
    check_case("the caller's pool");
    exec.pool = &interface;
    CHECK_OK(diagnose(&params, &p.tensors, &exec, HYPERATTN_DIAGNOSE_TRUE_ERROR, got));
    CHECK_BYTES(got, expected, sizeof expected);
    CHECK(own.tasks > 0);
    problem_destroy(&p);
}

static void odd_inputs(random_source *source)
{
    hyperattn_diagnosis heads[MOST_HEADS];
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    check_case("a NaN in a query");
    const problem_shape shape = {1, 2, 1, 50, 60, 8, 8};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    tensor_set(&p.q.view, 0, 1, 7, 3, NAN);
    CHECK_OK(diagnose(&params, &p.tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, heads));
    CHECK(isfinite(heads[0].alpha) && isnan(heads[1].alpha));
    CHECK(heads[0].true_error == 0.0 && isnan(heads[1].true_error));
    CHECK_NEAR(heads[1].captured_mass, 1.0, 0.0);
    problem_destroy(&p);

    static const double values[] = {NAN, INFINITY, -INFINITY};
    const problem_shape longer = {1, 2, 2, 150, 200, 8, 8};
    for (size_t x = 0; x < sizeof values / sizeof values[0]; x += 1) {
        for (int in_query = 0; in_query < 2; in_query += 1) {
            for (hyperattn_method method = HYPERATTN_METHOD_PAPER; method <= HYPERATTN_METHOD_REFINED; method += 1) {
                check_case("%g in %s, method %u", values[x], in_query ? "a sampled query" : "a key", method);
                p = problem_create(&longer, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
                tensor_set(in_query ? &p.q.view : &p.k.view, 0, 1, sampled_row(150, 20), 3, values[x]);
                hyperattn_params estimating = problem_params(method, HYPERATTN_MASK_NONE);
                estimating.min_seq_len = 0;
                estimating.block_size = 32;
                estimating.sample_size = 32;
                estimating.budget = 64;
                estimating.target_error = 0.0f;
                CHECK_OK(diagnose(&estimating, &p.tensors, NULL, 0, heads));
                /* Every logit of the query, or one of every row, is NaN or infinite. */
                CHECK(isnan(heads[1].captured_mass) && isnan(heads[1].kappa));
                CHECK(heads[0].captured_mass > 0.0 && heads[0].captured_mass <= 1.0);
                CHECK(heads[0].kappa >= 1.0 && isfinite(heads[0].kappa));
                problem_destroy(&p);
            }
        }
    }

    static const problem_shape empty[] = {{1, 2, 1, 0, 60, 8, 8}, {1, 2, 1, 50, 0, 8, 8}};
    for (int s = 0; s < 2; s += 1) {
        for (hyperattn_method method = HYPERATTN_METHOD_AUTO; method <= HYPERATTN_METHOD_REFINED; method += 1) {
            check_case("%d queries, %d keys, method %u", (int)empty[s].n_q, (int)empty[s].n_k, method);
            p = problem_create(&empty[s], HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
            params.method = method;
            CHECK_OK(diagnose(&params, &p.tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, heads));
            CHECK(isnan(heads[0].alpha));
            CHECK_NEAR(heads[0].true_error, 0.0, 0.0);
            CHECK_NEAR(heads[0].keys_per_query, 0.0, 0.0);
            problem_destroy(&p);
        }
    }
}

int main(int argc, char **argv)
{
    random_source source = {check_start("diagnose", argc, argv)};
    alpha_is_that_of_the_definition(&source);
    exact_heads(&source);
    estimated_heads(&source);
    equal_keys(&source);
    budgets_that_move(&source);
    outputs_are_not_looked_at(&source);
    same_figures_however_it_runs(&source);
    odd_inputs(&source);
    return check_finish();
}
