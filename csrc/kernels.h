// All kernels of one instruction set, for its file alone.
#include "job.h"

#define NOINLINE __attribute__((noinline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

using fastlstm::BackwardJob;
using fastlstm::Barrier;
using fastlstm::ForwardJob;
using fastlstm::Job;
using fastlstm::STRIP;
using fastlstm::ceil_div;
using fastlstm::max;
using fastlstm::min;

// The first of `count` things that belongs to `team` of `teams`
inline int64_t share(int64_t count, int64_t team, int64_t teams) { return count * team / teams; }

#include "vector.h"
#include "cells.h"
#include "product.h"

// Batch rows that pass a panel together, and rows of packed weights in a block: 16 KB of these and, with 16 lanes, of
// sums, so that both stay in the L1 cache while the rows' tiles are computed.
constexpr int64_t ROW_BLOCK = 64, BLOCK_K = 4096 / VECTOR_BYTES;

// This thread's place. `teams` teams split the batch rows and meet nobody; within a team units are split, one barrier a
// step.
struct ThreadPosition {
    int64_t thread, teams, team_size, used_threads, team, team_thread;
    Barrier *barriers;
    int64_t all_barriers = 0, team_barriers = 0;  // meetings of all that this thread has come to, and of its team

    ThreadPosition(const Job &job, int thread, int threads)
        : thread(thread), teams(min(threads, job.teams)), team_size(threads / teams), used_threads(teams * team_size),
          team(thread / team_size), team_thread(thread % team_size), barriers(job.barriers) {}

    // What of `count` things, of all or of the team's, is this thread's
    int64_t first(int64_t count) const { return share(count, thread, used_threads); }
    int64_t last(int64_t count) const { return share(count, thread + 1, used_threads); }
    int64_t first_of_team(int64_t count) const { return share(count, team_thread, team_size); }
    int64_t last_of_team(int64_t count) const { return share(count, team_thread + 1, team_size); }

    // A meeting of all may be left before the others come, and waited for when the next has been come to: so two counters
    // in turn, or a fast thread's second arrival would stand for a slow one's first.
    int64_t arrive_all() {
        arrive(barriers[all_barriers % 2], used_threads);
        return all_barriers++;
    }
    void wait_for_all(int64_t meeting) const { wait(barriers[meeting % 2], used_threads, meeting / 2 + 1); }
    void all_barrier() { wait_for_all(arrive_all()); }
    void team_barrier() {
        arrive(barriers[2 + team], team_size);
        wait(barriers[2 + team], team_size, ++team_barriers);
    }

    static void arrive(Barrier &barrier, int64_t threads) {
        if (threads > 1) __atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL);
    }
    // Returns when `threads` threads have arrived `times` times. A spin yields: there may be more threads than cores.
    NOINLINE static void wait(Barrier &barrier, int64_t threads, int64_t times) {
        if (threads == 1) return;
        for (int spins = 0; __atomic_load_n(&barrier.arrived, __ATOMIC_ACQUIRE) < threads * times; spins++)
            if (spins > 2000) sched_yield();
    }
};

#include "forward.h"
#include "gradients.h"
#include "few_pairs.h"
#include "backward.h"

}  // namespace

// For float32 and float64, of each cell
#define BOTH(function, cell) {function<cell, float>, function<cell, double>}
#define ALL(function) {BOTH(function, Lstm), BOTH(function, Gru)}
#define KERNELS(name) {name, VECTOR_BYTES, false, ALL(packed_size), ALL(pack_weights), ALL(forward)}
#define BACKWARD ALL(backward)
