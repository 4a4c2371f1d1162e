// What a kernel is handed beside the caller's arguments, and the table of kernels that each instruction set fills.
//
// The files of the instruction sets include no more than this and keep all else to themselves: an inline function
// compiled for a newer processor and merged by the linker would stop an older one.
#pragma once

#include <sched.h>
#include <stdint.h>

#include "fastlstm.h"

namespace fastlstm {

// Vectors of a digest: as many as keep the multipliers busy and stay in registers.
constexpr int64_t digest_vectors(int64_t vector_bytes) { return vector_bytes == 64 ? 16 : 8; }

struct alignas(64) Barrier { int64_t arrived; };  // a cache line each

struct Job {
    int64_t parts;      // into how many the batch rows are split; threads within a part split the units
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
    // dweights strips of [x, h_prev, 1], otherwise rows are few: x and h_prev for outer.h.
    void *strips;
    int64_t strip_size;
    void *dweights;  // (halves, panels, I+H+1, S, lanes): the last row is the bias
    int64_t halves;  // into how many the batch rows are split, each with sums of its own
};

// For each cell in float32 and float64. The backward pass stands apart, so that a program without one can be linked
// without its code.
constexpr int CELLS = 2;
using Tasks = fastlstm_task[CELLS][2];
struct Kernels {
    const char *name;
    int64_t vector_bytes;
    void (*pack[CELLS][2])(const fastlstm_forward_args *, void *packed);
    Tasks forward;
};

extern const Kernels avx512_kernels, avx2_kernels, base_kernels;
extern const Tasks avx512_backward, avx2_backward, base_backward;

constexpr int64_t STRIP = 24;  // columns of [x, h_prev, 1] packed side by side: 8 tiles of 3, or 4 of 6

}  // namespace fastlstm
