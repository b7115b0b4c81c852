#include "reference.h"

#include <math.h>
#include <stdlib.h>

enum { SAMPLED_ROWS = 8 };

double relative_error(const float *x, const float *expected, size_t count) {
    double difference = 0.0, norm = 0.0;
    size_t i;
    for (i = 0; i < count; i++) {
        double e = expected[i], delta = (double)x[i] - e;
        difference += delta * delta;
        norm += e * e;
    }
    return sqrt(difference / norm);
}

/* One output row: softmax over the first `visible` keys, then the weighted sum of their values. */
static void attention_row(const inputs *in, int64_t q_row, int64_t kv_row, int64_t visible, double *logits,
                          double *row) {
    int64_t d = in->head_dim, j, c;
    double largest = -INFINITY, sum = 0.0;
    for (j = 0; j < visible; j++) {
        double dot = 0.0;
        for (c = 0; c < d; c++)
            dot += inputs_element(in->q, in->dtype, q_row * d + c)
                   * inputs_element(in->k, in->dtype, (kv_row + j) * d + c);
        logits[j] = dot / sqrt((double)d);
        if (logits[j] > largest) largest = logits[j];
    }
    for (c = 0; c < d; c++) row[c] = 0.0;
    for (j = 0; j < visible; j++) {
        double weight = exp(logits[j] - largest);
        sum += weight;
        for (c = 0; c < d; c++) row[c] += weight * inputs_element(in->v, in->dtype, (kv_row + j) * d + c);
    }
    for (c = 0; c < d; c++) row[c] /= sum;
}

double sampled_rows_error(const inputs *in, int64_t n, int causal, const float *out) {
    int64_t d = in->head_dim, group = in->heads_q / in->heads_kv, head, s, c;
    double *logits = allocate((size_t)n * sizeof *logits), *row = allocate((size_t)d * sizeof *row);
    double difference = 0.0, norm = 0.0;
    for (head = 0; head < in->heads_q; head++) {
        for (s = 0; s < SAMPLED_ROWS; s++) {
            int64_t i = s * (n - 1) / (SAMPLED_ROWS - 1);
            attention_row(in, head * in->tokens + i, head / group * in->tokens, causal ? i + 1 : n, logits, row);
            for (c = 0; c < d; c++) {
                double delta = (double)out[(head * n + i) * d + c] - row[c];
                difference += delta * delta;
                norm += row[c] * row[c];
            }
        }
    }
    free(logits);
    free(row);
    return sqrt(difference / norm);
}
