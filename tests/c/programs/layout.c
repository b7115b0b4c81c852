/* Prints "struct field offset size" for every field of the header's structs, and "struct - size alignment" for the
 * structs themselves. A test compares this with the same structs written in Rust. */
#include <hyperattn/hyperattn.h>
#include <stddef.h>
#include <stdio.h>

#define FIELD(type, field) \
    printf(#type " " #field " %zu %zu\n", offsetof(type, field), sizeof(((type *)0)->field))
/* The alignment is where a member lands behind a single char. */
#define WHOLE(type) \
    do { \
        struct behind_char { \
            char first; \
            type second; \
        }; \
        printf(#type " - %zu %zu\n", sizeof(type), offsetof(struct behind_char, second)); \
    } while (0)

int main(void)
{
    WHOLE(hyperattn_params);
    FIELD(hyperattn_params, struct_size);
    FIELD(hyperattn_params, method);
    FIELD(hyperattn_params, mask);
    FIELD(hyperattn_params, scale);
    FIELD(hyperattn_params, residual);
    FIELD(hyperattn_params, lsh_num_projs);
    FIELD(hyperattn_params, block_size);
    FIELD(hyperattn_params, sample_size);
    FIELD(hyperattn_params, flags);
    FIELD(hyperattn_params, min_seq_len);
    FIELD(hyperattn_params, seed);
    FIELD(hyperattn_params, offset);
    FIELD(hyperattn_params, approx_d_epsilon);
    FIELD(hyperattn_params, approx_d_kappa);
    FIELD(hyperattn_params, budget);
    FIELD(hyperattn_params, num_first_keys);
    FIELD(hyperattn_params, band);
    FIELD(hyperattn_params, target_error);
    FIELD(hyperattn_params, head_methods);

    WHOLE(hyperattn_tensor);
    FIELD(hyperattn_tensor, data);
    FIELD(hyperattn_tensor, dtype);
    FIELD(hyperattn_tensor, reserved);
    FIELD(hyperattn_tensor, shape);
    FIELD(hyperattn_tensor, stride);

    WHOLE(hyperattn_block_mask);
    FIELD(hyperattn_block_mask, struct_size);
    FIELD(hyperattn_block_mask, query_block);
    FIELD(hyperattn_block_mask, key_block);
    FIELD(hyperattn_block_mask, num_query_blocks);
    FIELD(hyperattn_block_mask, num_key_blocks);
    FIELD(hyperattn_block_mask, row_offsets);
    FIELD(hyperattn_block_mask, columns);
    FIELD(hyperattn_block_mask, row_offsets_head_stride);

    WHOLE(hyperattn_tensors);
    FIELD(hyperattn_tensors, struct_size);
    FIELD(hyperattn_tensors, q);
    FIELD(hyperattn_tensors, k);
    FIELD(hyperattn_tensors, v);
    FIELD(hyperattn_tensors, out);
    FIELD(hyperattn_tensors, lse);
    FIELD(hyperattn_tensors, block_mask);
    FIELD(hyperattn_tensors, error);
    FIELD(hyperattn_tensors, mask);
    FIELD(hyperattn_tensors, num_sequences);
    FIELD(hyperattn_tensors, cu_seqlens_q);
    FIELD(hyperattn_tensors, cu_seqlens_k);

    WHOLE(hyperattn_grads);
    FIELD(hyperattn_grads, struct_size);
    FIELD(hyperattn_grads, dout);
    FIELD(hyperattn_grads, dq);
    FIELD(hyperattn_grads, dk);
    FIELD(hyperattn_grads, dv);
    FIELD(hyperattn_grads, dlse);

    WHOLE(hyperattn_diagnosis);
    FIELD(hyperattn_diagnosis, struct_size);
    FIELD(hyperattn_diagnosis, alpha);
    FIELD(hyperattn_diagnosis, kappa);
    FIELD(hyperattn_diagnosis, captured_mass);
    FIELD(hyperattn_diagnosis, estimated_error);
    FIELD(hyperattn_diagnosis, true_error);
    FIELD(hyperattn_diagnosis, keys_per_query);

    WHOLE(hyperattn_layout);
    FIELD(hyperattn_layout, size);
    FIELD(hyperattn_layout, align);

    WHOLE(hyperattn_buffer);
    FIELD(hyperattn_buffer, data);
    FIELD(hyperattn_buffer, size);

    WHOLE(hyperattn_threadpool);
    FIELD(hyperattn_threadpool, struct_size);
    FIELD(hyperattn_threadpool, ctx);
    FIELD(hyperattn_threadpool, num_threads);
    FIELD(hyperattn_threadpool, parallel_for);

    WHOLE(hyperattn_cpu_exec);
    FIELD(hyperattn_cpu_exec, struct_size);
    FIELD(hyperattn_cpu_exec, workspace);
    FIELD(hyperattn_cpu_exec, num_threads);
    FIELD(hyperattn_cpu_exec, reserved);
    FIELD(hyperattn_cpu_exec, pool);

    WHOLE(hyperattn_cuda_exec);
    FIELD(hyperattn_cuda_exec, struct_size);
    FIELD(hyperattn_cuda_exec, workspace);
    FIELD(hyperattn_cuda_exec, stream);
    return 0;
}
