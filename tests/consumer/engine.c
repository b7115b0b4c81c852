/* Runs a layer through C and through C++ and compares both with a loop in double precision. */

#include "layer.h"

#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef WITH_NEIGHBOUR
#include "neighbour.h"
#endif

static float q[TOKENS * HEADS * HEAD_DIM], k[TOKENS * KV_HEADS * HEAD_DIM], v[TOKENS * KV_HEADS * HEAD_DIM];
static float out[TOKENS * HEADS * HEAD_DIM];

static void fill(float *values, int count)
{
    for (int i = 0; i < count; i++)
        values[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

static double dot(const float *a, const float *b)
{
    double sum = 0;
    for (int d = 0; d < HEAD_DIM; d++)
        sum += (double)a[d] * b[d];
    return sum;
}

/* The largest distance of out from attention. */
static double error(void)
{
    double largest = 0;
    for (int i = 0; i < TOKENS; i++)
        for (int head = 0; head < HEADS; head++) {
            const int kv_head = head / (HEADS / KV_HEADS);
            double weights = 0, expected[HEAD_DIM] = { 0 };
            for (int j = 0; j <= i; j++) {
                const float *key = k + (j * KV_HEADS + kv_head) * HEAD_DIM;
                const float *value = v + (j * KV_HEADS + kv_head) * HEAD_DIM;
                const double weight = exp(dot(q + (i * HEADS + head) * HEAD_DIM, key) / sqrt((double)HEAD_DIM));
                weights += weight;
                for (int d = 0; d < HEAD_DIM; d++)
                    expected[d] += weight * value[d];
            }
            for (int d = 0; d < HEAD_DIM; d++)
                largest = fmax(largest, fabs(expected[d] / weights - out[(i * HEADS + head) * HEAD_DIM + d]));
        }
    return largest;
}

static int check(const char *name, int (*layer)(const float *, const float *, const float *, float *))
{
    for (int i = 0; i < TOKENS * HEADS * HEAD_DIM; i++)
        out[i] = NAN;
    if (layer(q, k, v, out) != 0)
        return 1;
    const double found = error();
    printf("%s: error %.1e\n", name, found);
    return !(found < 1e-5);
}

int main(void)
{
    fill(q, TOKENS * HEADS * HEAD_DIM);
    fill(k, TOKENS * KV_HEADS * HEAD_DIM);
    fill(v, TOKENS * KV_HEADS * HEAD_DIM);
    int failed = check("C", layer_in_c) + check("C++", layer_in_cpp);
#ifdef WITH_NEIGHBOUR
    /* The second library panics and catches it, with a standard library of its own. */
    const int words = (int)neighbour_count_words("attention is linear"), caught = (int)neighbour_count_words(NULL);
    printf("neighbour: %d words, %d for no text\n", words, caught);
    failed += words != 3 || caught != -1;
    failed += check("C after the neighbour's panic", layer_in_c);
#endif
    printf("hyperattn %s on %s\n", hyperattn_version_string(), hyperattn_cpu_isa());
    return failed != 0;
}
