/* Times exact attention and HyperAttention (arXiv 2310.05869) through hyperattn's C API, and measures
 * how far the estimates are from the exact output.
 *
 *     demo DATA_FOLDER CSV_PATH [MAXIMUM_N]
 */
#define _POSIX_C_SOURCE 200112L /* clock_gettime */

#include "inputs.h"
#include "keys_per_query.h"
#include "reference.h"
#include "report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_ROWS = 64, MAX_METHODS = 5, MAX_RUNS = 5, SEEDS = 4 };
enum { BLOCK_SIZE = 256, SAMPLE_SIZE = 256, REAL_MIN_SEQ_LEN = 1024, MIN_SEQ_LEN = 4096 };
enum { SMALLEST_N = 4096, LARGEST_N = 1 << 20 };

/* One line of the table: what to call, and with how many seeds. */
typedef struct method {
    const char        *name;
    hyperattn_method   method;
    hyperattn_residual residual;
    int                seeds;
} method;

static const method REAL_METHODS[] = {
    {"EXACT", HYPERATTN_METHOD_EXACT, HYPERATTN_RESIDUAL_UNIFORM, 1},
    {"PAPER UNIFORM", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_UNIFORM, SEEDS},
    {"PAPER ROW_NORM", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_ROW_NORM, SEEDS},
    {"PAPER NONE", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_NONE, SEEDS},
    {"AUTO", HYPERATTN_METHOD_AUTO, HYPERATTN_RESIDUAL_UNIFORM, 1},
};

static const method GENERATED_METHODS[] = {
    {"EXACT", HYPERATTN_METHOD_EXACT, HYPERATTN_RESIDUAL_UNIFORM, 1},
    {"PAPER UNIFORM", HYPERATTN_METHOD_PAPER, HYPERATTN_RESIDUAL_UNIFORM, 1},
    {"AUTO", HYPERATTN_METHOD_AUTO, HYPERATTN_RESIDUAL_UNIFORM, 1},
};

/* Same inputs, mask and length for a list of methods: EXACT first, then PAPER, AUTO last. */
typedef struct group {
    const inputs *in;
    int64_t       n, min_seq_len;
    int           causal;
    const method *methods;
    int           count;
} group;

static void check(hyperattn_status status, const char *what, int64_t n) {
    if (status == HYPERATTN_STATUS_OK) return;
    fprintf(stderr, "\ndemo: %s at n = %lld: %s: %s\n", what, (long long)n, hyperattn_status_string(status),
            hyperattn_last_error());
    exit(1);
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* One call of the library. `out` is f32 whatever the inputs are. Returns milliseconds. */
static double forward(const group *g, const method *m, uint64_t seed, float *out) {
    const inputs *in = g->in;
    hyperattn_params params;
    hyperattn_tensors tensors;
    double start;

    hyperattn_params_init(&params, sizeof params); /* scale 0 is 1/sqrt(head_dim), as the model uses */
    params.method = m->method;
    params.mask = g->causal ? HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT : HYPERATTN_MASK_NONE;
    params.residual = m->residual;
    params.block_size = BLOCK_SIZE;
    params.sample_size = SAMPLE_SIZE;
    params.min_seq_len = g->min_seq_len;
    params.seed = seed;

    memset(&tensors, 0, sizeof tensors); /* no lse, no block mask */
    tensors.struct_size = sizeof tensors;
    tensors.q = hyperattn_tensor_bhsd(in->q, in->dtype, 1, in->heads_q, g->n, in->head_dim);
    tensors.k = hyperattn_tensor_bhsd(in->k, in->dtype, 1, in->heads_kv, g->n, in->head_dim);
    tensors.v = hyperattn_tensor_bhsd(in->v, in->dtype, 1, in->heads_kv, g->n, in->head_dim);
    tensors.out = hyperattn_tensor_bhsd(out, HYPERATTN_DTYPE_F32, 1, in->heads_q, g->n, in->head_dim);

    start = now_ms();
    check(hyperattn_forward(&params, &tensors, NULL), m->name, g->n);
    return now_ms() - start;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return count % 2 ? values[count / 2] : 0.5 * (values[count / 2 - 1] + values[count / 2]);
}

static double keys_per_query(const group *g, const method *m) {
    int64_t samples = SAMPLE_SIZE;
    if (m->method == HYPERATTN_METHOD_EXACT) return keys_per_query_exact(g->n, g->causal);
    if (m->residual == HYPERATTN_RESIDUAL_NONE) samples = 0;
    if (m->residual == HYPERATTN_RESIDUAL_ROW_NORM) samples = 2 * SAMPLE_SIZE; /* row sums, product with V */
    return keys_per_query_paper(g->n, g->causal, BLOCK_SIZE, samples, g->min_seq_len);
}

/* EXACT's own check; everything else in the table is relative to it. */
static double check_exact(const group *g, const float *exact) {
    double tolerance = g->in->dtype == HYPERATTN_DTYPE_F32 ? 5e-6 : 2e-3; /* against double precision */
    double error = sampled_rows_error(g->in, g->n, g->causal, exact);
    if (error <= tolerance) return error;
    fprintf(stderr, "\ndemo: EXACT at n = %lld differs from the double-precision loop by %g, more than %g\n",
            (long long)g->n, error, tolerance);
    exit(1);
}

static double mean_head_error(const group *g, const float *out, const float *exact) {
    size_t head = (size_t)(g->n * g->in->head_dim), h, heads = (size_t)g->in->heads_q;
    double sum = 0.0;
    for (h = 0; h < heads; h++) sum += relative_error(out + h * head, exact + h * head, head);
    return sum / (double)heads;
}

/* Equal bits tell which method AUTO chose: all ran with the same seed and settings. */
static void name_choice(const group *g, const float *out, const float *exact, const float *paper, size_t bytes,
                        report_row *row) {
    if (memcmp(out, exact, bytes) == 0) {
        strcpy(row->method, "AUTO = EXACT");
        row->keys_per_query = keys_per_query_exact(g->n, g->causal);
    } else if (memcmp(out, paper, bytes) == 0) {
        strcpy(row->method, "AUTO = PAPER");
    } else {
        row->keys_per_query = NAN;
    }
}

/* How often to run what took `first` milliseconds. */
static int runs_for(const method *m, double first) {
    int runs = first > 1000.0 ? 1 : first > 300.0 ? 3 : MAX_RUNS;
    return runs < m->seeds ? m->seeds : runs;
}

/* Runs the methods in turns, so that another load on the machine meets all of them, and fills one row each.
 * Round r uses seed 1 + r modulo the method's seeds; the first rounds, one a seed, also measure the error. */
static void run_group(const group *g, report_row *rows) {
    size_t bytes = (size_t)(g->in->heads_q * g->n * g->in->head_dim) * sizeof(float);
    float *exact = allocate(bytes), *paper = allocate(bytes), *out = allocate(bytes);
    double times[MAX_METHODS][MAX_RUNS];
    int round, i;

    /* Touch the pages now: the faults belong to no method. */
    memset(exact, 0, bytes);
    memset(paper, 0, bytes);
    memset(out, 0, bytes);
    for (i = 0; i < g->count; i++) {
        memset(&rows[i], 0, sizeof rows[i]);
        rows[i].input = g->in->name;
        rows[i].mask = g->causal ? "causal" : "full";
        rows[i].n = g->n;
        rows[i].runs = 1;
        rows[i].keys_per_query = keys_per_query(g, &g->methods[i]);
        strncpy(rows[i].method, g->methods[i].name, sizeof rows[i].method - 1);
    }
    fprintf(stderr, "%-8s %-6s n = %7lld:", rows[0].input, rows[0].mask, (long long)g->n);
    for (round = 0; round < MAX_RUNS; round++) {
        for (i = 0; i < g->count; i++) {
            const method *m = &g->methods[i];
            float *target = round == 0 && i == 0 ? exact : round == 0 && i == 1 ? paper : out;
            if (round >= rows[i].runs) continue;
            if (round == 0) fprintf(stderr, " %s", m->name);
            times[i][round] = forward(g, m, 1 + (uint64_t)(round % m->seeds), target);
            if (round == 0) {
                fprintf(stderr, " %.0f ms,", times[i][0]);
                rows[i].runs = runs_for(m, times[i][0]);
            }
            if (round >= m->seeds) continue;
            if (m->method == HYPERATTN_METHOD_EXACT) rows[i].error = check_exact(g, exact);
            else rows[i].error += mean_head_error(g, target, exact) / m->seeds;
            if (m->method == HYPERATTN_METHOD_AUTO) name_choice(g, target, exact, paper, bytes, &rows[i]);
        }
    }
    fprintf(stderr, " done\n");
    for (i = 0; i < g->count; i++) {
        rows[i].time_ms = median(times[i], rows[i].runs);
        rows[i].speedup = rows[0].time_ms / rows[i].time_ms;
    }
    free(exact);
    free(paper);
    free(out);
}

/* Starts the library's threads and brings the cores to speed before anything is timed. */
static void warm_up(const inputs *in) {
    group g = {NULL, SMALLEST_N, REAL_MIN_SEQ_LEN, 0, GENERATED_METHODS, 2};
    float *out = allocate((size_t)(g.n * in->head_dim) * sizeof(float));
    int i;
    g.in = in;
    for (i = 0; i < g.count; i++) forward(&g, &g.methods[i], 1, out);
    free(out);
}

static int run_all(const inputs *real, const inputs *generated, report_row *rows) {
    group g;
    int count = 0;
    g.in = real;
    g.n = real->tokens;
    g.min_seq_len = REAL_MIN_SEQ_LEN;
    g.causal = 1;
    g.methods = REAL_METHODS;
    g.count = sizeof REAL_METHODS / sizeof *REAL_METHODS;
    run_group(&g, rows);
    count += g.count;

    g.in = generated;
    g.min_seq_len = MIN_SEQ_LEN;
    g.methods = GENERATED_METHODS;
    g.count = sizeof GENERATED_METHODS / sizeof *GENERATED_METHODS;
    for (g.n = SMALLEST_N; g.n <= generated->tokens; g.n *= 2) {
        for (g.causal = 0; g.causal <= 1 && count + g.count <= MAX_ROWS; g.causal++) {
            run_group(&g, rows + count);
            count += g.count;
        }
    }
    return count;
}

int main(int argc, char **argv) {
    static report_row rows[MAX_ROWS];
    inputs real, generated;
    FILE *csv;
    char *end = NULL;
    long max_n = argc == 4 ? strtol(argv[3], &end, 10) : 65536;
    int count;
    if (argc < 3 || argc > 4 || (end != NULL && *end != '\0') || max_n < SMALLEST_N || max_n > LARGEST_N) {
        fprintf(stderr, "usage: demo DATA_FOLDER CSV_PATH [MAXIMUM_N]\nMAXIMUM_N: %d to %d, default 65536\n",
                SMALLEST_N, LARGEST_N);
        return 2;
    }
    csv = fopen(argv[2], "w"); /* first, so that a wrong path fails before the work */
    if (csv == NULL) {
        fprintf(stderr, "demo: cannot write %s\n", argv[2]);
        return 1;
    }
    real = inputs_load(argv[1]);
    fprintf(stderr, "generating %ld tokens\n", max_n);
    generated = inputs_generate(max_n);
    warm_up(&generated);
    count = run_all(&real, &generated, rows);

    printf("hyperattn %s, kernels: %s, all cores\n\n", hyperattn_version_string(), hyperattn_cpu_isa());
    printf("real:       layer 12 of Qwen2.5-Coder-0.5B on a novel, query heads 1 and 5 with their KV head, d = 64, f16;\n"
           "            b = m = %d, min_seq_len = %d, %d seeds\n",
           (int)BLOCK_SIZE, (int)REAL_MIN_SEQ_LEN, (int)SEEDS);
    printf("clusters:   %s;\n            b = m = %d, min_seq_len = %d\n\n", inputs_generate_description(),
           (int)BLOCK_SIZE, (int)MIN_SEQ_LEN);
    report_print(rows, count);
    inputs_free(&real);
    inputs_free(&generated);
    if (!report_write_csv(rows, count, csv) || fclose(csv) != 0) {
        fprintf(stderr, "demo: cannot write %s\n", argv[2]);
        return 1;
    }
    return 0;
}
