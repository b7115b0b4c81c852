/* A workspace of exactly the size and no more than the alignment that the library asked for. */
#ifndef WORKSPACE_H
#define WORKSPACE_H

#include <hyperattn/hyperattn.h>
#include <stdbool.h>

typedef struct workspace {
    hyperattn_buffer buffer;
    unsigned char *pages;
    size_t mapped;
} workspace;

/* `fill` is what every byte holds at first. Behind the buffer, less than two alignments away, lies a page that can be
 * neither read nor written. */
workspace workspace_create(hyperattn_layout layout, unsigned char fill);
void workspace_destroy(workspace *w);
/* True when the bytes before and behind the buffer are still as created. */
bool workspace_surroundings_unchanged(const workspace *w);

#endif
