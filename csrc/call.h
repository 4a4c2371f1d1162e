// What the functions of fastlstm.h do for each call: sizes are checked, threads are split, and the kernel is run.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "job.h"

namespace fastlstm {
namespace {

#include "cells.h"

constexpr int64_t MAX_THREADS = 256, LARGEST = INT64_C(1) << 40;

// The numbers of a cell that sizes follow from, see cells.h
struct Cell {
    int64_t preacts, x_preacts, h_preacts, states, carried, saved;

    int64_t weights(int64_t I, int64_t H) const { return x_preacts * I + h_preacts * H; }  // of one unit
    bool has_c() const { return states > 1; }
};
template <class C> constexpr Cell cell_of() { return {C::S, C::X, C::Y, C::STATES, C::STATES - C::FIRST_READ, C::SAVED}; }
constexpr Cell cells[CELLS] = {cell_of<Lstm>(), cell_of<Gru>()};  // in the order of enum fastlstm_cell

inline bool is_cell(int64_t cell) { return 0 <= cell && cell < CELLS; }
inline bool is_dtype(int64_t dtype) { return dtype == FASTLSTM_FLOAT32 || dtype == FASTLSTM_FLOAT64; }
inline bool is_int8(int64_t dtype) { return dtype == FASTLSTM_INT8 || dtype == FASTLSTM_INT8_BY_INT16; }
inline int64_t size_of(int64_t dtype) { return dtype == FASTLSTM_FLOAT64 ? 8 : 4; }  // of x and the states

// Whether all arrays of a call have a size
inline bool are_sizes(int64_t cell, int64_t T, int64_t B, int64_t I, int64_t H) {
    const int64_t sizes[] = {T, B, I, H}, most = max(cells[cell].preacts, cells[cell].saved);
    for (int64_t size : sizes)
        if (size < 1 || size > LARGEST) return false;
    const double x_size = (double)T * B * (I + 64), h_size = (double)T * B * (H + 64) * most;
    return x_size <= LARGEST && h_size <= LARGEST && (double)(H + 64) * (I + H + 64) * most <= LARGEST;
}

// Whether the last of so many things, so many elements apart in either direction, is in reach.
inline bool is_stride(int64_t count, int64_t stride) {
    const int64_t most = LARGEST / count;
    return -most <= stride && stride <= most;
}

// Whether the rows of a weight, of so many columns, lie so many elements apart: they do not overlap.
template <class Args> bool is_weight_row(const Args &a, int64_t columns, int64_t row_stride) {
    return row_stride >= columns && is_stride(cells[a.cell].preacts * a.H, row_stride);
}
template <class Args> bool are_input_strides(const Args &a) {
    return is_stride(a.T, a.x_step) && is_stride(a.B, a.x_row) && is_stride(a.B, a.h_0_row) && is_stride(a.B, a.c_0_row);
}

// Threads, and into how many parts they split the batch rows; threads within a part split the units.
//
// Parts meet nobody, but each reads all weights; a split of units halves what a thread reads, for a barrier of a
// microsecond a step. So a part is given the rows that make its products last longer than its reading, few where weights
// are few, but no more than fill a pass over a panel; and all other threads go to units.
struct Split {
    int64_t threads = 1, teams = 1;
    Barrier barriers[MAX_THREADS + 2];  // those of the parts there are

    // back: of the backward pass, whose steps read weight_hh alone. size: of a weight in bytes. A multiply-add of bytes
    // takes a quarter of the time.
    Split(const Cell &cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t panels, const fastlstm_threads *requested,
          bool is_backward, int64_t size = 4) {
        if (requested && requested->count > 1) {
            threads = min(requested->count, MAX_THREADS);
            const int64_t weights = cell.weights(I, H);
            const int64_t rows_per_team = min(64, max(2, size * H * (is_backward ? cell.weights(0, H) : weights) >> 15));
            teams = min(threads, max(max(1, B / rows_per_team), min(ceil_div(threads, panels), B / 2)));
            // multiply-adds of a step: for fewer the barrier would cost what the second thread saves
            if (teams < threads && (double)B * H * weights * size < 4 * 75000) threads = teams;
            threads = min(threads, teams * panels);
            // and of a call, with 32 more a sum for the cells: for fewer waking it would
            const double work = (double)T * B * (H + 8) * (weights * size / 4 + 32 * cell.preacts);
            if (teams == threads && work < 1000000) threads = teams = 1;
        }
        for (int64_t k = 0; k < teams + 2; k++) barriers[k].arrived = 0;
    }
};

inline void run(fastlstm_task task, void *job, int64_t threads, const fastlstm_threads *requested) {
    if (threads == 1)
        task(job, 0, 1);
    else if (requested->parallel)
        requested->parallel(requested->context, task, job, (int)threads);
    else
        run_in_pool(task, job, (int)threads);
}

// Scratch of one call, in one piece: told of everything first, then taken. Each part is on cache lines of its own.
class Memory {
    struct Buffer {
        void **pointer;
        int64_t offset;
    } buffers[8];
    int count = 0;
    int64_t total = 0;
    void *memory = nullptr;

  public:
    void want(void *&pointer, int64_t bytes) {
        buffers[count++] = {&pointer, total};
        total += (bytes + 63) / 64 * 64;
    }
    bool take() {
        if (total && posix_memalign(&memory, 64, (size_t)total)) return false;
        for (int k = 0; k < count; k++) *buffers[k].pointer = (char *)memory + buffers[k].offset;
        return true;
    }
    ~Memory() { free(memory); }
    Memory() = default;
    Memory(const Memory &) = delete;
};

// Zeros for the initial states that are not given
struct Zeros {
    void *row = nullptr;
    int64_t bytes;

    template <class Args> Zeros(const Args &a, Memory &memory) : bytes(a.H * size_of(a.dtype)) {
        if (!a.h_0 || !a.c_0) memory.want(row, bytes);
    }
    template <class Args> void replace_absent(Args &a) const {
        if (row) memset(row, 0, (size_t)bytes);
        if (!a.h_0) a.h_0 = row, a.h_0_row = 0;
        if (!a.c_0) a.c_0 = row, a.c_0_row = 0;
    }
};

}  // namespace
}  // namespace fastlstm
