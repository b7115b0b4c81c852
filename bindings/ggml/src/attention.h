// GGML_OP_FLASH_ATTN_EXT by hyperattn.
#ifndef GGML_HYPERATTN_ATTENTION_H
#define GGML_HYPERATTN_ATTENTION_H

#include "threads.h"
#include "workspace.h"

#include "ggml.h"

#include <hyperattn/hyperattn.h>

// What is kept from call to call.
struct attention_memory {
    workspace scratch;
    workspace lse;
};

// Whether attention_compute can compute the node. Looks at types, shapes and parameters only: there may be no data yet.
bool attention_supports(const ggml_tensor *node);

// Computes a node that attention_supports. Says what went wrong in ggml's log.
ggml_status attention_compute(const ggml_tensor *node, const hyperattn_params &params, const threads &team,
                              attention_memory &memory);

#endif
