// The softmax of a TILE_MERGE tile's row begins with the partials that the row has left: their values weighted by
// 2^(logit - max), where a partial's logit is its lse in base 2.
#pragma once

#include "convert.cuh"
#include "online_softmax.cuh"
#include "work.cuh"

namespace hyperattn {

struct PartialWeight {
    float weight;
    // Of what the row had before.
    float scale;
};

// Raises the maximum of a row to a partial's logit.
__device__ __forceinline__ PartialWeight weigh_partial(float lse, float &max)
{
    using namespace online_softmax;
    float logit = lse * LOG2_E;
    // A NaN is no maximum, but the weight is one then.
    float joined = fmaxf(max, logit), center = subtrahend(joined);
    PartialWeight of = {exp2_approximate(logit - center), exp2_approximate(max - center)};
    max = joined;
    return of;
}

} // namespace hyperattn
