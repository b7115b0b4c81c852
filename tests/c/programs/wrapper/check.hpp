// Checks that count failures and go on, and what makes one test serve both error models.
#ifndef CHECK_HPP
#define CHECK_HPP

#include <hyperattn/hyperattn.hpp>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

inline int checks = 0;
inline int failures = 0;

inline bool check_that(bool passed, const char *file, int line, const std::string &what)
{
    checks += 1;
    if (!passed) {
        failures += 1;
        std::printf("%s:%d: FAILED: %s; last error: \"%s\"\n", file, line, what.c_str(), hyperattn_last_error());
    }
    return passed;
}

inline void check_near(double actual, double expected, double tolerance, const char *file, int line, const char *what)
{
    check_that(std::fabs(actual - expected) <= tolerance, file, line,
               std::string(what) + ": " + std::to_string(actual) + ", expected " + std::to_string(expected));
}

/// What a call came to: a status and, for an error, its sentence.
struct result {
    hyperattn_status status;
    std::string sentence;
};

/// Runs a call that throws, or returns its status.
template <class Call>
result result_of(Call call)
{
#ifdef HYPERATTN_NO_EXCEPTIONS
    const hyperattn_status status = call();
    return {status, status == HYPERATTN_STATUS_OK ? "" : hyperattn_last_error()};
#else
    try {
        static_cast<void>(call());
    } catch (const hyperattn::error &error) {
        return {error.status(), error.what()};
    }
    return {HYPERATTN_STATUS_OK, ""};
#endif
}

inline void check_result(const result &actual, hyperattn_status status, const char *part, const char *file, int line)
{
    check_that(actual.status == status && actual.sentence.find(part) != std::string::npos, file, line,
               std::string(hyperattn_status_string(actual.status)) + " \"" + actual.sentence + "\", expected " +
                   hyperattn_status_string(status) + " \"... " + part + " ...\"");
}

#define CHECK(condition) check_that((condition), __FILE__, __LINE__, #condition)
#define CHECK_NEAR(actual, expected, tolerance) \
    check_near((actual), (expected), (tolerance), __FILE__, __LINE__, #actual " near " #expected)
/// The call succeeds.
#define CHECK_OK(call) check_result(result_of([&] { return call; }), HYPERATTN_STATUS_OK, "", __FILE__, __LINE__)
/// The call fails with this status and a sentence with this part.
#define CHECK_FAILS(call, status, part) \
    check_result(result_of([&] { return call; }), (status), (part), __FILE__, __LINE__)

void check_views();
void check_calls();
void check_threads();
void check_workspace();
void check_plans();

#endif
