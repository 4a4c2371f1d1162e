// What a kernel gets beside the caller's arguments, and the table of kernels of each instruction set.
//
// The files of the instruction sets share this header alone, and everything else in them is local. Otherwise the linker
// might merge an inline function with its copy for a newer processor, which older ones cannot run.
#pragma once

#include <sched.h>
#include <stdint.h>

#include "fastlstm.h"

#ifdef VECTOR_BYTES  // of a register, which the file of an instruction set defines
#if (VECTOR_BYTES == 32 && !(defined(__AVX2__) && defined(__FMA__))) || \
    (VECTOR_BYTES == 64 && !(defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)))
#error "compile this file with the flags that its first line names"
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#define BASE_NAME "neon"
#elif defined(__x86_64__)
#include <immintrin.h>
#define BASE_NAME "base"
#else
#error "these kernels are for x86-64 and 64-bit ARM"
#endif
#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define REGISTERS 32
#define TILE_ROWS 6  // batch rows by 4 vectors that fit the registers: 24 accumulators
#else
#define REGISTERS 16
#define TILE_ROWS 3
#endif
#endif

namespace fastlstm {

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Vectors of a digest: as many as keep the multipliers busy and stay in registers.
constexpr int64_t digest_vectors(int64_t vector_bytes) { return vector_bytes == 64 ? 8 : 4; }

struct alignas(128) Barrier { int64_t arrived; };  // a cache line each, of which Apple's are the longest

// What one thread writes and another reads ends with the order of both, in brackets. All else a thread writes for itself.
// team: each thread writes for its units, and its team reads after its next barrier, that of the step.
// all: every thread writes a share, and any thread reads after the next barrier of all threads.
// chunk: as all, at the barrier of a chunk. A thread overwrites a chunk when all have arrived at the barrier of the
//   second one after it, and so have read it.
struct Job {
    int64_t teams;      // which split the batch rows; the threads of a team split the units
    Barrier *barriers;  // two of all threads, then one of each team
};

struct ForwardJob : Job {
    const fastlstm_forward_args *args;
    bool pack;
    int64_t panels;  // that `packed` has room for: all, or one for each thread, which packs its panels in turn
    // For each panel the weights of x (I, X, lanes) and of h (H, Y, lanes); then biases (panels, S, lanes), and digests
    // (panels, digest_vectors, lanes). cells.h has the numbers of a cell, and Panel tells of compact panels. [all]
    void *packed;
    void *resets;  // (threads, B, H), with `reset`: h_in, h before a step and after its resets
};

struct BackwardJob : Job {
    const fastlstm_backward_args *args;
    int64_t chunk, ring;          // the steps of a chunk, and how many chunks dpreact and strips have room for
    void *dpreact;                // (panels, ring * chunk, B, S, lanes); see Panel [team, chunk]
    // (panels, B, lanes) for each carried gradient, and with `lengths` one more, for dh of held rows
    void *carried;
    void *packed_hh, *packed_ih;  // [group of 3 or 4 vectors][k][vector], k as dpreact's panels have it; or NULL [all]
    // The row operands of the weight gradients: `ring` chunks, strip_size elements each, or NULL where none is wanted.
    // With accumulators they are strips of [x, h_in, 1], and for few pairs x and h_in as few_pairs.h has them. [chunk]
    void *strips;
    int64_t strip_size;
    void *accumulators;  // (split_k_sets, panels, I+H+1, S, lanes), whose last row is of the biases; NULL for few pairs
    int64_t split_k_sets;  // sets of accumulators, each of a share of the batch rows, added at the end [all]
};

// A layer with int8 weights. Rows of x and h are rounded to one or two activation bytes, which a team's threads share.
struct Int8Job : Job {
    const fastlstm_forward_args *args;
    bool pack;
    void *packed;      // see Int8Packed [all]
    int64_t block;     // steps of an input block, whose x is multiplied at once
    bool few_rows;     // then x is multiplied for all panels before h is
    bool has_amx;      // whether this process may use AMX
    uint8_t *x, *h;    // (2, B, block, act_bytes, row bytes of I), (2, B, act_bytes, row bytes of H) [team, x by rows]
    // of these rows: (2, B, block) and (3, B) [team, by rows; where h is NaN each thread]; (threads, B) of the current step
    float *scales_x, *scales_h, *scales;
    float *sums_x;     // the input projection, if rows are few: (panels, B, block, X, lanes)
    float *carried;    // the state that the cell reads: (panels, B, lanes)
};

// Bytes of a row of activation bytes, which is written in whole vectors
constexpr int64_t int8_row_bytes(int64_t columns) { return (columns + 15) / 16 * 16; }

// A task for each cell in float32 and float64, or with int8 weights for one and two activation bytes. The backward pass
// has a table of its own, so that programs without it are linked without its code.
constexpr int CELLS = 2;
using Tasks = fastlstm_task[CELLS][2];
// One step of one row on one thread. Of the arguments it reads I, H and packed.
using StepOfRow = void (*)(const fastlstm_forward_args *, const void *x, const void *h, const void *c, void *h_next,
                           void *c_next);
struct Kernels {
    const char *name;
    int64_t vector_bytes;
    bool has_amx;  // whether they can use AMX
    size_t (*packed_size[CELLS][2])(int64_t I, int64_t H);  // bytes, by cell and dtype % 2: the second is float64 or int16
    void (*pack[CELLS][2])(const fastlstm_forward_args *, void *packed);
    Tasks forward;
    StepOfRow step[CELLS][2];  // of float32 and float64
};

#if defined(__aarch64__) && defined(__linux__)  // Apple's processors all have sdot, so that base_int8 uses it
#define WITH_DOTPROD
#endif

extern const Kernels avx512_kernels, avx2_kernels, base_kernels, avx512_int8, avx2_int8, base_int8, dotprod_int8;
extern const Tasks avx512_backward, avx2_backward, base_backward;

constexpr int64_t STRIP = 24;  // columns of [x, h_in, 1] in a strip: 8 tiles of 3 rows, or 4 of 6

// Runs task(argument, k, n) for k from 0 to n - 1 on the library's own threads, with n at most `threads`. If another
// call has the pool, or no thread can be started, the caller works alone.
void run_in_pool(fastlstm_task task, void *argument, int threads);
// Returns memory that `free` frees, at a multiple of 64 bytes, or NULL: then fastlstm_error_text tells how many they were.
void *allocate(size_t bytes);

}  // namespace fastlstm
