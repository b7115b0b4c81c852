/* Eight threads call at once on data of their own; each has its own last error. */
#define _POSIX_C_SOURCE 200809L
#include <hyperattn/hyperattn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"

enum { THREADS = 8, ROUNDS = 6 };

typedef struct job {
    problem p;
    hyperattn_params params;
    array expected_out, expected_lse;
    uint32_t index;
    int32_t last_status;
    unsigned different, wrong_errors;
    char error[512];
} job;

static pthread_barrier_t barrier;

/* Eight different shapes, methods and numbers of threads. */
static void job_create(job *j, uint32_t index, random_source *source)
{
    const problem_shape shape = {1 + index % 2, 4, 2, 150 + 13 * index, 200 + 7 * index, 64, 32 + 8 * index};
    hyperattn_dtype dtype = HYPERATTN_DTYPE_F32 + index % 3;
    memset(j, 0, sizeof *j);
    j->index = index;
    j->p = problem_create(&shape, dtype, dtype, (array_layout)(index % 3), source);
    static const hyperattn_method methods[] = {HYPERATTN_METHOD_EXACT, HYPERATTN_METHOD_PAPER, HYPERATTN_METHOD_REFINED};
    j->params = problem_params(methods[index % 3], index / 2 % 3);
    j->params.residual = index / 3 % 3;
    j->params.min_seq_len = 40;
    j->params.block_size = 32;
    j->params.sample_size = 32;
    j->params.budget = 64;
    j->params.band = 16;
    j->params.target_error = index < 4 ? 0.0f : 0.5f;
    j->params.seed = index;
    j->expected_out = array_create(dtype, ARRAY_BHSD, shape.batch, 4, shape.n_q, shape.d_v);
    j->expected_lse = array_create(HYPERATTN_DTYPE_F32, ARRAY_BHSD, shape.batch, 4, shape.n_q, 1);

    check_case("serial run %u", index);
    hyperattn_tensors tensors = j->p.tensors;
    tensors.out = j->expected_out.view;
    tensors.lse = j->expected_lse.view;
    hyperattn_cpu_exec exec = problem_exec(1);
    CHECK_OK(hyperattn_forward(&j->params, &tensors, &exec));
}

static void job_destroy(job *j)
{
    problem_destroy(&j->p);
    array_destroy(&j->expected_out);
    array_destroy(&j->expected_lse);
}

/* Runs on its own thread; the results are checked on the main one. */
static void *job_main(void *context)
{
    job *j = (job *)context;
    pthread_barrier_wait(&barrier);
    for (uint32_t round = 0; round < ROUNDS; round += 1) {
        problem_poison_outputs(&j->p);
        /* 1, 2, 3 and all threads: calls share the library's threads with one another. */
        hyperattn_cpu_exec exec = problem_exec((j->index + round) % 4);
        j->last_status |= hyperattn_forward(&j->params, &j->p.tensors, &exec);
        j->different += !tensor_same_bits(&j->p.out.view, &j->expected_out.view);
        j->different += !tensor_same_bits(&j->p.lse.view, &j->expected_lse.view);
    }
    /* Every thread fails with its own value, waits until all have failed, then reads its sentence. */
    hyperattn_params bad = j->params;
    bad.lsh_num_projs = 1000 + j->index;
    bad.method = HYPERATTN_METHOD_PAPER;
    j->wrong_errors += hyperattn_forward(&bad, &j->p.tensors, NULL) != HYPERATTN_STATUS_INVALID_ARGUMENT;
    pthread_barrier_wait(&barrier);
    snprintf(j->error, sizeof j->error, "%s", hyperattn_last_error());
    pthread_barrier_wait(&barrier);
    return NULL;
}

int main(int argc, char **argv)
{
    random_source source = {check_start("concurrency", argc, argv)};
    static job jobs[THREADS];
    pthread_t threads[THREADS];
    for (uint32_t i = 0; i < THREADS; i += 1) {
        job_create(&jobs[i], i, &source);
    }
    check_case("last error of the main thread");
    CHECK_STATUS(hyperattn_forward(NULL, &jobs[0].p.tensors, NULL), HYPERATTN_STATUS_INVALID_ARGUMENT);
    char before[512];
    snprintf(before, sizeof before, "%s", hyperattn_last_error());

    pthread_barrier_init(&barrier, NULL, THREADS);
    for (uint32_t i = 0; i < THREADS; i += 1) {
        if (pthread_create(&threads[i], NULL, job_main, &jobs[i]) != 0) {
            perror("pthread_create");
            return 1;
        }
    }
    for (uint32_t i = 0; i < THREADS; i += 1) {
        pthread_join(threads[i], NULL);
    }
    pthread_barrier_destroy(&barrier);

    CHECK(strcmp(before, hyperattn_last_error()) == 0);
    for (uint32_t i = 0; i < THREADS; i += 1) {
        check_case("thread %u", i);
        CHECK_STATUS(jobs[i].last_status, HYPERATTN_STATUS_OK);
        CHECK_INT(jobs[i].different, 0);
        CHECK_INT(jobs[i].wrong_errors, 0);
        char value[16];
        snprintf(value, sizeof value, "%u", 1000 + i);
        CHECK_CONTAINS(jobs[i].error, "lsh_num_projs");
        CHECK_CONTAINS(jobs[i].error, value);
        job_destroy(&jobs[i]);
    }
    return check_finish();
}
