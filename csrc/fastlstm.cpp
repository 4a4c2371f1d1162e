// The functions of fastlstm.h: they check arguments, choose a kernel, allocate scratch and run the threads.
#include <stdio.h>

#include "call.h"

#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

using namespace fastlstm;

namespace {

__thread size_t refused_bytes = 0;  // which this thread has last asked for in vain

constexpr int64_t CHUNK_PAIRS = 128;  // (step, row) pairs of a chunk of the backward pass
// Up to so many bytes of accumulators, half with few batch rows but many steps, each half of the rows has its own set,
// so that a thread sums over rows in its cache. Only the shape decides, so that bits do not depend on the threads.
constexpr int64_t SPLIT_K_BYTES = 1 << 19;
constexpr int64_t FEW_PAIRS = 128;  // up to which few_pairs.h computes the weight gradients; fewer where padding is much

#ifdef __x86_64__
#define SETS(name) {&base_##name, &avx2_##name, &avx512_##name}
#define INT8_SETS SETS(int8)
#else
#define SETS(name) {&base_##name}
#ifdef WITH_DOTPROD
#define INT8_SETS {&base_int8, &dotprod_int8}
#else
#define INT8_SETS SETS(int8)
#endif
#endif

// Returns the index in SETS, or in INT8_SETS, of the requested instruction set, or of the widest that runs. If the requested
// one cannot run, that is -1.
int set_of(int64_t instructions, [[maybe_unused]] bool int8 = false) {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && (!int8 || __builtin_cpu_supports("avx512vnni"));
    if (avx512 && (instructions == FASTLSTM_BEST || instructions == FASTLSTM_AVX512)) return 2;
    if (avx2 && (instructions == FASTLSTM_BEST || instructions == FASTLSTM_AVX2)) return 1;
#elif defined(WITH_DOTPROD)
    constexpr unsigned long DOTPROD = 1 << 20;  // HWCAP_ASIMDDP
    if (int8 && instructions == FASTLSTM_BEST && (getauxval(AT_HWCAP) & DOTPROD)) return 1;
#endif
    return instructions == FASTLSTM_BEST || instructions == FASTLSTM_BASE ? 0 : -1;
}

const Kernels *kernels_of(int64_t instructions, int64_t dtype = FASTLSTM_FLOAT32) {
    static const Kernels *const float_kernels[] = SETS(kernels), *const int8_kernels[] = INT8_SETS;
    const int set = set_of(instructions, is_int8(dtype));
    return set < 0 ? nullptr : is_int8(dtype) ? int8_kernels[set] : float_kernels[set];
}

constexpr int64_t MAX_INT8_COLUMNS = 1 << 16;  // of int8 weights, whose sums are of int32

template <class Args> int check_common(const Args &a, bool may_be_int8) {
    if (a.version != FASTLSTM_VERSION) return FASTLSTM_BAD_VERSION;
    const bool int8 = may_be_int8 && is_int8(a.dtype);
    if (!(int8 || is_dtype(a.dtype)) || !is_cell(a.cell) || !are_sizes(a.cell, a.T, a.B, a.I, a.H))
        return FASTLSTM_BAD_ARGUMENT;
    if (int8 && (a.I > MAX_INT8_COLUMNS || a.H > MAX_INT8_COLUMNS)) return FASTLSTM_BAD_ARGUMENT;
    return kernels_of(a.instructions, a.dtype) ? FASTLSTM_OK : FASTLSTM_NO_INSTRUCTIONS;
}

bool are_weights(const fastlstm_forward_args &a) {
    const bool has_scales = !is_int8(a.dtype) || (a.weight_ih_scale && a.weight_hh_scale);
    const bool has_rows = is_weight_row(a, a.I, a.weight_ih_row) && is_weight_row(a, a.H, a.weight_hh_row);
    const bool is_aligned = are_aligned(is_int8(a.dtype) ? 1 : size_of(a.dtype), a.weight_ih, a.weight_hh) &&
            are_aligned(size_of(a.dtype), a.bias_ih, a.bias_hh, a.weight_ih_scale, a.weight_hh_scale);
    return a.weight_ih && a.weight_hh && has_rows && has_scales && is_aligned;
}

int check(const fastlstm_forward_args *a) {
    if (!a) return FASTLSTM_BAD_ARGUMENT;
    if (int code = check_common(*a, true)) return code;
    const bool has_weights = (a->packed && !a->changed) || are_weights(*a), may_save = !is_int8(a->dtype) || !a->gates;
    const bool has_states = cells[a->cell].has_c() ? a->c_n && !a->c == !a->gates : !a->c_0 && !a->c_n && !a->c;
    bool is_right = has_weights && may_save && a->x && (a->h || a->T == 1) && a->h_n && has_states && are_input_strides(*a);
    is_right = is_right && are_aligned(8, a->changed, a->lengths) &&
            are_aligned(size_of(a->dtype), a->x, a->h_0, a->c_0, a->h, a->h_n, a->c_n, a->c, a->gates);
    return is_right ? FASTLSTM_OK : FASTLSTM_BAD_ARGUMENT;
}

int check(const fastlstm_backward_args *a) {
    if (!a) return FASTLSTM_BAD_ARGUMENT;
    if (int code = check_common(*a, false)) return code;
    bool is_right = a->x && (!a->dx || a->weight_ih) && a->weight_hh && (a->h || a->T == 1) && a->gates;
    is_right = is_right && (cells[a->cell].has_c() ? a->c != nullptr : !a->c_0 && !a->c && !a->dc && !a->dc_n && !a->dc_0);
    is_right = is_right && is_weight_row(*a, a->H, a->weight_hh_row) && (!a->dx || is_weight_row(*a, a->I, a->weight_ih_row));
    is_right = is_right && are_input_strides(*a) && is_stride(a->T, a->dh_step) && is_stride(a->B, a->dh_row) &&
            is_stride(a->T, a->dc_step) && is_stride(a->B, a->dc_row) && is_stride(a->B, a->dh_n_row) &&
            is_stride(a->B, a->dc_n_row);
    is_right = is_right && are_aligned(8, a->lengths) &&
            are_aligned(size_of(a->dtype), a->x, a->weight_ih, a->weight_hh, a->h_0, a->c_0, a->h, a->c, a->gates, a->dh, a->dc,
                        a->dh_n, a->dc_n, a->dx, a->dweight_ih, a->dweight_hh, a->dbias_ih, a->dbias_hh, a->dh_0, a->dc_0);
    return is_right ? FASTLSTM_OK : FASTLSTM_BAD_ARGUMENT;
}

// (step, row) pairs of an input block of int8 layers, whose x is multiplied in one pass over the weights
constexpr int64_t INPUT_BLOCK_PAIRS = 48;

// Returns whether the processor has AMX for bytes, and the system lets this process use it. It asks once.
bool may_use_amx() {
#ifdef FASTLSTM_EMULATE_TILES
    return true;
#elif defined(__linux__) && defined(__x86_64__)
    static int known = 0;  // 1 if it is absent, 2 if it is there
    if (const int status = __atomic_load_n(&known, __ATOMIC_RELAXED)) return status == 2;
    constexpr unsigned TILES = 1 << 24, BYTES = 1 << 25;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d = 0;
    const bool can = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & BYTES);
    const bool may = can && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    __atomic_store_n(&known, 1 + may, __ATOMIC_RELAXED);
    return may;
#else
    return false;
#endif
}

// Runs a layer with int8 weights, whose arguments have been checked.
int run_int8(fastlstm_forward_args &a, const Kernels &kernels, const Split &split, const fastlstm_threads *threads) {
    const Cell &cell = cells[a.cell];
    const int64_t panels = ceil_div(a.H, kernels.vector_bytes / 4), act_bytes = a.dtype == FASTLSTM_INT8 ? 1 : 2;
    Barriers barriers(split);
    Int8Job job = {};
    job.args = &a, job.teams = split.teams, job.barriers = barriers.all;
    job.pack = !a.packed, job.packed = (void *)a.packed;
    job.block = max(1, min(a.T, INPUT_BLOCK_PAIRS / a.B)), job.few_rows = a.B <= INPUT_BLOCK_PAIRS / 2;
    job.has_amx = kernels.has_amx && may_use_amx();
    Memory memory;
    Zeros zeros(a, memory);
    const int64_t pairs = job.block * a.B, scale_count = 2 * pairs + 3 * a.B;
    void *x, *h, *scales, *sums_x = nullptr, *carried;
    memory.want(x, 2 * pairs * act_bytes * int8_row_bytes(a.I));
    memory.want(h, 2 * a.B * act_bytes * int8_row_bytes(a.H));
    memory.want(scales, (scale_count + split.threads * a.B) * 4);
    memory.want(carried, panels * a.B * kernels.vector_bytes);
    if (job.few_rows) memory.want(sums_x, panels * pairs * cell.x_preacts * kernels.vector_bytes);
    if (job.pack) memory.want(job.packed, (int64_t)kernels.packed_size[a.cell][act_bytes - 1](a.I, a.H));
    if (!memory.take()) return FASTLSTM_NO_MEMORY;
    job.x = (uint8_t *)x, job.h = (uint8_t *)h, job.sums_x = (float *)sums_x, job.carried = (float *)carried;
    job.scales_x = (float *)scales, job.scales_h = job.scales_x + 2 * pairs, job.scales = job.scales_x + scale_count;
    zeros.replace_absent(a);
    run(kernels.forward[a.cell][act_bytes - 1], &job, split.threads, threads);
    return FASTLSTM_OK;
}

Split split_of(const fastlstm_forward_args &a, const Kernels &kernels, const fastlstm_threads *threads) {
    return {cells[a.cell], a.T, a.B, a.I, a.H, kernels.vector_bytes / size_of(a.dtype), threads, /*is_backward=*/false,
            /*trains=*/a.gates != nullptr, is_int8(a.dtype) ? 1 : 4};
}

// Runs a layer whose arguments have been checked.
int run_layer(fastlstm_forward_args &a, const Kernels &kernels, const Split &split, const fastlstm_threads *threads) {
    if (!a.h) a.h = a.h_n;
    if (a.changed) *a.changed = 0;
    if (is_int8(a.dtype)) return run_int8(a, kernels, split, threads);
    const Cell &cell = cells[a.cell];
    const int64_t size = size_of(a.dtype), lanes = kernels.vector_bytes / size, panels = ceil_div(a.H, lanes);
    Barriers barriers(split);
    ForwardJob job = {};
    job.args = &a, job.teams = split.teams, job.barriers = barriers.all;
    job.pack = !a.packed, job.packed = (void *)a.packed;
    Memory memory;
    Zeros zeros(a, memory);
    job.panels = job.pack && a.T == 1 && split.teams == 1 ? split.threads : panels;
    if (job.pack) memory.want(job.packed, (job.panels * cell.weights(a.I, a.H) + panels * cell.preacts) * lanes * size);
    if (a.reset) memory.want(job.resets, split.threads * a.B * a.H * size);
    if (!memory.take()) return FASTLSTM_NO_MEMORY;
    zeros.replace_absent(a);
    run(kernels.forward[a.cell][a.dtype], &job, split.threads, threads);
    return FASTLSTM_OK;
}

}  // namespace

struct fastlstm_steps {
    fastlstm_forward_args args;  // without x and the states
    const Kernels *kernels;
    StepOfRow step;  // or NULL
    Split split;
    fastlstm_threads threads;
};

int64_t fastlstm_forced_split[2];

int fastlstm_version(void) { return FASTLSTM_VERSION; }

void *fastlstm::allocate(size_t bytes) {
    void *memory;
    if (!posix_memalign(&memory, 64, bytes)) return memory;
    refused_bytes = bytes;
    return nullptr;
}

const char *fastlstm_error_text(int code) {
    static __thread char no_memory[80];
    if (code == FASTLSTM_NO_MEMORY) {
        snprintf(no_memory, sizeof no_memory, "can't allocate memory: you tried to allocate %zu bytes", refused_bytes);
        return no_memory;
    }
    static const char *const texts[] = {
        "no error",
        "the structure is of another version of the interface",
        "a size, stride or pointer cannot be, or an array is not aligned to its elements",
        nullptr,  // FASTLSTM_NO_MEMORY, see above
        "the processor or this build lacks the instruction set asked for",
        "the file cannot be opened or read",
        "the file is not a fastlstm model",
        "the file's format is newer than this library",
        "the file is truncated, or longer than it says",
        "the file is corrupt",
        "the path is that of a folder, a pipe or a device, and not of a file",
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

size_t fastlstm_gates_size(int64_t dtype, int64_t instructions, int64_t cell, int64_t T, int64_t B, int64_t H) {
    int64_t lanes = fastlstm_lanes(dtype, instructions);
    if (!lanes || !is_cell(cell) || !are_sizes(cell, T, B, 1, H)) return 0;
    return (size_t)(T * B * ceil_div(H, lanes) * cells[cell].saved * lanes * size_of(dtype));
}

size_t fastlstm_packed_size(int64_t dtype, int64_t instructions, int64_t cell, int64_t I, int64_t H) {
    const Kernels *kernels = kernels_of(instructions, dtype);
    const bool is_small = !is_int8(dtype) || (I <= MAX_INT8_COLUMNS && H <= MAX_INT8_COLUMNS);
    const bool is_known = kernels && (is_dtype(dtype) || is_int8(dtype)) && is_cell(cell);
    return is_known && is_small && are_sizes(cell, 1, 1, I, H) ? kernels->packed_size[cell][dtype % 2](I, H) : 0;
}

int fastlstm_pack(const fastlstm_forward_args *args, void *packed) {
    if (!args || !packed) return FASTLSTM_BAD_ARGUMENT;
    fastlstm_forward_args a = *args;
    a.T = a.B = 1;
    if (int code = check_common(a, true)) return code;
    if (!are_weights(a)) return FASTLSTM_BAD_ARGUMENT;
    kernels_of(a.instructions, a.dtype)->pack[a.cell][a.dtype % 2](&a, packed);
    return FASTLSTM_OK;
}

int fastlstm_forward(const fastlstm_forward_args *args, const fastlstm_threads *threads) {
    if (int code = check(args)) return code;
    fastlstm_forward_args a = *args;
    const Kernels &kernels = *kernels_of(a.instructions, a.dtype);
    return run_layer(a, kernels, split_of(a, kernels, threads), threads);
}

int fastlstm_steps_make(const fastlstm_forward_args *args, const fastlstm_threads *threads, fastlstm_steps **steps) {
    if (steps) *steps = nullptr;
    if (!args || !steps) return FASTLSTM_BAD_ARGUMENT;
    fastlstm_forward_args from = *args, a = {};
    from.T = 1;
    if (int code = check_common(from, true)) return code;
    if (!are_weights(from)) return FASTLSTM_BAD_ARGUMENT;
    a.version = FASTLSTM_VERSION, a.dtype = from.dtype, a.instructions = from.instructions, a.cell = from.cell;
    a.T = 1, a.B = from.B, a.I = a.x_row = from.I, a.H = a.h_0_row = a.c_0_row = from.H;
    // A vector of AVX2 holds so few units, and is faster than half of one of AVX-512. With one K block the bits are the same.
    const bool is_half = a.dtype == FASTLSTM_FLOAT32 && a.H <= 8 && a.I + a.H <= 64;
    if (is_half && a.instructions == FASTLSTM_BEST && kernels_of(FASTLSTM_AVX2)) a.instructions = FASTLSTM_AVX2;
    const Kernels &kernels = *kernels_of(a.instructions, a.dtype);
    const int64_t head_bytes = ceil_div(sizeof(fastlstm_steps), 64) * 64;
    void *memory = allocate(head_bytes + kernels.packed_size[a.cell][a.dtype % 2](a.I, a.H));
    if (!memory) return FASTLSTM_NO_MEMORY;
    a.packed = (char *)memory + head_bytes;
    kernels.pack[a.cell][a.dtype % 2](&from, (void *)a.packed);
    *steps = (fastlstm_steps *)memory;
    const Split split = split_of(a, kernels, threads);
    const auto step = a.B == 1 && split.threads == 1 ? kernels.step[a.cell][a.dtype % 2] : nullptr;
    **steps = {a, &kernels, step, split, threads ? *threads : fastlstm_threads{1, nullptr, nullptr}};
    return FASTLSTM_OK;
}

void fastlstm_steps_free(fastlstm_steps *steps) { free(steps); }

int fastlstm_step(const fastlstm_steps *steps, const void *x, const void *h, const void *c, void *h_next, void *c_next) {
    if (!steps || !x || !h || !h_next || h == h_next) return FASTLSTM_BAD_ARGUMENT;
    if (const bool has_c = cells[steps->args.cell].has_c(); has_c != !!c || has_c != !!c_next) return FASTLSTM_BAD_ARGUMENT;
    if (!are_aligned(size_of(steps->args.dtype), x, h, c, h_next, c_next)) return FASTLSTM_BAD_ARGUMENT;
    if (steps->step) return steps->step(&steps->args, x, h, c, h_next, c_next), FASTLSTM_OK;
    fastlstm_forward_args a = steps->args;
    a.x = x, a.h_0 = h, a.c_0 = c, a.h = a.h_n = h_next, a.c_n = c_next;
    return run_layer(a, *steps->kernels, steps->split, &steps->threads);
}

int fastlstm_backward(const fastlstm_backward_args *args, const fastlstm_threads *threads) {
    if (int code = check(args)) return code;
    fastlstm_backward_args a = *args;
    const Kernels &kernels = *kernels_of(a.instructions);
    const Cell &cell = cells[a.cell];
    const int64_t size = size_of(a.dtype), lanes = kernels.vector_bytes / size;
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, panels = ceil_div(H, lanes);
    Split split(cell, T, B, I, H, lanes, threads, /*is_backward=*/true, /*trains=*/true);
    Barriers barriers(split);
    BackwardJob job = {};
    job.args = &a, job.teams = split.teams, job.barriers = barriers.all;
    job.chunk = ceil_div(T, max(1, (T * B + CHUNK_PAIRS / 2) / CHUNK_PAIRS));
    job.ring = min(4, ceil_div(T, job.chunk));
    const int64_t accumulator_bytes = panels * (I + H + 1) * cell.preacts * lanes * size;
    const bool has_many_pairs = B >= 4 && T * B >= 1024 && accumulator_bytes <= SPLIT_K_BYTES / 2;
    job.split_k_sets = has_many_pairs || (B >= 128 && accumulator_bytes <= SPLIT_K_BYTES) ? 2 : 1;
    const int64_t wide = 4 * lanes, groups = ceil_div(H, wide), groups_x = ceil_div(I, wide);  // of columns
    int64_t columns = (groups_x + groups) * wide;
    const bool has_few_pairs = T * B <= FEW_PAIRS && T * B * columns <= FEW_PAIRS * (I + H);
    if (!has_few_pairs) columns = ceil_div(I + H + 1, STRIP) * STRIP;
    job.strip_size = job.chunk * B * columns;
    const int64_t group_bytes = panels * lanes * wide * size;  // of the transposed weights of one pre-activation

    Memory memory;
    Zeros zeros(a, memory);
    memory.want(job.dpreact, panels * job.ring * job.chunk * B * cell.preacts * lanes * size);
    memory.want(job.carried, panels * B * lanes * (cell.carried + (a.lengths ? 1 : 0)) * size);
    if (T > 1 || a.dh_0) memory.want(job.packed_hh, groups * cell.h_preacts * group_bytes);
    if (a.dx) memory.want(job.packed_ih, groups_x * cell.x_preacts * group_bytes);
    if (a.dweight_ih || a.dweight_hh || a.dbias_ih || a.dbias_hh) {
        memory.want(job.strips, job.ring * job.strip_size * size);
        if (!has_few_pairs) memory.want(job.accumulators, job.split_k_sets * accumulator_bytes);
    }
    if (!memory.take()) return FASTLSTM_NO_MEMORY;
    zeros.replace_absent(a);
    static const Tasks *const tasks[] = SETS(backward);
    run((*tasks[set_of(a.instructions)])[a.cell][a.dtype], &job, split.threads, threads);
    return FASTLSTM_OK;
}
