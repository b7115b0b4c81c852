#include "layer.h"

#include <hyperattn/hyperattn.hpp>

#include <cstdio>

int layer_in_cpp(const float *q, const float *k, const float *v, float *out)
{
    hyperattn::params params;
    params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    try {
        hyperattn::forward(params, hyperattn::tensors(hyperattn::bshd(q, 1, HEADS, TOKENS, HEAD_DIM),
                                                      hyperattn::bshd(k, 1, KV_HEADS, TOKENS, HEAD_DIM),
                                                      hyperattn::bshd(v, 1, KV_HEADS, TOKENS, HEAD_DIM),
                                                      hyperattn::bshd(out, 1, HEADS, TOKENS, HEAD_DIM)));
    } catch (const hyperattn::error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
