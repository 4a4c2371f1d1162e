// What every call of fastlstm.h does: checks sizes, splits threads, gets memory and runs the kernel.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "job.h"

// The teams, and the threads of each, that tests force on calls that are given threads: no part of the interface. 0 is none.
extern "C" FASTLSTM_API int64_t fastlstm_forced_split[2];

namespace fastlstm {
namespace {

#include "cells.h"

constexpr int64_t MAX_THREADS = 256, LARGEST = INT64_C(1) << 40;

// The numbers of a cell on which sizes depend: see cells.h
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

// Returns whether the sizes of all arrays of a call are within the limits.
inline bool are_sizes(int64_t cell, int64_t T, int64_t B, int64_t I, int64_t H) {
    const int64_t sizes[] = {T, B, I, H}, most = max(cells[cell].preacts, cells[cell].saved);
    for (int64_t size : sizes)
        if (size < 1 || size > LARGEST) return false;
    const double x_size = (double)T * B * (I + 64), h_size = (double)T * B * (H + 64) * most;
    return x_size <= LARGEST && h_size <= LARGEST && (double)(H + 64) * (I + H + 64) * most <= LARGEST;
}

// Returns whether `count` things at this stride, which may be negative, lie within the largest array.
inline bool is_stride(int64_t count, int64_t stride) {
    const int64_t most = LARGEST / count;
    return -most <= stride && stride <= most;
}

// Returns whether a weight of so many columns may have this row stride: its rows must not overlap.
template <class Args> bool is_weight_row(const Args &a, int64_t columns, int64_t row_stride) {
    return row_stride >= columns && is_stride(cells[a.cell].preacts * a.H, row_stride);
}
template <class Args> bool are_input_strides(const Args &a) {
    return is_stride(a.T, a.x_step) && is_stride(a.B, a.x_row) && is_stride(a.B, a.h_0_row) && is_stride(a.B, a.c_0_row);
}

// Returns whether each array begins at a multiple of `bytes`, the size of its elements. NULL does.
template <class... Arrays> bool are_aligned(int64_t bytes, Arrays... arrays) {
    return !((... | (uintptr_t)arrays) & (uintptr_t)(bytes - 1));
}

// How many threads work, and in how many teams: those of the least predicted time, in multiply-adds of float32. Teams
// split the batch rows, and the threads of a team, its members, split the units.
//
// thread_split.py, in fastlstm/backends/numba/host, has the same rule and says what its numbers stand for.
struct Split {
    int64_t threads = 1, teams = 1;

    // is_backward: such a step reads weight_hh alone. trains: whether this pass saves values or reads saved ones.
    // size: bytes of a weight, by which a multiply-add's time goes.
    Split(const Cell &cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t lanes, const fastlstm_threads *requested,
          bool is_backward, bool trains, int64_t size = 4) {
        const int64_t available = requested ? max(1, min(requested->count, MAX_THREADS)) : 1;
        const int64_t panels = ceil_div(H, lanes), groups = is_backward ? ceil_div(panels, 4) : panels;
        const int64_t products = cell.weights(I, H), read = is_backward ? cell.weights(0, H) : products;
        auto wake_time = [](int64_t count) { return count > 1 ? 190000. + 15000. * count : 0.; };
        auto predicted_time = [&](int64_t n, int64_t members) {
            const int64_t own_panels = ceil_div(panels * ceil_div(groups, members), groups), rows = ceil_div(B, n);
            const int64_t units = min(H, own_panels * lanes), enough = min(64, max(2, size * units * read >> 15));
            const int64_t most_rows = max(rows, n > 1 ? enough : enough / 8);
            const double own_units = min(H, ceil_div(panels, n * members) * lanes);  // where all threads split the panels
            const double multiply_adds = (double)most_rows * read * units + B * (products - read) * own_units;
            double step = multiply_adds * size / 4 + 32. * cell.preacts * rows * own_panels * lanes;
            if (members > 1) step += 30000. + 5000. * members + 32. * rows * (H - units);
            return T * step + 3. * products * own_units * size / 4 + (trains && T == 1 ? 2 : 1) * wake_time(n * members);
        };
        double least = available > 1 ? predicted_time(1, 1) : 0;
        auto consider = [&](int64_t n, int64_t members) {
            const double time = predicted_time(n, members);
            const bool is_smaller = n * members < threads || (n * members == threads && n < teams);
            if (time < least || (time == least && is_smaller)) least = time, teams = n, threads = n * members;
        };
        auto more = [](int64_t count, int64_t n) {  // the next number of shares whose largest is smaller
            return n < count ? ceil_div(count, ceil_div(count, n) - 1) : MAX_THREADS + 1;
        };
        // A row alone takes as long as two.
        const int64_t most_teams = least > wake_time(2) ? min(available, ceil_div(B, 2)) : 0;
        for (int64_t n = 1; n <= most_teams; n = more(B, n)) {
            const int64_t most_members = min(available / n, groups);
            for (int64_t members = 1; members <= most_members; members = more(groups, members)) {
                consider(n, members);
                if (is_backward && n == 1) consider(min(available / members, most_teams), members);
            }
            if (is_backward) consider(n, most_members);
        }
        if (fastlstm_forced_split[0] && requested) teams = fastlstm_forced_split[0], threads = teams * fastlstm_forced_split[1];
    }
};

// The barriers of a call, of which 2 + teams are used
struct Barriers {
    Barrier all[MAX_THREADS + 2];
    explicit Barriers(const Split &split) {
        for (int64_t k = 0; k < split.teams + 2; k++) all[k].arrived = 0;
    }
};

inline void run(fastlstm_task task, void *job, int64_t threads, const fastlstm_threads *requested) {
    if (threads == 1) task(job, 0, 1);
    else if (requested->parallel) requested->parallel(requested->context, task, job, (int)threads);
    else run_in_pool(task, job, (int)threads);
}

// All scratch buffers of a call in one block: `want` reserves cache lines, `take` allocates and sets the pointers.
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
        if (total && !(memory = allocate((size_t)total))) return false;
        for (int k = 0; k < count; k++) *buffers[k].pointer = (char *)memory + buffers[k].offset;
        return true;
    }
    ~Memory() { free(memory); }
    Memory() = default;
    Memory(const Memory &) = delete;
};

// A row of zeros, for initial states that the caller leaves out
struct Zeros {
    void *row = nullptr;
    int64_t bytes;

    template <class Args> Zeros(const Args &a, Memory &memory) : bytes(a.H * size_of(a.dtype)) {
        if (!a.h_0 || (!a.c_0 && cells[a.cell].has_c())) memory.want(row, bytes);
    }
    template <class Args> void replace_absent(Args &a) const {
        if (row) memset(row, 0, (size_t)bytes);
        if (!a.h_0) a.h_0 = row, a.h_0_row = 0;
        if (!a.c_0) a.c_0 = row, a.c_0_row = 0;
    }
};

}  // namespace
}  // namespace fastlstm
