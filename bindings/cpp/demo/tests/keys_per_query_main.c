/* Prints keys_per_query_paper for every line "n causal block_size samples min_seq_len" of standard input. */
#include "keys_per_query.h"

#include <stdio.h>

int main(void) {
    long n, block_size, samples, min_seq_len;
    int causal;
    while (scanf("%ld %d %ld %ld %ld", &n, &causal, &block_size, &samples, &min_seq_len) == 5)
        printf("%.17g\n", keys_per_query_paper(n, causal, block_size, samples, min_seq_len));
    return 0;
}
