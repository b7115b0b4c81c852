#include "random.h"

#include <math.h>

uint64_t random_bits(random_source *source)
{
    source->state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = source->state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

double random_uniform(random_source *source)
{
    return (double)(random_bits(source) >> 11) * 0x1p-53;
}

double random_gaussian(random_source *source)
{
    /* Box-Muller; 1 - u is never 0. */
    double radius = sqrt(-2.0 * log(1.0 - random_uniform(source)));
    return radius * cos(6.283185307179586 * random_uniform(source));
}
