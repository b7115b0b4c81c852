/* Thread pools as an engine would bring them. */
#ifndef POOL_H
#define POOL_H

#include <hyperattn/hyperattn.h>

typedef struct worker_pool worker_pool;

/* A pool of `threads` POSIX threads, the caller's own among them; parallel_for allocates nothing. */
worker_pool *worker_pool_create(uint32_t threads);
void worker_pool_destroy(worker_pool *pool);
hyperattn_threadpool worker_pool_interface(worker_pool *pool);
/* Tasks run since the pool was created. */
unsigned long worker_pool_tasks(worker_pool *pool);

/* Says that it has `threads` threads (counted in *tasks), but runs every task on the calling thread, last first. */
typedef struct reverse_pool {
    uint32_t threads;
    unsigned long tasks;
} reverse_pool;
hyperattn_threadpool reverse_pool_interface(reverse_pool *pool);

#endif
