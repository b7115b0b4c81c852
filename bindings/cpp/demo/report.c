#include "report.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void print_rule(void) {
    int i;
    for (i = 0; i < 92; i++) putchar('-');
    putchar('\n');
}

static const report_row *find_real(const report_row *rows, int count, const char *method) {
    int i;
    for (i = 0; i < count; i++)
        if (strcmp(rows[i].input, "real") == 0 && strcmp(rows[i].method, method) == 0) return &rows[i];
    return NULL;
}

/* Says what was measured, whichever way it came out. */
static void print_conclusion(const report_row *rows, int count) {
    const report_row *paper = find_real(rows, count, "PAPER UNIFORM");
    const report_row *row_norm = find_real(rows, count, "PAPER ROW_NORM");
    const report_row *none = find_real(rows, count, "PAPER NONE");
    if (paper == NULL || row_norm == NULL || none == NULL) return;
    printf("\nOn the real input the published estimator misses the exact output by %.1f %% of its norm (UNIFORM;\n"
           "ROW_NORM %.1f %%, blocks alone %.1f %%). ",
           100.0 * paper->error, 100.0 * row_norm->error, 100.0 * none->error);
    if (paper->error > 0.05)
        printf("That is a large loss: PAPER is no drop-in replacement for exact\n"
               "attention in a trained model. Measure the model's quality before using it for speed.\n");
    else
        printf("Whether a model bears that has to be measured on the model.\n");
    if (find_real(rows, count, "AUTO = PAPER") != NULL)
        printf("AUTO looks at time alone: it ran PAPER here, with the same loss. Ask for EXACT where quality counts.\n");
}

void report_print(const report_row *rows, int count) {
    int i;
    printf("%-9s %-15s %-7s %8s %12s %9s %11s %12s\n", "input", "method", "mask", "n", "time (ms)", "speed-up",
           "rel. error", "keys/query");
    print_rule();
    for (i = 0; i < count; i++) {
        const report_row *r = &rows[i];
        if (i > 0 && (r->n != r[-1].n || strcmp(r->mask, r[-1].mask) != 0)) print_rule();
        printf("%-9s %-15s %-7s %8lld %12.2f %8.2fx %11.2e ", r->input, r->method, r->mask, (long long)r->n,
               r->time_ms, r->speedup, r->error);
        if (isnan(r->keys_per_query)) printf("%12s\n", "-");
        else printf("%12.1f\n", r->keys_per_query);
    }
    print_rule();
    printf("time        median of the runs; a method that takes longer than a second runs once a seed\n"
           "rel. error  relative Frobenius error of the output against EXACT, mean over heads and seeds; EXACT's\n"
           "            own: against a loop in double precision on 8 rows a head\n"
           "keys/query  key columns that a query meets on average, from the settings; ROW_NORM draws two samples\n"
           "PAPER is exact where n <= min_seq_len. \"AUTO = X\": its output is bit for bit that of X.\n");
    print_conclusion(rows, count);
}

int report_write_csv(const report_row *rows, int count, FILE *file) {
    int i;
    fprintf(file, "input,method,mask,n,runs,time_ms,speedup,error,keys_per_query\n");
    for (i = 0; i < count; i++) {
        const report_row *r = &rows[i];
        fprintf(file, "%s,%s,%s,%lld,%d,%.9g,%.9g,%.9g,", r->input, r->method, r->mask, (long long)r->n, r->runs,
                r->time_ms, r->speedup, r->error);
        if (isnan(r->keys_per_query)) fprintf(file, "\n"); /* an empty field: unknown */
        else fprintf(file, "%.9g\n", r->keys_per_query);
    }
    return fflush(file) == 0 && !ferror(file);
}
