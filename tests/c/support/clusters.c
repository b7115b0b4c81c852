#include "clusters.h"

#include <stdlib.h>

/* 0..count in random order. */
static int64_t *shuffled_create(int64_t count, random_source *source)
{
    int64_t *order = (int64_t *)malloc((size_t)(count + 1) * sizeof *order);
    if (order == NULL) {
        exit(EXIT_FAILURE);
    }
    for (int64_t i = 0; i < count; i += 1) {
        int64_t other = (int64_t)(random_bits(source) % (uint64_t)(i + 1));
        order[i] = order[other];
        order[other] = i;
    }
    return order;
}

static double *centres_create(int64_t count, random_source *source)
{
    double *centres = (double *)malloc((size_t)count * sizeof *centres);
    if (centres == NULL) {
        exit(EXIT_FAILURE);
    }
    for (int64_t i = 0; i < count; i += 1) {
        centres[i] = random_gaussian(source);
    }
    return centres;
}

static void set_row(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, const double *centre,
                    double noise, random_source *source)
{
    for (int64_t c = 0; c < view->shape[3]; c += 1) {
        tensor_set(view, batch, head, row, c, centre[c] + noise * random_gaussian(source));
    }
}

void clusters_fill(const problem *p, int clusters, double noise, random_source *source)
{
    const hyperattn_tensor *q = &p->q.view, *k = &p->k.view, *v = &p->v.view;
    int64_t d = q->shape[3], d_v = v->shape[3], group = q->shape[1] / k->shape[1];
    for (int64_t b = 0; b < q->shape[0]; b += 1) {
        for (int64_t h = 0; h < k->shape[1]; h += 1) {
            double *keys = centres_create(clusters * d, source), *values = centres_create(clusters * d_v, source);
            int64_t *order = shuffled_create(k->shape[2], source);
            for (int64_t j = 0; j < k->shape[2]; j += 1) {
                int64_t cluster = order[j] % clusters;
                set_row(k, b, h, j, keys + cluster * d, noise, source);
                set_row(v, b, h, j, values + cluster * d_v, noise, source);
            }
            free(order);
            for (int64_t head = h * group; head < (h + 1) * group; head += 1) {
                order = shuffled_create(q->shape[2], source);
                for (int64_t i = 0; i < q->shape[2]; i += 1) {
                    set_row(q, b, head, i, keys + order[i] % clusters * d, noise, source);
                }
                free(order);
            }
            free(keys);
            free(values);
        }
    }
}
