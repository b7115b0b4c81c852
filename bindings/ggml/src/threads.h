// The threads that hyperattn runs on.
#ifndef GGML_HYPERATTN_THREADS_H
#define GGML_HYPERATTN_THREADS_H

#include <hyperattn/hyperattn.h>

// As many threads as the program has asked for. With OpenMP they are those that ggml's CPU backend runs on when the
// same thread calls: other threads would compete for the cores with these, which wait for their next work by spinning
// for some milliseconds. Without OpenMP they are hyperattn's own.
class threads {
public:
    threads();
    threads(const threads &) = delete;
    threads &operator=(const threads &) = delete;

    // At least one.
    void set_count(int count);

    // Refers to this object.
    hyperattn_cpu_exec exec() const;

private:
    uint32_t count_;
#ifdef _OPENMP
    hyperattn_threadpool pool_ = {};
#endif
};

#endif
