#include "keys_per_query.h"

double keys_per_query_exact(int64_t n, int causal) {
    return causal ? ((double)n + 1.0) / 2.0 : (double)n;
}

/* Columns summed over the n queries of a causal square. */
static double causal_columns(int64_t n, int64_t block_size, int64_t samples, int64_t leaf) {
    int64_t first, second;
    double far;
    if (n <= leaf) return (double)n * keys_per_query_exact(n, 1);
    first = n - n / 2; /* the left half has the extra key */
    second = n / 2;
    far = first <= block_size ? (double)first : (double)(block_size + samples);
    return causal_columns(first, block_size, samples, leaf) + causal_columns(second, block_size, samples, leaf)
           + (double)second * far;
}

double keys_per_query_paper(int64_t n, int causal, int64_t block_size, int64_t samples, int64_t min_seq_len) {
    int64_t leaf = min_seq_len > block_size ? min_seq_len : block_size;
    if (leaf < 1) leaf = 1;
    if (n <= leaf) return keys_per_query_exact(n, causal);
    if (causal) return causal_columns(n, block_size, samples, leaf) / (double)n;
    return (double)(block_size + samples);
}
