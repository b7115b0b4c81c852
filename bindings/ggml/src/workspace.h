// Scratch memory that is kept between calls.
#ifndef GGML_HYPERATTN_WORKSPACE_H
#define GGML_HYPERATTN_WORKSPACE_H

#include <hyperattn/hyperattn.h>

#include <cstdlib>

class workspace {
public:
    workspace() = default;
    workspace(const workspace &) = delete;
    workspace &operator=(const workspace &) = delete;
    ~workspace() { std::free(memory_.data); }

    // At least as much as layout asks for; {NULL, 0} where there is no memory. What it held before is lost.
    hyperattn_buffer reserve(const hyperattn_layout &layout)
    {
        if (layout.size > memory_.size || layout.align > align_) {
            std::free(memory_.data);
            // A key-value cache grows call by call; the memory shall not.
            const size_t wanted = layout.size + layout.size / 4;
            const size_t size = (wanted + layout.align - 1) / layout.align * layout.align;
            memory_.data = std::aligned_alloc(layout.align, size);
            memory_.size = memory_.data ? size : 0;
            align_ = layout.align;
        }
        return memory_;
    }

private:
    hyperattn_buffer memory_ = {};
    size_t align_ = 0;
};

#endif
