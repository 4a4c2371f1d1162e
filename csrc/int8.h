// The forward pass of a layer with int8 weights: included by a file for each instruction set.
//
// Each weight row is a row of int8 numbers times its scale. Each row of x, and of h before each step, is rounded in the
// same way, to one or two activation bytes. Sums of products of integers are exact in any order, and the rest has one
// order. So all instruction sets, numbers of threads and batches give the same bits.
#pragma once

#include "kernels.h"

namespace {

#include "int8_tiles.h"

using fastlstm::Int8Job, fastlstm::int8_row_bytes;

// This thread's share of a layer. The threads of a team share its activation bytes: at each step all of them read h of
// the step before, and each writes h of its own units.
template <class C, int ACT_BYTES> struct Int8Layer {
    static constexpr int64_t L = Vector<float>::N, X = C::X * L;
    static_assert(C::STATES - C::FIRST_READ == 1, "one state is carried");
    static constexpr float UNIT_SCALE = 1 / TOP[ACT_BYTES];  // the scale of a row of h within [-1, 1]
    const Int8Job &job;
    ThreadPosition &position;
    const fastlstm_forward_args &a;
    const Int8Packed<C> packed{a.I, a.H, job.packed};
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, block = job.block, panels = ceil_div(H, L);
    const int64_t x_byte_stride = int8_row_bytes(I), h_byte_stride = int8_row_bytes(H),
                  x_row_bytes = ACT_BYTES * x_byte_stride, h_row_bytes = ACT_BYTES * h_byte_stride;
    const int64_t b_first = share(B, position.team, position.teams),  // the team's rows
                  rows = share(B, position.team + 1, position.teams) - b_first;
    const int64_t p_first = position.first_of_team(panels), p_last = position.last_of_team(panels);  // this thread's panels
    const int64_t whole = min(p_last, H / L) - p_first;  // how many of these are full
    const int64_t u_first = p_first * L, units = min(p_last * L, H) - u_first;  // this thread's units
    const int64_t r_first = position.first_of_team(rows), r_last = position.last_of_team(rows);  // the rows that it rounds
    float *const carried = job.carried + b_first * L, *const reset_scales = job.scales + position.thread * B;
    const Matrix<const float> h_0{(const float *)a.h_0 + b_first * a.h_0_row, a.h_0_row};
    const Matrix<const float> initial_carried{C::FIRST_READ ? (const float *)a.c_0 + b_first * a.c_0_row : h_0.data,
                                                  C::FIRST_READ ? a.c_0_row : a.h_0_row};
    const Matrix<float> h{(float *)a.h + b_first * H, H}, h_n{(float *)a.h_n + b_first * H, H};
    alignas(64) float block_sums_x[ROW_BLOCK * X], tail[ROW_BLOCK * L];

    Int8Layer(const Int8Job &job, ThreadPosition &position) : job(job), position(position), a(*job.args) {}
    int64_t time_of(int64_t s) const { return a.reverse ? T - 1 - s : s; }
    Mask mask_of(int64_t s) const { return Mask(a, time_of(s), b_first); }
    // h before step s: its bytes in two buffers, and its scales in three: to read, to write, to set back to UNIT_SCALE
    uint8_t *h_bytes_of(int64_t s) const { return job.h + (s % 2 * B + b_first) * h_row_bytes; }
    float *h_scales_of(int64_t s) const { return job.scales_h + s % 3 * B + b_first; }
    // The team's first row of the input block of step s. Two blocks of B * block rows alternate, each team after team.
    int64_t first_input_of(int64_t s) const { return (s / block % 2 * B + b_first) * block; }
    float *sums_x_of(int64_t p) const { return job.sums_x + (p * B + b_first) * block * X; }

    void round_inputs(int64_t s) const {  // this thread's rows of the input block that begins with step s
        const int64_t count = s < T ? min(block, T - s) * rows : 0;
        for (int64_t k = position.first_of_team(count); k < position.last_of_team(count); k++) {
            const float *x = (const float *)a.x + time_of(s + k / rows) * a.x_step + (b_first + k % rows) * a.x_row;
            const int64_t row = first_input_of(s) + k;
            job.scales_x[row] = quantize<ACT_BYTES>(I, x, /*least=*/0, job.x + row * x_row_bytes, x_byte_stride);
        }
    }
    void round_state(int64_t s, int64_t r, const float *from) const {
        h_scales_of(s)[r] = quantize<ACT_BYTES>(H, from, /*least=*/1, h_bytes_of(s) + r * h_row_bytes, h_byte_stride);
    }
    void multiply_inputs(int64_t s, int64_t p, int64_t count, int64_t first_pair, int64_t row_count, float *sums_x) const {
        const int64_t row = first_input_of(s) + first_pair;
        Int8Rows<C, ACT_BYTES, /*IS_STEP=*/false> x = {};
        x.panel = packed.panels + p, x.weights = packed.weights_x + p * packed.x_panel_bytes;
        x.panel_bytes = packed.x_panel_bytes, x.groups = packed.groups_x, x.direction = 1;
        x.a = job.x + row * x_row_bytes, x.byte_stride = x_byte_stride, x.scales = job.scales_x + row;
        x.sums_x = sums_x, x.sums_x_panel = B * block * X;
        x.multiply(row_count, count, job.has_amx);
    }
    // Runs step s for `count` panels from p on, in the direction `sign`, and for row_count rows from r on.
    void run(int64_t s, int64_t p, int64_t count, int64_t sign, int64_t r, int64_t row_count, float *sums_x,
             const float *scales) {
        const bool is_cut = (p + 1) * L > H;
        const Matrix<float> output = h.from(time_of(s) * B + r, p * L);
        Int8Rows<C, ACT_BYTES, /*IS_STEP=*/true> step = {};
        step.panel = packed.panels + p, step.weights = packed.weights_h + p * packed.h_panel_bytes;
        step.panel_bytes = packed.h_panel_bytes, step.groups = packed.groups_h, step.direction = sign;
        step.a = h_bytes_of(s) + r * h_row_bytes, step.byte_stride = h_byte_stride, step.scales = scales + r;
        step.sums_x = sums_x, step.sums_x_panel = B * block * X;
        step.carried = carried + (p * B + r) * L, step.carried_panel = B * L;
        step.h = is_cut ? tail : output.data, step.h_row = is_cut ? L : H;
        step.next = h_bytes_of(s + 1) + r * h_row_bytes + p * L, step.next_scales = h_scales_of(s + 1) + r;
        step.multiply(row_count, count, job.has_amx);
        if (is_cut) copy_rows<float>(row_count, H - p * L, H - p * L, {tail, L}, output);
    }
    // Sets this thread's units to zero in the rows that are reset before step s.
    void reset(int64_t s) const {
        const Mask mask = mask_of(s);
        for (int64_t r = mask.next(RESET, rows); r < rows; r = mask.next(RESET, rows, r + 1))
            for (int64_t k = 0; k < ACT_BYTES; k++)
                __builtin_memset(h_bytes_of(s) + r * h_row_bytes + k * h_byte_stride + u_first, ZERO, (p_last - p_first) * L);
        for (int64_t p = p_first; p < p_last; p++) mask.zero<float>(RESET, rows, L, {carried + p * B * L, L});
    }
    void hold(int64_t s, int64_t r, float scale) const {  // copies a row to the next step
        for (int64_t byte = r * h_row_bytes + u_first; byte < (r + 1) * h_row_bytes; byte += h_byte_stride)
            __builtin_memcpy(h_bytes_of(s + 1) + byte, h_bytes_of(s) + byte, (p_last - p_first) * L);
        if (r_first <= r && r < r_last) h_scales_of(s + 1)[r] = scale;
        zero_rows<float>(1, units, h.from(time_of(s) * B + r, u_first));
    }

    void begin() const {
        for (int64_t r = r_first; r < r_last; r++)
            round_state(0, r, h_0[r]), h_scales_of(1)[r] = h_scales_of(2)[r] = UNIT_SCALE;
        for (int64_t p = p_first; p < p_last; p++)
            copy_rows<float>(rows, min(L, H - p * L), L, initial_carried.from(0, p * L), {carried + p * B * L, L});
        round_inputs(0);
        position.team_barrier();
        if (a.reset) reset(0), position.team_barrier();
    }
    void step(int64_t s) {
        PAUSE();
        const Mask mask = mask_of(s);
        const float *scales = h_scales_of(s);
        for (int64_t r = 0; a.reset && r < rows; r++) reset_scales[r] = mask.is(RESET, r) ? UNIT_SCALE : scales[r];
        if (a.reset) scales = reset_scales;
        for (int64_t r = r_first; r < r_last; r++)  // written only after a NaN or |h| > 1, so that other threads keep the line
            if (h_scales_of(s + 2)[r] != UNIT_SCALE) h_scales_of(s + 2)[r] = UNIT_SCALE;
        for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1)) hold(s, r, scales[r]);
        const int64_t block_row = s % block * rows, at_once = job.few_rows ? max(1, whole) : 1;
        if (job.few_rows && block_row == 0 && p_first < p_last)
            multiply_inputs(s, p_first, p_last - p_first, 0, min(block, T - s) * rows, sums_x_of(p_first));
        // Serpentine order: the weights read last are still in the L2 cache. The last panel, if it is not full, comes last.
        const int64_t sign = s % 2 ? -1 : 1;
        for (int64_t p = p_first, count; p < p_last; p += count) {
            count = p < p_first + whole ? min(at_once, p_first + whole - p) : 1;
            const int64_t from = p >= p_first + whole || sign > 0 ? p : p_first + (p_first + whole - 1 - p);
            for (int64_t r = 0, row_count; r < rows; r += max(1, row_count)) {
                row_count = min(ROW_BLOCK, mask.next(HOLD, rows, r) - r);
                if (row_count == 0) continue;
                float *const sums_x = job.few_rows ? sums_x_of(from) + (block_row + r) * X : block_sums_x;
                if (!job.few_rows) multiply_inputs(s, from, 1, r, row_count, sums_x);
                run(s, from, count, sign, r, row_count, sums_x, scales);
            }
        }
        if (a.reset) reset(s + 1);
        if ((s + 1) % block == 0) round_inputs(s + 1);
        position.team_barrier();
    }
    // If initial states of a GRU lie outside [-1, 1], later ones may too. Then h is quantized again after each step.
    bool requantizes_h() const {
        bool is_large = false;
        for (int64_t r = 0; C::FIRST_READ == 0 && r < rows; r++) is_large |= h_scales_of(0)[r] != UNIT_SCALE;
        return is_large;
    }
    void round_states(int64_t s) const {
        const Mask mask = mask_of(s), next = mask_of(s + 1);
        for (int64_t r = r_first; r < r_last; r++)
            if (!mask.holds(r) && !next.is(RESET, r)) round_state(s + 1, r, h[time_of(s) * B + r]);
        position.team_barrier();
    }
    void finish() const {
        if (!a.lengths) copy_rows<float>(rows, units, units, h.from(time_of(T - 1) * B, u_first), h_n.from(0, u_first));
        for (int64_t r = 0; a.lengths && r < rows; r++) {
            const int64_t length = max(0, min(a.lengths[b_first + r], T)), last = a.reverse ? 0 : length - 1;
            copy_rows<float>(1, units, units, {(length > 0 ? h[last * B + r] : h_0[r]) + u_first, 0}, h_n.from(r, u_first));
        }
        for (int64_t p = p_first; C::FIRST_READ > 0 && p < p_last; p++)
            copy_rows<float>(rows, min(L, H - p * L), 0, {carried + p * B * L, L}, {(float *)a.c_n + b_first * H + p * L, H});
    }
    void forward() {
        if (job.has_amx) configure_amx();
        begin();
        const bool requantizes = requantizes_h();
        for (int64_t s = 0; s < T; s++) {
            step(s);
            if (requantizes && s + 1 < T) round_states(s);
        }
        finish();
        if (job.has_amx) release_amx();
    }
};

template <class C, int ACT_BYTES> void forward_int8(void *argument, int thread, int threads) {
    const Int8Job &job = *(const Int8Job *)argument;
    const fastlstm_forward_args &a = *job.args;
    ThreadPosition position(job, thread, threads);
    if (thread >= position.used_threads) return;
    const int64_t panels = ceil_div(a.H, Vector<float>::N);
    const Int8Packed<C> packed(a.I, a.H, job.packed);
    for (int64_t p = position.first(panels); p < position.last(panels); p++) {
        if (job.pack) pack_int8_panel<C>(a, p, packed);
        else if (a.changed && is_int8_changed<C>(a, packed.panels[p], p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    if (job.pack && position.teams > 1) position.all_barrier();
    Int8Layer<C, ACT_BYTES>(job, position).forward();
}

}  // namespace

#define INT8_BOTH(function, cell) {function<cell, 1>, function<cell, 2>}
#define INT8_ALL(function) {INT8_BOTH(function, Lstm), INT8_BOTH(function, Gru)}
#define INT8_TABLES INT8_ALL(packed_size_int8), INT8_ALL(pack_int8), INT8_ALL(forward_int8), {}
#define INT8_KERNELS(name) {name, VECTOR_BYTES, HAS_AMX, INT8_TABLES}
