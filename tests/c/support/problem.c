#include "problem.h"

#include <string.h>

const problem_dtypes legal_dtypes[LEGAL_DTYPES] = {
    {HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32},
    {HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F16},
    {HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16},
    {HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F32},
    {HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_F32},
    {HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F16, HYPERATTN_DTYPE_F32},
    {HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_BF16, HYPERATTN_DTYPE_F32},
};

problem problem_create_mixed(const problem_shape *shape, problem_dtypes dtypes, array_layout layout,
                             random_source *source)
{
    const problem_shape s = *shape;
    array_layout own = layout == ARRAY_BROADCAST_BATCH ? ARRAY_BHSD : layout;
    problem p;
    p.q = array_create(dtypes.q, own, s.batch, s.heads_q, s.n_q, s.d);
    p.k = array_create(dtypes.kv, layout, s.batch, s.heads_kv, s.n_k, s.d);
    p.v = array_create(dtypes.kv, layout, s.batch, s.heads_kv, s.n_k, s.d_v);
    p.out = array_create(dtypes.out, own, s.batch, s.heads_q, s.n_q, s.d_v);
    p.lse = array_create(HYPERATTN_DTYPE_F32, own, s.batch, s.heads_q, s.n_q, 1);
    p.error = array_create(HYPERATTN_DTYPE_F32, own, s.batch, s.heads_q, 1, 1);
    tensor_fill_gaussian(&p.q.view, source, 1.0, 0.0);
    tensor_fill_gaussian(&p.k.view, source, 1.0, 0.0);
    tensor_fill_gaussian(&p.v.view, source, 1.0, 0.0);
    memset(&p.tensors, 0, sizeof p.tensors);
    p.tensors.struct_size = sizeof p.tensors;
    p.tensors.q = p.q.view;
    p.tensors.k = p.k.view;
    p.tensors.v = p.v.view;
    p.tensors.out = p.out.view;
    p.tensors.lse = p.lse.view;
    return p;
}

problem problem_create(const problem_shape *shape, hyperattn_dtype dtype, hyperattn_dtype out_dtype,
                       array_layout layout, random_source *source)
{
    const problem_dtypes dtypes = {dtype, dtype, out_dtype};
    return problem_create_mixed(shape, dtypes, layout, source);
}

void problem_destroy(problem *p)
{
    array_destroy(&p->q);
    array_destroy(&p->k);
    array_destroy(&p->v);
    array_destroy(&p->out);
    array_destroy(&p->lse);
    array_destroy(&p->error);
}

void problem_want_error(problem *p)
{
    p->tensors.error = p->error.view;
}

void problem_poison_outputs(problem *p)
{
    array_poison(&p->out);
    array_poison(&p->lse);
    array_poison(&p->error);
}

hyperattn_params problem_params(hyperattn_method method, hyperattn_mask mask)
{
    hyperattn_params params;
    hyperattn_params_init(&params, sizeof params);
    params.method = method;
    params.mask = mask;
    return params;
}

hyperattn_params problem_small_params(hyperattn_method method, hyperattn_mask mask, int64_t min_seq_len)
{
    hyperattn_params params = problem_params(method, mask);
    params.min_seq_len = min_seq_len;
    params.block_size = 32;
    params.sample_size = 24;
    params.budget = 64;
    params.band = 16;
    params.target_error = 0.4f;
    params.seed = 7;
    return params;
}

hyperattn_cpu_exec problem_exec(uint32_t num_threads)
{
    hyperattn_cpu_exec exec;
    memset(&exec, 0, sizeof exec);
    exec.struct_size = sizeof exec;
    exec.num_threads = num_threads;
    return exec;
}

const char *mask_name(hyperattn_mask mask)
{
    static const char *const names[] = {"none", "bottom-right", "top-left"};
    return mask < 3 ? names[mask] : "unknown";
}

const char *dtype_name(hyperattn_dtype dtype)
{
    static const char *const names[] = {"invalid", "f32", "f16", "bf16"};
    return dtype < 4 ? names[dtype] : "unknown";
}
