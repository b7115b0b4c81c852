/* METHOD_REFINED: how far off it may be, what it says about that, what its options change, and what it must not touch. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "reference.h"
#include "topics.h"
#include "workspace.h"

static const problem_shape LONG = {1, 4, 2, 4096, 4096, 64, 64};

/* No fall-back, and nothing exact because it is short. */
static hyperattn_params refined_params(hyperattn_mask mask, uint32_t budget)
{
    hyperattn_params params = problem_params(HYPERATTN_METHOD_REFINED, mask);
    params.min_seq_len = 0;
    params.budget = budget;
    params.target_error = 0.0f;
    params.seed = 5;
    return params;
}

/* The exact output of a problem, in f32 and from the library: other programs check that one against a reference. */
static array exact_create(const problem *p, hyperattn_mask mask)
{
    const int64_t *shape = p->out.view.shape;
    array exact = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, shape[0], shape[1], shape[2], shape[3]);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, mask);
    hyperattn_tensors tensors = p->tensors;
    tensors.out = exact.view;
    memset(&tensors.lse, 0, sizeof tensors.lse);
    memset(&tensors.error, 0, sizeof tensors.error);
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    return exact;
}

/* |out - exact|_F / |exact|_F of one head. */
static double head_error(const hyperattn_tensor *out, const hyperattn_tensor *exact, int64_t batch, int64_t head)
{
    double difference = 0.0, whole = 0.0;
    for (int64_t i = 0; i < out->shape[2]; i += 1) {
        for (int64_t c = 0; c < out->shape[3]; c += 1) {
            double want = tensor_get(exact, batch, head, i, c), off = tensor_get(out, batch, head, i, c) - want;
            difference += off * off;
            whole += want * want;
        }
    }
    return difference == 0.0 ? 0.0 : sqrt(difference / whole);
}

static double worst_head_error(const problem *p, const array *exact)
{
    double worst = 0.0;
    for (int64_t b = 0; b < p->out.view.shape[0]; b += 1) {
        for (int64_t h = 0; h < p->out.view.shape[1]; h += 1) {
            double error = head_error(&p->out.view, &exact->view, b, h);
            worst = error <= worst ? worst : error;
        }
    }
    return worst;
}

/* Runs on freshly poisoned outputs; nothing is written beside them. */
static void run(problem *p, const hyperattn_params *params)
{
    problem_poison_outputs(p);
    CHECK_OK(hyperattn_forward(params, &p->tensors, NULL));
    CHECK_INT(array_changed_outside(&p->out), 0);
    CHECK_INT(array_changed_outside(&p->lse), 0);
    CHECK_INT(array_changed_outside(&p->error), 0);
}

typedef struct input_kind {
    const char *name;
    double noise, sink, bound;
} input_kind;

/* 32 topics, so a query's own has some 128 keys of 4096: a budget of 512 holds them beside the band. The rest has little
 * weight with noise 0.3, and a good part with 0.9. Bounds: a few times what was measured, 0.015, 0.013 and 0.045. */
static const input_kind KINDS[] = {
    {"topics", 0.3, 0.0, 0.05}, {"topics and sinks", 0.3, 10.0, 0.05}, {"noisy topics and sinks", 0.9, 8.0, 0.15}};
enum { KIND_COUNT = sizeof KINDS / sizeof KINDS[0] };

/* Under the bound, far below PAPER at as many keys, and the estimate tells the truth. */
static void errors_are_small_and_known(random_source *source)
{
    problem p = problem_create(&LONG, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BSHD, source);
    problem_want_error(&p);
    int heads = 0, off_by_two = 0;
    for (int kind = 0; kind < KIND_COUNT; kind += 1) {
        topics_fill(&p, 32, KINDS[kind].noise, KINDS[kind].sink, source);
        for (uint32_t mask = 0; mask < 2; mask += 1) {
            check_case("%s, mask %s", KINDS[kind].name, mask_name(mask));
            array exact = exact_create(&p, mask);
            hyperattn_params params = refined_params(mask, 512);
            run(&p, &params);
            for (int64_t h = 0; h < LONG.heads_q; h += 1) {
                double error = head_error(&p.out.view, &exact.view, 0, h);
                double estimate = tensor_get(&p.error.view, 0, h, 0, 0);
                printf("%s, mask %s, head %d: error %.4f, estimate %.4f\n", KINDS[kind].name, mask_name(mask), (int)h,
                       error, estimate);
                CHECK_BELOW(error, KINDS[kind].bound);
                CHECK(error > 0.0 && estimate > 0.0);
                heads += 1;
                off_by_two += error > 2.0 * estimate || estimate > 2.0 * error;
            }
            double refined = worst_head_error(&p, &exact);
            params.method = HYPERATTN_METHOD_PAPER;
            params.min_seq_len = 1024;
            run(&p, &params);
            double paper = worst_head_error(&p, &exact);
            printf("%s, mask %s: worst head %.4f, PAPER %.4f\n", KINDS[kind].name, mask_name(mask), refined, paper);
            CHECK_BELOW(refined, 0.5 * paper);
            array_destroy(&exact);
        }
    }
    /* A few dozen rows of 8 tiles, and a head's error may sit in a few tiles: 12 of 192 heads were off by more over eight
     * seeds, so that more than 6 of 24 have a probability below 0.001. */
    check_case("estimates within a factor of 2");
    printf("%d of %d estimates are off by more than a factor of 2\n", off_by_two, heads);
    CHECK(4 * off_by_two <= heads);
    problem_destroy(&p);
}

/* More keys, less error; with a target, heads that miss it get more until it is met. */
static void budget_and_target_take_effect(random_source *source)
{
    problem p = problem_create(&LONG, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    problem_want_error(&p);
    topics_fill(&p, 32, 0.9, 8.0, source);
    array exact = exact_create(&p, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    double errors[3];
    static const uint32_t budgets[] = {128, 512, 2048};
    for (int i = 0; i < 3; i += 1) {
        check_case("budget %u", budgets[i]);
        hyperattn_params params = refined_params(HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, budgets[i]);
        run(&p, &params);
        errors[i] = worst_head_error(&p, &exact);
        printf("budget %u: worst head %.4f\n", budgets[i], errors[i]);
        CHECK(i == 0 || errors[i] < 0.8 * errors[i - 1]);
    }
    /* Missed with 128 keys, met at 512 or before. */
    check_case("target %.3f", errors[1]);
    hyperattn_params params = refined_params(HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, 128);
    params.target_error = (float)errors[1];
    run(&p, &params);
    for (int64_t h = 0; h < LONG.heads_q; h += 1) {
        double estimate = tensor_get(&p.error.view, 0, h, 0, 0);
        CHECK(estimate <= errors[1]);
        CHECK_BELOW(head_error(&p.out.view, &exact.view, 0, h), 1.5 * errors[1]);
    }
    /* Out of reach of every estimate: exact. */
    check_case("target 1e-6");
    params.target_error = 1e-6f;
    run(&p, &params);
    for (int64_t h = 0; h < LONG.heads_q; h += 1) {
        CHECK_NEAR(tensor_get(&p.error.view, 0, h, 0, 0), 0.0, 0.0);
        CHECK_BELOW(head_error(&p.out.view, &exact.view, 0, h), reference_tolerance(HYPERATTN_DTYPE_F32));
    }
    array_destroy(&exact);
    problem_destroy(&p);
}

/* Up to budget or min_seq_len keys there is nothing to estimate. */
static void equals_exact_for_few_keys(random_source *source)
{
    static const problem_shape shapes[] = {
        {2, 6, 2, 200, 300, 64, 48}, {1, 2, 1, 300, 200, 80, 64}, {1, 2, 2, 9, 0, 8, 8}, {1, 2, 2, 0, 9, 8, 8}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (int t = 0; t < LEGAL_DTYPES; t += 1) {
            problem p = problem_create_mixed(&shapes[s], legal_dtypes[t], s % 2 == 0 ? ARRAY_BSHD : ARRAY_PADDED, source);
            problem_want_error(&p);
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                for (int by_budget = 0; by_budget < 2; by_budget += 1) {
                    check_case("few keys: shape %zu %s %s->%s mask %s, %s", s, dtype_name(legal_dtypes[t].q),
                               dtype_name(legal_dtypes[t].kv), dtype_name(legal_dtypes[t].out), mask_name(mask),
                               by_budget ? "budget" : "min_seq_len");
                    hyperattn_params params = refined_params(mask, by_budget ? 300 : 64);
                    params.min_seq_len = by_budget ? 0 : 300;
                    reference_expect_exact(&p, &params);
                    for (int64_t row = 0; row < shapes[s].batch * shapes[s].heads_q; row += 1) {
                        CHECK_NEAR(tensor_get(&p.error.view, row / shapes[s].heads_q, row % shapes[s].heads_q, 0, 0), 0.0,
                                   0.0);
                    }
                }
            }
            problem_destroy(&p);
        }
    }
}

/* Every dtype and mask, chunks of queries against a longer cache and the other way round, in memory with gaps. */
static void shapes_and_dtypes(random_source *source)
{
    static const problem_shape shapes[] = {
        {1, 4, 2, 1500, 1500, 64, 64}, {2, 2, 1, 300, 2000, 64, 32}, {1, 2, 1, 1500, 900, 32, 64}, {1, 2, 2, 1, 2000, 64, 64}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (int t = 0; t < LEGAL_DTYPES; t += 1) {
            problem p = problem_create_mixed(&shapes[s], legal_dtypes[t], t % 2 == 0 ? ARRAY_PADDED : ARRAY_BSHD, source);
            problem_want_error(&p);
            topics_fill(&p, 16, 0.3, 8.0, source);
            uint64_t inputs = array_hash(&p.q) ^ array_hash(&p.k) ^ array_hash(&p.v);
            for (uint32_t mask = 0; mask < 3; mask += 1) {
                check_case("shape %zu %s %s->%s mask %s", s, dtype_name(legal_dtypes[t].q), dtype_name(legal_dtypes[t].kv),
                           dtype_name(legal_dtypes[t].out), mask_name(mask));
                array exact = exact_create(&p, mask);
                hyperattn_params params = refined_params(mask, 512);
                run(&p, &params);
                CHECK(tensor_all_finite(&p.out.view));
                CHECK(tensor_all_finite(&p.error.view));
                /* The rounding of 16-bit types is small against the estimator's error. */
                CHECK_BELOW(worst_head_error(&p, &exact), 0.15);
                array_destroy(&exact);
            }
            CHECK(inputs == (array_hash(&p.q) ^ array_hash(&p.k) ^ array_hash(&p.v)));
            problem_destroy(&p);
        }
    }
}

/* lse of the estimate: that of exact attention, but for the error of what the rest weighs. */
static void lse_is_estimated(random_source *source)
{
    const problem_shape shape = {1, 2, 1, 1500, 1500, 64, 64};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    topics_fill(&p, 16, 0.3, 8.0, source);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        check_case("lse, mask %s", mask_name(mask));
        hyperattn_params params = refined_params(mask, 512);
        run(&p, &params);
        reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
        double sum = 0.0;
        for (int64_t row = 0; row < shape.heads_q * shape.n_q; row += 1) {
            double off = tensor_get(&p.lse.view, 0, row / shape.n_q, row % shape.n_q, 0) - r.lse[row];
            sum += off * off;
        }
        CHECK_BELOW(sqrt(sum / (double)(shape.heads_q * shape.n_q)), 0.1);
        reference_destroy(&r);
    }
    problem_destroy(&p);
}

/* The same bits for 1, 2 and 4 threads, with a workspace of just the size and without. */
static void same_bits_for_any_threads(random_source *source)
{
    const problem_shape shape = {2, 4, 2, 1000, 1400, 64, 64};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    problem_want_error(&p);
    topics_fill(&p, 16, 0.9, 8.0, source);
    problem expected = p;
    expected.out = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 1000, 64);
    expected.lse = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 1000, 1);
    expected.error = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 2, 4, 1, 1);
    expected.tensors.out = expected.out.view;
    expected.tensors.lse = expected.lse.view;
    expected.tensors.error = expected.error.view;
    for (int target = 0; target < 2; target += 1) {
        hyperattn_params params = refined_params(HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, 128);
        params.target_error = target ? 0.1f : 0.0f;
        hyperattn_cpu_exec exec = problem_exec(1);
        CHECK_OK(hyperattn_forward(&params, &expected.tensors, &exec));
        for (uint32_t threads = 1; threads <= 4; threads *= 2) {
            for (int given = 0; given < 2; given += 1) {
                check_case("%u threads, target %g, %s workspace", threads, (double)params.target_error,
                           given ? "given" : "own");
                exec = problem_exec(threads);
                hyperattn_layout layout = {0, 0};
                CHECK_OK(hyperattn_forward_workspace(&params, &p.tensors, &exec, &layout));
                workspace w = workspace_create(layout, 0xff);
                if (given) {
                    exec.workspace = w.buffer;
                }
                problem_poison_outputs(&p);
                CHECK_OK(hyperattn_forward(&params, &p.tensors, &exec));
                CHECK(tensor_same_bits(&p.out.view, &expected.out.view));
                CHECK(tensor_same_bits(&p.lse.view, &expected.lse.view));
                CHECK(tensor_same_bits(&p.error.view, &expected.error.view));
                CHECK(workspace_surroundings_unchanged(&w));
                workspace_destroy(&w);
            }
        }
    }
    array_destroy(&expected.out);
    array_destroy(&expected.lse);
    array_destroy(&expected.error);
    problem_destroy(&p);
}

/* Rows of a head that are not finite, and the first of them. */
static int64_t rows_not_finite(const hyperattn_tensor *out, int64_t head, int64_t *first)
{
    int64_t count = 0;
    for (int64_t i = out->shape[2] - 1; i >= 0; i -= 1) {
        bool finite = true;
        for (int64_t c = 0; c < out->shape[3]; c += 1) {
            finite = finite && isfinite(tensor_get(out, 0, head, i, c));
        }
        if (!finite) {
            *first = i;
            count += 1;
        }
    }
    return count;
}

static bool same_head(const hyperattn_tensor *a, const hyperattn_tensor *b, int64_t head)
{
    for (int64_t i = 0; i < a->shape[2]; i += 1) {
        for (int64_t c = 0; c < a->shape[3]; c += 1) {
            if (tensor_get(a, 0, head, i, c) != tensor_get(b, 0, head, i, c)) {
                return false;
            }
        }
    }
    return true;
}

/* One NaN in a query reaches its own row, one in a key or value the rows that see it; other heads keep their bits. */
static void nan_stays_in_its_rows(float target_error, random_source *source)
{
    enum { QUERY = 333, KEY = 500 };
    const problem_shape shape = {1, 4, 2, 700, 700, 32, 32};
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    topics_fill(&p, 16, 0.6, 6.0, source);
    problem_want_error(&p);
    array clean = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, 1, 4, 700, 32);
    for (uint32_t mask = 0; mask < 3; mask += 1) {
        hyperattn_params params = refined_params(mask, 128);
        params.target_error = target_error;
        run(&p, &params);
        memcpy(clean.view.data, p.out.view.data, (size_t)tensor_elements(&clean.view) * sizeof(float));
        hyperattn_tensor *const inputs[] = {&p.q.view, &p.k.view, &p.v.view};
        for (int input = 0; input < 3; input += 1) {
            check_case("NaN in %c, mask %s, target %g", "qkv"[input], mask_name(mask), (double)target_error);
            /* Query head 1 belongs to KV head 0, as does query head 0. */
            int64_t head = input == 0 ? 1 : 0, row = input == 0 ? QUERY : KEY;
            double kept = tensor_get(inputs[input], 0, head, row, 3);
            tensor_set(inputs[input], 0, head, row, 3, NAN);
            run(&p, &params);
            tensor_set(inputs[input], 0, head, row, 3, kept);
            for (int64_t h = 0; h < shape.heads_q; h += 1) {
                int64_t first = 0, count = rows_not_finite(&p.out.view, h, &first);
                if (input == 0 && h == 1) {
                    CHECK_INT(count, 1);
                    CHECK_INT(first, QUERY);
                } else if (input > 0 && h < 2) {
                    /* The causal masks let query KEY and those after it see the key. */
                    CHECK(count == 0 || mask == HYPERATTN_MASK_NONE || first >= KEY);
                } else {
                    CHECK(same_head(&p.out.view, &clean.view, h));
                }
            }
        }
    }
    array_destroy(&clean);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("refined", argc, argv)};
    errors_are_small_and_known(&source);
    budget_and_target_take_effect(&source);
    equals_exact_for_few_keys(&source);
    shapes_and_dtypes(&source);
    lse_is_estimated(&source);
    same_bits_for_any_threads(&source);
    nan_stays_in_its_rows(0.0f, &source);
    nan_stays_in_its_rows(0.1f, &source);
    return check_finish();
}
