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

/* The definition, over every row or the sampled ones. */
static double alpha_of(const hyperattn_tensors *tensors, const reference *r, hyperattn_mask mask, int64_t b, int64_t h,
                       bool every_row)
{
    const hyperattn_tensor *q = &tensors->q, *k = &tensors->k;
    int64_t n_q = q->shape[2], n_k = k->shape[2], d = q->shape[3], group = q->shape[1] / k->shape[1];
    bool all = every_row || n_q <= SAMPLED;
    int64_t count = all ? n_q : SAMPLED;
    double *squares = (double *)calloc((size_t)n_k + 1, sizeof *squares);
    if (squares == NULL) {
        exit(EXIT_FAILURE);
    }
    for (int64_t number = 0; number < count; number += 1) {
        int64_t i = all ? number : (2 * number + 1) * n_q / (2 * SAMPLED);
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
        for (hyperattn_method method = HYPERATTN_METHOD_PAPER; method <= HYPERATTN_METHOD_REFINED; method += 1) {
            for (uint32_t mask = 0; mask < 3; mask += 1) {
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
                    }
                    if (mask == HYPERATTN_MASK_NONE) {
                        /* Blocks and samples, or first keys, chosen keys and what stands for the rest. */
                        CHECK_NEAR(heads[0].keys_per_query, 128.0, method == HYPERATTN_METHOD_PAPER ? 1e-5 : 13.0);
                    }
                }
            }
        }
        array_destroy(&out);
        array_destroy(&exact);
        array_destroy(&error);
        problem_destroy(&p);
    }
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
    problem_destroy(&p);

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
    outputs_are_not_looked_at(&source);
    same_figures_however_it_runs(&source);
    odd_inputs(&source);
    return check_finish();
}
