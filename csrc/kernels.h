// All kernels of one instruction set, included by its file alone.
#include "job.h"

#ifndef PAUSE  // tests compile a random delay here, with which a missing barrier shows in nearly every run
#define PAUSE()
#endif
#define NOINLINE __attribute__((noinline))
#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

using fastlstm::BackwardJob, fastlstm::Barrier, fastlstm::ForwardJob, fastlstm::Job;
using fastlstm::STRIP, fastlstm::ceil_div, fastlstm::max, fastlstm::min;

// Returns a / b, without a division if b is 1: calls of few units run on one thread, and take hardly longer than a division.
inline int64_t quotient(int64_t a, int64_t b) { return b == 1 ? a : a / b; }
// Returns the first of `count` things that belongs to share `part` of `parts`.
inline int64_t share(int64_t count, int64_t part, int64_t parts) { return quotient(count * part, parts); }

#include "vector.h"
#include "cells.h"
#include "product.h"

// Batch rows of a row block, and rows of packed weights of a K block: 16 KB of weights and, with 16 lanes, of preact,
// so that both stay in the L1 cache while the rows' tiles are computed.
constexpr int64_t ROW_BLOCK = 64, BLOCK_K = 4096 / VECTOR_BYTES;

// Which thread of which team this is, and the barriers that it has passed. Teams split the batch rows. The threads of a
// team split the units, and wait for each other after every step.
struct ThreadPosition {
    int64_t thread, teams, team_size, used_threads, team, team_thread;
    Barrier *barriers;
    int64_t all_barriers = 0, team_barriers = 0;  // how many this thread has passed, of all threads and of its team

    ThreadPosition(const Job &job, int thread, int threads)
        : thread(thread), teams(min(threads, job.teams)), team_size(quotient(threads, teams)),
          used_threads(teams * team_size), team(quotient(thread, team_size)), team_thread(thread - team * team_size),
          barriers(job.barriers) {}

    // The first and last of this thread's share of `count` things, among all threads or in its team
    int64_t first(int64_t count) const { return share(count, thread, used_threads); }
    int64_t last(int64_t count) const { return share(count, thread + 1, used_threads); }
    int64_t first_of_team(int64_t count) const { return share(count, team_thread, team_size); }
    int64_t last_of_team(int64_t count) const { return share(count, team_thread + 1, team_size); }

    // Arrives at the next barrier of all threads and returns its number, with which `wait_for_all` waits there. Two
    // counters take turns: with one, a fast thread's second arrival would count as a slow one's first.
    int64_t arrive_all() {
        arrive(barriers[all_barriers % 2], used_threads);
        return all_barriers++;
    }
    void wait_for_all(int64_t number) const { wait(barriers[number % 2], used_threads, number / 2 + 1); }
    void all_barrier() { wait_for_all(arrive_all()); }
    void team_barrier() {
        arrive(barriers[2 + team], team_size);
        wait(barriers[2 + team], team_size, ++team_barriers);
    }

    static void arrive(Barrier &barrier, int64_t threads) {
        if (threads > 1) __atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL);
    }
    // Waits until `threads` threads have arrived `times` times. It yields, since there may be more threads than cores.
    NOINLINE static void wait(Barrier &barrier, int64_t threads, int64_t times) {
        if (threads == 1) return;
        for (int spins = 0; __atomic_load_n(&barrier.arrived, __ATOMIC_ACQUIRE) < threads * times; spins++)
            if (spins > 2000) sched_yield();
        PAUSE();
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
#define KERNELS(name) {name, VECTOR_BYTES, /*has_amx=*/false, ALL(packed_size), ALL(pack_weights), ALL(forward), ALL(step)}
#define BACKWARD ALL(backward)
