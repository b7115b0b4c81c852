/* Wrong hyperattn_params. */
#include <math.h>

#include "bad_calls.h"

#define BAD_ESTIMATOR(change, status, ...) \
    do { \
        bad_call c; \
        bad_call_fresh_estimator(&c); \
        change; \
        bad_call_expect(#change, &c, status, PARTS(__VA_ARGS__)); \
    } while (0)

void bad_params(void)
{
    BAD(c.params_argument = NULL, INVALID, "params", "NULL");
    BAD(c.params.struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "params.struct_size", "0");
    BAD(c.params.struct_size = 1, HYPERATTN_STATUS_ABI_MISMATCH, "params.struct_size", "1");
    BAD(c.params.struct_size = 7, HYPERATTN_STATUS_ABI_MISMATCH, "params.struct_size", "7");
    BAD(c.params.struct_size = 13, HYPERATTN_STATUS_ABI_MISMATCH, "params.struct_size", "13");
    BAD(c.params.struct_size = 42, HYPERATTN_STATUS_ABI_MISMATCH, "params.struct_size", "42");

    BAD(c.params.method = 77, INVALID, "method", "77");
    BAD(c.params.method = UINT32_MAX, INVALID, "method", "4294967295");
    BAD(c.params.mask = 3, INVALID, "mask", "3");
    BAD(c.params.residual = 9, INVALID, "residual", "9");
    BAD(c.params.flags = 4, INVALID, "flags", "4");
    BAD(c.params.flags = 6, INVALID, "flags", "6");
    BAD(c.params.flags = 0x80000001u, INVALID, "flags");

    BAD(c.params.scale = NAN, INVALID, "scale", "NaN");
    BAD(c.params.scale = INFINITY, INVALID, "scale", "inf");
    BAD(c.params.scale = -INFINITY, INVALID, "scale", "-inf");

    /* Out of range is out of range also where the method or the length leaves it unused. */
    BAD(c.params.lsh_num_projs = 25, INVALID, "lsh_num_projs", "25", "24");
    BAD(c.params.min_seq_len = -1, INVALID, "min_seq_len", "-1");
    BAD_ESTIMATOR(c.params.lsh_num_projs = UINT32_MAX, INVALID, "lsh_num_projs", "4294967295");
    BAD_ESTIMATOR(c.params.min_seq_len = INT64_MIN, INVALID, "min_seq_len", "-9223372036854775808");

    BAD(c.params.budget = 0, INVALID, "budget", "0", "64");
    BAD(c.params.budget = 63, INVALID, "budget", "63", "64");
    BAD(c.params.target_error = -0.01f, INVALID, "target_error", "-0.01");
    BAD(c.params.target_error = NAN, INVALID, "target_error", "NaN");
    BAD(c.params.target_error = INFINITY, INVALID, "target_error", "inf");
    BAD((c.params.method = HYPERATTN_METHOD_REFINED, c.params.budget = 1), INVALID, "budget", "1", "64");
    BAD((c.params.method = HYPERATTN_METHOD_REFINED, c.params.target_error = -INFINITY), INVALID, "target_error", "-inf");

    BAD_ESTIMATOR((c.params.block_size = 0, c.params.sample_size = 0), INVALID, "block_size", "sample_size", "0");
    BAD_ESTIMATOR((c.params.block_size = 0, c.params.residual = HYPERATTN_RESIDUAL_NONE), INVALID, "block_size",
                  "residual");

    BAD_ESTIMATOR((c.params.residual = HYPERATTN_RESIDUAL_ROW_NORM, c.params.approx_d_epsilon = 0.0f), INVALID,
                  "approx_d_epsilon", "0");
    BAD_ESTIMATOR((c.params.residual = HYPERATTN_RESIDUAL_ROW_NORM, c.params.approx_d_epsilon = -0.5f), INVALID,
                  "approx_d_epsilon", "-0.5");
    BAD_ESTIMATOR((c.params.residual = HYPERATTN_RESIDUAL_ROW_NORM, c.params.approx_d_epsilon = NAN), INVALID,
                  "approx_d_epsilon", "NaN");
    BAD_ESTIMATOR((c.params.residual = HYPERATTN_RESIDUAL_ROW_NORM, c.params.approx_d_kappa = 0.0f), INVALID,
                  "approx_d_kappa", "0");
    BAD_ESTIMATOR((c.params.residual = HYPERATTN_RESIDUAL_ROW_NORM, c.params.approx_d_kappa = -3.0f), INVALID,
                  "approx_d_kappa", "-3");
    BAD_ESTIMATOR((c.params.residual = HYPERATTN_RESIDUAL_ROW_NORM, c.params.approx_d_kappa = NAN), INVALID,
                  "approx_d_kappa", "NaN");
}
