// recognise_mask on the masks that llama.cpp makes, and on every mask that differs from one of them in one entry.
#include "mask.h"

#include <cstdio>
#include <functional>
#include <vector>

namespace {

constexpr uint16_t VISIBLE = 0x0000;
constexpr uint16_t HIDDEN = 0xfc00;
constexpr uint16_t MINUS_ZERO = 0x8000;
constexpr uint16_t MINUS_ONE = 0xbc00; // a distance, as ALiBi has
constexpr uint16_t NOT_A_NUMBER = 0x7e00;

int checks = 0;
int failures = 0;

struct mask {
    int64_t queries;
    int64_t keys;
    int64_t stride;
    std::vector<uint16_t> entries;

    // What lies between the rows must not be looked at.
    mask(int64_t queries_, int64_t keys_, int64_t stride_, const std::function<bool(int64_t, int64_t)> &sees)
        : queries(queries_), keys(keys_), stride(stride_), entries(queries_ * stride_, NOT_A_NUMBER)
    {
        for (int64_t i = 0; i < queries; ++i) {
            for (int64_t j = 0; j < keys; ++j)
                entries[i * stride + j] = sees(i, j) ? VISIBLE : HIDDEN;
        }
    }
    visible_keys recognise() const { return recognise_mask(entries.data(), queries, keys, stride); }
};

void expect(const char *what, const visible_keys &got, const visible_keys &wanted)
{
    ++checks;
    if (got.pattern == wanted.pattern && got.first_key == wanted.first_key && got.keys == wanted.keys)
        return;
    ++failures;
    std::fprintf(stderr, "%s: pattern %d, keys %lld + %lld instead of %d, %lld + %lld\n", what,
                 static_cast<int>(got.pattern), static_cast<long long>(got.first_key), static_cast<long long>(got.keys),
                 static_cast<int>(wanted.pattern), static_cast<long long>(wanted.first_key),
                 static_cast<long long>(wanted.keys));
}

// Whatever single entry is changed, and to what: the mask is no longer of a pattern.
void expect_every_entry_to_matter(const char *what, mask mask)
{
    const visible_keys whole = mask.recognise();
    for (int64_t i = 0; i < mask.queries; ++i) {
        for (int64_t j = 0; j < mask.keys; ++j) {
            uint16_t &entry = mask.entries[i * mask.stride + j];
            const uint16_t before = entry;
            for (uint16_t value : {VISIBLE, HIDDEN, MINUS_ZERO, MINUS_ONE, NOT_A_NUMBER}) {
                if (value == before)
                    continue;
                entry = value;
                ++checks;
                const visible_keys got = mask.recognise();
                if (got.pattern != mask_pattern::other) {
                    ++failures;
                    std::fprintf(stderr, "%s: entry %lld, %lld as %04x was not seen\n", what, static_cast<long long>(i),
                                 static_cast<long long>(j), value);
                }
                // No key that a row sees is cut off.
                if (value != HIDDEN && (j < got.first_key || j >= got.first_key + got.keys)) {
                    ++failures;
                    std::fprintf(stderr, "%s: entry %lld, %lld as %04x was cut off\n", what, static_cast<long long>(i),
                                 static_cast<long long>(j), value);
                }
            }
            entry = before;
        }
    }
    expect(what, mask.recognise(), whole);
}

} // namespace

int main()
{
    const auto all = [](int64_t, int64_t) { return true; };
    // 70 tokens after 130 in a cache of 256 cells.
    const auto causal = [](int64_t i, int64_t j) { return j <= 130 + i; };

    expect("all visible", mask(70, 200, 200, all).recognise(), {mask_pattern::none, 0, 200});
    expect("padded", mask(70, 256, 256, [](int64_t, int64_t j) { return j < 200; }).recognise(),
           {mask_pattern::none, 0, 200});
    expect("a sequence behind another",
           mask(70, 512, 520, [](int64_t, int64_t j) { return j >= 130 && j < 300; }).recognise(),
           {mask_pattern::none, 130, 170});
    expect("causal, padded", mask(70, 256, 256, causal).recognise(), {mask_pattern::causal, 0, 200});
    expect("causal, nothing cached", mask(64, 64, 64, [](int64_t i, int64_t j) { return j <= i; }).recognise(),
           {mask_pattern::causal, 0, 64});
    expect("causal behind another sequence",
           mask(70, 512, 512, [](int64_t i, int64_t j) { return j >= 130 && j <= 200 + i; }).recognise(),
           {mask_pattern::causal, 130, 140});
    expect("one query", mask(1, 300, 300, [](int64_t, int64_t j) { return j < 257; }).recognise(),
           {mask_pattern::none, 0, 257});

    expect("a window", mask(70, 256, 256, [&](int64_t i, int64_t j) { return causal(i, j) && j > 30 + i; }).recognise(),
           {mask_pattern::other, 31, 169});
    expect("two sequences",
           mask(128, 256, 256, [](int64_t i, int64_t j) { return j / 64 == 1 + i / 64 && j % 64 <= i % 64; })
               .recognise(),
           {mask_pattern::other, 64, 128});
    expect("a step of two", mask(70, 512, 512, [](int64_t i, int64_t j) { return j <= 130 + 2 * i; }).recognise(),
           {mask_pattern::other, 0, 269});
    expect("a step missing",
           mask(70, 512, 512, [](int64_t i, int64_t j) { return j <= 130 + i - (i > 40); }).recognise(),
           {mask_pattern::other, 0, 199});
    expect("the other way round", mask(70, 256, 256, [](int64_t i, int64_t j) { return j <= 200 - i; }).recognise(),
           {mask_pattern::other, 0, 201});
    expect("a row that sees nothing",
           mask(70, 256, 256, [&](int64_t i, int64_t j) { return i != 9 && causal(i, j); }).recognise(),
           {mask_pattern::other, 0, 200});
    expect("nothing seen", mask(70, 256, 256, [](int64_t, int64_t) { return false; }).recognise(),
           {mask_pattern::other, 0, 0});

    expect_every_entry_to_matter("causal", mask(66, 300, 310, [](int64_t i, int64_t j) { return j <= 190 + i; }));
    expect_every_entry_to_matter("none", mask(5, 400, 400, [](int64_t, int64_t j) { return j >= 3 && j < 390; }));

    std::printf("mask: %d checks, %d failures\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
