#define _DEFAULT_SOURCE
#include "workspace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SURROUNDINGS = 0x5a };

workspace workspace_create(hyperattn_layout layout, unsigned char fill)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t align = layout.align == 0 ? 1 : layout.align;
    size_t body = (layout.size + 3 * align + page - 1) / page * page;
    workspace w;
    w.mapped = body + page;
    void *pages = mmap(NULL, w.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect((unsigned char *)pages + body, page, PROT_NONE) != 0) {
        perror("workspace_create");
        exit(EXIT_FAILURE);
    }
    w.pages = (unsigned char *)pages;
    memset(w.pages, SURROUNDINGS, body);
    /* As close to the fence as the alignment allows, and not aligned to twice as much as was asked for. */
    uintptr_t address = ((uintptr_t)w.pages + body - layout.size) / align * align;
    if (address % (2 * align) == 0) {
        address -= align;
    }
    w.buffer.data = w.pages + (address - (uintptr_t)w.pages);
    w.buffer.size = layout.size;
    memset(w.buffer.data, fill, layout.size);
    return w;
}

void workspace_destroy(workspace *w)
{
    munmap(w->pages, w->mapped);
    memset(w, 0, sizeof *w);
}

bool workspace_surroundings_unchanged(const workspace *w)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const unsigned char *start = (const unsigned char *)w->buffer.data, *end = start + w->buffer.size;
    for (const unsigned char *byte = w->pages; byte < w->pages + w->mapped - page; byte += 1) {
        if ((byte < start || byte >= end) && *byte != SURROUNDINGS) {
            return false;
        }
    }
    return true;
}
