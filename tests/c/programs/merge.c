/* hyperattn_merge: two results over disjoint keys become the result over all of them. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "reference.h"

/* One half's outputs. */
typedef struct partial {
    array out, lse;
} partial;

static partial partial_create(const problem_shape *s, hyperattn_dtype dtype, array_layout layout)
{
    partial part;
    part.out = array_create(dtype, layout, s->batch, s->heads_q, s->n_q, s->d_v);
    part.lse = array_create(HYPERATTN_DTYPE_F32, layout, s->batch, s->heads_q, s->n_q, 1);
    return part;
}

static void partial_destroy(partial *part)
{
    array_destroy(&part->out);
    array_destroy(&part->lse);
}

static void partial_fill(const partial *part, double out, double lse)
{
    const int64_t *shape = part->out.view.shape;
    for (int64_t row = 0; row < shape[0] * shape[1] * shape[2]; row += 1) {
        int64_t b = row / (shape[1] * shape[2]), h = row / shape[2] % shape[1], i = row % shape[2];
        for (int64_t c = 0; c < shape[3]; c += 1) {
            tensor_set(&part->out.view, b, h, i, c, out);
        }
        tensor_set(&part->lse.view, b, h, i, 0, lse);
    }
}

/* Forward over the keys [first, first + count) into `part`. */
static void forward_keys(const problem *p, int64_t first, int64_t count, const partial *part)
{
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    hyperattn_tensors tensors = p->tensors;
    hyperattn_tensor *parts[] = {&tensors.k, &tensors.v};
    for (int i = 0; i < 2; i += 1) {
        int64_t bytes = first * parts[i]->stride[2] * (int64_t)dtype_size(parts[i]->dtype);
        parts[i]->data = (unsigned char *)parts[i]->data + bytes;
        parts[i]->shape[2] = count;
    }
    tensors.out = part->out.view;
    tensors.lse = part->lse.view;
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
}

static int32_t merge(const partial *a, const partial *b)
{
    return hyperattn_merge(&a->out.view, &a->lse.view, &b->out.view, &b->lse.view);
}

static void halves_make_the_whole(random_source *source)
{
    static const problem_shape shape = {2, 4, 2, 37, 150, 64, 48};
    static const int64_t splits[] = {75, 1, 149, 0, 150};
    for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
        for (int layout = ARRAY_BHSD; layout <= ARRAY_PADDED; layout += 1) {
            problem p = problem_create(&shape, t, t, (array_layout)layout, source);
            reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, NULL, NULL);
            for (size_t s = 0; s < sizeof splits / sizeof splits[0]; s += 1) {
                check_case("merge of %d and %d keys, %s, layout %d", (int)splits[s], (int)(150 - splits[s]),
                           dtype_name(t), layout);
                /* The second half in another layout than the first. */
                partial a = partial_create(&shape, t, (array_layout)layout);
                partial b = partial_create(&shape, t, (array_layout)((layout + 1) % 3));
                forward_keys(&p, 0, splits[s], &a);
                forward_keys(&p, splits[s], shape.n_k - splits[s], &b);
                uint64_t second = array_hash(&b.out) ^ array_hash(&b.lse);
                CHECK_OK(merge(&a, &b));
                CHECK((array_hash(&b.out) ^ array_hash(&b.lse)) == second);
                CHECK_INT(array_changed_outside(&a.out), 0);
                CHECK_INT(array_changed_outside(&a.lse), 0);
                hyperattn_tensors merged = p.tensors;
                merged.out = a.out.view;
                merged.lse = a.lse.view;
                reference_check(&r, &merged);
                partial_destroy(&a);
                partial_destroy(&b);
            }
            reference_destroy(&r);
            problem_destroy(&p);
        }
    }
}

/* (0, -inf) on either side changes nothing, not even a bit; on both sides it stays what it is. */
static void empty_is_neutral(random_source *source)
{
    static const problem_shape shape = {1, 2, 2, 9, 20, 16, 24};
    for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
        problem p = problem_create(&shape, t, t, ARRAY_BHSD, source);
        partial a = partial_create(&shape, t, ARRAY_BHSD), b = partial_create(&shape, t, ARRAY_BHSD);
        partial empty = partial_create(&shape, t, ARRAY_BHSD);

        check_case("empty second side, %s", dtype_name(t));
        forward_keys(&p, 0, shape.n_k, &a);
        forward_keys(&p, 0, shape.n_k, &b);
        partial_fill(&empty, 0.0, -INFINITY);
        CHECK_OK(merge(&a, &empty));
        CHECK(tensor_same_bits(&a.out.view, &b.out.view));
        CHECK(tensor_same_bits(&a.lse.view, &b.lse.view));

        check_case("empty first side, %s", dtype_name(t));
        CHECK_OK(merge(&empty, &b));
        CHECK(tensor_same_bits(&empty.out.view, &b.out.view));
        CHECK(tensor_same_bits(&empty.lse.view, &b.lse.view));

        check_case("both sides empty, %s", dtype_name(t));
        partial_fill(&a, 0.0, -INFINITY);
        partial_fill(&b, 0.0, -INFINITY);
        CHECK_OK(merge(&a, &b));
        CHECK(tensor_same_bits(&a.out.view, &b.out.view));
        CHECK(tensor_same_bits(&a.lse.view, &b.lse.view));

        partial_destroy(&a);
        partial_destroy(&b);
        partial_destroy(&empty);
        problem_destroy(&p);
    }
}

/* Weights of e^-1000 or e^1000 must neither overflow nor produce NaN. */
static void distant_sums(void)
{
    check_case("lse far apart");
    static const problem_shape shape = {1, 1, 1, 3, 1, 4, 4};
    partial a = partial_create(&shape, HYPERATTN_DTYPE_F32, ARRAY_BHSD);
    partial b = partial_create(&shape, HYPERATTN_DTYPE_F32, ARRAY_BHSD);
    partial_fill(&a, 2.0, -500.0);
    partial_fill(&b, -3.0, 500.0);
    CHECK_OK(merge(&a, &b));
    CHECK_NEAR(tensor_get(&a.out.view, 0, 0, 1, 1), -3.0, 1e-6);
    CHECK_NEAR(tensor_get(&a.lse.view, 0, 0, 1, 0), 500.0, 1e-4);
    partial_fill(&b, 7.0, -500.0);
    CHECK_OK(merge(&a, &b));
    CHECK_NEAR(tensor_get(&a.out.view, 0, 0, 2, 3), -3.0, 1e-6);
    /* Equal sums: the mean, and log 2 more. */
    partial_fill(&a, 1.0, 300.0);
    partial_fill(&b, 3.0, 300.0);
    CHECK_OK(merge(&a, &b));
    CHECK_NEAR(tensor_get(&a.out.view, 0, 0, 0, 0), 2.0, 1e-6);
    CHECK_NEAR(tensor_get(&a.lse.view, 0, 0, 0, 0), 300.0 + log(2.0), 1e-4);
    partial_destroy(&a);
    partial_destroy(&b);
}

static void nan_stays_in_its_row(void)
{
    check_case("NaN in one row");
    static const problem_shape shape = {1, 2, 2, 5, 1, 4, 4};
    partial a = partial_create(&shape, HYPERATTN_DTYPE_F32, ARRAY_BHSD);
    partial b = partial_create(&shape, HYPERATTN_DTYPE_F32, ARRAY_BHSD);
    partial_fill(&a, 1.0, 0.0);
    partial_fill(&b, 3.0, 0.0);
    tensor_set(&a.out.view, 0, 0, 1, 2, NAN);
    tensor_set(&b.lse.view, 0, 1, 3, 0, NAN);
    CHECK_OK(merge(&a, &b));
    for (int64_t h = 0; h < 2; h += 1) {
        for (int64_t i = 0; i < 5; i += 1) {
            for (int64_t c = 0; c < 4; c += 1) {
                double got = tensor_get(&a.out.view, 0, h, i, c);
                bool nan_expected = (h == 0 && i == 1 && c == 2) || (h == 1 && i == 3);
                CHECK(nan_expected ? isnan(got) : fabs(got - 2.0) <= 1e-6);
            }
            double lse = tensor_get(&a.lse.view, 0, h, i, 0);
            CHECK(h == 1 && i == 3 ? isnan(lse) : fabs(lse - log(2.0)) <= 1e-6);
        }
    }
    partial_destroy(&a);
    partial_destroy(&b);
}

static void no_rows(void)
{
    check_case("no rows");
    static const problem_shape shape = {1, 2, 2, 0, 1, 4, 4};
    partial a = partial_create(&shape, HYPERATTN_DTYPE_F32, ARRAY_BHSD);
    partial b = partial_create(&shape, HYPERATTN_DTYPE_F32, ARRAY_BHSD);
    CHECK_OK(merge(&a, &b));
    CHECK(array_untouched(&a.out) && array_untouched(&a.lse));
    partial_destroy(&a);
    partial_destroy(&b);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("merge", argc, argv)};
    halves_make_the_whole(&source);
    empty_is_neutral(&source);
    distant_sums();
    nan_stays_in_its_row();
    no_rows();
    return check_finish();
}
