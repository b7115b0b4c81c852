// Attention that can be worked out by hand: two heads of two queries share one head of two keys.
#ifndef SMALL_HPP
#define SMALL_HPP

#include "check.hpp"

#include <vector>

/// With scale ln 3 and keys (1, 0) and (0, 1), a query (a, b) has the logits a ln 3 and b ln 3.
struct small {
    // [head, query, dim]: weights (3/4, 1/4), (1/4, 3/4); (1/2, 1/2), (9/10, 1/10).
    std::vector<float> q = {1, 0, 0, 1, 0, 0, 2, 0};
    std::vector<float> k = {1, 0, 0, 1};
    std::vector<float> v = {4, 0, 0, 8};
    std::vector<float> out = std::vector<float>(8, NAN);
    std::vector<float> lse = std::vector<float>(4, NAN);
    hyperattn::params params;

    small()
    {
        params.method = HYPERATTN_METHOD_EXACT;
        params.scale = std::log(3.0f);
    }

    hyperattn::tensors tensors()
    {
        return {hyperattn::bhsd(q, 1, 2, 2, 2), hyperattn::bhsd(k, 1, 1, 2, 2), hyperattn::bhsd(v, 1, 1, 2, 2),
                hyperattn::bhsd(out, 1, 2, 2, 2), hyperattn::bhsd(lse, 1, 2, 2, 1)};
    }
};

/// [head, query, dim]
inline const double small_out[8] = {3.0, 2.0, 1.0, 6.0, 2.0, 4.0, 3.6, 0.8};
/// [head, query]: ln(3 + 1), ln(1 + 3), ln(1 + 1), ln(9 + 1).
inline const double small_lse[4] = {std::log(4.0), std::log(4.0), std::log(2.0), std::log(10.0)};

inline void check_small_out(const float *out)
{
    for (int i = 0; i < 8; ++i) {
        CHECK_NEAR(static_cast<double>(out[i]), small_out[i], 1e-5);
    }
}

inline void check_small_lse(const float *lse)
{
    for (int i = 0; i < 4; ++i) {
        CHECK_NEAR(static_cast<double>(lse[i]), small_lse[i], 1e-5);
    }
}

/// Four heads of 300 queries, two of keys, tokens first: enough work for several tasks. Every value is 2.
struct large {
    std::vector<float> q = std::vector<float>(4 * 300 * 16), k = std::vector<float>(2 * 300 * 16);
    std::vector<float> v = std::vector<float>(k.size(), 2.0f), out = std::vector<float>(q.size(), NAN);
    hyperattn::params params;

    large()
    {
        for (std::size_t i = 0; i < q.size(); ++i) {
            q[i] = std::sin(static_cast<float>(i));
        }
        for (std::size_t i = 0; i < k.size(); ++i) {
            k[i] = std::cos(static_cast<float>(i));
        }
        params.method = HYPERATTN_METHOD_EXACT;
    }

    hyperattn::tensors tensors()
    {
        return {hyperattn::bshd(q, 1, 4, 300, 16), hyperattn::bshd(k, 1, 2, 300, 16),
                hyperattn::bshd(v, 1, 2, 300, 16), hyperattn::bshd(out, 1, 4, 300, 16)};
    }

    /// Whether every output is 2, as it must be.
    bool complete() const
    {
        for (const float value : out) {
            if (!(std::fabs(value - 2.0f) < 1e-5f)) {
                return false;
            }
        }
        return true;
    }
};

#endif
