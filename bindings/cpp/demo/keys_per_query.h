#ifndef KEYS_PER_QUERY_H
#define KEYS_PER_QUERY_H
#include <stdint.h>

/* How many key columns one query meets, on average over the queries, when n queries attend to n keys.
 * Follows from the settings alone; no attention is computed. */

/* Exact attention: every visible key. */
double keys_per_query_exact(int64_t n, int causal);

/* HyperAttention (arXiv 2310.05869): one sorted block and the sampled keys, and when causal the
 * recursion of Algorithm 4. `samples` counts every sample that a query meets. */
double keys_per_query_paper(int64_t n, int causal, int64_t block_size, int64_t samples, int64_t min_seq_len);

#endif
