#define _DEFAULT_SOURCE
#include "array.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "half.h"

enum { GUARD_BYTES = 256, FILL = 0xff };

size_t dtype_size(hyperattn_dtype dtype)
{
    return dtype == HYPERATTN_DTYPE_F32 ? 4 : 2;
}

static hyperattn_tensor layout_view(hyperattn_dtype dtype, array_layout layout, const int64_t shape[4])
{
    hyperattn_tensor view;
    memset(&view, 0, sizeof view);
    view.dtype = dtype;
    memcpy(view.shape, shape, sizeof view.shape);
    int64_t batch = shape[0], heads = shape[1], rows = shape[2], columns = shape[3];
    (void)batch;
    view.stride[3] = 1;
    switch (layout) {
    case ARRAY_BSHD:
        view.stride[2] = heads * columns;
        view.stride[1] = columns;
        view.stride[0] = rows * heads * columns;
        break;
    case ARRAY_PADDED:
        view.stride[2] = columns + 5;
        view.stride[1] = rows * view.stride[2] + 7;
        view.stride[0] = heads * view.stride[1] + 11;
        /* With one column the last stride is never used, and any value is legal. */
        view.stride[3] = columns == 1 ? 9 : 1;
        break;
    default:
        view.stride[2] = columns;
        view.stride[1] = rows * columns;
        view.stride[0] = layout == ARRAY_BROADCAST_BATCH ? 0 : heads * rows * columns;
        break;
    }
    return view;
}

int64_t tensor_elements(const hyperattn_tensor *view)
{
    return view->shape[0] * view->shape[1] * view->shape[2] * view->shape[3];
}

int64_t tensor_offset(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, int64_t column)
{
    return batch * view->stride[0] + head * view->stride[1] + row * view->stride[2] + column * view->stride[3];
}

array array_create(hyperattn_dtype dtype, array_layout layout, int64_t batch, int64_t heads, int64_t sequence,
                   int64_t head_dim)
{
    const int64_t shape[4] = {batch, heads, sequence, head_dim};
    array a;
    a.view = layout_view(dtype, layout, shape);
    size_t size = 0;
    if (tensor_elements(&a.view) > 0) {
        int64_t last = tensor_offset(&a.view, batch - 1, heads - 1, sequence - 1, head_dim - 1);
        size = (size_t)(last + 1) * dtype_size(dtype);
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t body = (GUARD_BYTES + size + page - 1) / page * page;
    a.mapped = body + page;
    void *pages = mmap(NULL, a.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect((unsigned char *)pages + body, page, PROT_NONE) != 0) {
        perror("array_create");
        exit(EXIT_FAILURE);
    }
    a.pages = (unsigned char *)pages;
    a.end = a.pages + body;
    a.view.data = a.end - size;
    array_poison(&a);
    return a;
}

void array_destroy(array *a)
{
    munmap(a->pages, a->mapped);
    memset(a, 0, sizeof *a);
}

void array_poison(array *a)
{
    memset(a->pages, FILL, (size_t)(a->end - a->pages));
}

double tensor_get(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, int64_t column)
{
    int64_t at = tensor_offset(view, batch, head, row, column);
    switch (view->dtype) {
    case HYPERATTN_DTYPE_F32:
        return (double)((const float *)view->data)[at];
    case HYPERATTN_DTYPE_F16:
        return (double)float_from_f16(((const uint16_t *)view->data)[at]);
    default:
        return (double)float_from_bf16(((const uint16_t *)view->data)[at]);
    }
}

void tensor_set(const hyperattn_tensor *view, int64_t batch, int64_t head, int64_t row, int64_t column, double value)
{
    int64_t at = tensor_offset(view, batch, head, row, column);
    switch (view->dtype) {
    case HYPERATTN_DTYPE_F32:
        ((float *)view->data)[at] = (float)value;
        break;
    case HYPERATTN_DTYPE_F16:
        ((uint16_t *)view->data)[at] = f16_from_float((float)value);
        break;
    default:
        ((uint16_t *)view->data)[at] = bf16_from_float((float)value);
        break;
    }
}

/* The next index in row-major order; false after the last. */
static bool next_index(const hyperattn_tensor *view, int64_t index[4])
{
    for (int axis = 3; axis >= 0; axis -= 1) {
        index[axis] += 1;
        if (index[axis] < view->shape[axis]) {
            return true;
        }
        index[axis] = 0;
    }
    return false;
}

static unsigned char *element(const hyperattn_tensor *view, const int64_t index[4])
{
    int64_t at = tensor_offset(view, index[0], index[1], index[2], index[3]);
    return (unsigned char *)view->data + (size_t)at * dtype_size(view->dtype);
}

bool tensor_same_bits(const hyperattn_tensor *a, const hyperattn_tensor *b)
{
    if (a->dtype != b->dtype || memcmp(a->shape, b->shape, sizeof a->shape) != 0) {
        return false;
    }
    if (tensor_elements(a) == 0) {
        return true;
    }
    int64_t index[4] = {0, 0, 0, 0};
    do {
        if (memcmp(element(a, index), element(b, index), dtype_size(a->dtype)) != 0) {
            return false;
        }
    } while (next_index(a, index));
    return true;
}

bool tensor_all_finite(const hyperattn_tensor *view)
{
    if (tensor_elements(view) == 0) {
        return true;
    }
    int64_t index[4] = {0, 0, 0, 0};
    do {
        if (!isfinite(tensor_get(view, index[0], index[1], index[2], index[3]))) {
            return false;
        }
    } while (next_index(view, index));
    return true;
}

void tensor_fill_gaussian(const hyperattn_tensor *view, random_source *source, double deviation, double mean)
{
    if (tensor_elements(view) == 0) {
        return;
    }
    int64_t index[4] = {0, 0, 0, 0};
    do {
        double value = deviation * random_gaussian(source) + mean;
        tensor_set(view, index[0], index[1], index[2], index[3], value);
    } while (next_index(view, index));
}

size_t array_changed_outside(const array *a)
{
    size_t size = (size_t)(a->end - a->pages);
    unsigned char *copy = (unsigned char *)malloc(size);
    memcpy(copy, a->pages, size);
    if (tensor_elements(&a->view) > 0) {
        int64_t index[4] = {0, 0, 0, 0};
        do {
            memset(copy + (element(&a->view, index) - a->pages), FILL, dtype_size(a->view.dtype));
        } while (next_index(&a->view, index));
    }
    size_t changed = 0;
    for (size_t i = 0; i < size; i += 1) {
        changed += copy[i] != FILL;
    }
    free(copy);
    return changed;
}

bool array_untouched(const array *a)
{
    for (const unsigned char *byte = a->pages; byte < a->end; byte += 1) {
        if (*byte != FILL) {
            return false;
        }
    }
    return true;
}

uint64_t array_hash(const array *a)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (const unsigned char *byte = a->pages; byte < a->end; byte += 1) {
        hash = (hash ^ *byte) * UINT64_C(0x100000001b3);
    }
    return hash;
}
