// What a mask tensor says: llama.cpp and its kin express every kind of visibility as f16 entries, 0 or -inf.
#ifndef GGML_HYPERATTN_MASK_H
#define GGML_HYPERATTN_MASK_H

#include <cstdint>

enum class mask_pattern {
    // Every query sees the keys first_key .. first_key + keys.
    none,
    // Query i sees the keys first_key .. first_key + keys - (queries - 1 - i): causal, aligned at the last key.
    causal,
    // Anything else. Keys outside of first_key .. first_key + keys are seen by no query; keys may be 0.
    other,
};

struct visible_keys {
    mask_pattern pattern;
    int64_t first_key;
    int64_t keys;
};

// Looks at every entry of queries rows of keys f16 numbers, the rows row_stride entries apart: about keys * queries * 2
// bytes are read.
visible_keys recognise_mask(const uint16_t *mask, int64_t queries, int64_t keys, int64_t row_stride);

#endif
