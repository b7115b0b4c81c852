#include "mask.h"

#include <algorithm>

namespace {

constexpr uint16_t VISIBLE = 0x0000; // 0 in f16
constexpr uint16_t HIDDEN = 0xfc00;  // -inf in f16

// Entries that are compared at a time: a loop of a fixed length without an exit is one that compilers vectorise.
constexpr int64_t BLOCK = 128;

bool all_equal(const uint16_t *block, uint16_t value)
{
    uint16_t difference = 0;
    for (int64_t i = 0; i < BLOCK; ++i)
        difference |= static_cast<uint16_t>(block[i] ^ value);
    return difference == 0;
}

// How many of the first entries have the value.
int64_t leading(const uint16_t *entries, int64_t count, uint16_t value)
{
    int64_t i = 0;
    while (i + BLOCK <= count && all_equal(entries + i, value))
        i += BLOCK;
    while (i < count && entries[i] == value)
        ++i;
    return i;
}

// How many of the last entries have the value.
int64_t trailing(const uint16_t *entries, int64_t count, uint16_t value)
{
    int64_t i = count;
    while (i >= BLOCK && all_equal(entries + i - BLOCK, value))
        i -= BLOCK;
    while (i > 0 && entries[i - 1] == value)
        --i;
    return count - i;
}

// The entries of a row from the first to the last that are not hidden.
struct row_span {
    int64_t begin;
    int64_t end;
    bool all_visible;
};

row_span span_of(const uint16_t *row, int64_t keys)
{
    const int64_t begin = leading(row, keys, HIDDEN);
    const int64_t end = keys - trailing(row + begin, keys - begin, HIDDEN);
    return {begin, end, leading(row + begin, end - begin, VISIBLE) == end - begin};
}

} // namespace

visible_keys recognise_mask(const uint16_t *mask, int64_t queries, int64_t keys, int64_t row_stride)
{
    row_span first = {};
    bool none = true;
    bool causal = true;
    int64_t begin = keys;
    int64_t end = 0;
    for (int64_t i = 0; i < queries; ++i) {
        const row_span row = span_of(mask + i * row_stride, keys);
        const bool empty = row.begin == row.end;
        if (i == 0)
            first = row;
        // A row that sees nothing has no place in a pattern.
        const bool alike = !empty && row.all_visible && row.begin == first.begin;
        none = none && alike && row.end == first.end;
        causal = causal && alike && row.end == first.end + i;
        if (!empty) {
            begin = std::min(begin, row.begin);
            end = std::max(end, row.end);
        }
    }
    if (begin >= end)
        return {mask_pattern::other, 0, 0};
    return {none ? mask_pattern::none : causal ? mask_pattern::causal : mask_pattern::other, begin, end - begin};
}
