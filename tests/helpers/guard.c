/* Memory between unreadable pages, for `tests.helpers.guarded`, which loads this library before all others.
 *
 * While `guard_on` is set, posix_memalign, from which torch and csrc/ have their memory, gives each block pages of its
 * own. The block lies at their end, or with `guard_begin` at their beginning. It is filled with NaN. The rest of its
 * pages has a pattern, which free() looks at. Freed pages become unreadable, and are never used again.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, REST = 0xA5, NANS = 0xFF };
static const size_t ARENA = (size_t)1 << 36, LARGEST = (size_t)1 << 26;

typedef struct { char *address; size_t size; } Block;
int guard_on = 0, guard_begin = 0;
static char *arena;
static Block *blocks; /* by the page of their first byte */
static size_t next_page = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int (*plain_memalign)(void **, size_t, size_t);
static void (*plain_free)(void *);

__attribute__((constructor)) static void start(void) {
    plain_memalign = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    plain_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    blocks = mmap(0, ARENA / PAGE * sizeof(Block), PROT_READ | PROT_WRITE, flags, -1, 0);
    arena = mmap(0, ARENA, PROT_NONE, flags, -1, 0);
}

static Block *block_of(const void *address) { return blocks + ((const char *)address - arena) / PAGE; }
static size_t pages_of(size_t bytes) { return bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE; }
static char *first_page(const Block *block) { return block->address - (block->address - arena) % PAGE; }
static char *last_page_end(const Block *block) {
    return first_page(block) + pages_of(block->address + block->size - first_page(block));
}

void *guard_alloc(size_t alignment, size_t size) {
    const size_t padded = (size + !size + alignment - 1) / alignment * alignment, bytes = pages_of(padded);
    pthread_mutex_lock(&lock);
    char *pages = arena + next_page * PAGE;
    next_page += bytes / PAGE + 1; /* an unreadable page follows */
    pthread_mutex_unlock(&lock);
    if (next_page * PAGE > ARENA || mprotect(pages, bytes, PROT_READ | PROT_WRITE)) return NULL;
    char *address = guard_begin ? pages : pages + bytes - padded;
    memset(pages, REST, bytes);
    memset(address, NANS, size);
    *block_of(address) = (Block){address, size};
    return address;
}

void guard_protect(void *address, int may_write) {
    const Block *block = block_of(address);
    mprotect(first_page(block), last_page_end(block) - first_page(block), PROT_READ | (may_write ? PROT_WRITE : 0));
}

void guard_free(void *address) {
    Block *block = block_of(address);
    char *begin = first_page(block), *end = last_page_end(block);
    for (char *c = begin; c < end; c++)
        if ((c < block->address || c >= block->address + block->size) && *c != (char)REST) {
            fprintf(stderr, "written %td bytes from a block of %zu bytes\n", c - block->address, block->size);
            abort();
        }
    mprotect(begin, end - begin, PROT_NONE);
    madvise(begin, end - begin, MADV_DONTNEED);
}

int posix_memalign(void **address, size_t alignment, size_t size) {
    if (!guard_on || size > LARGEST) return plain_memalign(address, alignment, size);
    *address = guard_alloc(alignment, size);
    return *address ? 0 : ENOMEM;
}

void free(void *address) {
    if (arena && (char *)address >= arena && (char *)address < arena + ARENA) guard_free(address);
    else if (plain_free) plain_free(address);
}
