// The functions of fastlstm.h: arguments are checked, a kernel is chosen, memory is found, the threads run.
#include <stdlib.h>
#include <string.h>

#include "job.h"
#include "threads.h"

using namespace fastlstm;

namespace {

constexpr int64_t MAX_THREADS = 256, LARGEST = INT64_C(1) << 40;
constexpr int64_t CHUNK_ROWS = 128;  // (step, row) pairs whose dpreact is turned into gradients together
// Up to this size of the sums over (step, row) pairs, or half of it where batch rows are few but steps many, each half of
// the batch rows has its own: a thread's are then over what it has in its cache. It depends on nothing but the shape, so
// that the bits do not on the threads.
constexpr int64_t HALF_BYTES = 1 << 19;
constexpr int64_t FEW_ROWS = 128;  // (step, row) pairs whose weight gradients are written row by row, less for padding

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

const Kernels *kernels_of(int64_t instructions) {
#ifdef __x86_64__
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
    if (avx512 && (instructions == FASTLSTM_BEST || instructions == FASTLSTM_AVX512)) return &avx512_kernels;
    if (avx2 && (instructions == FASTLSTM_BEST || instructions == FASTLSTM_AVX2)) return &avx2_kernels;
#endif
    return instructions == FASTLSTM_BEST || instructions == FASTLSTM_BASE ? &base_kernels : nullptr;
}

const Tasks &backward_of([[maybe_unused]] const Kernels &kernels) {
#ifdef __x86_64__
    if (&kernels == &avx512_kernels) return avx512_backward;
    if (&kernels == &avx2_kernels) return avx2_backward;
#endif
    return base_backward;
}

bool is_dtype(int64_t dtype) { return dtype == FASTLSTM_FLOAT32 || dtype == FASTLSTM_FLOAT64; }
int64_t size_of(int64_t dtype) { return dtype == FASTLSTM_FLOAT32 ? 4 : 8; }

// The product of sizes, or -1 where one is below 1 or the result would be no array's size
int64_t product_of(int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
    int64_t total = 1;
    const int64_t sizes[] = {a, b, c, d};
    for (int64_t size : sizes) {
        if (size < 1 || size > LARGEST || total > LARGEST / size) return -1;
        total *= size;
    }
    return total;
}

// Whether the last of so many things, so many elements apart in either direction, is in reach.
bool is_stride(int64_t count, int64_t stride) {
    const int64_t most = LARGEST / count;
    return -most <= stride && stride <= most;
}

// Whether 4H rows of so many columns lie so many elements apart: a weight's rows do not overlap.
template <class Args> bool is_weight_row(const Args &a, int64_t columns, int64_t row) {
    return row >= columns && is_stride(4 * a.H, row);
}
template <class Args> bool are_weight_rows(const Args &a) {
    return is_weight_row(a, a.I, a.weight_ih_row) && is_weight_row(a, a.H, a.weight_hh_row);
}
template <class Args> bool are_input_strides(const Args &a) {
    return is_stride(a.T, a.x_step) && is_stride(a.B, a.x_row) && is_stride(a.B, a.h_0_row) && is_stride(a.B, a.c_0_row);
}

template <class Args> int check_common(const Args &a) {
    if (a.version != FASTLSTM_VERSION) return FASTLSTM_BAD_VERSION;
    if (!is_dtype(a.dtype) || a.I < 1 || a.H < 1 || a.I > LARGEST || a.H > LARGEST ||
        product_of(a.T, a.B, a.I + 64) < 0 || product_of(a.T, a.B, a.H + 64, 4) < 0 ||
        product_of(a.H + 64, a.I + a.H + 64, 4) < 0)
        return FASTLSTM_BAD_ARGUMENT;
    return kernels_of(a.instructions) ? FASTLSTM_OK : FASTLSTM_NO_INSTRUCTIONS;
}

int check(const fastlstm_forward_args *a) {
    if (!a) return FASTLSTM_BAD_ARGUMENT;
    if (int code = check_common(*a)) return code;
    bool weights = (a->packed && !a->changed) || (a->weight_ih && a->weight_hh && are_weight_rows(*a));
    bool right = weights && a->x && (a->h || a->T == 1) && a->h_n && a->c_n && !a->c == !a->gates && are_input_strides(*a);
    return right ? FASTLSTM_OK : FASTLSTM_BAD_ARGUMENT;
}

int check(const fastlstm_backward_args *a) {
    if (!a) return FASTLSTM_BAD_ARGUMENT;
    if (int code = check_common(*a)) return code;
    bool right = a->x && (!a->dx || a->weight_ih) && a->weight_hh && (a->h || a->T == 1) && a->c && a->gates;
    right = right && is_weight_row(*a, a->H, a->weight_hh_row) && (!a->dx || is_weight_row(*a, a->I, a->weight_ih_row));
    right = right && are_input_strides(*a) && is_stride(a->T, a->dh_step) && is_stride(a->B, a->dh_row) &&
            is_stride(a->T, a->dc_step) && is_stride(a->B, a->dc_row) && is_stride(a->B, a->dh_n_row) &&
            is_stride(a->B, a->dc_n_row);
    return right ? FASTLSTM_OK : FASTLSTM_BAD_ARGUMENT;
}

// Scratch of one call, in one piece: told of everything first, then taken. Each part is on cache lines of its own.
class Memory {
    struct Part {
        void **place;
        int64_t at;
    } parts[8];
    int count = 0;
    int64_t total = 0;
    void *memory = nullptr;

  public:
    void want(void *&place, int64_t bytes) {
        parts[count++] = {&place, total};
        total += (bytes + 63) / 64 * 64;
    }
    bool take() {
        if (total && posix_memalign(&memory, 64, (size_t)total)) return false;
        for (int k = 0; k < count; k++) *parts[k].place = (char *)memory + parts[k].at;
        return true;
    }
    ~Memory() { free(memory); }
    Memory() = default;
    Memory(const Memory &) = delete;
};

// Threads, and into how many parts they split the batch rows; threads within a part split the units.
//
// Parts meet nobody, but each reads all weights; a split of units halves what a thread reads, for a barrier of a
// microsecond a step. So a part is given the rows that make its products last longer than its reading, few where weights
// are few, but no more than fill a pass over a panel; and all other threads go to units.
struct Split {
    int64_t threads = 1, parts = 1;
    Barrier barriers[MAX_THREADS + 2];  // those of the parts there are

    // back: of the backward pass, whose steps read weight_hh alone
    Split(int64_t T, int64_t B, int64_t I, int64_t H, int64_t panels, const fastlstm_threads *asked, bool back) {
        if (asked && asked->count > 1) {
            threads = min(asked->count, MAX_THREADS);
            const int64_t K = I + H, enough = min(64, max(2, 16 * H * (back ? H : K) >> 15));
            parts = min(threads, max(max(1, B / enough), min(ceil_div(threads, panels), B / 2)));
            // multiply-adds of a step: for fewer the barrier would cost what the second thread saves
            if (parts < threads && (double)B * 4 * H * K < 75000) threads = parts;
            threads = min(threads, parts * panels);
            // and of a call, with 32 more a sum for the cells: for fewer waking it would
            if (parts == threads && (double)T * B * 4 * (H + 8) * (K + 32) < 1000000) threads = parts = 1;
        }
        for (int64_t k = 0; k < parts + 2; k++) barriers[k].arrived = 0;
    }
};

void run(fastlstm_task task, void *job, int64_t threads, const fastlstm_threads *asked) {
    if (threads == 1)
        task(job, 0, 1);
    else if (asked->parallel)
        asked->parallel(asked->context, task, job, (int)threads);
    else
        run_in_pool(task, job, (int)threads);
}

// Zeros for the initial states that are not given
struct Zeros {
    void *at = nullptr;
    int64_t bytes;

    template <class Args> Zeros(const Args &a, Memory &memory) : bytes(a.H * size_of(a.dtype)) {
        if (!a.h_0 || !a.c_0) memory.want(at, bytes);
    }
    template <class Args> void give(Args &a) const {
        if (at) memset(at, 0, (size_t)bytes);
        if (!a.h_0) a.h_0 = at, a.h_0_row = 0;
        if (!a.c_0) a.c_0 = at, a.c_0_row = 0;
    }
};

}  // namespace

int fastlstm_version(void) { return FASTLSTM_VERSION; }

const char *fastlstm_error_text(int code) {
    static const char *const texts[] = {
        "no error",
        "the structure is of another version of the interface",
        "a size, stride or pointer cannot be",
        "no memory is left",
        "the processor or this build lacks the instruction set asked for",
        "the file cannot be opened or read",
        "the file is not a fastlstm model",
        "the file's format is newer than this library",
        "the file is truncated, or longer than it says",
        "the file is corrupt",
    };
    return code >= 0 && code < (int)(sizeof texts / sizeof *texts) ? texts[code] : "unknown error";
}

const char *fastlstm_instructions_name(int instructions) {
    const Kernels *kernels = kernels_of(instructions);
    return kernels ? kernels->name : nullptr;
}

int64_t fastlstm_lanes(int64_t dtype, int64_t instructions) {
    const Kernels *kernels = kernels_of(instructions);
    return kernels && is_dtype(dtype) ? kernels->vector_bytes / size_of(dtype) : 0;
}

size_t fastlstm_gates_size(int64_t dtype, int64_t instructions, int64_t T, int64_t B, int64_t H) {
    int64_t lanes = fastlstm_lanes(dtype, instructions);
    if (!lanes || H < 1 || H > LARGEST || product_of(T, B, H + 64, 4) < 0) return 0;
    return (size_t)(T * B * ceil_div(H, lanes) * 4 * lanes * size_of(dtype));
}

size_t fastlstm_packed_size(int64_t dtype, int64_t instructions, int64_t I, int64_t H) {
    int64_t lanes = fastlstm_lanes(dtype, instructions);
    if (!lanes || I < 1 || H < 1 || I > LARGEST || H > LARGEST || product_of(H + 64, I + H + 64, 4) < 0) return 0;
    const int64_t vectors = (I + H + 1) * 4 + digest_vectors(lanes * size_of(dtype));  // see ForwardJob
    return (size_t)(ceil_div(H, lanes) * vectors * lanes * size_of(dtype));
}

int fastlstm_pack(const fastlstm_forward_args *args, void *packed) {
    if (!args || !packed) return FASTLSTM_BAD_ARGUMENT;
    fastlstm_forward_args a = *args;
    a.T = a.B = 1;
    if (int code = check_common(a)) return code;
    if (!a.weight_ih || !a.weight_hh || !are_weight_rows(a)) return FASTLSTM_BAD_ARGUMENT;
    kernels_of(a.instructions)->pack[a.dtype](&a, packed);
    return FASTLSTM_OK;
}

int fastlstm_forward(const fastlstm_forward_args *args, const fastlstm_threads *threads) {
    if (int code = check(args)) return code;
    fastlstm_forward_args a = *args;
    const Kernels &kernels = *kernels_of(a.instructions);
    const int64_t size = size_of(a.dtype), lanes = kernels.vector_bytes / size;
    Split split(a.T, a.B, a.I, a.H, ceil_div(a.H, lanes), threads, false);
    ForwardJob job = {};
    job.args = &a, job.parts = split.parts, job.barriers = split.barriers;
    job.pack = !a.packed, job.packed = (void *)a.packed;
    Memory memory;
    const Zeros zeros(a, memory);
    const int64_t panels = ceil_div(a.H, lanes);
    job.panels = job.pack && a.T == 1 && split.parts == 1 ? split.threads : panels;
    if (job.pack) memory.want(job.packed, (job.panels * (a.I + a.H) + panels) * 4 * lanes * size);
    if (a.reset) memory.want(job.resets, split.threads * a.B * a.H * size);
    if (!memory.take()) return FASTLSTM_NO_MEMORY;
    zeros.give(a);
    if (!a.h) a.h = a.h_n;
    if (a.changed) *a.changed = 0;
    run(kernels.forward[a.dtype], &job, split.threads, threads);
    return FASTLSTM_OK;
}

int fastlstm_step(int64_t dtype, int64_t instructions, int64_t B, int64_t I, int64_t H, const void *packed, const void *x,
                  const void *h, void *c, void *h_next, const fastlstm_threads *threads) {
    if (!packed || !h || !c || h == h_next) return FASTLSTM_BAD_ARGUMENT;
    fastlstm_forward_args a = {};
    a.version = FASTLSTM_VERSION, a.dtype = dtype, a.instructions = instructions;
    a.T = 1, a.B = B, a.I = I, a.H = H;
    a.x = x, a.x_row = I, a.packed = packed, a.h_0 = h, a.h_0_row = H, a.c_0 = c, a.c_0_row = H;
    a.h_n = h_next, a.c_n = c;
    return fastlstm_forward(&a, threads);
}

int fastlstm_backward(const fastlstm_backward_args *args, const fastlstm_threads *threads) {
    if (int code = check(args)) return code;
    fastlstm_backward_args a = *args;
    const Kernels &kernels = *kernels_of(a.instructions);
    const int64_t size = size_of(a.dtype), lanes = kernels.vector_bytes / size, wide = 4 * lanes;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, panels = ceil_div(H, lanes);
    Split split(T, B, I, H, panels, threads, true);
    BackwardJob job = {};
    job.args = &a, job.parts = split.parts, job.barriers = split.barriers;
    job.chunk = ceil_div(T, max(1, (T * B + CHUNK_ROWS / 2) / CHUNK_ROWS));
    job.ring = min(4, ceil_div(T, job.chunk));
    const int64_t dweights = panels * (I + H + 1) * wide * size;
    const bool many = B >= 4 && T * B >= 1024 && dweights <= HALF_BYTES / 2;
    job.halves = many || (B >= 128 && dweights <= HALF_BYTES) ? 2 : 1;
    int64_t columns = (ceil_div(I, wide) + ceil_div(H, wide)) * wide;
    const bool few = T * B <= FEW_ROWS && T * B * columns <= FEW_ROWS * (I + H);
    if (!few) columns = ceil_div(I + H + 1, STRIP) * STRIP;
    job.strip_size = job.chunk * B * columns;
    const int64_t group = panels * wide * wide * size;  // bytes of four vectors of transposed weights

    Memory memory;
    const Zeros zeros(a, memory);
    memory.want(job.dpreact, panels * job.ring * job.chunk * B * wide * size);
    memory.want(job.carried, panels * B * lanes * (a.lengths ? 2 : 1) * size);
    if (T > 1 || a.dh_0) memory.want(job.packed_hh, ceil_div(H, wide) * group);
    if (a.dx) memory.want(job.packed_ih, ceil_div(I, wide) * group);
    if (a.dweight_ih || a.dweight_hh || a.dbias) {
        memory.want(job.strips, job.ring * job.strip_size * size);
        if (!few) memory.want(job.dweights, job.halves * dweights);
    }
    if (!memory.take()) return FASTLSTM_NO_MEMORY;
    zeros.give(a);
    run(backward_of(kernels)[a.dtype], &job, split.threads, threads);
    return FASTLSTM_OK;
}
