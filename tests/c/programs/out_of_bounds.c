/* A tensor that is one element shorter than its view says. Only a sanitizer sees it: the test expects its report, which
 * shows that the library's own reads are watched. */
#include <hyperattn/hyperattn.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 6, HEAD_DIM = 8 };

int main(void)
{
    float *q = (float *)calloc(TOKENS * HEAD_DIM, sizeof *q);
    float *k = (float *)calloc(TOKENS * HEAD_DIM - 1, sizeof *k);
    float *v = (float *)calloc(TOKENS * HEAD_DIM, sizeof *v);
    float *out = (float *)calloc(TOKENS * HEAD_DIM, sizeof *out);
    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    hyperattn_tensors tensors = {0};
    tensors.struct_size = sizeof tensors;
    tensors.q = hyperattn_tensor_bhsd(q, HYPERATTN_DTYPE_F32, 1, 1, TOKENS, HEAD_DIM);
    tensors.k = hyperattn_tensor_bhsd(k, HYPERATTN_DTYPE_F32, 1, 1, TOKENS, HEAD_DIM);
    tensors.v = hyperattn_tensor_bhsd(v, HYPERATTN_DTYPE_F32, 1, 1, TOKENS, HEAD_DIM);
    tensors.out = hyperattn_tensor_bhsd(out, HYPERATTN_DTYPE_F32, 1, 1, TOKENS, HEAD_DIM);
    hyperattn_status status = hyperattn_forward(&params, &tensors, NULL);
    printf("status %d, nothing was reported\n", (int)status);
    free(q);
    free(k);
    free(v);
    free(out);
    return 0;
}
