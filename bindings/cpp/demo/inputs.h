#ifndef INPUTS_H
#define INPUTS_H
#include <hyperattn/hyperattn.h>

/* Queries, keys and values of one problem, contiguous [heads, tokens, head_dim], owned by this struct. */
typedef struct inputs {
    const char     *name;
    hyperattn_dtype dtype;
    int64_t         heads_q, heads_kv, tokens, head_dim;
    void           *q, *k, *v;
} inputs;

/* Reads q.f16, k.f16 and v.f16 from a folder. Prints the reason and exits on failure. */
inputs inputs_load(const char *folder);

/* Draws one f32 head of clustered tokens. The first n tokens do not depend on how many are drawn. */
inputs inputs_generate(int64_t tokens);

/* One sentence for the reader of the table: what inputs_generate draws. */
const char *inputs_generate_description(void);

void inputs_free(inputs *in);

/* Element `index` of q, k or v in double precision. */
double inputs_element(const void *data, hyperattn_dtype dtype, int64_t index);

/* malloc that prints the reason and exits instead of returning NULL. */
void *allocate(size_t bytes);

#endif
