// The shortest useful C++ program: causal attention over standard containers, grouped heads, an error for a wrong call.
#include <hyperattn/hyperattn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

int main()
{
    const std::int64_t batch = 1, heads = 4, kv_heads = 2, tokens = 300, head_dim = 64;
    std::vector<float> q(static_cast<std::size_t>(heads * tokens * head_dim));
    std::vector<float> k(static_cast<std::size_t>(kv_heads * tokens * head_dim)), v(k.size()), out(q.size());
    for (std::size_t i = 0; i < q.size(); ++i) {
        q[i] = static_cast<float>(std::sin(static_cast<double>(i)));
    }
    for (std::size_t i = 0; i < k.size(); ++i) {
        k[i] = static_cast<float>(std::cos(static_cast<double>(i)));
        v[i] = 2.0f; // so that every output is 2, whatever the weights
    }

    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;

    hyperattn_tensors tensors = {};
    tensors.struct_size = sizeof tensors;
    tensors.q = hyperattn_tensor_bshd(q.data(), HYPERATTN_DTYPE_F32, batch, heads, tokens, head_dim);
    tensors.k = hyperattn_tensor_bshd(k.data(), HYPERATTN_DTYPE_F32, batch, kv_heads, tokens, head_dim);
    tensors.v = hyperattn_tensor_bshd(v.data(), HYPERATTN_DTYPE_F32, batch, kv_heads, tokens, head_dim);
    tensors.out = hyperattn_tensor_bshd(out.data(), HYPERATTN_DTYPE_F32, batch, heads, tokens, head_dim);

    if (hyperattn_forward(&params, &tensors, nullptr) != HYPERATTN_STATUS_OK) {
        std::printf("hyperattn_forward: %s\n", hyperattn_last_error());
        return 1;
    }
    for (float value : out) {
        if (!(std::fabs(value - 2.0f) < 1e-5f)) {
            std::printf("an output is %g instead of 2\n", static_cast<double>(value));
            return 1;
        }
    }

    tensors.k.shape[3] = 32;
    if (hyperattn_forward(&params, &tensors, nullptr) == HYPERATTN_STATUS_OK) {
        std::printf("a wrong head_dim was accepted\n");
        return 1;
    }
    std::printf("a wrong call says: %s\n", hyperattn_last_error());
    return 0;
}
