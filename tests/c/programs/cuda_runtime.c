/* hyperattn_cuda_forward as a program of the CUDA runtime calls it: memory from cudaMalloc, a stream, or none. Against
 * loops in double precision. Linked with the runtime, so cuda/pack.sh builds it and not the tests here; prints SKIPPED where
 * there is no device. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "reference.h"

/* What is used of cuda_runtime_api.h, whose folder need not be known here. */
int cudaGetDeviceCount(int *count);
int cudaMalloc(void **memory, size_t size);
int cudaFree(void *memory);
int cudaMemcpy(void *to, const void *from, size_t size, int kind);
int cudaStreamCreate(struct CUstream_st **stream);
int cudaStreamSynchronize(struct CUstream_st *stream);
int cudaStreamDestroy(struct CUstream_st *stream);
enum { TO_DEVICE = 1, FROM_DEVICE = 2 };

/* An array's bytes in device memory, and the view of them there. */
typedef struct device_array {
    void *memory;
    size_t size;
    hyperattn_tensor view;
} device_array;

static device_array to_device(const array *a)
{
    device_array d;
    d.size = (size_t)(a->end - a->pages);
    CHECK_INT(cudaMalloc(&d.memory, d.size), 0);
    CHECK_INT(cudaMemcpy(d.memory, a->pages, d.size, TO_DEVICE), 0);
    d.view = a->view;
    d.view.data = (unsigned char *)d.memory + ((unsigned char *)a->view.data - a->pages);
    return d;
}

static void from_device(device_array *d, array *a)
{
    if (a != NULL) {
        CHECK_INT(cudaMemcpy(a->pages, d->memory, d->size, FROM_DEVICE), 0);
    }
    CHECK_INT(cudaFree(d->memory), 0);
}

/* Weights and outputs are rounded to the type of the values and of the output. */
static double tolerance(const problem_dtypes *dtypes)
{
    hyperattn_dtype coarsest = dtypes->q == dtypes->kv ? dtypes->kv : HYPERATTN_DTYPE_F32;
    return coarsest == HYPERATTN_DTYPE_F32 ? 2e-5 : coarsest == HYPERATTN_DTYPE_F16 ? 2e-3 : 1.5e-2;
}

enum { OWN_MEMORY = 1, DEFAULT_STREAM = 2 };

static void run_case(const problem_shape *s, const problem_dtypes *dtypes, array_layout layout, hyperattn_mask mask,
                     int how, random_source *source)
{
    check_case("b%d h%d/%d n_q %d n_k %d d %d d_v %d %s %s->%s layout %d mask %s how %d", (int)s->batch,
               (int)s->heads_q, (int)s->heads_kv, (int)s->n_q, (int)s->n_k, (int)s->d, (int)s->d_v, dtype_name(dtypes->q),
               dtype_name(dtypes->kv), dtype_name(dtypes->out), (int)layout, mask_name(mask), how);
    problem p = problem_create_mixed(s, *dtypes, layout, source);
    problem_want_error(&p);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, mask);
    reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);

    array *host[] = {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.error};
    hyperattn_tensors tensors = p.tensors;
    hyperattn_tensor *views[] = {&tensors.q, &tensors.k, &tensors.v, &tensors.out, &tensors.lse, &tensors.error};
    device_array device[6];
    for (int i = 0; i < 6; i += 1) {
        device[i] = to_device(host[i]);
        *views[i] = device[i].view;
    }
    hyperattn_cuda_exec exec;
    memset(&exec, 0, sizeof exec);
    exec.struct_size = sizeof exec;
    if (!(how & DEFAULT_STREAM)) {
        CHECK_INT(cudaStreamCreate(&exec.stream), 0);
    }
    if (!(how & OWN_MEMORY)) {
        hyperattn_layout need = {0, 0};
        CHECK_OK(hyperattn_cuda_forward_workspace(&params, &tensors, &need));
        CHECK_INT(cudaMalloc(&exec.workspace.data, need.size), 0);
        exec.workspace.size = need.size;
        params.flags = HYPERATTN_FLAG_NO_ALLOC;
    }
    CHECK_OK(hyperattn_cuda_forward(&params, &tensors, how == (OWN_MEMORY | DEFAULT_STREAM) ? NULL : &exec));
    CHECK_INT(cudaStreamSynchronize(exec.stream), 0);
    if (exec.workspace.data != NULL) {
        CHECK_INT(cudaFree(exec.workspace.data), 0);
    }
    if (exec.stream != NULL) {
        CHECK_INT(cudaStreamDestroy(exec.stream), 0);
    }
    for (int i = 0; i < 6; i += 1) {
        from_device(&device[i], i < 3 ? NULL : host[i]);
    }

    CHECK_BELOW(reference_error(&r, &p.out.view), tolerance(dtypes));
    for (int64_t row = 0, b = 0; b < s->batch; b += 1) {
        for (int64_t h = 0; h < s->heads_q; h += 1) {
            CHECK(tensor_get(&p.error.view, b, h, 0, 0) == 0.0);
            for (int64_t i = 0; i < s->n_q; i += 1, row += 1) {
                CHECK_NEAR(tensor_get(&p.lse.view, b, h, i, 0), r.lse[row], 3e-5 * fmax(1.0, fabs(r.lse[row])));
            }
        }
    }
    CHECK(array_changed_outside(&p.out) == 0 && array_changed_outside(&p.lse) == 0);
    reference_destroy(&r);
    problem_destroy(&p);
}

static void sweep(random_source *source)
{
    static const problem_shape shapes[] = {
        /* batch, heads_q, heads_kv, n_q, n_k, d, d_v */
        {1, 1, 1, 1, 1, 64, 64},      {1, 2, 1, 64, 64, 64, 64},    {2, 2, 2, 127, 127, 128, 128},
        {1, 1, 1, 251, 251, 80, 80},  {2, 6, 2, 61, 61, 96, 64},    {1, 6, 2, 97, 13, 64, 192},
        {2, 2, 1, 5, 0, 64, 64},      {1, 4, 4, 65, 33, 256, 3},    {1, 2, 1, 509, 503, 64, 64},
        {1, 1, 1, 300, 700, 256, 256}, {1, 2, 2, 300, 2, 16, 8},
    };
    int turn = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += 1) {
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            for (int t = 0; t < LEGAL_DTYPES; t += 1) {
                run_case(&shapes[s], &legal_dtypes[t], (array_layout)(turn % ARRAY_LAYOUTS), mask, turn % 3, source);
                turn += 1;
            }
        }
    }
    run_case(&shapes[1], &legal_dtypes[2], ARRAY_BHSD, HYPERATTN_MASK_NONE, OWN_MEMORY | DEFAULT_STREAM, source);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("cuda_runtime", argc, argv)};
    int count = 0;
    if (cudaGetDeviceCount(&count) != 0 || count == 0) {
        printf("SKIPPED: no CUDA device\n");
        return 0;
    }
    sweep(&source);
    return check_finish();
}
