/* The examples of include/README.md, which tests/guide.rs puts into guide_examples.h, do what the guide says. CUDA's
 * functions are stand-ins here: only what happens without a device is seen. */
#include "guide_examples.h"

#include "check.h"
#include "pool.h"
#include "problem.h"
#include "reference.h"

enum { BATCH = 2, HEADS_Q = 4, HEADS_KV = 2, TOKENS = 37, DIM = 16, CAPACITY = 50 };

static int captures_begun, captures_ended;

/* One allocation, aligned as CUDA does. */
cudaError_t cudaMalloc(void **memory, size_t size)
{
    static unsigned char device[1 << 20];
    size_t skipped = (256 - (uintptr_t)device % 256) % 256;
    *memory = device + skipped;
    return size <= sizeof device - skipped ? cudaSuccess : (cudaError_t)2;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    (void)stream;
    (void)mode;
    captures_begun += 1;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    (void)stream;
    captures_ended += 1;
    *graph = NULL;
    return cudaSuccess;
}

/* A problem in float, each head's rows together, and exact attention's output under `mask`. */
static problem solved(int64_t batch, int64_t tokens, hyperattn_mask mask, random_source *source)
{
    problem_shape shape = { batch, HEADS_Q, HEADS_KV, tokens, tokens, DIM, DIM };
    problem p = problem_create(&shape, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, mask);
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    return p;
}

static float *floats(int64_t count)
{
    float *memory = calloc((size_t)count, sizeof *memory);
    if (memory == NULL) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    return memory;
}

static void copy(const hyperattn_tensor *to, const hyperattn_tensor *from)
{
    for (int64_t b = 0; b < from->shape[0]; b += 1) {
        for (int64_t h = 0; h < from->shape[1]; h += 1) {
            for (int64_t i = 0; i < from->shape[2]; i += 1) {
                for (int64_t c = 0; c < from->shape[3]; c += 1) {
                    tensor_set(to, b, h, i, c, tensor_get(from, b, h, i, c));
                }
            }
        }
    }
}

static void check_near_all(const hyperattn_tensor *actual, const hyperattn_tensor *expected, double tolerance)
{
    double worst = 0.0;
    for (int64_t row = 0; row < expected->shape[0] * expected->shape[1] * expected->shape[2]; row += 1) {
        int64_t b = row / (expected->shape[1] * expected->shape[2]);
        int64_t h = row / expected->shape[2] % expected->shape[1], i = row % expected->shape[2];
        for (int64_t c = 0; c < expected->shape[3]; c += 1) {
            double difference = tensor_get(actual, b, h, i, c) - tensor_get(expected, b, h, i, c);
            worst = difference > worst ? difference : -difference > worst ? -difference : worst;
        }
    }
    CHECK_BELOW(worst, tolerance);
}

/* Every layout gives the bits of the packed one. */
static void check_layouts(random_source *source)
{
    problem p = solved(BATCH, TOKENS, HYPERATTN_MASK_NONE, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    int64_t row = BATCH * TOKENS * DIM;
    float *memory[] = { floats(row * HEADS_Q), floats(row * HEADS_KV), floats(row * HEADS_KV), floats(row * HEADS_Q) };
    const hyperattn_tensor *from[] = { &p.tensors.q, &p.tensors.k, &p.tensors.v };
    hyperattn_tensors tensors = { .struct_size = sizeof tensors };
    hyperattn_tensor *to[] = { &tensors.q, &tensors.k, &tensors.v };

    check_case("[S, B, H, D]");
    for (int i = 0; i < 3; i += 1) {
        *to[i] = tokens_first(memory[i], BATCH, from[i]->shape[1], TOKENS, DIM);
        copy(to[i], from[i]);
    }
    tensors.out = tokens_first(memory[3], BATCH, HEADS_Q, TOKENS, DIM);
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    CHECK(tensor_same_bits(&tensors.out, &p.tensors.out));
    CHECK(memory[3][HEADS_Q * DIM] == (float)tensor_get(&p.tensors.out, 1, 0, 0, 0));

    check_case("[B, S, Hq + 2 Hkv, D]");
    float *packed = floats(row * (HEADS_Q + 2 * HEADS_KV));
    side_by_side(&tensors, packed, BATCH, HEADS_Q, HEADS_KV, TOKENS, DIM);
    for (int i = 0; i < 3; i += 1) {
        copy(to[i], from[i]);
    }
    CHECK(packed[HEADS_Q * DIM] == (float)tensor_get(&p.tensors.k, 0, 0, 0, 0));
    CHECK(packed[(2 * HEADS_KV + HEADS_Q) * DIM] == (float)tensor_get(&p.tensors.q, 0, 0, 1, 0));
    CHECK_OK(hyperattn_forward(&params, &tensors, NULL));
    CHECK(tensor_same_bits(&tensors.out, &p.tensors.out));

    check_case("[B, H, C, D]");
    float *cache[] = { floats(BATCH * HEADS_KV * CAPACITY * DIM), floats(BATCH * HEADS_KV * CAPACITY * DIM) };
    tensors.q = p.tensors.q;
    for (int i = 0; i < 2; i += 1) {
        *to[i + 1] = cached(cache[i], HYPERATTN_DTYPE_F32, BATCH, HEADS_KV, TOKENS, CAPACITY, DIM);
        copy(to[i + 1], from[i + 1]);
        CHECK(cache[i][CAPACITY * DIM] == (float)tensor_get(from[i + 1], 0, 1, 0, 0));
        free(cache[i]);
        cache[i] = NULL;
    }
    free(packed);
    for (int i = 0; i < 4; i += 1) {
        free(memory[i]);
    }
    problem_destroy(&p);
}

/* A prompt in chunks of any lengths, single tokens among them, is the prompt in one piece. */
static void check_chunks(random_source *source)
{
    check_case("chunks");
    problem p = solved(1, TOKENS, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    kv_cache cache = { .heads = HEADS_KV, .capacity = CAPACITY, .head_dim = DIM };
    cache.k = floats(HEADS_KV * CAPACITY * DIM);
    cache.v = floats(HEADS_KV * CAPACITY * DIM);
    hyperattn_tensor k = cached(cache.k, HYPERATTN_DTYPE_F32, 1, HEADS_KV, TOKENS, CAPACITY, DIM);
    hyperattn_tensor v = cached(cache.v, HYPERATTN_DTYPE_F32, 1, HEADS_KV, TOKENS, CAPACITY, DIM);
    copy(&k, &p.tensors.k);
    copy(&v, &p.tensors.v);
    float *q = floats(TOKENS * HEADS_Q * DIM), *out = floats(TOKENS * HEADS_Q * DIM);
    hyperattn_tensor queries = hyperattn_tensor_bshd(q, HYPERATTN_DTYPE_F32, 1, HEADS_Q, TOKENS, DIM);
    hyperattn_tensor results = hyperattn_tensor_bshd(out, HYPERATTN_DTYPE_F32, 1, HEADS_Q, TOKENS, DIM);
    copy(&queries, &p.tensors.q);
    const int64_t chunks[] = { 16, 1, 1, 19 };
    for (int i = 0; i < 4; i += 1) {
        int64_t at = cache.used * HEADS_Q * DIM;
        cache.used += chunks[i];
        CHECK_OK(attend_latest(&params, &cache, q + at, out + at, HEADS_Q, chunks[i]));
    }
    CHECK_INT(cache.used, TOKENS);
    check_near_all(&results, &p.tensors.out, 1e-5);
    free(q);
    free(out);
    free(cache.k);
    free(cache.v);
    problem_destroy(&p);
}

static void check_pages(random_source *source)
{
    check_case("pages");
    problem p = solved(1, TOKENS, HYPERATTN_MASK_NONE, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    const int64_t lengths[] = { 10, 26, 1 };
    page pages[3];
    int64_t first = 0;
    for (int i = 0; i < 3; i += 1) {
        pages[i].k = floats(HEADS_KV * lengths[i] * DIM);
        pages[i].v = floats(HEADS_KV * lengths[i] * DIM);
        pages[i].tokens = lengths[i];
        hyperattn_tensor from[] = { p.tensors.k, p.tensors.v };
        void *to[] = { pages[i].k, pages[i].v };
        for (int side = 0; side < 2; side += 1) {
            from[side].data = (float *)from[side].data + first * from[side].stride[2];
            from[side].shape[2] = lengths[i];
            hyperattn_tensor view = hyperattn_tensor_bhsd(to[side], HYPERATTN_DTYPE_F32, 1, HEADS_KV, lengths[i], DIM);
            copy(&view, &from[side]);
        }
        first += lengths[i];
    }
    int64_t rows = HEADS_Q * TOKENS;
    float *out[] = { floats(rows * DIM), floats(rows * DIM) }, *lse[] = { floats(rows), floats(rows) };
    hyperattn_tensors parts[2];
    for (int i = 0; i < 2; i += 1) {
        parts[i] = p.tensors;
        parts[i].out = hyperattn_tensor_bhsd(out[i], HYPERATTN_DTYPE_F32, 1, HEADS_Q, TOKENS, DIM);
        parts[i].lse = hyperattn_tensor_bhsd(lse[i], HYPERATTN_DTYPE_F32, 1, HEADS_Q, TOKENS, 1);
    }
    CHECK_OK(attend_pages(&params, parts[0], parts[1], pages, 3, HEADS_KV));
    check_near_all(&parts[0].out, &p.tensors.out, 1e-5);
    check_near_all(&parts[0].lse, &p.tensors.lse, 1e-5);
    for (int i = 0; i < 3; i += 1) {
        free(pages[i].k);
        free(pages[i].v);
    }
    for (int i = 0; i < 2; i += 1) {
        free(out[i]);
        free(lse[i]);
    }
    problem_destroy(&p);
}

static worker_pool *workers;

static void run_on_workers(engine *self, size_t n, void (*task)(void *context, size_t index), void *context)
{
    (void)self;
    hyperattn_threadpool pool = worker_pool_interface(workers);
    pool.parallel_for(pool.ctx, n, task, context);
}

static void check_engine(random_source *source)
{
    check_case("engine");
    workers = worker_pool_create(2);
    engine mine = { 2, run_on_workers, NULL, 0 };
    problem p = solved(BATCH, TOKENS, HYPERATTN_MASK_NONE, source), again = p;
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    again.tensors.lse.data = NULL;
    float *out = floats(BATCH * HEADS_Q * TOKENS * DIM);
    again.tensors.out = hyperattn_tensor_bhsd(out, HYPERATTN_DTYPE_F32, BATCH, HEADS_Q, TOKENS, DIM);
    CHECK_STATUS(engine_attend(&mine, params, &again.tensors), HYPERATTN_STATUS_WORKSPACE_TOO_SMALL);
    CHECK_OK(engine_reserve(&mine, &params, &again.tensors));
    CHECK_OK(engine_attend(&mine, params, &again.tensors));
    CHECK(tensor_same_bits(&again.tensors.out, &p.tensors.out));
    CHECK(worker_pool_tasks(workers) > 0);
    free(out);
    free(mine.scratch);
    problem_destroy(&p);
    worker_pool_destroy(workers);
}

/* Each sequence as if it were alone, and a plan's tasks as the whole. */
static void check_sequences_and_plans(random_source *source)
{
    check_case("sequences");
    const int32_t ends[] = { 0, 9, 9, TOKENS };
    problem p = solved(1, TOKENS, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    float *out[] = { floats(HEADS_Q * TOKENS * DIM), floats(HEADS_Q * TOKENS * DIM) };
    hyperattn_tensors joined = p.tensors;
    joined.lse.data = NULL;
    joined.out = hyperattn_tensor_bhsd(out[0], HYPERATTN_DTYPE_F32, 1, HEADS_Q, TOKENS, DIM);
    CHECK_OK(attend_sequences(&params, joined, ends, 3));
    hyperattn_tensors alone = joined;
    hyperattn_tensor *parts[] = { &alone.q, &alone.k, &alone.v, &alone.out };
    alone.out.data = out[1];
    for (int i = 0; i < 4; i += 1) {
        parts[i]->data = (float *)parts[i]->data + ends[2] * parts[i]->stride[2];
        parts[i]->shape[2] = TOKENS - ends[2];
    }
    CHECK_OK(hyperattn_forward(&params, &alone, NULL));
    hyperattn_tensor last = joined.out;
    last.data = out[0] + ends[2] * DIM;
    last.shape[2] = TOKENS - ends[2];
    CHECK(tensor_same_bits(&last, &alone.out));

    check_case("plan");
    hyperattn_plan *plan = NULL;
    hyperattn_buffer allocate = { NULL, 0 };
    CHECK_OK(hyperattn_plan_create(&params, &joined, &plan));
    for (size_t i = 0; i < 3; i += 1) {
        CHECK_OK(run_share(plan, &joined, i, 3, allocate));
    }
    CHECK(tensor_same_bits(&joined.out, &p.tensors.out));
    hyperattn_plan_destroy(plan);
    free(out[0]);
    free(out[1]);
    problem_destroy(&p);
}

static void check_cuda(random_source *source)
{
    check_case("CUDA, without a device");
    problem p = solved(1, TOKENS, HYPERATTN_MASK_NONE, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_NONE);
    hyperattn_buffer workspace = { NULL, 0 };
    CHECK_OK(cuda_reserve(&params, &p.tensors, &workspace));
    CHECK(workspace.data != NULL && workspace.size > 0);
    CHECK_STATUS(cuda_attend(&params, &p.tensors, workspace, NULL), HYPERATTN_STATUS_DEVICE_UNAVAILABLE);
    cudaGraph_t graph;
    CHECK_STATUS(cuda_capture(&params, &p.tensors, workspace, NULL, &graph), HYPERATTN_STATUS_DEVICE_UNAVAILABLE);
    CHECK_INT(captures_begun, 1);
    CHECK_INT(captures_ended, 1);

    problem_poison_outputs(&p);
    CHECK_OK(attend_anywhere(&params, &p.tensors, &p.tensors));
    reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, NULL, NULL);
    reference_check(&r, &p.tensors);
    reference_destroy(&r);
    problem_destroy(&p);
}

/* The weights of a row add up to 1, so that the gradients of the values add up to those of the outputs. */
static void check_training(random_source *source)
{
    check_case("gradients");
    problem p = solved(1, TOKENS, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT, source);
    hyperattn_params params = problem_params(HYPERATTN_METHOD_EXACT, HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT);
    float *dout = floats(HEADS_Q * TOKENS * DIM), *dq = floats(HEADS_Q * TOKENS * DIM);
    float *dk = floats(HEADS_KV * TOKENS * DIM), *dv = floats(HEADS_KV * TOKENS * DIM);
    double expected = 0.0, actual = 0.0;
    for (int64_t i = 0; i < HEADS_Q * TOKENS * DIM; i += 1) {
        dout[i] = (float)random_gaussian(source);
        expected += dout[i];
    }
    CHECK_OK(gradients_of(&params, &p.tensors, dout, dq, dk, dv));
    for (int64_t i = 0; i < HEADS_KV * TOKENS * DIM; i += 1) {
        actual += dv[i];
    }
    CHECK_NEAR(actual, expected, 1e-3);
    /* The first query of each head sees one key, and the last ones see many. */
    CHECK(dq[0] > -1e-5f && dq[0] < 1e-5f && dq[(TOKENS - 1) * DIM] != 0.0f && dk[0] != 0.0f);
    free(dout);
    free(dq);
    free(dk);
    free(dv);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = { check_start("guide", argc, argv) };
    check_layouts(&source);
    check_chunks(&source);
    check_pages(&source);
    check_training(&source);
    check_engine(&source);
    check_sequences_and_plans(&source);
    check_cuda(&source);

    check_case("the rest");
    hyperattn_params model = problem_params(HYPERATTN_METHOD_PAPER, HYPERATTN_MASK_NONE);
    model.offset = 3;
    CHECK_INT(params_of_layer(&model, 4).offset, 7);
    CHECK(why_not_this_library() == NULL);
    return check_finish();
}
