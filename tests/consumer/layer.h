/* One attention layer of a small engine: the same in C and in C++. */

#ifndef LAYER_H
#define LAYER_H

enum { HEADS = 4, KV_HEADS = 2, TOKENS = 96, HEAD_DIM = 32 };

#ifdef __cplusplus
extern "C" {
#endif

/* out[TOKENS][HEADS][HEAD_DIM] = causal attention. 0 when all went well; else a sentence is printed. */
int layer_in_c(const float *q, const float *k, const float *v, float *out);
int layer_in_cpp(const float *q, const float *k, const float *v, float *out);

#ifdef __cplusplus
}
#endif

#endif
