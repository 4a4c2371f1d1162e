// What a kernel is handed beside the caller's arguments, and the table of kernels that each instruction set fills.
//
// The files of the instruction sets include no more than this and keep all else to themselves: an inline function
// compiled for a newer processor and merged by the linker would stop an older one.
#pragma once

#include <sched.h>
#include <stdint.h>

#include "fastlstm.h"

#ifdef VECTOR_BYTES  // of a register, which the file of an instruction set defines
#if (VECTOR_BYTES == 32 && !(defined(__AVX2__) && defined(__FMA__))) || \
    (VECTOR_BYTES == 64 && !(defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)))
#error "compile this file with the flags that its first line names"
#endif
#define BASE_NAME "base"
#if defined(__aarch64__)
#include <arm_neon.h>
#undef BASE_NAME
#define BASE_NAME "neon"
#elif VECTOR_BYTES > 16
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
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

struct alignas(64) Barrier { int64_t arrived; };  // a cache line each

struct Job {
    int64_t teams;      // into how many the batch rows are split; threads within a part split the units
    Barrier *barriers;  // two of all threads, then one of each part
};

struct ForwardJob : Job {
    const fastlstm_forward_args *args;
    bool pack;
    int64_t panels;  // of the weights that `packed` has room for: all, or one for each thread, which then packs them in turn
    // Weights of x (I, X, lanes) and of h (H, Y, lanes) for each panel, biases (panels, S, lanes), digests (panels,
    // digest_vectors, lanes). See cells.h for the numbers of a cell, and Panel for narrow panels.
    void *packed;
    void *resets;  // (threads, B, H) with `reset`: the hidden states that a step with resets sees
};

struct BackwardJob : Job {
    const fastlstm_backward_args *args;
    int64_t chunk, ring;          // steps whose dpreact is turned into gradients together, and how many chunks are kept
    void *dpreact;                // (panels, ring * chunk, B, S, lanes); see Panel
    // (panels, B, lanes) for each state whose gradient the cell hands on, and one more with `lengths`: dh of held rows
    void *carried;
    void *packed_hh, *packed_ih;  // [group of 3 or 4 vectors][k][vector], k in the order of dpreact's panels; or NULL
    // What sums over rows are taken of: `ring` chunks, strip_size elements each, or NULL where none is wanted. With
    // dweights strips of [x, h_prev, 1], otherwise rows are few: x and h_prev for few_pairs.h.
    void *strips;
    int64_t strip_size;
    void *accumulators;  // (halves, panels, I+H+1, S, lanes): the last row is the bias
    int64_t split_k_sets;  // into how many the batch rows are split, each with sums of its own
};

// A layer with int8 weights. Rows of x and h are rounded to bytes, which the threads of a part share.
struct Int8Job : Job {
    const fastlstm_forward_args *args;
    bool pack;
    void *packed;      // see Int8Packed
    int64_t block;     // steps whose x is multiplied at once
    bool few_rows;          // whether rows are few: then x is multiplied for all panels, before h is
    bool has_amx;     // whether this process may use the matrix unit, see amx.h
    uint8_t *x, *h;    // (2, B, block, pieces, pitch of I), (2, B, pieces, pitch of H)
    float *scales_x, *scales_h, *scales;  // of these rows: (2, B, block), (3, B), and (threads, B) of the step that runs
    float *sums_x;     // what x makes of the sums, if rows are few: (panels, B, block, X, lanes)
    float *carried;    // the state that a cell reads: (panels, B, lanes)
};

// Bytes from one row of quantized numbers to the next: whole vectors are written.
constexpr int64_t int8_row_bytes(int64_t columns) { return (columns + 15) / 16 * 16; }

// For each cell in float32 and float64, or with int8 weights for x and h of one byte and of two. The backward pass stands
// apart, so that a program without one can be linked without its code.
constexpr int CELLS = 2;
using Tasks = fastlstm_task[CELLS][2];
struct Kernels {
    const char *name;
    int64_t vector_bytes;
    bool has_amx;  // whether they can use a matrix unit
    size_t (*packed_size[CELLS][2])(int64_t I, int64_t H);  // bytes
    void (*pack[CELLS][2])(const fastlstm_forward_args *, void *packed);
    Tasks forward;
};

extern const Kernels avx512_kernels, avx2_kernels, base_kernels, avx512_int8, avx2_int8, base_int8;
extern const Tasks avx512_backward, avx2_backward, base_backward;

constexpr int64_t STRIP = 24;  // columns of [x, h_prev, 1] packed side by side: 8 tiles of 3, or 4 of 6

// task(argument, k, n) for k from 0 to n - 1 on the library's own threads, n at most `threads`: where another call holds
// the pool, or no thread can be started, the caller works alone.
void run_in_pool(fastlstm_task task, void *argument, int threads);

}  // namespace fastlstm
