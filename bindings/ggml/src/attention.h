// GGML_OP_FLASH_ATTN_EXT by hyperattn.
#ifndef GGML_HYPERATTN_ATTENTION_H
#define GGML_HYPERATTN_ATTENTION_H

#include "workspace.h"

#include "ggml.h"

#include <hyperattn/hyperattn.h>

// Queries that a node must have to be taken. llama.cpp decides with a node of one query for each sequence whether its own
// flash attention is in use, and there the CPU backend must have it.
constexpr int64_t LEAST_QUERIES = 64;

// Whether attention_compute can compute the node. Looks at types, shapes and parameters only: there may be no data yet.
bool attention_supports(const ggml_tensor *node);

// Computes a node that attention_supports. Says what went wrong in ggml's log.
ggml_status attention_compute(const ggml_tensor *node, const hyperattn_params &params, uint32_t num_threads,
                              workspace &memory);

#endif
