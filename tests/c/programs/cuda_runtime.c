/* hyperattn_cuda_forward as a program of the CUDA runtime calls it: memory from cudaMalloc, a stream, or none. Against
 * loops in double precision. Then plans, run and captured in a graph, against the call. Linked with the runtime, so
 * cuda/pack.sh builds it and not the tests here; prints SKIPPED where there is no device. */
#include <hyperattn/hyperattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "reference.h"

/* What is used of cuda_runtime_api.h, whose folder need not be known here. */
struct CUgraph_st;
struct CUgraphExec_st;
int cudaGetDeviceCount(int *count);
int cudaMalloc(void **memory, size_t size);
int cudaFree(void *memory);
int cudaMemcpy(void *to, const void *from, size_t size, int kind);
int cudaMemset(void *memory, int byte, size_t size);
int cudaStreamCreate(struct CUstream_st **stream);
int cudaStreamSynchronize(struct CUstream_st *stream);
int cudaStreamDestroy(struct CUstream_st *stream);
int cudaStreamBeginCapture(struct CUstream_st *stream, int mode);
int cudaStreamEndCapture(struct CUstream_st *stream, struct CUgraph_st **graph);
int cudaGraphInstantiateWithFlags(struct CUgraphExec_st **executable, struct CUgraph_st *graph,
                                  unsigned long long flags);
int cudaGraphLaunch(struct CUgraphExec_st *executable, struct CUstream_st *stream);
int cudaGraphExecDestroy(struct CUgraphExec_st *executable);
int cudaGraphDestroy(struct CUgraph_st *graph);
enum { TO_DEVICE = 1, FROM_DEVICE = 2, CAPTURE_GLOBAL = 0 };

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

/* Poisons the outputs, which are arrays 3 to 5 of a problem, on the device. */
static void poison_outputs(device_array *device)
{
    for (int i = 3; i < 6; i += 1) {
        CHECK_INT(cudaMemset(device[i].memory, 0xff, device[i].size), 0);
    }
}

/* The outputs must be `host`'s, bit by bit. */
static void expect_outputs(const device_array *device, array *const *host)
{
    for (int i = 3; i < 6; i += 1) {
        unsigned char *bytes = (unsigned char *)malloc(device[i].size);
        CHECK(bytes != NULL);
        if (bytes == NULL) {
            return;
        }
        CHECK_INT(cudaMemcpy(bytes, device[i].memory, device[i].size, FROM_DEVICE), 0);
        CHECK_BYTES(bytes, host[i]->pages, device[i].size);
        free(bytes);
    }
}

/* A plan is made from shapes alone, run, captured in a graph, and gone before the graph runs. */
static void plan_case(hyperattn_method method, hyperattn_mask mask, const problem_dtypes *dtypes, random_source *source)
{
    static const problem_shape shape = {1, 4, 2, 700, 800, 64, 64};
    check_case("plan, method %d mask %s %s", (int)method, mask_name(mask), dtype_name(dtypes->q));
    problem p = problem_create_mixed(&shape, *dtypes, ARRAY_BHSD, source);
    problem_want_error(&p);
    hyperattn_params params = problem_params(method, mask);
    params.min_seq_len = 100;
    params.block_size = 64;
    params.sample_size = 48;
    params.budget = 128;
    params.band = 32;
    params.flags = HYPERATTN_FLAG_NO_ALLOC;

    array *host[] = {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.error};
    hyperattn_tensors tensors = p.tensors, shapes;
    hyperattn_tensor *views[] = {&tensors.q, &tensors.k, &tensors.v, &tensors.out, &tensors.lse, &tensors.error};
    device_array device[6];
    for (int i = 0; i < 6; i += 1) {
        device[i] = to_device(host[i]);
        *views[i] = device[i].view;
    }
    shapes = tensors;
    shapes.q.data = shapes.k.data = shapes.v.data = shapes.out.data = shapes.lse.data = shapes.error.data = NULL;
    hyperattn_cuda_exec exec;
    memset(&exec, 0, sizeof exec);
    exec.struct_size = sizeof exec;
    CHECK_INT(cudaStreamCreate(&exec.stream), 0);
    hyperattn_layout need = {0, 0}, planned = {0, 0};
    CHECK_OK(hyperattn_cuda_forward_workspace(&params, &tensors, &need));
    CHECK_INT(cudaMalloc(&exec.workspace.data, need.size), 0);
    exec.workspace.size = need.size;

    CHECK_OK(hyperattn_cuda_forward(&params, &tensors, &exec));
    CHECK_INT(cudaStreamSynchronize(exec.stream), 0);
    for (int i = 3; i < 6; i += 1) {
        CHECK_INT(cudaMemcpy(host[i]->pages, device[i].memory, device[i].size, FROM_DEVICE), 0);
        CHECK(!array_untouched(host[i]));
    }

    hyperattn_cuda_plan *plan = NULL;
    CHECK_OK(hyperattn_cuda_plan_create(&params, &shapes, &plan));
    CHECK_OK(hyperattn_cuda_plan_workspace(plan, &planned));
    CHECK_INT(planned.size, need.size);
    CHECK_INT(planned.align, need.align);
    poison_outputs(device);
    CHECK_OK(hyperattn_cuda_plan_run(plan, &tensors, &exec));
    CHECK_INT(cudaStreamSynchronize(exec.stream), 0);
    expect_outputs(device, host);

    struct CUgraph_st *graph = NULL;
    struct CUgraphExec_st *executable = NULL;
    CHECK_INT(cudaStreamBeginCapture(exec.stream, CAPTURE_GLOBAL), 0);
    CHECK_OK(hyperattn_cuda_plan_run(plan, &tensors, &exec));
    CHECK_INT(cudaStreamEndCapture(exec.stream, &graph), 0);
    hyperattn_cuda_plan_destroy(plan);
    CHECK_INT(cudaGraphInstantiateWithFlags(&executable, graph, 0), 0);
    CHECK_INT(cudaGraphDestroy(graph), 0);
    for (int turn = 0; turn < 2; turn += 1) {
        poison_outputs(device);
        CHECK_INT(cudaGraphLaunch(executable, exec.stream), 0);
        CHECK_INT(cudaStreamSynchronize(exec.stream), 0);
        expect_outputs(device, host);
    }

    CHECK_INT(cudaGraphExecDestroy(executable), 0);
    CHECK_INT(cudaFree(exec.workspace.data), 0);
    CHECK_INT(cudaStreamDestroy(exec.stream), 0);
    for (int i = 0; i < 6; i += 1) {
        from_device(&device[i], NULL);
    }
    problem_destroy(&p);
}

static void plans(random_source *source)
{
    static const hyperattn_method methods[] = {HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_REFINED,
                                               HYPERATTN_METHOD_AUTO};
    static const problem_dtypes dtypes[] = {
        {HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16},
        {HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32},
    };
    for (int method = 0; method < 4; method += 1) {
        for (int t = 0; t < 2; t += 1) {
            plan_case(methods[method], HYPERATTN_MASK_NONE, &dtypes[t], source);
            plan_case(methods[method], HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, &dtypes[t], source);
        }
    }
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
    plans(&source);
    return check_finish();
}
