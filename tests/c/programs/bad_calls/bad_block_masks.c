/* Wrong hyperattn_block_mask. */
#include "bad_calls.h"

#define BAD_MASK(change, status, ...) \
    do { \
        bad_call c; \
        bad_call_fresh_block_mask(&c); \
        change; \
        bad_call_expect(#change, &c, status, PARTS(__VA_ARGS__)); \
    } while (0)

void bad_block_masks(void)
{
    BAD_MASK(c.block_mask.struct_size = 0, HYPERATTN_STATUS_ABI_MISMATCH, "block_mask.struct_size", "0");
    BAD_MASK(c.block_mask.struct_size = 10, HYPERATTN_STATUS_ABI_MISMATCH, "block_mask.struct_size", "10");
    BAD_MASK(c.block_mask.query_block = 0, INVALID, "block_mask.query_block", "0");
    BAD_MASK(c.block_mask.key_block = 0, INVALID, "block_mask.key_block", "0");
    BAD_MASK(c.block_mask.num_query_blocks = 2, INVALID, "block_mask.num_query_blocks", "2", "3");
    BAD_MASK(c.block_mask.num_query_blocks = -3, INVALID, "block_mask.num_query_blocks", "-3");
    BAD_MASK(c.block_mask.num_key_blocks = 3, INVALID, "block_mask.num_key_blocks", "3", "2");
    BAD_MASK(c.block_mask.row_offsets = NULL, INVALID, "block_mask.row_offsets", "NULL");
    BAD_MASK(c.block_mask.columns = NULL, INVALID, "block_mask.columns", "NULL");
    BAD_MASK(c.block_mask.row_offsets_head_stride = -4, INVALID, "block_mask.row_offsets_head_stride", "-4");
    BAD_MASK(c.block_mask.row_offsets_head_stride = INT64_MAX, INVALID, "block_mask.row_offsets_head_stride",
             "9223372036854775807");
    BAD_MASK(c.row_offsets[0] = -1, INVALID, "block_mask.row_offsets", "-1");
    BAD_MASK(c.row_offsets[0] = 2, INVALID, "block_mask.row_offsets", "2", "1");
    BAD_MASK(c.row_offsets[3] = 2, INVALID, "block_mask.row_offsets", "3", "2");
    BAD_MASK(c.columns[1] = -1, INVALID, "block_mask.columns", "-1");
    BAD_MASK(c.columns[2] = 2, INVALID, "block_mask.columns", "2");
    BAD_MASK((c.columns[1] = 1, c.columns[2] = 0), INVALID, "block_mask.columns");
    BAD_MASK(c.columns[2] = 0, INVALID, "block_mask.columns");
    BAD_MASK(c.params.method = HYPERATTN_METHOD_EXACT, INVALID, "block_mask", "method");
}
