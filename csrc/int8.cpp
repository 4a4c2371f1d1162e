// Calls of layers with int8 weights: a kernel is chosen, memory is found, the threads run.
#include "call.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

using namespace fastlstm;

// (step, row) pairs whose x is multiplied in one pass over the weights, in several steps where rows are few
constexpr int64_t BLOCK_ROWS = 48;

// Whether the processor multiplies tiles of bytes, and the system lets this process use them. It is asked once.
static bool is_unit_there() {
#ifdef FASTLSTM_EMULATE_TILES
    return true;
#elif defined(__linux__) && defined(__x86_64__)
    enum { UNKNOWN, ABSENT, THERE };
    static int known = UNKNOWN;
    if (const int answer = __atomic_load_n(&known, __ATOMIC_RELAXED)) return answer == THERE;
    constexpr unsigned TILES = 1 << 24, BYTES = 1 << 25;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d = 0;
    const bool can = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & BYTES);
    const bool may = can && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    __atomic_store_n(&known, may ? THERE : ABSENT, __ATOMIC_RELAXED);
    return may;
#else
    return false;
#endif
}

int fastlstm::run_int8(fastlstm_forward_args &a, const Kernels &kernels, const fastlstm_threads *threads) {
    const Cell &cell = cells[a.cell];
    const int64_t lanes = kernels.vector_bytes / 4, panels = ceil_div(a.H, lanes);
    const int64_t pieces = a.dtype == FASTLSTM_INT8 ? 1 : 2;
    Split split(cell, a.T, a.B, a.I, a.H, panels, threads, false, 1);
    Int8Job job = {};
    job.args = &a, job.parts = split.parts, job.barriers = split.barriers;
    job.pack = !a.packed, job.packed = (void *)a.packed;
    job.block = max(1, min(a.T, BLOCK_ROWS / a.B)), job.few = a.B <= BLOCK_ROWS / 2;
    job.has_unit = kernels.has_unit && is_unit_there();
    Memory memory;
    Zeros zeros(a, memory);
    const int64_t panel = int8_panel_size(cell.sums, cell.of_x, cell.of_h, a.I, a.H, kernels.vector_bytes);
    const int64_t rows = job.block * a.B, scales_of = 2 * rows + 3 * a.B;
    void *x, *h, *scales, *sums_x = nullptr, *carried;
    memory.want(x, 2 * rows * pieces * int8_pitch(a.I));
    memory.want(h, 2 * a.B * pieces * int8_pitch(a.H));
    memory.want(scales, (scales_of + split.threads * a.B) * 4);
    memory.want(carried, panels * a.B * kernels.vector_bytes);
    if (job.few) memory.want(sums_x, panels * rows * cell.of_x * kernels.vector_bytes);
    if (job.pack) memory.want(job.packed, panels * panel);
    if (!memory.take()) return FASTLSTM_NO_MEMORY;
    job.x = (uint8_t *)x, job.h = (uint8_t *)h, job.sums_x = (float *)sums_x, job.carried = (float *)carried;
    job.scales_x = (float *)scales, job.scales_h = job.scales_x + 2 * rows, job.scales = job.scales_x + scales_of;
    zeros.give(a);
    if (!a.h) a.h = a.h_n;
    if (a.changed) *a.changed = 0;
    run(kernels.forward[a.cell][pieces - 1], &job, split.threads, threads);
    return FASTLSTM_OK;
}
