/* The caller's block mask: blocks of the mask are exact, the rest is the residual's. */
#include <hyperattn/hyperattn.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "reference.h"

enum { QUERY_BLOCK = 32, KEY_BLOCK = 40, QUERY_BLOCKS = 5, KEY_BLOCKS = 5, HEADS = 2, BATCH = 2, HEAD_STRIDE = 9 };

/* Ragged at both ends: 4 blocks of 32 queries and 2 more, 4 blocks of 40 keys and 30 more. */
static const problem_shape SHAPE = {BATCH, HEADS, 1, 130, 190, 64, 64};

/* One pattern per (batch, head), as bits and as the compressed rows given to the library. */
typedef struct pattern_set {
    bool present[BATCH * HEADS][QUERY_BLOCKS][KEY_BLOCKS];
    int64_t row_offsets[BATCH * HEADS * HEAD_STRIDE];
    int32_t columns[BATCH * HEADS * QUERY_BLOCKS * KEY_BLOCKS];
    hyperattn_block_mask mask;
    bool shared;
} pattern_set;

/* Compresses `present`; a shared pattern is that of the first head. */
static void compress(pattern_set *set, bool shared)
{
    /* Entries between two heads' rows belong to nobody: a value that no row may start at. */
    memset(set->row_offsets, 0x7f, sizeof set->row_offsets);
    int64_t used = 0;
    for (int head = 0; head < (shared ? 1 : BATCH * HEADS); head += 1) {
        int64_t *row = set->row_offsets + head * HEAD_STRIDE;
        for (int i = 0; i < QUERY_BLOCKS; i += 1) {
            row[i] = used;
            for (int j = 0; j < KEY_BLOCKS; j += 1) {
                if (set->present[head][i][j]) {
                    set->columns[used] = j;
                    used += 1;
                }
            }
        }
        row[QUERY_BLOCKS] = used;
    }
    set->shared = shared;
    memset(&set->mask, 0, sizeof set->mask);
    set->mask.struct_size = sizeof set->mask;
    set->mask.query_block = QUERY_BLOCK;
    set->mask.key_block = KEY_BLOCK;
    set->mask.num_query_blocks = QUERY_BLOCKS;
    set->mask.num_key_blocks = KEY_BLOCKS;
    set->mask.row_offsets = set->row_offsets;
    set->mask.columns = set->columns;
    set->mask.row_offsets_head_stride = shared ? 0 : HEAD_STRIDE;
}

static bool in_pattern(const void *context, int64_t batch, int64_t head, int64_t query, int64_t key)
{
    const pattern_set *set = (const pattern_set *)context;
    int64_t pattern = set->shared ? 0 : batch * HEADS + head;
    return set->present[pattern][query / QUERY_BLOCK][key / KEY_BLOCK];
}

static hyperattn_params blocks_params(hyperattn_mask mask, hyperattn_residual residual)
{
    hyperattn_params params = problem_params(HYPERATTN_METHOD_PAPER, mask);
    params.residual = residual;
    params.min_seq_len = 0;
    params.sample_size = 32;
    return params;
}

static void all_blocks_equal_exact(random_source *source)
{
    pattern_set set;
    memset(&set, 0, sizeof set);
    memset(set.present, 1, sizeof set.present);
    for (hyperattn_dtype t = HYPERATTN_DTYPE_F32; t <= HYPERATTN_DTYPE_BF16; t += 1) {
        problem p = problem_create(&SHAPE, t, t, ARRAY_BSHD, source);
        for (uint32_t mask = 0; mask < 3; mask += 1) {
            for (uint32_t residual = 0; residual < 3; residual += 1) {
                for (int shared = 0; shared < 2; shared += 1) {
                    check_case("all blocks: %s mask %s residual %u shared %d", dtype_name(t), mask_name(mask),
                               residual, shared);
                    compress(&set, shared != 0);
                    p.tensors.block_mask = &set.mask;
                    hyperattn_params params = blocks_params(mask, residual);
                    problem_poison_outputs(&p);
                    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
                    reference r = reference_compute(&p.tensors, mask, 0.0, NULL, NULL);
                    reference_check(&r, &p.tensors);
                    reference_destroy(&r);
                }
            }
        }
        problem_destroy(&p);
    }
}

/* Blocks only, by loops over the same pattern. */
static void expect_pattern(pattern_set *set, bool shared, random_source *source)
{
    compress(set, shared);
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_PADDED, source);
    p.tensors.block_mask = &set->mask;
    hyperattn_params params = blocks_params(HYPERATTN_MASK_NONE, HYPERATTN_RESIDUAL_NONE);
    CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
    reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, in_pattern, set);
    reference_check(&r, &p.tensors);
    reference_destroy(&r);
    problem_destroy(&p);
}

static void patterns_without_residual(random_source *source)
{
    pattern_set set;
    memset(&set, 0, sizeof set);
    check_case("block-diagonal, one pattern for all heads");
    for (int i = 0; i < QUERY_BLOCKS; i += 1) {
        set.present[0][i][i] = true;
    }
    expect_pattern(&set, true, source);

    check_case("a pattern for every batch item and head");
    memset(set.present, 0, sizeof set.present);
    for (int head = 0; head < BATCH * HEADS; head += 1) {
        for (int i = 0; i < QUERY_BLOCKS; i += 1) {
            set.present[head][i][(i + head) % KEY_BLOCKS] = true;
            set.present[head][i][0] = head % 2 == 0;
        }
    }
    expect_pattern(&set, false, source);

    check_case("a row of blocks without any key");
    memset(set.present, 0, sizeof set.present);
    set.present[0][0][4] = true;
    set.present[0][2][1] = true;
    set.present[0][4][0] = true;
    expect_pattern(&set, true, source);
}

/* With a residual the blocks stay exact and the rest is sampled: much better than a fifth of the keys. */
static void residual_fills_the_rest(random_source *source)
{
    pattern_set set;
    memset(&set, 0, sizeof set);
    for (int i = 0; i < QUERY_BLOCKS; i += 1) {
        set.present[0][i][i] = true;
    }
    compress(&set, true);
    problem p = problem_create(&SHAPE, HYPERATTN_DTYPE_F32, HYPERATTN_DTYPE_F32, ARRAY_BHSD, source);
    p.tensors.block_mask = &set.mask;
    reference r = reference_compute(&p.tensors, HYPERATTN_MASK_NONE, 0.0, NULL, NULL);
    double errors[3];
    for (uint32_t residual = 0; residual < 3; residual += 1) {
        check_case("block-diagonal with residual %u", residual);
        hyperattn_params params = blocks_params(HYPERATTN_MASK_NONE, residual);
        params.sample_size = 2048;
        problem_poison_outputs(&p);
        CHECK_OK(hyperattn_forward(&params, &p.tensors, NULL));
        CHECK(tensor_all_finite(&p.out.view));
        errors[residual] = reference_error(&r, &p.out.view);
    }
    printf("block-diagonal: error %.3f uniform, %.3f row-norm, %.3f blocks alone\n", errors[0], errors[1], errors[2]);
    CHECK_BELOW(errors[HYPERATTN_RESIDUAL_UNIFORM], 0.5 * errors[HYPERATTN_RESIDUAL_NONE]);
    CHECK_BELOW(errors[HYPERATTN_RESIDUAL_ROW_NORM], 0.5 * errors[HYPERATTN_RESIDUAL_NONE]);
    reference_destroy(&r);
    problem_destroy(&p);
}

int main(int argc, char **argv)
{
    random_source source = {check_start("block_mask", argc, argv)};
    all_blocks_equal_exact(&source);
    patterns_without_residual(&source);
    residual_fills_the_rest(&source);
    return check_finish();
}
