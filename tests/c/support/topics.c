#include "topics.h"

#include <math.h>
#include <stdlib.h>

enum { KEY_RUN = 8, QUERY_RUN = 256, SINKS = 4 };

static void set_row(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, const double *topic,
                    double noise, random_source *source)
{
    for (int64_t c = 0; c < view->shape[3]; c += 1) {
        tensor_set(view, batch, head, row, c, topic[c] + noise * random_gaussian(source));
    }
}

static void fill_kv_head(const problem *p, int64_t b, int64_t h, int topics, double noise, double sink,
                         random_source *source)
{
    const hyperattn_tensor *q = &p->q.view, *k = &p->k.view, *v = &p->v.view;
    int64_t d = q->shape[3], d_v = v->shape[3], group = q->shape[1] / k->shape[1], width = d + d_v;
    double *topic = (double *)malloc((size_t)(topics * width) * sizeof *topic);
    if (topic == NULL) {
        exit(EXIT_FAILURE);
    }
    for (int64_t i = 0; i < topics * width; i += 1) {
        topic[i] = random_gaussian(source);
    }
    /* Column 0 is kept for the sinks, so that they meet every query alike. */
    double root = sqrt(sink * sqrt((double)d));
    const double *of_run = topic;
    for (int64_t j = 0; j < k->shape[2]; j += 1) {
        if (j % KEY_RUN == 0) {
            of_run = topic + (int64_t)(random_bits(source) % (uint64_t)topics) * width;
        }
        set_row(k, b, h, j, of_run, noise, source);
        set_row(v, b, h, j, of_run + d, noise, source);
        if (sink > 0.0) {
            tensor_set(k, b, h, j, 0, 0.0);
        }
        if (sink > 0.0 && j < SINKS) {
            for (int64_t c = 0; c < d; c += 1) {
                tensor_set(k, b, h, j, c, c == 0 ? root : 0.0);
            }
            for (int64_t c = 0; c < d_v; c += 1) {
                tensor_set(v, b, h, j, c, 0.1 * random_gaussian(source));
            }
        }
    }
    for (int64_t head = h * group; head < (h + 1) * group; head += 1) {
        for (int64_t i = 0; i < q->shape[2]; i += 1) {
            if (i % QUERY_RUN == 0) {
                of_run = topic + (int64_t)(random_bits(source) % (uint64_t)topics) * width;
            }
            set_row(q, b, head, i, of_run, noise, source);
            if (sink > 0.0) {
                tensor_set(q, b, head, i, 0, root);
            }
        }
    }
    free(topic);
}

void topics_fill(const problem *p, int topics, double noise, double sink, random_source *source)
{
    for (int64_t b = 0; b < p->q.view.shape[0]; b += 1) {
        for (int64_t h = 0; h < p->k.view.shape[1]; h += 1) {
            fill_kv_head(p, b, h, topics, noise, sink, source);
        }
    }
}
