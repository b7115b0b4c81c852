/* Versions, names, features, status sentences and the two views of contiguous memory. */
#define _POSIX_C_SOURCE 200809L
#include <hyperattn/hyperattn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static void versions(void)
{
    check_case("versions");
    uint32_t expected = (uint32_t)HYPERATTN_VERSION_MAJOR << 24 | (uint32_t)HYPERATTN_VERSION_MINOR << 16 |
                        (uint32_t)HYPERATTN_VERSION_PATCH << 8;
    CHECK_INT(hyperattn_version(), expected);
    CHECK_INT(hyperattn_abi_version(), HYPERATTN_ABI_VERSION);
    char text[64];
    snprintf(text, sizeof text, "%d.%d.%d", HYPERATTN_VERSION_MAJOR, HYPERATTN_VERSION_MINOR,
             HYPERATTN_VERSION_PATCH);
    const char *string = hyperattn_version_string();
    CHECK(string != NULL);
    /* A suffix such as "-rc.1" may follow. */
    CHECK(string != NULL && strncmp(string, text, strlen(text)) == 0);
    CHECK(string != NULL && strchr("-+", string[strlen(text)]) != NULL); /* strchr also finds the closing 0 */
}

static void instruction_set(void)
{
    check_case("cpu_isa");
    const char *isa = hyperattn_cpu_isa();
    CHECK(isa != NULL && isa[0] != '\0');
    printf("cpu_isa %s\n", isa == NULL ? "(NULL)" : isa);
    const char *limit = getenv("HYPERATTN_MAX_ISA");
    if (limit != NULL && strcmp(limit, "scalar") == 0) {
        CHECK(isa != NULL && strcmp(isa, "scalar") == 0);
    }
}

static void features(void)
{
    check_case("features");
    CHECK(hyperattn_has_feature(HYPERATTN_FEATURE_THREADS));
    CHECK(!hyperattn_has_feature(0));
    CHECK(!hyperattn_has_feature(UINT32_MAX));
    /* Kernels built ahead of time are of no use without the entry points that run them. */
    CHECK(!hyperattn_has_feature(HYPERATTN_FEATURE_CUDA_AOT) || hyperattn_has_feature(HYPERATTN_FEATURE_CUDA));
}

static void status_strings(void)
{
    static const hyperattn_status known[] = {
        HYPERATTN_STATUS_OK,
        HYPERATTN_STATUS_INVALID_ARGUMENT,
        HYPERATTN_STATUS_UNSUPPORTED,
        HYPERATTN_STATUS_DEVICE_UNAVAILABLE,
        HYPERATTN_STATUS_OUT_OF_MEMORY,
        HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
        HYPERATTN_STATUS_CUDA,
        HYPERATTN_STATUS_ABI_MISMATCH,
        HYPERATTN_STATUS_INTERNAL,
    };
    enum { KNOWN = sizeof known / sizeof known[0] };
    for (int i = 0; i < KNOWN; i += 1) {
        check_case("status %d", (int)known[i]);
        const char *text = hyperattn_status_string(known[i]);
        CHECK(text != NULL && text[0] != '\0');
        CHECK(text == hyperattn_status_string(known[i])); /* static */
        for (int j = 0; j < i; j += 1) {
            CHECK(text != NULL && strcmp(text, hyperattn_status_string(known[j])) != 0);
        }
    }
    for (int i = -70000; i < 70000; i += 1) {
        check_case("status %d", i);
        CHECK(hyperattn_status_string(i) != NULL);
    }
    check_case("extreme statuses");
    CHECK(hyperattn_status_string(INT32_MIN) != NULL);
    CHECK(hyperattn_status_string(INT32_MAX) != NULL);
}

static void last_error_before_any(void)
{
    check_case("last error before any");
    CHECK(hyperattn_last_error() != NULL);
    CHECK(hyperattn_last_error() != NULL && hyperattn_last_error()[0] == '\0');
}

static void check_view(const hyperattn_tensor *view, const void *data, int64_t stride_batch, int64_t stride_head,
                       int64_t stride_row)
{
    CHECK(view->data == data);
    CHECK_INT(view->dtype, HYPERATTN_DTYPE_BF16);
    CHECK_INT(view->reserved, 0);
    CHECK_INT(view->shape[0], 2);
    CHECK_INT(view->shape[1], 3);
    CHECK_INT(view->shape[2], 5);
    CHECK_INT(view->shape[3], 7);
    CHECK_INT(view->stride[0], stride_batch);
    CHECK_INT(view->stride[1], stride_head);
    CHECK_INT(view->stride[2], stride_row);
    CHECK_INT(view->stride[3], 1);
}

static void contiguous_views(void)
{
    uint16_t memory[2 * 3 * 5 * 7];
    check_case("tensor_bhsd");
    hyperattn_tensor view = hyperattn_tensor_bhsd(memory, HYPERATTN_DTYPE_BF16, 2, 3, 5, 7);
    check_view(&view, memory, 105, 35, 7);
    check_case("tensor_bshd");
    view = hyperattn_tensor_bshd(memory, HYPERATTN_DTYPE_BF16, 2, 3, 5, 7);
    check_view(&view, memory, 105, 7, 21);

    /* Senseless extents make a view that every call rejects, not a crash. */
    check_case("views of senseless extents");
    view = hyperattn_tensor_bhsd(NULL, 0, INT64_MAX, INT64_MAX, INT64_MIN, -1);
    CHECK(view.data == NULL);
    view = hyperattn_tensor_bshd(NULL, UINT32_MAX, INT64_MIN, INT64_MAX, INT64_MAX, INT64_MAX);
    CHECK(view.data == NULL);
}

static void default_parameters(void)
{
    check_case("params_init");
    hyperattn_params params;
    memset(&params, 0xff, sizeof params);
    hyperattn_params_init(&params, sizeof params);
    CHECK_INT(params.struct_size, sizeof params);
    CHECK_INT(params.method, HYPERATTN_METHOD_AUTO);
    CHECK_INT(params.mask, HYPERATTN_MASK_NONE);
    CHECK_NEAR((double)params.scale, 0.0, 0.0);
    CHECK_INT(params.residual, HYPERATTN_RESIDUAL_UNIFORM);
    CHECK_INT(params.lsh_num_projs, 7);
    CHECK_INT(params.block_size, 256);
    CHECK_INT(params.sample_size, 256);
    CHECK_INT(params.flags, 0);
    CHECK_INT(params.min_seq_len, 4096);
    CHECK_INT(params.seed, 0);
    CHECK_INT(params.offset, 0);
    CHECK_NEAR((double)params.approx_d_epsilon, 0.5, 0.0);
    CHECK_NEAR((double)params.approx_d_kappa, 1e4, 0.0);
    hyperattn_params_init(NULL, sizeof params);
    hyperattn_params_init(NULL, 0);
}

int main(int argc, char **argv)
{
    check_start("api_misc", argc, argv);
    last_error_before_any();
    versions();
    instruction_set();
    features();
    status_strings();
    contiguous_views();
    default_parameters();
    return check_finish();
}
