#define _POSIX_C_SOURCE 200809L
#include "pool.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 64 };

struct worker_pool {
    pthread_t workers[MAX_THREADS];
    uint32_t threads;
    pthread_mutex_t caller; /* one parallel_for at a time */
    pthread_mutex_t lock;   /* guards everything below */
    pthread_cond_t work_ready, work_done;
    void (*task)(void *task_context, size_t index);
    void *task_context;
    size_t next, count, running;
    unsigned long tasks;
    bool stop;
};

/* Runs tasks until none is left to start. The lock is held on entry and on return. */
static void run_tasks(worker_pool *pool)
{
    while (pool->next < pool->count) {
        size_t index = pool->next;
        pool->next += 1;
        pool->running += 1;
        pool->tasks += 1;
        pthread_mutex_unlock(&pool->lock);
        pool->task(pool->task_context, index);
        pthread_mutex_lock(&pool->lock);
        pool->running -= 1;
    }
    if (pool->running == 0) {
        pthread_cond_broadcast(&pool->work_done);
    }
}

static void *worker_main(void *context)
{
    worker_pool *pool = (worker_pool *)context;
    pthread_mutex_lock(&pool->lock);
    while (!pool->stop) {
        if (pool->next < pool->count) {
            run_tasks(pool);
        } else {
            pthread_cond_wait(&pool->work_ready, &pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

worker_pool *worker_pool_create(uint32_t threads)
{
    worker_pool *pool = (worker_pool *)calloc(1, sizeof *pool);
    if (pool == NULL || threads == 0 || threads > MAX_THREADS) {
        exit(EXIT_FAILURE);
    }
    pool->threads = threads;
    pthread_mutex_init(&pool->caller, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work_ready, NULL);
    pthread_cond_init(&pool->work_done, NULL);
    for (uint32_t i = 1; i < threads; i += 1) {
        if (pthread_create(&pool->workers[i], NULL, worker_main, pool) != 0) {
            exit(EXIT_FAILURE);
        }
    }
    return pool;
}

void worker_pool_destroy(worker_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work_ready);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 1; i < pool->threads; i += 1) {
        pthread_join(pool->workers[i], NULL);
    }
    pthread_cond_destroy(&pool->work_done);
    pthread_cond_destroy(&pool->work_ready);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->caller);
    free(pool);
}

static uint32_t worker_pool_num_threads(void *context)
{
    return ((worker_pool *)context)->threads;
}

static void worker_pool_parallel_for(void *context, size_t count, void (*task)(void *, size_t), void *task_context)
{
    worker_pool *pool = (worker_pool *)context;
    pthread_mutex_lock(&pool->caller);
    pthread_mutex_lock(&pool->lock);
    pool->task = task;
    pool->task_context = task_context;
    pool->next = 0;
    pool->count = count;
    pthread_cond_broadcast(&pool->work_ready);
    run_tasks(pool);
    while (pool->running > 0) {
        pthread_cond_wait(&pool->work_done, &pool->lock);
    }
    pool->count = 0;
    pool->next = 0;
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->caller);
}

hyperattn_threadpool worker_pool_interface(worker_pool *pool)
{
    hyperattn_threadpool interface;
    memset(&interface, 0, sizeof interface);
    interface.struct_size = sizeof interface;
    interface.ctx = pool;
    interface.num_threads = worker_pool_num_threads;
    interface.parallel_for = worker_pool_parallel_for;
    return interface;
}

unsigned long worker_pool_tasks(worker_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    unsigned long tasks = pool->tasks;
    pthread_mutex_unlock(&pool->lock);
    return tasks;
}

static uint32_t reverse_pool_num_threads(void *context)
{
    return ((reverse_pool *)context)->threads;
}

static void reverse_pool_parallel_for(void *context, size_t count, void (*task)(void *, size_t), void *task_context)
{
    reverse_pool *pool = (reverse_pool *)context;
    for (size_t i = count; i > 0; i -= 1) {
        pool->tasks += 1;
        task(task_context, i - 1);
    }
}

hyperattn_threadpool reverse_pool_interface(reverse_pool *pool)
{
    hyperattn_threadpool interface;
    memset(&interface, 0, sizeof interface);
    interface.struct_size = sizeof interface;
    interface.ctx = pool;
    interface.num_threads = reverse_pool_num_threads;
    interface.parallel_for = reverse_pool_parallel_for;
    return interface;
}
