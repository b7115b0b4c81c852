#define _DEFAULT_SOURCE
#include "check.h"

#include <hyperattn/hyperattn.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DEFAULT_SEED = 20231009, SECONDS_TO_LIVE = 900, FAILURES_PRINTED = 30 };

static unsigned long checks, failures;
static char current_case[256];

static void report_crash(int signal_number)
{
    /* Only async-signal-safe calls from here on. */
    const char *what = signal_number == SIGALRM ? "TIMEOUT in case: " : "CRASH in case: ";
    ssize_t written = write(STDOUT_FILENO, what, strlen(what));
    written += write(STDOUT_FILENO, current_case, strlen(current_case));
    written += write(STDOUT_FILENO, "\n", 1);
    _exit(written < 0 ? 3 : 2);
}

uint64_t check_start(const char *program, int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)DEFAULT_SEED;
    /* Unbuffered, so that what was printed before a crash is seen. */
    setvbuf(stdout, NULL, _IONBF, 0);
    signal(SIGSEGV, report_crash);
    signal(SIGBUS, report_crash);
    signal(SIGFPE, report_crash);
    signal(SIGABRT, report_crash);
    signal(SIGALRM, report_crash);
    alarm(SECONDS_TO_LIVE);
    printf("%s: seed %llu\n", program, (unsigned long long)seed);
    return seed;
}

int check_finish(void)
{
    printf("%lu checks, %lu failures\n", checks, failures);
    return checks > 0 && failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

void check_case(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(current_case, sizeof current_case, format, arguments);
    va_end(arguments);
}

/* Counts one check; true when its failure is to be printed. */
static bool failed(bool passed, const char *file, int line, const char *expression)
{
    checks += 1;
    if (passed) {
        return false;
    }
    failures += 1;
    if (failures > FAILURES_PRINTED) {
        return false;
    }
    printf("%s:%d: FAILED: %s [%s]", file, line, expression, current_case);
    return true;
}

void check_that(bool passed, const char *file, int line, const char *expression)
{
    if (failed(passed, file, line, expression)) {
        printf("\n");
    }
}

void check_int(long long actual, long long expected, const char *file, int line, const char *expression)
{
    if (failed(actual == expected, file, line, expression)) {
        printf(": %lld, expected %lld\n", actual, expected);
    }
}

void check_near(double actual, double expected, double tolerance, const char *file, int line, const char *expression)
{
    bool passed = actual == expected || fabs(actual - expected) <= tolerance;
    if (failed(passed, file, line, expression)) {
        printf(": %.9g, expected %.9g within %.3g\n", actual, expected, tolerance);
    }
}

void check_below(double actual, double bound, const char *file, int line, const char *expression)
{
    if (failed(actual < bound, file, line, expression)) {
        printf(": %.9g, bound %.9g\n", actual, bound);
    }
}

void check_contains(const char *text, const char *part, const char *file, int line, const char *expression)
{
    if (failed(text != NULL && strstr(text, part) != NULL, file, line, expression)) {
        printf(": \"%s\" lacks \"%s\"\n", text == NULL ? "(NULL)" : text, part);
    }
}

void check_bytes(const void *actual, const void *expected, size_t size, const char *file, int line,
                 const char *expression)
{
    const unsigned char *a = (const unsigned char *)actual;
    const unsigned char *b = (const unsigned char *)expected;
    size_t at = 0;
    while (at < size && a[at] == b[at]) {
        at += 1;
    }
    if (failed(at == size, file, line, expression)) {
        printf(": byte %zu of %zu is 0x%02x, expected 0x%02x\n", at, size, a[at], b[at]);
    }
}

void check_status(int32_t actual, int32_t expected, const char *file, int line, const char *expression)
{
    if (failed(actual == expected, file, line, expression)) {
        printf(": %s, expected %s; last error: \"%s\"\n", hyperattn_status_string(actual),
               hyperattn_status_string(expected), hyperattn_last_error());
    }
}
