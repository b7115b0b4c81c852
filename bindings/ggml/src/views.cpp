#include "views.h"

namespace {

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

int64_t element_size(hyperattn_dtype dtype)
{
    return dtype == HYPERATTN_DTYPE_F32 ? 4 : 2;
}

} // namespace

bool is_viewable(const ggml_tensor *tensor)
{
    const hyperattn_dtype dtype = dtype_of(tensor->type);
    if (dtype == 0 || tensor->ne[0] > LARGEST_HEAD_DIM)
        return false;
    const size_t size = element_size(dtype);
    return tensor->nb[0] == size && tensor->nb[1] % size == 0 && tensor->nb[2] % size == 0 && tensor->nb[3] % size == 0;
}

hyperattn_tensor stream_view(const ggml_tensor *tensor, int64_t stream, int tokens, int heads)
{
    hyperattn_tensor view = {};
    view.data = static_cast<char *>(tensor->data) + stream * tensor->nb[3];
    view.dtype = dtype_of(tensor->type);
    const int64_t size = element_size(view.dtype);
    view.shape[0] = 1;
    view.shape[1] = tensor->ne[heads];
    view.shape[2] = tensor->ne[tokens];
    view.shape[3] = tensor->ne[0];
    view.stride[1] = static_cast<int64_t>(tensor->nb[heads]) / size;
    view.stride[2] = static_cast<int64_t>(tensor->nb[tokens]) / size;
    view.stride[3] = 1;
    return view;
}

hyperattn_tensor tokens_of(hyperattn_tensor view, int64_t first, int64_t count)
{
    view.data = static_cast<char *>(view.data) + first * view.stride[2] * element_size(view.dtype);
    view.shape[2] = count;
    return view;
}
