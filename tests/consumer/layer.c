#include "layer.h"

#include <hyperattn/hyperattn.h>
#include <stdio.h>

int layer_in_c(const float *q, const float *k, const float *v, float *out)
{
    if (hyperattn_abi_version() != HYPERATTN_ABI_VERSION) {
        fprintf(stderr, "the header belongs to another hyperattn\n");
        return 1;
    }
    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    hyperattn_tensors tensors = { .struct_size = sizeof tensors };
    tensors.q = hyperattn_tensor_bshd(q, HYPERATTN_DTYPE_F32, 1, HEADS, TOKENS, HEAD_DIM);
    tensors.k = hyperattn_tensor_bshd(k, HYPERATTN_DTYPE_F32, 1, KV_HEADS, TOKENS, HEAD_DIM);
    tensors.v = hyperattn_tensor_bshd(v, HYPERATTN_DTYPE_F32, 1, KV_HEADS, TOKENS, HEAD_DIM);
    tensors.out = hyperattn_tensor_bshd(out, HYPERATTN_DTYPE_F32, 1, HEADS, TOKENS, HEAD_DIM);
    if (hyperattn_forward(&params, &tensors, NULL) != HYPERATTN_STATUS_OK) {
        fprintf(stderr, "%s\n", hyperattn_last_error());
        return 1;
    }
    return 0;
}
