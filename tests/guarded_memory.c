/* Preloaded (guarded.py), gives every tensor pages of its own between two that must not be touched: one element read or written
   beyond its end crashes, or before its beginning with GUARDED_END=low. PyTorch's memory comes from posix_memalign. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
#define SLOTS (1u << 20)
#define FREED ((void *)-1)

struct block {
    void *start; /* what the caller has */
    void *pages;
    size_t length;
};

static struct block table[SLOTS]; /* open addressing */
static uintptr_t lowest = UINTPTR_MAX, highest; /* a look at these spares malloc's memory the search */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t first_slot(void *start) { return ((uintptr_t)start >> 4) * 11400714819323198485u >> 44; }

int posix_memalign(void **out, size_t alignment, size_t size) {
    size_t room = ((size ? size : 1) + PAGE - 1) / PAGE * PAGE;
    if (alignment > PAGE) return ENOMEM;
    char *pages = mmap(0, room + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return ENOMEM;
    mprotect(pages, PAGE, PROT_NONE);
    mprotect(pages + PAGE + room, PAGE, PROT_NONE);
    const char *end = getenv("GUARDED_END");
    /* PyTorch asks for 64 bytes, but vectors need no more than the 16 that rows are multiples of. */
    size_t step = alignment > 64 ? alignment : 16;
    char *start = end && !strcmp(end, "low") ? pages + PAGE : pages + PAGE + (room - size) / step * step;

    pthread_mutex_lock(&lock);
    size_t slot = first_slot(start);
    while (table[slot].start && table[slot].start != FREED) slot = (slot + 1) % SLOTS;
    table[slot] = (struct block){start, pages, room + 2 * PAGE};
    if ((uintptr_t)start < lowest) lowest = (uintptr_t)start;
    if ((uintptr_t)start > highest) highest = (uintptr_t)start;
    pthread_mutex_unlock(&lock);
    *out = start;
    return 0;
}

void free(void *start) {
    static void (*next)(void *);
    if (!next) next = (void (*)(void *))dlsym(RTLD_NEXT, "free");
    if ((uintptr_t)start < lowest || (uintptr_t)start > highest) {
        next(start);
        return;
    }
    pthread_mutex_lock(&lock);
    size_t slot = first_slot(start);
    while (table[slot].start && table[slot].start != start) slot = (slot + 1) % SLOTS;
    struct block found = table[slot];
    if (found.start) table[slot].start = FREED;
    pthread_mutex_unlock(&lock);
    if (found.start)
        munmap(found.pages, found.length);
    else
        next(start);
}
