#include "inputs.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEAD_DIM = 64, CENTRES = 64, REAL_TOKENS = 8192 };
#define NOISE 0.25 /* standard deviation around a centre; the centres' components have 1 */
#define TWO_PI 6.283185307179586

static void fail(const char *what, const char *name) {
    fprintf(stderr, "demo: %s: %s\n", what, name);
    exit(1);
}

void *allocate(size_t bytes) {
    void *data = malloc(bytes);
    if (data == NULL) fail("out of memory", "inputs or outputs");
    return data;
}

/* The files are little-endian; the library takes the machine's own byte order. */
static uint16_t *read_f16(const char *folder, const char *name, size_t count) {
    char path[4096];
    unsigned char *bytes = allocate(2 * count + 1);
    uint16_t *values = allocate(2 * count);
    size_t i, got;
    FILE *file;
    int length = snprintf(path, sizeof path, "%s/%s", folder, name);
    if (length < 0 || (size_t)length >= sizeof path) fail("path too long", folder);
    file = fopen(path, "rb");
    if (file == NULL) fail("cannot open", path);
    got = fread(bytes, 1, 2 * count + 1, file);
    fclose(file);
    if (got != 2 * count) fail("unexpected size", path);
    for (i = 0; i < count; i++) values[i] = (uint16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8);
    free(bytes);
    return values;
}

inputs inputs_load(const char *folder) {
    inputs in = {"real", HYPERATTN_DTYPE_F16, 2, 1, REAL_TOKENS, HEAD_DIM, NULL, NULL, NULL};
    size_t head = (size_t)in.tokens * HEAD_DIM;
    in.q = read_f16(folder, "q.f16", 2 * head);
    in.k = read_f16(folder, "k.f16", head);
    in.v = read_f16(folder, "v.f16", head);
    return in;
}

/* SplitMix64 and the Box-Muller transform: the same numbers on every machine, up to libm's rounding. */
typedef struct generator {
    uint64_t state;
    double   spare;
    int      has_spare;
} generator;

static uint64_t next_u64(generator *g) {
    uint64_t z = g->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double next_uniform(generator *g) { /* in (0, 1] */
    return ((double)(next_u64(g) >> 11) + 1.0) / 9007199254740992.0;
}

static double next_normal(generator *g) {
    double radius, angle;
    if (g->has_spare) {
        g->has_spare = 0;
        return g->spare;
    }
    radius = sqrt(-2.0 * log(next_uniform(g)));
    angle = TWO_PI * next_uniform(g);
    g->spare = radius * sin(angle);
    g->has_spare = 1;
    return radius * cos(angle);
}

static void draw_near(generator *g, const float *centre, float *row) {
    int c;
    for (c = 0; c < HEAD_DIM; c++) row[c] = centre[c] + (float)(NOISE * next_normal(g));
}

inputs inputs_generate(int64_t tokens) {
    static float centres[CENTRES][HEAD_DIM], means[CENTRES][HEAD_DIM];
    inputs in = {"clusters", HYPERATTN_DTYPE_F32, 1, 1, tokens, HEAD_DIM, NULL, NULL, NULL};
    size_t bytes = (size_t)tokens * HEAD_DIM * sizeof(float);
    generator g = {1, 0.0, 0};
    float *q = allocate(bytes), *k = allocate(bytes), *v = allocate(bytes);
    int64_t i;
    int j, c;
    for (j = 0; j < CENTRES; j++) {
        for (c = 0; c < HEAD_DIM; c++) centres[j][c] = (float)next_normal(&g);
        for (c = 0; c < HEAD_DIM; c++) means[j][c] = (float)next_normal(&g);
    }
    for (i = 0; i < tokens; i++) {
        uint64_t key = next_u64(&g) % CENTRES, query = next_u64(&g) % CENTRES;
        draw_near(&g, centres[query], q + i * HEAD_DIM);
        draw_near(&g, centres[key], k + i * HEAD_DIM);
        draw_near(&g, means[key], v + i * HEAD_DIM);
    }
    in.q = q;
    in.k = k;
    in.v = v;
    return in;
}

const char *inputs_generate_description(void) {
    return "generated, one head, d = 64, f32: 64 normal cluster centres; keys and queries = a random centre\n"
           "            + 0.25 x normal noise; values = the mean of the key's centre + 0.25 x normal noise; seed 1";
}

void inputs_free(inputs *in) {
    free(in->q);
    free(in->k);
    free(in->v);
    in->q = in->k = in->v = NULL;
}

static double half_to_double(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size;
    if (exponent == 31) size = fraction != 0 ? NAN : INFINITY;
    else if (exponent == 0) size = ldexp(fraction, -24);
    else size = ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -size : size;
}

double inputs_element(const void *data, hyperattn_dtype dtype, int64_t index) {
    if (dtype == HYPERATTN_DTYPE_F16) return half_to_double(((const uint16_t *)data)[index]);
    return ((const float *)data)[index];
}
