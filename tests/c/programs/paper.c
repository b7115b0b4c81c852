/* METHOD_PAPER: where it must equal exact attention, how far off it may be, and what its options change. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "clusters.h"
#include "problem.h"
#include "reference.h"

static const problem_shape SQUARE = {1, 1, 1, 2048, 2048, 64, 64};

static const char *residual_name(hyperattn_residual residual)
{
    static const char *const names[] = {"uniform", "row-norm", "none"};
    return names[residual];
}

/* An estimator that does estimate: no exact leaves, four blocks of 64 and 64 samples on a few hundred keys. */
static hyperattn_params estimator_params(hyperattn_mask mask, hyperattn_residual residual)
{
    hyperattn_params params = problem_params(HYPERATTN_METHOD_PAPER, mask);
    params.residual = residual;
    params.min_seq_len = 0;
    params.block_size = 64;
    params.sample_size = 64;
    params.seed = 7;
    return params;
}

/* Algorithm 2 promises something for a kappa that bounds the spread of the unmasked row sums and a cap (epsilon) above the
 * single terms; the defaults of both would cap nearly every term of inputs like these. */
static void allow_wide_row_sums(hyperattn_params *params)
{
    params->approx_d_epsilon = 10.0f;
    params->approx_d_kappa = 100.0f;
}

/* For legal_dtypes[first] up to, without, legal_dtypes[end]. */
static void equals_exact_when_blocks_cover_all_keys(int first, int end, random_source *source)
{
    static const problem_shape shapes[] = {
        {1, 2, 1, 301, 301, 64, 64}, {2, 6, 2, 50, 173, 80, 64}, {1, 2, 2, 173, 50, 64, 128}, {1, 1, 1, 1, 1, 8, 8},
        {1, 2, 2, 9, 0, 8, 8},       {1, 2, 2, 0, 9, 8, 8},
    };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (int t = first; t < end; t += 1) {
            array_layout layout = s % 2 == 0 ? ARRAY_BSHD : ARRAY_PADDED;
            problem p = problem_create_mixed(&shapes[s], legal_dtypes[t], layout, source);
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                for (uint32_t residual = 0; residual < 3; residual += 1) {
                    check_case("block_size >= n: shape %zu %s %s->%s mask %s residual %s", s,
                               dtype_name(legal_dtypes[t].q), dtype_name(legal_dtypes[t].kv),
                               dtype_name(legal_dtypes[t].out), mask_name(mask), residual_name(residual));
                    hyperattn_params params = estimator_params(mask, residual);
                    params.block_size = 512;
                    reference_expect_exact(&p, &params);
                }
            }
            problem_destroy(&p);
        }
    }
}

static void equals_exact_up_to_min_seq_len(random_source *source)
{
    static const problem_shape shapes[] = {{2, 6, 2, 200, 150, 64, 64}, {1, 2, 1, 64, 150, 128, 80}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        problem p = problem_create(&shapes[s], HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            check_case("n_k <= min_seq_len: shape %zu mask %s", s, mask_name(mask));
            hyperattn_params params = estimator_params(mask, HYPERATTN_RESIDUAL_UNIFORM);
            params.block_size = 16;
            params.sample_size = 16;
            params.min_seq_len = 150;
            reference_expect_exact(&p, &params);
        }
        problem_destroy(&p);
    }
}

/* One key more than min_seq_len, and the estimator runs: otherwise the tests above would show nothing. */
static void estimates_above_min_seq_len(random_source *source)
{
    check_case("n_k = min_seq_len + 1");
    const problem_shape shape = {1, 1, 1, 151, 151, 64, 64};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, NULL, NULL);
    hyperattn_params params = estimator_params(HYPERATTN_MASK_NONE, HYPERATTN_RESIDUAL_UNIFORM);
    params.block_size = 16;
    params.sample_size = 16;
    params.min_seq_len = 150;
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    CHECK(reference_error(&r, &p.out.view) > 1e-3);
    reference_destroy(&r);
    problem_destroy(&p);
}

static double error_of(problem *p, const reference *r, const hyperattn_params *params)
{
    problem_poison_outputs(p);
    CHECK_OK(hyperattn_forward(params, &p->tensors, NULL));
    CHECK(tensor_all_finite(&p->out.view));
    CHECK(tensor_all_finite(&p->lse.view));
    return reference_error(r, &p->out.view);
}

/* Every number of hyperplanes, blocks or samples alone or both, every residual: finite, and never far from the values. */
static void options_give_finite_results(random_source *source)
{
    static const uint32_t sizes[][2] = {{64, 64}, {64, 0}, {0, 64}, {48, 200}, {1, 1}, {500, 3}};
    const problem_shape shape = {1, 2, 1, 400, 400, 64, 64};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_PADDED, source);
    clusters_fill(&p, 8, 0.25, source);
    reference references[3];
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        references[mask] = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
    }
    for (uint32_t projections = 0; projections <= 24; projections += 1) {
        for (uint32_t residual = 0; residual < 3; residual += 1) {
            for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s += 1) {
                if (sizes[s][0] == 0 && residual == HYPERATTN_RESIDUAL_NONE) {
                    continue; /* nothing left to compute: a bad call */
                }
                uint32_t mask = (projections + residual + (uint32_t)s) % 3;
                check_case("projections %u residual %s block %u sample %u mask %s", projections,
                           residual_name(residual), sizes[s][0], sizes[s][1], mask_name(mask));
                hyperattn_params params = estimator_params(mask, residual);
                params.lsh_num_projs = projections;
                params.block_size = sizes[s][0];
                params.sample_size = sizes[s][1];
                double error = error_of(&p, &references[mask], &params);
                if (residual != HYPERATTN_RESIDUAL_ROW_NORM) {
                    /* A weighted mean of values: twice their size would be wrong by more than their spread. */
                    CHECK_BELOW(error, 2.0);
                }
            }
        }
    }
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        reference_destroy(&references[mask]);
    }
    problem_destroy(&p);
}

/* Clusters, every mask and dtype, grouped heads, both orders of n_q and n_k. */
static void clustered_inputs_are_estimated_well(random_source *source)
{
    static const problem_shape shapes[] = {
        {1, 4, 2, 900, 900, 64, 64}, {1, 2, 1, 700, 1100, 64, 32}, {1, 2, 1, 1100, 700, 64, 32}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        /* One dtype for each shape and all three for the first. */
        for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= (s == 0 ? HYPERATTN_DTYPE_BF16 : HYPERATTN_DTYPE_F32); t += 1) {
            problem p = problem_create(&shapes[s], t, t, ARRAY_BSHD, source);
            clusters_fill(&p, 16, 0.1, source);
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
                for (uint32_t residual = 0; residual < 2; residual += 1) {
                    check_case("clusters: shape %zu %s mask %s residual %s", s, dtype_name(t), mask_name(mask),
                               residual_name(residual));
                    hyperattn_params params = estimator_params(mask, residual);
                    params.block_size = 128;
                    params.sample_size = 128;
                    params.min_seq_len = 128;
                    allow_wide_row_sums(&params);
                    problem_poison_outputs(&p);
                    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                    double error = reference_error(&r, &p.out.view);
                    if (t == HYPERATTN_DTYPE_F32) {
                        printf("clusters: shape %zu mask %s residual %s: error %.3f\n", s, mask_name(mask),
                               residual_name(residual), error);
                    }
                    /* Uniform: a row's weight is nearly all in its cluster, of which 8 of 128 samples are expected, so the
                     * values' noise is what remains. Row-norm: numerator and row sum draw apart, each off by 8^-1/2. */
                    CHECK_BELOW(error, residual == HYPERATTN_RESIDUAL_UNIFORM ? 0.1 : 0.5);
                }
                reference_destroy(&r);
            }
            problem_destroy(&p);
        }
    }
}

/* What the hash is for: with the blocks alone, sorted blocks must find a query's cluster far more often than unsorted. */
static void sorting_beats_the_given_order(random_source *source)
{
    check_case("sortLSH against the given order");
    problem p = problem_create(&SQUARE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    clusters_fill(&p, 16, 0.02, source);
    reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, NULL, NULL);
    hyperattn_params params = estimator_params(HYPERATTN_MASK_NONE, HYPERATTN_RESIDUAL_NONE);
    /* An unsorted block of 16 keys misses a given one of 16 clusters with probability (15/16)^16, about 0.36; rows that
     * miss theirs are wrong by more than their size. Two clusters of a bucket share it; rows near a hyperplane stray. */
    params.block_size = 16;
    params.sample_size = 0;
    double sorted = error_of(&p, &r, &params);
    params.lsh_num_projs = 0;
    double unsorted = error_of(&p, &r, &params);
    printf("blocks alone on clusters: error %.3f sorted, %.3f in the given order\n", sorted, unsorted);
    CHECK_BELOW(sorted, 0.7 * unsorted);
    reference_destroy(&r);
    problem_destroy(&p);
}

/* i.i.d. Gaussian queries and keys, values around 1: the estimator's easy case, and more samples must help. */
static void gaussian_inputs_with_a_mean(random_source *source)
{
    problem p = problem_create(&SQUARE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    tensor_fill_gaussian(&p.v.view, source, 1.0, 1.0);
    for (uint32_t residual = 0; residual < 2; residual += 1) {
        check_case("Gaussian inputs, values + 1, residual %s", residual_name(residual));
        reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, NULL, NULL);
        hyperattn_params params = estimator_params(HYPERATTN_MASK_NONE, residual);
        params.block_size = 256;
        params.sample_size = 256;
        allow_wide_row_sums(&params);
        double error = error_of(&p, &r, &params);
        params.block_size = 0;
        params.sample_size = 64;
        double few = error_of(&p, &r, &params);
        params.sample_size = 1024;
        double many = error_of(&p, &r, &params);
        printf("Gaussian, values + 1, residual %s: error %.3f; 64 samples alone %.3f, 1024 alone %.3f\n",
               residual_name(residual), error, few, many);
        CHECK_BELOW(error, 0.2);
        CHECK_BELOW(many, 0.5 * few);
        reference_destroy(&r);
    }
    problem_destroy(&p);
}

/* Algorithm 4 must not let a query see, or be moved by, a later key. */
static void later_keys_change_no_earlier_row(random_source *source)
{
    static const problem_shape shapes[] = {{1, 2, 1, 600, 600, 32, 32}, {1, 2, 1, 500, 600, 32, 32}};
    const int64_t first_changed = 400;
    for (size_t s = 0; s < 2; s += 1) {
        for (uint32_t mask = 1; mask < 3; mask += 1) {
            for (uint32_t residual = 0; residual < 3; residual += 1) {
                check_case("causality: shape %zu mask %s residual %s", s, mask_name(mask), residual_name(residual));
                problem p = problem_create(&shapes[s], HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
                hyperattn_params params = estimator_params(mask, residual);
                params.min_seq_len = 50;
                params.block_size = 32;
                params.sample_size = 32;
                int64_t n_q = shapes[s].n_q, n_k = shapes[s].n_k;
                int64_t rows = mask == HYPERATTN_MASK_CAUSAL_TOP_LEFT ? first_changed : first_changed - (n_k - n_q);
                CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                array before = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, n_q, 32);
                memcpy(before.view.data, p.out.view.data, (size_t)tensor_elements(&p.out.view) * sizeof(float));
                for (int64_t j = first_changed; j < n_k; j += 1) {
                    for (int64_t c = 0; c < 32; c += 1) {
                        tensor_set(&p.k.view, 0, 0, j, c, 3.0 * random_gaussian(source));
                        tensor_set(&p.v.view, 0, 0, j, c, 100.0);
                    }
                }
                CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                hyperattn_tensor early = p.out.view, early_before = before.view;
                early.shape[2] = rows;
                early_before.shape[2] = rows;
                CHECK(tensor_same_bits(&early, &early_before));
                CHECK(!tensor_same_bits(&p.out.view, &before.view));
                array_destroy(&before);
                problem_destroy(&p);
            }
        }
    }
}

static void seed_and_offset(random_source *source)
{
    const problem_shape shape = {1, 2, 2, 500, 500, 64, 64};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    array first = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 2, 500, 64);
    size_t size = (size_t)tensor_elements(&first.view) * sizeof(float);
    for (uint32_t residual = 0; residual < 3; residual += 1) {
        check_case("seed and offset, residual %s", residual_name(residual));
        hyperattn_params params = estimator_params(HYPERATTN_MASK_NONE, residual);
        CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
        memcpy(first.view.data, p.out.view.data, size);
        problem_poison_outputs(&p);
        CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
        CHECK(tensor_same_bits(&first.view, &p.out.view));
        /* Bits above the 32nd count too. */
        static const uint64_t changes[] = {1, UINT64_C(1) << 40};
        for (size_t c = 0; c < 2; c += 1) {
            params = estimator_params(HYPERATTN_MASK_NONE, residual);
            params.seed ^= changes[c];
            CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
            CHECK(!tensor_same_bits(&first.view, &p.out.view));
            params = estimator_params(HYPERATTN_MASK_NONE, residual);
            params.offset ^= changes[c];
            CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
            CHECK(!tensor_same_bits(&first.view, &p.out.view));
        }
    }
    array_destroy(&first);
    problem_destroy(&p);
}

/* A sequence gets the same bits wherever an engine puts it in a batch. */
static void position_in_the_batch_does_not_matter(random_source *source)
{
    const problem_shape shape = {3, 4, 2, 300, 300, 64, 48};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BSHD, source);
    array alone = array_create(HYPERATTN_DTYPE_F32, ARRAY_BSHD, 1, 4, 300, 48);
    array alone_lse = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 4, 300, 1);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        for (uint32_t residual = 0; residual < 3; residual += 1) {
            hyperattn_params params = estimator_params(mask, residual);
            CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
            for (int64_t b = 0; b < 3; b += 1) {
                check_case("batch item %d alone, mask %s residual %s", (int)b, mask_name(mask),
                           residual_name(residual));
                hyperattn_tensors item = p.tensors;
                hyperattn_tensor *views[5] = {&item.q, &item.k, &item.v, &item.out, &item.lse};
                for (int i = 0; i < 5; i += 1) {
                    views[i]->data = (float *)views[i]->data + b * views[i]->stride[0];
                    views[i]->shape[0] = 1;
                }
                hyperattn_tensors single = item;
                single.out = alone.view;
                single.lse = alone_lse.view;
                CHECK_OK(hyperattn_forward(&params, &single, NULL));
                CHECK(tensor_same_bits(&item.out, &alone.view));
                CHECK(tensor_same_bits(&item.lse, &alone_lse.view));
            }
        }
    }
    array_destroy(&alone);
    array_destroy(&alone_lse);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("paper", argc, argv)};
    equals_exact_when_blocks_cover_all_keys(0, 3, &source);
    equals_exact_up_to_min_seq_len(&source);
    estimates_above_min_seq_len(&source);
    options_give_finite_results(&source);
    clustered_inputs_are_estimated_well(&source);
    sorting_beats_the_given_order(&source);
    gaussian_inputs_with_a_mean(&source);
    later_keys_change_no_earlier_row(&source);
    seed_and_offset(&source);
    position_in_the_batch_does_not_matter(&source);
    /* Last, because cases added here change the inputs of all that follows, and checks above are statistical. */
    equals_exact_when_blocks_cover_all_keys(3, LEGAL_DTYPES, &source);
    return check_finish();
}
