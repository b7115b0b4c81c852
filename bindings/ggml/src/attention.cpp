#include "attention.h"
#include "mask.h"
#include "views.h"

#include "ggml-impl.h"

#include <cmath>
#include <cstring>

namespace {

// Queries that a node must have to be taken. llama.cpp decides with a node of one query for each sequence whether its
// own flash attention is in use, and there the CPU backend must have it.
constexpr int64_t LEAST_QUERIES = 64;

// The sources of a node, as ggml_flash_attn_ext numbers them.
enum { QUERY, KEY, VALUE, MASK, SINKS };

// The parameters of a node, as ggml_flash_attn_ext stores them.
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

visible_keys visible_of(const ggml_tensor *mask, int64_t stream, int64_t queries, int64_t keys)
{
    if (mask == nullptr)
        return {mask_pattern::none, 0, keys};
    const hyperattn_tensor view = stream_view(mask, stream % mask->ne[3], 1, 2);
    return recognise_mask(static_cast<const uint16_t *>(view.data), queries, keys, view.stride[2]);
}

// The entries of the keys that some query sees, [1, 1, queries, keys]: all heads have the same.
hyperattn_tensor mask_view(const ggml_tensor *mask, int64_t stream, int64_t queries, const visible_keys &visible)
{
    hyperattn_tensor view = stream_view(mask, stream % mask->ne[3], 1, 2);
    view.data = static_cast<uint16_t *>(view.data) + visible.first_key;
    view.shape[2] = queries;
    view.shape[3] = visible.keys;
    return view;
}

// One number for each head and query, in memory that is kept; data is NULL where there is none.
hyperattn_tensor lse_view(const hyperattn_tensor &out, workspace &memory)
{
    const int64_t heads = out.shape[1];
    const int64_t queries = out.shape[2];
    const hyperattn_buffer buffer = memory.reserve({static_cast<size_t>(heads * queries) * sizeof(float), 64});
    return hyperattn_tensor_bhsd(buffer.data, HYPERATTN_DTYPE_F32, 1, heads, queries, 1);
}

// A sink is the logit of one more key, whose value is 0: attention over that key alone, to be joined to the rest.
hyperattn_status join_sinks(const ggml_tensor *sinks, const hyperattn_tensor &out, const hyperattn_tensor &lse)
{
    static const float zeros[LARGEST_HEAD_DIM] = {};
    // The zeros are those of all rows, and a head's sink is that of all its queries.
    const int64_t heads = out.shape[1];
    hyperattn_tensor sink_out = hyperattn_tensor_bhsd(zeros, HYPERATTN_DTYPE_F32, 1, heads, out.shape[2], out.shape[3]);
    sink_out.stride[0] = sink_out.stride[1] = sink_out.stride[2] = 0;
    hyperattn_tensor sink_lse = hyperattn_tensor_bhsd(sinks->data, HYPERATTN_DTYPE_F32, 1, heads, out.shape[2], 1);
    sink_lse.stride[1] = 1;
    sink_lse.stride[2] = 0;
    return hyperattn_merge(&out, &lse, &sink_out, &sink_lse);
}

hyperattn_status forward(const hyperattn_params &params, const hyperattn_tensors &tensors, const threads &team,
                         workspace &memory)
{
    hyperattn_cpu_exec exec = team.exec();
    hyperattn_layout need = {};
    const hyperattn_status status = hyperattn_forward_workspace(&params, &tensors, &exec, &need);
    if (status != HYPERATTN_STATUS_OK)
        return status;
    // Where there is no memory to keep, hyperattn asks for some itself, and says so when it gets none.
    exec.workspace = memory.reserve(need);
    return hyperattn_forward(&params, &tensors, &exec);
}

hyperattn_status compute_stream(const ggml_tensor *node, int64_t stream, hyperattn_params params, const threads &team,
                                attention_memory &memory)
{
    const ggml_tensor *mask = node->src[MASK];
    const ggml_tensor *sinks = node->src[SINKS];
    const int64_t queries = node->src[QUERY]->ne[1];
    const visible_keys visible = visible_of(mask, stream, queries, node->src[KEY]->ne[1]);
    hyperattn_tensors tensors = {};
    tensors.struct_size = sizeof tensors;
    tensors.q = stream_view(node->src[QUERY], stream, 1, 2);
    tensors.k = tokens_of(stream_view(node->src[KEY], stream, 1, 2), visible.first_key, visible.keys);
    tensors.v = tokens_of(stream_view(node->src[VALUE], stream, 1, 2), visible.first_key, visible.keys);
    tensors.out = stream_view(node, stream, 2, 1);
    if (sinks)
        tensors.lse = lse_view(tensors.out, memory.lse);
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
    const hyperattn_status status = forward(params, tensors, team, memory.scratch);
    return status == HYPERATTN_STATUS_OK && sinks ? join_sinks(sinks, tensors.out, tensors.lse) : status;
}

} // namespace

bool attention_supports(const ggml_tensor *node)
{
    if (node->op != GGML_OP_FLASH_ATTN_EXT)
        return false;
    const ggml_tensor *q = node->src[QUERY];
    const ggml_tensor *k = node->src[KEY];
    const ggml_tensor *v = node->src[VALUE];
    const ggml_tensor *mask = node->src[MASK];
    const operation op = operation_of(node);
    if (op.max_bias != 0 || op.logit_softcap != 0)
        return false;
    // hyperattn takes 0 for 1/sqrt(head_dim).
    if (op.scale == 0 || !std::isfinite(op.scale))
        return false;
    if (q->type != GGML_TYPE_F32 || k->type != v->type || !is_viewable(q) || !is_viewable(k) || !is_viewable(v) ||
        !is_viewable(node))
        return false;
    if (q->ne[1] < LEAST_QUERIES || k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] != 0)
        return false;
    if (k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3])
        return false;
    // One mask for all heads, as everybody makes them; ggml itself asks for f16.
    return mask == nullptr || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->ne[0] >= k->ne[1] &&
                               mask->ne[1] >= q->ne[1] && mask->nb[0] == sizeof(uint16_t));
}

ggml_status attention_compute(const ggml_tensor *node, const hyperattn_params &params, const threads &team,
                              attention_memory &memory)
{
    hyperattn_params own = params;
    own.scale = operation_of(node).scale;
    for (int64_t stream = 0; stream < node->ne[3]; ++stream) {
        const hyperattn_status status = compute_stream(node, stream, own, team, memory);
        if (status != HYPERATTN_STATUS_OK) {
            GGML_LOG_ERROR("hyperattn: %s: %s: %s\n", node->name, hyperattn_status_string(status),
                           hyperattn_last_error());
            return status == HYPERATTN_STATUS_OUT_OF_MEMORY ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}
