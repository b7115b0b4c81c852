/* Checks that count failures and go on. Every program starts with check_start() and returns check_finish(). */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Names the program, prints the seed of its random inputs (argv[1], else a fixed one) and returns it.
 * Ends a program that hangs, and says which case was running when one crashes. */
uint64_t check_start(const char *program, int argc, char **argv);

/* Prints the counts; the exit status: 0 when at least one check ran and none failed. */
int check_finish(void);

/* What runs now, printed with every failure until the next call. */
void check_case(const char *format, ...);

void check_that(bool passed, const char *file, int line, const char *expression);
void check_int(long long actual, long long expected, const char *file, int line, const char *expression);
/* |actual - expected| <= tolerance; equal infinities pass, a NaN fails. */
void check_near(double actual, double expected, double tolerance, const char *file, int line, const char *expression);
/* actual < bound; a NaN fails. */
void check_below(double actual, double bound, const char *file, int line, const char *expression);
void check_contains(const char *text, const char *part, const char *file, int line, const char *expression);
void check_bytes(const void *actual, const void *expected, size_t size, const char *file, int line,
                 const char *expression);
/* As check_int; a failure also prints hyperattn_last_error(). */
void check_status(int32_t actual, int32_t expected, const char *file, int line, const char *expression);

#ifdef __cplusplus
}
#endif

#define CHECK(condition) check_that((condition), __FILE__, __LINE__, #condition)
#define CHECK_INT(actual, expected) \
    check_int((long long)(actual), (long long)(expected), __FILE__, __LINE__, #actual " == " #expected)
#define CHECK_NEAR(actual, expected, tolerance) \
    check_near((actual), (expected), (tolerance), __FILE__, __LINE__, #actual " near " #expected)
#define CHECK_BELOW(actual, bound) check_below((actual), (bound), __FILE__, __LINE__, #actual " < " #bound)
#define CHECK_CONTAINS(text, part) check_contains((text), (part), __FILE__, __LINE__, #text " contains " #part)
#define CHECK_BYTES(actual, expected, size) \
    check_bytes((actual), (expected), (size), __FILE__, __LINE__, #actual " same bytes as " #expected)
#define CHECK_STATUS(call, expected) check_status((call), (expected), __FILE__, __LINE__, #call " == " #expected)
#define CHECK_OK(call) CHECK_STATUS(call, HYPERATTN_STATUS_OK)

#endif
