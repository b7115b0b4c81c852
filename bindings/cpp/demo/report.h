#ifndef REPORT_H
#define REPORT_H
#include <stdint.h>
#include <stdio.h>

/* One line of the table. */
typedef struct report_row {
    const char *input, *mask;
    char        method[24];
    int64_t     n;
    int         runs;           /* timed runs; time_ms is their median */
    double      time_ms;
    double      speedup;        /* time of EXACT / time */
    double      error;          /* relative Frobenius error, see report_print */
    double      keys_per_query; /* NAN where the settings do not tell */
} report_row;

/* The table, what its columns mean, and what the errors on the real input say. */
void report_print(const report_row *rows, int count);

/* The same rows for a program to read. Returns 0 when they could not be written. */
int report_write_csv(const report_row *rows, int count, FILE *file);

#endif
