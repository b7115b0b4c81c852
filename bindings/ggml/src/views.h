// ggml's tensors as hyperattn's: the same memory, with dimensions named from the slowest and strides in elements.
#ifndef GGML_HYPERATTN_VIEWS_H
#define GGML_HYPERATTN_VIEWS_H

#include "ggml.h"

#include <hyperattn/hyperattn.h>

// hyperattn's limit.
constexpr int64_t LARGEST_HEAD_DIM = 256;

// Whether hyperattn has the type, rows are side by side and short enough, and strides are whole elements.
bool is_viewable(const ggml_tensor *tensor);

// One sequence stream of a tensor, [1, heads, tokens, head_dim]. tokens and heads are the numbers that these dimensions
// have in ggml.
hyperattn_tensor stream_view(const ggml_tensor *tensor, int64_t stream, int tokens, int heads);

// The tokens first .. first + count of a view.
hyperattn_tensor tokens_of(hyperattn_tensor view, int64_t first, int64_t count);

#endif
