// What a kernel is handed beside the caller's arguments, and the table of kernels that each instruction set fills.
//
// The files of the instruction sets include no more than this and keep all else to themselves: an inline function
// compiled for a newer processor and merged by the linker would stop an older one.
#pragma once

#include <sched.h>
#include <stdint.h>

#include "fastlstm.h"

namespace fastlstm {

struct alignas(64) Barrier { int64_t arrived; };  // a cache line each

struct Job {
    int64_t parts;      // into how many the batch rows are split; threads within a part split the units
    Barrier *barriers;  // of all threads, then of each part
    void *packed;       // forward: weights (panels, I+H, 4, lanes), then biases (panels, 4, lanes)
    void *resets;       // (threads, B, H) with a mask: the hidden states that a step with resets sees
};

struct ForwardJob : Job {
    const fastlstm_forward_args *args;
    bool pack;
};

struct BackwardJob : Job {
    const fastlstm_backward_args *args;
    int64_t chunk;              // steps whose dpreact is turned into gradients together
    void *dpreact;              // (panels, 2 chunk, B, 4, lanes): the last two chunks
    void *carried;              // (panels, B, lanes) dc, and with a mask as much again: dh of held rows
    void *packed_hh, *packed_ih;  // [group of 3 or 4 vectors][k][vector], k in the order of dpreact's panels; or NULL
    void *strips;               // 2 chunks of [x, h_prev, 1], or NULL: no sums over rows are wanted
    void *dweights;             // (panels, I+H+1, 4, lanes): the last row is the bias
};

struct Kernels {
    const char *name;
    int64_t vector_bytes;
    // for float32 and float64
    void (*pack[2])(const fastlstm_forward_args *, void *packed, int64_t first_panel, int64_t last_panel);
    void (*forward[2])(void *job, int thread, int threads);
    void (*backward[2])(void *job, int thread, int threads);
};

extern const Kernels avx512_kernels, avx2_kernels, base_kernels;

constexpr int64_t STRIP = 24;  // columns of [x, h_prev, 1] packed side by side: 8 tiles of 3, or 4 of 6

}  // namespace fastlstm
