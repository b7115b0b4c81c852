/* NaN and infinities: what they may reach, and what they must not. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "reference.h"

static const problem_shape SHAPE = {1, 4, 2, 150, 150, 24, 40};
enum { GROUP = 2 };

typedef enum row_state { ROW_CLEAN, ROW_NAN } row_state;

/* A row of out and lse: NaN everywhere, or the reference's numbers. */
static bool row_is(const problem *p, const reference *r, int64_t head, int64_t row, row_state state)
{
    int64_t at = head * SHAPE.n_q + row;
    for (int64_t c = 0; c < SHAPE.d_v; c += 1) {
        double got = tensor_get(&p->out.view, 0, head, row, c);
        bool good = state == ROW_NAN ? isnan(got) : fabs(got - r->out[at * SHAPE.d_v + c]) <= 1e-4;
        if (!good) {
            return false;
        }
    }
    double lse = tensor_get(&p->lse.view, 0, head, row, 0);
    return state == ROW_NAN ? isnan(lse) : fabs(lse - r->lse[at]) <= 1e-4;
}

static void run_exact(problem *p, hyperattn_mask mask)
{
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, mask);
    problem_poison_outputs(p);
    CHECK_OK(hyperattn_forward(&params, &p->tensors, NULL));
}

/* One NaN in one query: that row of that head, and nothing else. */
static void nan_in_a_query(random_source *source)
{
    static const int64_t rows[] = {0, 5, 63, 149};
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
        for (size_t n = 0; n < sizeof rows / sizeof rows[0]; n += 1) {
            check_case("NaN in query %d, mask %s", (int)rows[n], mask_name(mask));
            double kept = tensor_get(&p.q.view, 0, 1, rows[n], 7);
            tensor_set(&p.q.view, 0, 1, rows[n], 7, NAN);
            run_exact(&p, mask);
            tensor_set(&p.q.view, 0, 1, rows[n], 7, kept);
            int wrong = 0;
            for (int64_t h = 0; h < SHAPE.heads_q; h += 1) {
                for (int64_t i = 0; i < SHAPE.n_q; i += 1) {
                    wrong += !row_is(&p, &r, h, i, h == 1 && i == rows[n] ? ROW_NAN : ROW_CLEAN);
                }
            }
            CHECK_INT(wrong, 0);
        }
        reference_destroy(&r);
    }
    problem_destroy(&p);
}

/* One NaN in one key: every query of its heads that sees it, also from within the same tile, and no other. */
static void nan_in_a_key(random_source *source)
{
    static const int64_t keys[] = {0, 3, 64, 149};
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BSHD, source);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
        for (size_t n = 0; n < sizeof keys / sizeof keys[0]; n += 1) {
            check_case("NaN in key %d, mask %s", (int)keys[n], mask_name(mask));
            double kept = tensor_get(&p.k.view, 0, 1, keys[n], 3);
            tensor_set(&p.k.view, 0, 1, keys[n], 3, NAN);
            run_exact(&p, mask);
            tensor_set(&p.k.view, 0, 1, keys[n], 3, kept);
            int wrong = 0;
            for (int64_t h = 0; h < SHAPE.heads_q; h += 1) {
                for (int64_t i = 0; i < SHAPE.n_q; i += 1) {
                    bool sees = h / GROUP == 1 && mask_visible(mask, i, keys[n], SHAPE.n_q, SHAPE.n_k);
                    wrong += !row_is(&p, &r, h, i, sees ? ROW_NAN : ROW_CLEAN);
                }
            }
            CHECK_INT(wrong, 0);
        }
        reference_destroy(&r);
    }
    problem_destroy(&p);
}

/* One NaN or infinity in one value: that column of every query that sees it; 0 * NaN must not leak to those that do not. */
static void nan_in_a_value(random_source *source)
{
    static const double bad_values[] = {NAN, INFINITY};
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_PADDED, source);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
        for (size_t n = 0; n < 2; n += 1) {
            const int64_t key = 70, column = 33;
            check_case("%g in value %d, mask %s", bad_values[n], (int)key, mask_name(mask));
            double kept = tensor_get(&p.v.view, 0, 0, key, column);
            tensor_set(&p.v.view, 0, 0, key, column, bad_values[n]);
            run_exact(&p, mask);
            tensor_set(&p.v.view, 0, 0, key, column, kept);
            int wrong = 0;
            for (int64_t row = 0; row < SHAPE.heads_q * SHAPE.n_q; row += 1) {
                int64_t h = row / SHAPE.n_q, i = row % SHAPE.n_q;
                bool sees = h / GROUP == 0 && mask_visible(mask, i, key, SHAPE.n_q, SHAPE.n_k);
                for (int64_t c = 0; c < SHAPE.d_v; c += 1) {
                    double got = tensor_get(&p.out.view, 0, h, i, c);
                    bool bad = sees && c == column;
                    wrong += bad ? isfinite(got) : !(fabs(got - r.out[row * SHAPE.d_v + c]) <= 1e-4);
                }
                /* Values have no part in lse. */
                wrong += !(fabs(tensor_get(&p.lse.view, 0, h, i, 0) - r.lse[row]) <= 1e-4);
            }
            CHECK_INT(wrong, 0);
        }
        reference_destroy(&r);
    }
    problem_destroy(&p);
}

/* Queries are positive in column 0, so that an infinity there gives a logit of its sign. */
static void make_first_column_positive(const hyperattn_tensor *q)
{
    for (int64_t h = 0; h < q->shape[1]; h += 1) {
        for (int64_t i = 0; i < q->shape[2]; i += 1) {
            tensor_set(q, 0, h, i, 0, 0.5 + fabs(tensor_get(q, 0, h, i, 0)));
        }
    }
}

/* A logit of -inf is a weight of 0; a row that has no other logit is an empty row. */
static void negative_infinite_logits(random_source *source)
{
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
        make_first_column_positive(&p.q.view);
        check_case("some logits -inf, mask %s", mask_name(mask));
        for (int64_t j = 0; j < SHAPE.n_k; j += 3) {
            tensor_set(&p.k.view, 0, 0, j, 0, -INFINITY);
        }
        for (int64_t j = 0; j < 20; j += 1) {
            tensor_set(&p.k.view, 0, 1, j, 0, -INFINITY); /* when causal, the first 20 rows see nothing else */
        }
        run_exact(&p, mask);
        reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
        for (int64_t row = 0; row < SHAPE.heads_q * SHAPE.n_q; row += 1) {
            r.lse_bound[row] = 1e-4; /* the derived bound is infinite here */
        }
        reference_check(&r, &p.tensors);
        reference_destroy(&r);

        check_case("all logits -inf, mask %s", mask_name(mask));
        for (int64_t j = 0; j < SHAPE.n_k; j += 1) {
            tensor_set(&p.k.view, 0, 0, j, 0, -INFINITY);
        }
        run_exact(&p, mask);
        int wrong = 0;
        for (int64_t i = 0; i < SHAPE.n_q; i += 1) {
            wrong += tensor_get(&p.lse.view, 0, 0, i, 0) != -INFINITY;
            for (int64_t c = 0; c < SHAPE.d_v; c += 1) {
                wrong += tensor_get(&p.out.view, 0, 0, i, c) != 0.0;
            }
        }
        CHECK_INT(wrong, 0);
        problem_destroy(&p);
    }
}

/* A logit of +inf has no softmax: the rows that see it are anything, all others are clean. */
static void positive_infinite_logits(random_source *source)
{
    check_case("a logit of +inf");
    const uint32_t mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    make_first_column_positive(&p.q.view);
    reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
    tensor_set(&p.k.view, 0, 0, 100, 0, INFINITY);
    run_exact(&p, mask);
    int wrong = 0;
    for (int64_t h = 0; h < SHAPE.heads_q; h += 1) {
        for (int64_t i = 0; i < SHAPE.n_q; i += 1) {
            wrong += (h >= GROUP || i < 100) && !row_is(&p, &r, h, i, ROW_CLEAN);
        }
    }
    CHECK_INT(wrong, 0);
    reference_destroy(&r);
    problem_destroy(&p);
}

/* Logits in the thousands: finite, and as exact as single precision allows. */
static void huge_logits(random_source *source)
{
    static const float scales[] = {1e3f, -1e3f, 1e6f};
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        for (size_t s = 0; s < sizeof scales / sizeof scales[0]; s += 1) {
            for (hyperattn_method method = HYPERATTN_METHOD_EXACT; method <= HYPERATTN_METHOD_PAPER; method += 1) {
                for (uint32_t residual = 0; residual < 3; residual += 1) {
                    check_case("scale %g, mask %s, method %u residual %u", (double)scales[s], mask_name(mask), method,
                               residual);
                    hyperattn_params params = problem_params(method, mask);
                    params.scale = scales[s];
                    params.residual = residual;
                    params.min_seq_len = 20;
                    params.block_size = 16;
                    params.sample_size = 16;
                    problem_poison_outputs(&p);
                    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                    /* Algorithm 3 samples the product apart from the row sums, so its quotient may overflow by design. */
                    if (method == HYPERATTN_METHOD_EXACT || residual != HYPERATTN_RESIDUAL_ROW_NORM) {
                        CHECK(tensor_all_finite(&p.out.view));
                        CHECK(tensor_all_finite(&p.lse.view));
                    }
                    if (method == HYPERATTN_METHOD_EXACT && residual == 0) {
                        reference r = reference_compute(&p.tensors, mask, (double)scales[s], NULL, NULL);
                        double worst = 0.0;
                        for (int64_t row = 0; row < SHAPE.heads_q * SHAPE.n_q; row += 1) {
                            double got = tensor_get(&p.lse.view, 0, row / SHAPE.n_q, row % SHAPE.n_q, 0);
                            worst = fmax(worst, fabs(got - r.lse[row]) / r.lse_bound[row]);
                        }
                        CHECK_BELOW(worst, 1.0);
                        reference_destroy(&r);
                    }
                }
            }
        }
    }
    problem_destroy(&p);
}

/* The estimator moves a NaN query to another bucket, and so its neighbours; but they stay finite. */
static void nan_in_a_query_of_the_estimator(random_source *source)
{
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    tensor_set(&p.q.view, 0, 1, 60, 7, NAN);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        for (uint32_t residual = 0; residual < 3; residual += 1) {
            check_case("NaN in a query, METHOD_PAPER, mask %s residual %u", mask_name(mask), residual);
            hyperattn_params params = problem_params(HYPERATTN_METHOD_PAPER, mask);
            params.residual = residual;
            params.min_seq_len = 20;
            params.block_size = 16;
            params.sample_size = 16;
            problem_poison_outputs(&p);
            CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
            int wrong = 0;
            for (int64_t h = 0; h < SHAPE.heads_q; h += 1) {
                for (int64_t i = 0; i < SHAPE.n_q; i += 1) {
                    bool nan_expected = h == 1 && i == 60;
                    for (int64_t c = 0; c < SHAPE.d_v; c += 1) {
                        double got = tensor_get(&p.out.view, 0, h, i, c);
                        wrong += nan_expected ? !isnan(got) : !isfinite(got);
                    }
                }
            }
            CHECK_INT(wrong, 0);
        }
    }
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("nan_inf", argc, argv)};
    nan_in_a_query(&source);
    nan_in_a_key(&source);
    nan_in_a_value(&source);
    negative_infinite_logits(&source);
    positive_infinite_logits(&source);
    huge_logits(&source);
    nan_in_a_query_of_the_estimator(&source);
    return check_finish();
}
