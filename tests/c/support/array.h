/* Test tensors. The last element ends at a page that can be neither read nor written, so a kernel that reaches past a
 * tensor crashes; every byte that belongs to no element is filled and can be checked afterwards. */
#ifndef ARRAY_H
#define ARRAY_H

#include <hyperattn/hyperattn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "random.h"

typedef enum array_layout {
    ARRAY_BHSD,            /* contiguous [batch, heads, sequence, head_dim] */
    ARRAY_BSHD,            /* contiguous [batch, sequence, heads, head_dim] */
    ARRAY_PADDED,          /* gaps between rows, heads and batch items */
    ARRAY_BROADCAST_BATCH, /* stride[0] = 0; for inputs only */
    ARRAY_LAYOUTS
} array_layout;

typedef struct array {
    hyperattn_tensor view;
    unsigned char *pages; /* the mapping; the fence is its last page */
    size_t mapped;
    unsigned char *end; /* one past the last element: the fence */
} array;

size_t dtype_size(hyperattn_dtype dtype);

/* Every byte is 0xff: a NaN in every dtype. */
array array_create(hyperattn_dtype dtype, array_layout layout, int64_t batch, int64_t heads, int64_t sequence,
                   int64_t head_dim);
void array_destroy(array *a);
/* Back to 0xff everywhere. */
void array_poison(array *a);

int64_t tensor_offset(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, int64_t column);
double tensor_get(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, int64_t column);
void tensor_set(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, int64_t column, double value);
int64_t tensor_elements(const hyperattn_tensor *view);
/* True when both have the same shape and dtype and every element has the same bits. */
bool tensor_same_bits(const hyperattn_tensor *a, const hyperattn_tensor *b);
bool tensor_all_finite(const hyperattn_tensor *view);

/* Fills with deviation * N(0, 1) + mean. */
void tensor_fill_gaussian(const hyperattn_tensor *view, random_source *source, double deviation, double mean);

/* The number of bytes before, between and behind the elements that are no longer 0xff. */
size_t array_changed_outside(const array *a);
/* True when every byte, elements included, is 0xff. */
bool array_untouched(const array *a);
/* A hash of all bytes, to see that inputs stay as they were. */
uint64_t array_hash(const array *a);

#endif
