#include "reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "check.h"

/* Unit roundoff of f32, f16 and bf16. */
static const double UNIT_F32 = 0x1p-24, UNIT_F16 = 0x1p-11, UNIT_BF16 = 0x1p-8;

static double unit_roundoff(hyperattn_dtype dtype)
{
    return dtype == HYPERATTN_DTYPE_F32 ? UNIT_F32 : dtype == HYPERATTN_DTYPE_F16 ? UNIT_F16 : UNIT_BF16;
}

bool mask_visible(hyperattn_mask mask, int64_t query, int64_t key, int64_t n_q, int64_t n_k)
{
    switch (mask) {
    case HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT:
        return key <= query + (n_k - n_q);
    case HYPERATTN_MASK_CAUSAL_TOP_LEFT:
        return key <= query;
    default:
        return true;
    }
}

static double *allocate(int64_t count)
{
    double *memory = (double *)calloc((size_t)count + 1, sizeof *memory);
    if (memory == NULL) {
        exit(EXIT_FAILURE);
    }
    return memory;
}

/* One head as a contiguous array of doubles. */
static double *head_of(const hyperattn_tensor *view, int64_t batch, int64_t head)
{
    int64_t rows = view->shape[2], columns = view->shape[3];
    double *copy = allocate(rows * columns);
    for (int64_t row = 0; row < rows; row += 1) {
        for (int64_t column = 0; column < columns; column += 1) {
            copy[row * columns + column] = tensor_get(view, batch, head, row, column);
        }
    }
    return copy;
}

/* Not fmax: a call for every element would take half of the tests' time. */
static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* The largest magnitude in each row of `v`. */
static double *limits_of(const double *v, int64_t rows, int64_t columns)
{
    double *limits = allocate(rows);
    for (int64_t row = 0; row < rows; row += 1) {
        for (int64_t column = 0; column < columns; column += 1) {
            limits[row] = larger(limits[row], fabs(v[row * columns + column]));
        }
    }
    return limits;
}

/* The loops over pairs of a query and a key take most of the time of the programs under sanitizers, and read and write
 * nothing but this file's arrays: what is watched is everything else. */
#if defined(__GNUC__)
#define UNWATCHED __attribute__((no_sanitize("address", "undefined")))
#else
#define UNWATCHED
#endif

/* sum q_c k_c and sum |q_c k_c|. In four sums each: in one, every addition would wait for the one before it, which would
 * take half of the tests' time. */
UNWATCHED static void dot_product(const double *q, const double *k, int64_t d, double *dot, double *absolute)
{
    double a0 = 0.0, a1 = 0.0, a2 = 0.0, a3 = 0.0, b0 = 0.0, b1 = 0.0, b2 = 0.0, b3 = 0.0;
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) {
        double p0 = q[c] * k[c], p1 = q[c + 1] * k[c + 1], p2 = q[c + 2] * k[c + 2], p3 = q[c + 3] * k[c + 3];
        a0 += p0, a1 += p1, a2 += p2, a3 += p3;
        b0 += fabs(p0), b1 += fabs(p1), b2 += fabs(p2), b3 += fabs(p3);
    }
    for (; c < d; c += 1) {
        a0 += q[c] * k[c];
        b0 += fabs(q[c] * k[c]);
    }
    *dot = (a0 + a1) + (a2 + a3);
    *absolute = (b0 + b1) + (b2 + b3);
}

typedef struct row_result {
    double lse, lse_bound, value_limit;
} row_result;

/* One query. `logits` holds what is added to each key's logit, and then the logits of the visible keys; `limits` the
 * largest magnitude in each row of `v`. */
UNWATCHED static row_result attend(const double *q, const double *k, const double *v, const double *limits, int64_t n_k,
                         int64_t d, int64_t d_v, double scale, const bool *visible, double *logits, double *out)
{
    double highest = -INFINITY, magnitude = 0.0, limit = 0.0;
    for (int64_t j = 0; j < n_k; j += 1) {
        if (!visible[j]) {
            continue;
        }
        double dot, absolute;
        dot_product(q, k + j * d, d, &dot, &absolute);
        magnitude = larger(magnitude, fabs(scale) * absolute + fabs(logits[j]));
        logits[j] += scale * dot;
        highest = larger(highest, logits[j]);
        limit = larger(limit, limits[j]);
    }
    row_result result = {-INFINITY, 0.0, limit};
    if (highest == -INFINITY) {
        return result; /* no visible key, or logits of -inf only: out stays 0 */
    }
    double sum = 0.0;
    for (int64_t j = 0; j < n_k; j += 1) {
        if (visible[j]) {
            double weight = exp(logits[j] - highest);
            sum += weight;
            for (int64_t c = 0; c < d_v; c += 1) {
                out[c] += weight * v[j * d_v + c];
            }
        }
    }
    for (int64_t c = 0; c < d_v; c += 1) {
        out[c] /= sum;
    }
    result.lse = highest + log(sum);
    /* A logit: what is added, d products and sums, the scale, its own rounding and the change of the exponential's base,
     * each within one unit of sum |q_c k_c| |scale| and what is added. The sum: one unit for each of n_k additions, a few
     * for every exponential, one for each rescaling. Then the logarithm and the last addition. */
    result.lse_bound = UNIT_F32 * ((double)(d + 8) * magnitude + (double)(n_k + 32) + 4.0 * fabs(result.lse));
    return result;
}

/* What the mask tensor adds; its extents of 1 serve all. */
static double mask_at(const hyperattn_tensor *mask, int64_t batch, int64_t head, int64_t query, int64_t key)
{
    if (mask->data == NULL) {
        return 0.0;
    }
    return tensor_get(mask, mask->shape[0] == 1 ? 0 : batch, mask->shape[1] == 1 ? 0 : head,
                      mask->shape[2] == 1 ? 0 : query, key);
}

reference reference_compute(const hyperattn_tensors *tensors, hyperattn_mask mask, double scale,
                            reference_filter filter, const void *context)
{
    const hyperattn_tensor *q = &tensors->q, *k = &tensors->k, *v = &tensors->v;
    int64_t batches = q->shape[0], heads = q->shape[1], n_q = q->shape[2], n_k = k->shape[2];
    int64_t d = q->shape[3], d_v = v->shape[3], group = heads / k->shape[1];
    double factor = scale == 0.0 ? 1.0 / sqrt((double)d) : scale;

    reference r;
    memset(&r, 0, sizeof r);
    memcpy(r.shape.shape, tensors->out.shape, sizeof r.shape.shape);
    r.out = allocate(batches * heads * n_q * d_v);
    r.lse = allocate(batches * heads * n_q);
    r.lse_bound = allocate(batches * heads * n_q);
    r.value_limit = allocate(batches * heads * n_q);
    double *logits = allocate(n_k);
    bool *visible = (bool *)allocate(n_k);

    for (int64_t b = 0; b < batches; b += 1) {
        for (int64_t h = 0; h < heads; h += 1) {
            double *queries = head_of(q, b, h), *keys = head_of(k, b, h / group), *values = head_of(v, b, h / group);
            double *limits = limits_of(values, n_k, d_v);
            for (int64_t i = 0; i < n_q; i += 1) {
                for (int64_t j = 0; j < n_k; j += 1) {
                    logits[j] = mask_at(&tensors->mask, b, h, i, j);
                    visible[j] = mask_visible(mask, i, j, n_q, n_k) && logits[j] >= -0x1p127 &&
                                 (filter == NULL || filter(context, b, h, i, j));
                }
                int64_t row = (b * heads + h) * n_q + i;
                row_result result = attend(queries + i * d, keys, values, limits, n_k, d, d_v, factor, visible,
                                           logits, r.out + row * d_v);
                r.lse[row] = result.lse;
                r.lse_bound[row] = result.lse_bound;
                r.value_limit[row] = result.value_limit;
            }
            free(queries);
            free(keys);
            free(values);
            free(limits);
        }
    }
    free(logits);
    free(visible);
    return r;
}

void reference_destroy(reference *r)
{
    free(r->out);
    free(r->lse);
    free(r->lse_bound);
    free(r->value_limit);
    memset(r, 0, sizeof *r);
}

/* Adds the squared difference and the squared reference of one head. */
static void add_squares(const reference *r, const hyperattn_tensor *out, int64_t b, int64_t h, double *difference,
                        double *total)
{
    int64_t n_q = r->shape.shape[2], d_v = r->shape.shape[3];
    const double *expected = r->out + (b * r->shape.shape[1] + h) * n_q * d_v;
    for (int64_t i = 0; i < n_q; i += 1) {
        for (int64_t c = 0; c < d_v; c += 1) {
            double want = expected[i * d_v + c], error = tensor_get(out, b, h, i, c) - want;
            *difference += error * error;
            *total += want * want;
        }
    }
}

static double ratio(double difference, double total)
{
    return difference == 0.0 ? 0.0 : sqrt(difference / total);
}

double reference_error(const reference *r, const hyperattn_tensor *out)
{
    double difference = 0.0, total = 0.0;
    for (int64_t b = 0; b < r->shape.shape[0]; b += 1) {
        for (int64_t h = 0; h < r->shape.shape[1]; h += 1) {
            add_squares(r, out, b, h, &difference, &total);
        }
    }
    return ratio(difference, total);
}

double reference_head_error(const reference *r, const hyperattn_tensor *out, int64_t batch, int64_t head)
{
    double difference = 0.0, total = 0.0;
    add_squares(r, out, batch, head, &difference, &total);
    return ratio(difference, total);
}

double reference_tolerance(hyperattn_dtype dtype)
{
    return dtype == HYPERATTN_DTYPE_F32 ? 5e-6 : dtype == HYPERATTN_DTYPE_F16 ? 2e-3 : 1e-2;
}

/* Raises *worst to error / bound; a NaN counts as infinite. */
static void keep_worst(double *worst, double error, double bound)
{
    double share = error == 0.0 ? 0.0 : error / bound;
    if (!(share <= *worst)) {
        *worst = isnan(share) ? INFINITY : share;
    }
}

void reference_check(const reference *r, const hyperattn_tensors *tensors)
{
    const hyperattn_tensor *out = &tensors->out, *lse = &tensors->lse;
    int64_t heads = r->shape.shape[1], n_q = r->shape.shape[2], d_v = r->shape.shape[3];
    if (tensor_elements(&r->shape) > 0) {
        CHECK_BELOW(reference_error(r, out), reference_tolerance(tensors->q.dtype));
    }
    /* The worst element and the worst row, so that a failing case prints one line of each. */
    double worst_element = 0.0, worst_lse = 0.0;
    bool empty_rows_exact = true;
    for (int64_t row = 0; row < r->shape.shape[0] * heads * n_q; row += 1) {
        int64_t b = row / (heads * n_q), h = row / n_q % heads, i = row % n_q;
        bool empty = r->lse[row] == -INFINITY;
        /* An error e in every logit moves the weights by at most e^(2e) - 1 in all; rounding of the output, and of the
         * weights where a kernel keeps them in the queries' 16-bit type, adds a unit each. */
        double units = unit_roundoff(out->dtype) + unit_roundoff(tensors->q.dtype);
        double bound = r->value_limit[row] * (expm1(4.0 * r->lse_bound[row]) + 2.0 * units);
        for (int64_t c = 0; c < d_v; c += 1) {
            double got = tensor_get(out, b, h, i, c), error = fabs(got - r->out[row * d_v + c]);
            if (empty) {
                empty_rows_exact = empty_rows_exact && got == 0.0;
            } else {
                keep_worst(&worst_element, error, bound);
            }
        }
        if (lse->data != NULL) {
            double got = tensor_get(lse, b, h, i, 0);
            if (empty) {
                empty_rows_exact = empty_rows_exact && got == -INFINITY;
            } else {
                keep_worst(&worst_lse, fabs(got - r->lse[row]), r->lse_bound[row]);
            }
        }
    }
    CHECK(empty_rows_exact);
    CHECK_BELOW(worst_element, 1.0);
    CHECK_BELOW(worst_lse, 1.0);
}

void reference_expect_exact(problem *p, const hyperattn_params *params)
{
    problem_poison_outputs(p);
    CHECK_OK(hyperattn_forward(params, &p->tensors, NULL));
    CHECK_INT(array_changed_outside(&p->out), 0);
    CHECK_INT(array_changed_outside(&p->lse), 0);
    reference r = reference_compute(&p->tensors, params->mask, (double)params->scale, NULL, NULL);
    reference_check(&r, &p->tensors);
    reference_destroy(&r);
}
