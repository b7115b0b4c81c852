/* Gradients: against differences of the forward call, in every layout and dtype up to the last element before an
 * unreadable page, with a workspace of the size that was asked for, and old callers' structs. */
#include <hyperattn/hyperattn.h>
#include <stddef.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "workspace.h"

static const problem_shape SHAPE = {2, 4, 2, 60, 70, 16, 12};

typedef struct gradients {
    array dout, dlse, dq, dk, dv;
    hyperattn_grads grads;
} gradients;

static gradients gradients_create(const problem_shape *s, problem_dtypes dtypes, array_layout layout,
                                  random_source *source)
{
    gradients g;
    g.dout = array_create(dtypes.q, layout, s->batch, s->heads_q, s->n_q, s->d_v);
    g.dlse = array_create(HYPERATTN_DTYPE_F32, layout, s->batch, s->heads_q, s->n_q, 1);
    g.dq = array_create(dtypes.q, layout, s->batch, s->heads_q, s->n_q, s->d);
    g.dk = array_create(dtypes.kv, layout, s->batch, s->heads_kv, s->n_k, s->d);
    g.dv = array_create(dtypes.kv, layout, s->batch, s->heads_kv, s->n_k, s->d_v);
    tensor_fill_gaussian(&g.dout.view, source, 1.0, 0.0);
    tensor_fill_gaussian(&g.dlse.view, source, 1.0, 0.0);
    memset(&g.grads, 0, sizeof g.grads);
    g.grads.struct_size = sizeof g.grads;
    g.grads.dout = g.dout.view;
    g.grads.dq = g.dq.view;
    g.grads.dk = g.dk.view;
    g.grads.dv = g.dv.view;
    g.grads.dlse = g.dlse.view;
    return g;
}

static void gradients_destroy(gradients *g)
{
    array_destroy(&g->dout);
    array_destroy(&g->dlse);
    array_destroy(&g->dq);
    array_destroy(&g->dk);
    array_destroy(&g->dv);
}

static void gradients_poison(gradients *g)
{
    array_poison(&g->dq);
    array_poison(&g->dk);
    array_poison(&g->dv);
}

/* Keeps the selection of METHOD_PAPER where it is while q, k and v move: nothing is sorted by their contents. */
static hyperattn_params test_params(hyperattn_method method, hyperattn_mask mask)
{
    hyperattn_params params = problem_params(method, mask);
    params.min_seq_len = 16;
    params.block_size = 8;
    params.sample_size = 10;
    params.lsh_num_projs = 0;
    params.seed = 5;
    return params;
}

/* The sum of a * b over all elements, without rows that see nothing. */
static double product(const hyperattn_tensor *a, const hyperattn_tensor *b)
{
    double sum = 0.0;
    for (int64_t i = 0; i < a->shape[0] * a->shape[1] * a->shape[2]; i += 1) {
        int64_t batch = i / (a->shape[1] * a->shape[2]), head = i / a->shape[2] % a->shape[1], row = i % a->shape[2];
        for (int64_t c = 0; c < a->shape[3]; c += 1) {
            double x = tensor_get(a, batch, head, row, c);
            sum += x > -1e30 ? x * tensor_get(b, batch, head, row, c) : 0.0;
        }
    }
    return sum;
}

/* The loss whose gradients by out and lse are g's. */
static double loss(const hyperattn_params *params, const problem *p, const gradients *g)
{
    CHECK_OK(hyperattn_forward(params, &p->tensors, NULL));
    return product(&p->out.view, &g->dout.view) + product(&p->lse.view, &g->dlse.view);
}

static void compare_with_differences(const hyperattn_params *params, const problem *p, gradients *g,
                                     random_source *source)
{
    CHECK_OK(hyperattn_forward(params, &p->tensors, NULL));
    CHECK_OK(hyperattn_backward(params, &p->tensors, &g->grads, NULL));
    const hyperattn_tensor *moved[] = {&p->q.view, &p->k.view, &p->v.view};
    const hyperattn_tensor *slopes[] = {&g->dq.view, &g->dk.view, &g->dv.view};
    for (int which = 0; which < 3; which += 1) {
        double largest = 0.0;
        for (int entry = 0; entry < 6; entry += 1) {
            int64_t at[4];
            for (int dim = 0; dim < 4; dim += 1) {
                at[dim] = (int64_t)(random_uniform(source) * (double)moved[which]->shape[dim]);
            }
            double before = tensor_get(moved[which], at[0], at[1], at[2], at[3]);
            double slope = tensor_get(slopes[which], at[0], at[1], at[2], at[3]);
            /* Some 7,000 products of single precision make a loss, off by 1e-5; the third derivative is below 1. */
            const double step = 0.02;
            tensor_set(moved[which], at[0], at[1], at[2], at[3], before + step);
            double above = loss(params, p, g);
            tensor_set(moved[which], at[0], at[1], at[2], at[3], before - step);
            double below = loss(params, p, g);
            tensor_set(moved[which], at[0], at[1], at[2], at[3], before);
            CHECK_NEAR(slope, (above - below) / (2.0 * step), 1e-3);
            largest = slope > largest ? slope : -slope > largest ? -slope : largest;
        }
        CHECK_BELOW(0.01, largest);
    }
}

static void differences(random_source *source)
{
    const problem_dtypes f32 = legal_dtypes[0];
    problem p = problem_create_mixed(&SHAPE, f32, ARRAY_BHSD, source);
    gradients g = gradients_create(&SHAPE, f32, ARRAY_BHSD, source);
    for (hyperattn_mask mask = 0; mask < 3; mask += 1) {
        check_case("exact, mask %s", mask_name(mask));
        hyperattn_params params = test_params(HYPERATTN_METHOD_EXACT, mask);
        compare_with_differences(&params, &p, &g, source);
        for (hyperattn_residual residual = HYPERATTN_RESIDUAL_UNIFORM; residual <= HYPERATTN_RESIDUAL_NONE;
             residual += HYPERATTN_RESIDUAL_NONE) {
            check_case("paper, residual %u, mask %s", residual, mask_name(mask));
            params = test_params(HYPERATTN_METHOD_PAPER, mask);
            params.residual = residual;
            compare_with_differences(&params, &p, &g, source);
        }
    }
    check_case("a mask tensor");
    array numbers = array_create(HYPERATTN_DTYPE_F16, ARRAY_PADDED, 1, SHAPE.heads_q, SHAPE.n_q, SHAPE.n_k);
    tensor_fill_gaussian(&numbers.view, source, 2.0, 0.0);
    p.tensors.mask = numbers.view;
    hyperattn_params params = test_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    compare_with_differences(&params, &p, &g, source);
    array_destroy(&numbers);
    gradients_destroy(&g);
    problem_destroy(&p);
}

/* One call with exactly the memory that it asks for; nothing but the gradients' elements changes. */
static void run(const hyperattn_params *params, const problem *p, gradients *g, uint32_t threads)
{
    hyperattn_cpu_exec exec = problem_exec(threads);
    hyperattn_layout layout = {0, 0};
    CHECK_OK(hyperattn_backward_workspace(params, &p->tensors, &exec, &layout));
    hyperattn_tensors without_data = p->tensors;
    without_data.out.data = without_data.lse.data = without_data.q.data = NULL;
    hyperattn_layout same = {0, 0};
    CHECK_OK(hyperattn_backward_workspace(params, &without_data, &exec, &same));
    CHECK(same.size == layout.size && same.align == layout.align);

    workspace memory = workspace_create(layout, 0xff);
    exec.workspace = memory.buffer;
    hyperattn_params no_allocation = *params;
    no_allocation.flags |= HYPERATTN_FLAG_NO_ALLOC;
    const array *inputs[] = {&p->q, &p->k, &p->v, &p->out, &p->lse, &g->dout, &g->dlse};
    uint64_t before[7];
    for (int i = 0; i < 7; i += 1) {
        before[i] = array_hash(inputs[i]);
    }
    gradients_poison(g);
    CHECK_OK(hyperattn_backward(&no_allocation, &p->tensors, &g->grads, &exec));
    for (int i = 0; i < 7; i += 1) {
        CHECK(array_hash(inputs[i]) == before[i]);
    }
    CHECK(workspace_surroundings_unchanged(&memory));
    workspace_destroy(&memory);
    const array *outputs[] = {&g->dq, &g->dk, &g->dv};
    for (int i = 0; i < 3; i += 1) {
        CHECK_INT(array_changed_outside(outputs[i]), 0);
        CHECK(tensor_all_finite(&outputs[i]->view));
    }
}

static void layouts_and_dtypes(random_source *source)
{
    for (int i = 0; i < LEGAL_DTYPES; i += 1) {
        for (array_layout layout = ARRAY_BHSD; layout <= ARRAY_PADDED; layout += 1) {
            problem p = problem_create_mixed(&SHAPE, legal_dtypes[i], layout, source);
            gradients g = gradients_create(&SHAPE, legal_dtypes[i], layout, source);
            gradients other = gradients_create(&SHAPE, legal_dtypes[i], ARRAY_BHSD, source);
            other.grads.dout = g.grads.dout;
            other.grads.dlse = g.grads.dlse;
            for (hyperattn_method method = HYPERATTN_METHOD_EXACT; method <= HYPERATTN_METHOD_REFINED; method += 1) {
                check_case("%s, layout %d, method %u", dtype_name(legal_dtypes[i].q), (int)layout, method);
                hyperattn_params params = test_params(method, HYPERATTN_MASK_CAUSAL_TOP_LEFT);
                params.lsh_num_projs = 7;
                params.budget = 64;
                CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                run(&params, &p, &g, 1);
                /* Other threads, memory of the library's own, packed gradients: the same bits. */
                CHECK_OK(hyperattn_backward(&params, &p.tensors, &other.grads, NULL));
                CHECK(tensor_same_bits(&g.dq.view, &other.dq.view));
                CHECK(tensor_same_bits(&g.dk.view, &other.dk.view));
                CHECK(tensor_same_bits(&g.dv.view, &other.dv.view));
                run(&params, &p, &g, 2);
                CHECK(tensor_same_bits(&g.dk.view, &other.dk.view));
            }
            gradients_destroy(&other);
            gradients_destroy(&g);
            problem_destroy(&p);
        }
    }
}

/* The CPU's sums have one order, whatever is permitted, and no workspace grows. */
static void any_order_permitted(random_source *source)
{
    problem p = problem_create_mixed(&SHAPE, legal_dtypes[0], ARRAY_BHSD, source);
    gradients g = gradients_create(&SHAPE, legal_dtypes[0], ARRAY_BHSD, source);
    for (hyperattn_method method = HYPERATTN_METHOD_AUTO; method <= HYPERATTN_METHOD_REFINED; method += 1) {
        for (hyperattn_mask mask = 0; mask < 3; mask += 1) {
            check_case("method %u, mask %s", method, mask_name(mask));
            hyperattn_params params = test_params(method, mask);
            const array *outputs[] = {&p.out, &p.lse, &g.dq, &g.dk, &g.dv};
            uint64_t hashes[2][5];
            hyperattn_layout needs[2], device_needs[2];
            for (int permitted = 0; permitted < 2; permitted += 1) {
                params.flags = permitted ? HYPERATTN_FLAG_NONDETERMINISTIC : 0;
                CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                CHECK_OK(hyperattn_backward_workspace(&params, &p.tensors, NULL, &needs[permitted]));
                CHECK_OK(hyperattn_cuda_backward_workspace(&params, &p.tensors, &device_needs[permitted]));
                run(&params, &p, &g, 2);
                for (int i = 0; i < 5; i += 1) {
                    hashes[permitted][i] = array_hash(outputs[i]);
                }
            }
            for (int i = 0; i < 5; i += 1) {
                CHECK(hashes[0][i] == hashes[1][i]);
            }
            CHECK(needs[0].size == needs[1].size && device_needs[0].size == device_needs[1].size);
        }
    }
    gradients_destroy(&g);
    problem_destroy(&p);
}

/* A struct that ends before dlse, or one without its data, means that the loss does not depend on lse. */
static void without_dlse(random_source *source)
{
    problem p = problem_create_mixed(&SHAPE, legal_dtypes[0], ARRAY_BHSD, source);
    gradients g = gradients_create(&SHAPE, legal_dtypes[0], ARRAY_BHSD, source);
    gradients expected = gradients_create(&SHAPE, legal_dtypes[0], ARRAY_BHSD, source);
    hyperattn_params params = test_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    check_case("dlse of zeros");
    expected.grads.dout = g.grads.dout;
    tensor_fill_gaussian(&expected.dlse.view, source, 0.0, 0.0);
    CHECK_OK(hyperattn_backward(&params, &p.tensors, &expected.grads, NULL));
    for (int way = 0; way < 2; way += 1) {
        check_case("%s", way == 0 ? "no dlse" : "a struct that ends before dlse");
        gradients_poison(&g);
        if (way == 0) {
            g.grads.dlse.data = NULL;
            g.grads.dlse.dtype = 99;
        } else {
            g.grads.struct_size = offsetof(hyperattn_grads, dlse);
        }
        CHECK_OK(hyperattn_backward(&params, &p.tensors, &g.grads, NULL));
        CHECK(tensor_same_bits(&g.dq.view, &expected.dq.view));
        CHECK(tensor_same_bits(&g.dk.view, &expected.dk.view));
        CHECK(tensor_same_bits(&g.dv.view, &expected.dv.view));
    }
    gradients_destroy(&expected);
    gradients_destroy(&g);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("backward", argc, argv)};
    differences(&source);
    layouts_and_dtypes(&source);
    any_order_permitted(&source);
    without_dlse(&source);
    return check_finish();
}
