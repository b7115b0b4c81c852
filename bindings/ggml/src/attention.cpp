#include "attention.h"
#include "mask.h"

#include "ggml-impl.h"

#include <cmath>
#include <cstring>

namespace {

// The parameters of the operation, as ggml_flash_attn_ext stores them.
struct operation {
    float scale;
    float max_bias;
    float logit_softcap;
};

operation operation_of(const ggml_tensor *node)
{
    operation op;
    static_assert(sizeof op <= sizeof node->op_params);
    std::memcpy(&op, node->op_params, sizeof op);
    return op;
}

// 0 for a type that hyperattn does not have.
hyperattn_dtype dtype_of(ggml_type type)
{
    switch (type) {
    case GGML_TYPE_F32:
        return HYPERATTN_DTYPE_F32;
    case GGML_TYPE_F16:
        return HYPERATTN_DTYPE_F16;
    case GGML_TYPE_BF16:
        return HYPERATTN_DTYPE_BF16;
    default:
        return 0;
    }
}

// Rows of up to 256 elements side by side, every stride a whole number of elements.
bool readable(const ggml_tensor *tensor)
{
    const size_t size = ggml_type_size(tensor->type);
    if (dtype_of(tensor->type) == 0 || tensor->ne[0] > 256 || tensor->nb[0] != size)
        return false;
    return tensor->nb[1] % size == 0 && tensor->nb[2] % size == 0 && tensor->nb[3] % size == 0;
}

// One sequence stream of a tensor whose dimensions from the fastest are given by their numbers in ggml.
hyperattn_tensor stream_view(const ggml_tensor *tensor, int64_t stream, int rows, int heads)
{
    const int64_t size = static_cast<int64_t>(ggml_type_size(tensor->type));
    hyperattn_tensor view = {};
    view.data = static_cast<char *>(tensor->data) + stream * tensor->nb[3];
    view.dtype = dtype_of(tensor->type);
    const int64_t shape[4] = {1, tensor->ne[heads], tensor->ne[rows], tensor->ne[0]};
    const int64_t stride[4] = {0, static_cast<int64_t>(tensor->nb[heads]) / size,
                               static_cast<int64_t>(tensor->nb[rows]) / size, 1};
    std::memcpy(view.shape, shape, sizeof shape);
    std::memcpy(view.stride, stride, sizeof stride);
    return view;
}

// The rows first .. first + count.
hyperattn_tensor rows_of(hyperattn_tensor view, int64_t first, int64_t count)
{
    const int64_t size = view.dtype == HYPERATTN_DTYPE_F32 ? 4 : 2;
    view.data = static_cast<char *>(view.data) + first * view.stride[2] * size;
    view.shape[2] = count;
    return view;
}

visible_keys visible_of(const ggml_tensor *mask, int64_t stream, int64_t queries, int64_t keys)
{
    if (mask == nullptr)
        return {mask_pattern::none, 0, keys};
    const char *entries = static_cast<const char *>(mask->data) + stream % mask->ne[3] * mask->nb[3];
    return recognise_mask(reinterpret_cast<const uint16_t *>(entries), queries, keys,
                          static_cast<int64_t>(mask->nb[1] / sizeof(uint16_t)));
}

// The entries of the visible keys, for all heads.
hyperattn_tensor mask_view(const ggml_tensor *mask, int64_t stream, int64_t queries, const visible_keys &visible)
{
    hyperattn_tensor view = {};
    view.data = static_cast<char *>(mask->data) + stream % mask->ne[3] * mask->nb[3] +
                static_cast<size_t>(visible.first_key) * sizeof(uint16_t);
    view.dtype = HYPERATTN_DTYPE_F16;
    const int64_t shape[4] = {1, 1, queries, visible.keys};
    const int64_t stride[4] = {0, 0, static_cast<int64_t>(mask->nb[1] / sizeof(uint16_t)), 1};
    std::memcpy(view.shape, shape, sizeof shape);
    std::memcpy(view.stride, stride, sizeof stride);
    return view;
}

hyperattn_status forward(const hyperattn_params &params, const hyperattn_tensors &tensors, uint32_t num_threads,
                         workspace &memory)
{
    // Where there is no memory to keep, hyperattn asks for some itself, and says so when it gets none.
    hyperattn_cpu_exec exec = {};
    exec.struct_size = sizeof exec;
    exec.num_threads = num_threads;
    hyperattn_layout need = {};
    const hyperattn_status status = hyperattn_forward_workspace(&params, &tensors, &exec, &need);
    if (status != HYPERATTN_STATUS_OK)
        return status;
    exec.workspace = memory.reserve(need);
    return hyperattn_forward(&params, &tensors, &exec);
}

hyperattn_status compute_stream(const ggml_tensor *node, int64_t stream, hyperattn_params params, uint32_t num_threads,
                                workspace &memory)
{
    const ggml_tensor *mask = node->src[3];
    hyperattn_tensors tensors = {};
    tensors.struct_size = sizeof tensors;
    tensors.q = stream_view(node->src[0], stream, 1, 2);
    tensors.out = stream_view(node, stream, 2, 1);
    const int64_t queries = tensors.q.shape[2];
    const visible_keys visible = visible_of(mask, stream, queries, node->src[1]->ne[1]);
    tensors.k = rows_of(stream_view(node->src[1], stream, 1, 2), visible.first_key, visible.keys);
    tensors.v = rows_of(stream_view(node->src[2], stream, 1, 2), visible.first_key, visible.keys);
    switch (visible.pattern) {
    case mask_pattern::none:
        params.mask = HYPERATTN_MASK_NONE;
        break;
    case mask_pattern::causal:
        params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
        break;
    case mask_pattern::other:
        params.method = HYPERATTN_METHOD_EXACT;
        params.mask = HYPERATTN_MASK_NONE;
        tensors.mask = mask_view(mask, stream, queries, visible);
        break;
    }
    return forward(params, tensors, num_threads, memory);
}

} // namespace

bool attention_supports(const ggml_tensor *node)
{
    if (node->op != GGML_OP_FLASH_ATTN_EXT)
        return false;
    const ggml_tensor *q = node->src[0];
    const ggml_tensor *k = node->src[1];
    const ggml_tensor *v = node->src[2];
    const ggml_tensor *mask = node->src[3];
    const ggml_tensor *sinks = node->src[4];
    const operation op = operation_of(node);
    if (op.max_bias != 0 || op.logit_softcap != 0 || sinks != nullptr)
        return false;
    // hyperattn takes 0 for 1/sqrt(head_dim).
    if (op.scale == 0 || !std::isfinite(op.scale))
        return false;
    if (q->type != GGML_TYPE_F32 || k->type != v->type || !readable(q) || !readable(k) || !readable(v) || !readable(node))
        return false;
    if (q->ne[1] < LEAST_QUERIES || k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] != 0)
        return false;
    if (k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3])
        return false;
    // One mask for all heads, as everybody makes them; ggml itself asks for f16.
    return mask == nullptr || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->ne[0] >= k->ne[1] &&
                               mask->ne[1] >= q->ne[1] && mask->nb[0] == sizeof(uint16_t));
}

ggml_status attention_compute(const ggml_tensor *node, const hyperattn_params &params, uint32_t num_threads,
                              workspace &memory)
{
    hyperattn_params own = params;
    own.scale = operation_of(node).scale;
    for (int64_t stream = 0; stream < node->ne[3]; ++stream) {
        const hyperattn_status status = compute_stream(node, stream, own, num_threads, memory);
        if (status != HYPERATTN_STATUS_OK) {
            GGML_LOG_ERROR("hyperattn: %s: %s: %s\n", node->name, hyperattn_status_string(status), hyperattn_last_error());
            return status == HYPERATTN_STATUS_OUT_OF_MEMORY ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}
