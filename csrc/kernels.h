// All kernels of one instruction set: included by its file, in an anonymous namespace, after VECTOR_BYTES (of a
// register) and TILE_ROWS (batch rows by 4 vectors that fit the registers) are defined.
#define NOINLINE __attribute__((noinline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

using fastlstm::BackwardJob;
using fastlstm::Barrier;
using fastlstm::ForwardJob;
using fastlstm::Job;
using fastlstm::STRIP;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first of `count` things that belongs to `part` of `parts`
inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

#include "vector.h"

#include "cell.h"

#include "product.h"

// Batch rows that pass a panel together, and rows of packed weights in a block: with 16 lanes 16 KB of sums and 16 KB of
// weights, so that both stay in the L1 cache while the rows' tiles are computed.
constexpr int64_t CHUNK = 64, BLOCK_K = 64;

// This thread's place. `parts` teams split the batch rows and meet nobody; within a team units are split, one barrier a
// step.
struct Place {
    int64_t thread, parts, members, everyone, part, member;
    Barrier *barriers;
    int64_t met = 0, passed = 0;

    Place(const Job &job, int thread, int threads)
        : thread(thread), parts(min(threads, job.parts)), members(threads / parts), everyone(parts * members),
          part(thread / members), member(thread % members), barriers(job.barriers) {}

    void meet_everyone() { wait(barriers[0], everyone, met++); }
    void meet_team() { wait(barriers[1 + part], members, passed++); }

    // Returns when `threads` threads have called this for the (times + 1)th time. A spin yields: there may be more
    // threads than cores.
    static void wait(Barrier &barrier, int64_t threads, int64_t times) {
        if (threads == 1) return;
        int64_t target = threads * (times + 1);
        if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) >= target) return;
        for (int spins = 0; __atomic_load_n(&barrier.arrived, __ATOMIC_ACQUIRE) < target; spins++)
            if (spins > 2000) sched_yield();
    }
};

#include "forward.h"

#include "backward.h"

#define KERNELS(name)                                             \
    {name,                                                        \
     VECTOR_BYTES,                                                \
     {pack_weights<float>, pack_weights<double>},                 \
     {forward<float>, forward<double>},                           \
     {backward<float>, backward<double>}}
