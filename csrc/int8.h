// The forward pass of a layer with int8 weights: included by a file for each instruction set.
//
// Each weight row is a row of int8 numbers times its scale. Each row of x, and of h before each step, is rounded in the
// same way, to 8 bits or to 16, which are two pieces of 8. Their products are sums of integers, exact in any order, and the
// rest has one order: so all instruction sets, threads and batches give the same bits.
#pragma once

#include "kernels.h"

namespace {

#include "int8_tiles.h"

using fastlstm::Int8Job;
using fastlstm::int8_pitch;

// This thread's share of a layer. Threads of a part share its bytes: at a step all read those of h before it and write those
// after it, each for its own units.
template <class C, int PIECES> struct Int8Layer {
    static constexpr int64_t L = Vector<float>::N, X = C::X * L;
    static_assert(C::STATES - C::OWN == 1, "one state is carried");
    static constexpr float CLEAN = 1 / TOP[PIECES];  // the scale of a row of h whose numbers are within 1
    const Int8Job &job;
    Place &place;
    const fastlstm_forward_args &a;
    const Int8Packed<C> packed{a.I, a.H, job.packed};
    const int64_t T = a.T, B = a.B, I = a.I, H = a.H, block = job.block, panels = ceil_div(H, L);
    const int64_t piece_x = int8_pitch(I), piece_h = int8_pitch(H), row_x = PIECES * piece_x, row_h = PIECES * piece_h;
    // Rows of the part, panels of this thread and how many of these are whole, its units, and the rows that it rounds
    const int64_t b_first = share(B, place.part, place.parts), rows = share(B, place.part + 1, place.parts) - b_first;
    const int64_t p_first = place.first_of_team(panels), p_last = place.last_of_team(panels);
    const int64_t whole = min(p_last, H / L) - p_first, u_first = p_first * L, units = min(p_last * L, H) - u_first;
    const int64_t r_first = place.first_of_team(rows), r_last = place.last_of_team(rows);
    float *const carried = job.carried + b_first * L, *const own_scales = job.scales + place.thread * B;
    const Rows<const float> h_0{(const float *)a.h_0 + b_first * a.h_0_row, a.h_0_row};
    const Rows<const float> start{C::OWN ? (const float *)a.c_0 + b_first * a.c_0_row : h_0.at, C::OWN ? a.c_0_row : a.h_0_row};
    const Rows<float> h{(float *)a.h + b_first * H, H}, h_n{(float *)a.h_n + b_first * H, H};
    alignas(64) float chunk_x[CHUNK * X], tail[CHUNK * L];

    Int8Layer(const Int8Job &job, Place &place) : job(job), place(place), a(*job.args) {}
    int64_t time_of(int64_t s) const { return a.reverse ? T - 1 - s : s; }
    Mask mask_of(int64_t s) const { return Mask(a, time_of(s), b_first); }
    // h before step s: its bytes, and their scales in three turns, which are read, written and made ready
    uint8_t *bytes_of(int64_t s) const { return job.h + (s % 2 * B + b_first) * row_h; }
    float *scales_of(int64_t s) const { return job.scales_h + s % 3 * B + b_first; }
    int64_t inputs_of(int64_t s) const { return (s / block % 2 * B + b_first) * block; }  // the first of a block's rows of x
    float *sums_of(int64_t p) const { return job.sums_x + (p * B + b_first) * block * X; }

    void round_inputs(int64_t s) const {  // this thread's rows of the block that begins with step s
        const int64_t count = s < T ? min(block, T - s) * rows : 0;
        for (int64_t k = place.first_of_team(count); k < place.last_of_team(count); k++) {
            const float *x = (const float *)a.x + time_of(s + k / rows) * a.x_step + (b_first + k % rows) * a.x_row;
            const int64_t to = inputs_of(s) + k;
            job.scales_x[to] = quantize<PIECES>(I, x, 0, job.x + to * row_x, piece_x);
        }
    }
    void round_state(int64_t s, int64_t r, const float *from) const {
        scales_of(s)[r] = quantize<PIECES>(H, from, 1, bytes_of(s) + r * row_h, piece_h);
    }
    void multiply_inputs(int64_t s, int64_t p, int64_t count, int64_t first, int64_t some, float *sums_x) const {
        const int64_t at = inputs_of(s) + first;
        Int8Rows<C, PIECES, false> x = {};
        x.panel = packed.panels + p, x.weights = packed.weights_x + p * packed.size_x, x.size = packed.size_x;
        x.groups = packed.groups_x, x.sign = 1, x.a = job.x + at * row_x, x.piece = piece_x, x.scales = job.scales_x + at;
        x.sums_x = sums_x, x.sums_panel = B * block * X;
        x.multiply(some, count, job.has_unit);
    }
    // Step s of `count` panels from p on, or back, for some rows
    void run(int64_t s, int64_t p, int64_t count, int64_t sign, int64_t r, int64_t some, float *sums_x, const float *scales) {
        const bool cut = (p + 1) * L > H;
        const Rows<float> to = h.from(time_of(s) * B + r, p * L);
        Int8Rows<C, PIECES, true> step = {};
        step.panel = packed.panels + p, step.weights = packed.weights_h + p * packed.size_h, step.size = packed.size_h;
        step.groups = packed.groups_h, step.sign = sign, step.a = bytes_of(s) + r * row_h, step.piece = piece_h;
        step.scales = scales + r, step.sums_x = sums_x, step.sums_panel = B * block * X;
        step.carried = carried + (p * B + r) * L, step.carried_panel = B * L;
        step.h = cut ? tail : to.at, step.h_row = cut ? L : H;
        step.next = bytes_of(s + 1) + r * row_h + p * L, step.next_scales = scales_of(s + 1) + r;
        step.multiply(some, count, job.has_unit);
        if (cut) copy_rows<float>(some, H - p * L, H - p * L, {tail, L}, to);
    }
    // Rows that are reset before step s: this thread's units
    void reset(int64_t s) const {
        const Mask mask = mask_of(s);
        for (int64_t r = mask.next(RESET, rows); r < rows; r = mask.next(RESET, rows, r + 1))
            for (int64_t k = 0; k < PIECES; k++)
                __builtin_memset(bytes_of(s) + r * row_h + k * piece_h + u_first, ZERO, (p_last - p_first) * L);
        for (int64_t p = p_first; p < p_last; p++) mask.zero<float>(RESET, rows, L, {carried + p * B * L, L});
    }
    void hold(int64_t s, int64_t r, float scale) const {  // a row that step s leaves as it is
        for (int64_t at = r * row_h + u_first; at < (r + 1) * row_h; at += piece_h)
            __builtin_memcpy(bytes_of(s + 1) + at, bytes_of(s) + at, (p_last - p_first) * L);
        scales_of(s + 1)[r] = scale;
        zero_rows<float>(1, units, h.from(time_of(s) * B + r, u_first));
    }

    void begin() const {
        for (int64_t r = r_first; r < r_last; r++) round_state(0, r, h_0[r]), scales_of(1)[r] = scales_of(2)[r] = CLEAN;
        for (int64_t p = p_first; p < p_last; p++)
            copy_rows<float>(rows, min(L, H - p * L), L, start.from(0, p * L), {carried + p * B * L, L});
        round_inputs(0);
        place.meet_team();
        if (a.reset) reset(0), place.meet_team();
    }
    void step(int64_t s) {
        const Mask mask = mask_of(s);
        const float *scales = scales_of(s);
        for (int64_t r = 0; a.reset && r < rows; r++) own_scales[r] = mask.is(RESET, r) ? CLEAN : scales[r];
        if (a.reset) scales = own_scales;
        for (int64_t r = r_first; r < r_last; r++)  // seldom, so that other threads keep what they have read
            if (scales_of(s + 2)[r] != CLEAN) scales_of(s + 2)[r] = CLEAN;
        for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1)) hold(s, r, scales[r]);
        const int64_t of_block = s % block * rows, at_once = job.few ? max(1, whole) : 1;
        if (job.few && of_block == 0)
            multiply_inputs(s, p_first, p_last - p_first, 0, min(block, T - s) * rows, sums_of(p_first));
        // To and fro: the weights read last are still in the L2 cache. A panel that is cut comes last, or else first.
        const int64_t sign = s % 2 ? -1 : 1;
        for (int64_t p = p_first, count; p < p_last; p += count) {
            count = p < p_first + whole ? min(at_once, p_first + whole - p) : 1;
            const int64_t from = p >= p_first + whole || sign > 0 ? p : p_first + (p_first + whole - 1 - p);
            for (int64_t r = 0, some; r < rows; r += max(1, some)) {
                some = min(CHUNK, mask.next(HOLD, rows, r) - r);
                if (some == 0) continue;
                float *const sums_x = job.few ? sums_of(from) + (of_block + r) * X : chunk_x;
                if (!job.few) multiply_inputs(s, from, 1, r, some, sums_x);
                run(s, from, count, sign, r, some, sums_x, scales);
            }
        }
        if (a.reset) reset(s + 1);
        if ((s + 1) % block == 0) round_inputs(s + 1);
        place.meet_team();
    }
    // The state of a GRU that began beyond 1 may stay there: then its rows are rounded anew after each step.
    bool is_large() const {
        bool large = false;
        for (int64_t r = 0; C::OWN == 0 && r < rows; r++) large |= scales_of(0)[r] != CLEAN;
        return large;
    }
    void round_states(int64_t s) const {
        const Mask mask = mask_of(s), next = mask_of(s + 1);
        for (int64_t r = r_first; r < r_last; r++)
            if (!mask.holds(r) && !next.is(RESET, r)) round_state(s + 1, r, h[time_of(s) * B + r]);
        place.meet_team();
    }
    void finish() const {
        if (!a.lengths) copy_rows<float>(rows, units, units, h.from(time_of(T - 1) * B, u_first), h_n.from(0, u_first));
        for (int64_t r = 0; a.lengths && r < rows; r++) {
            const int64_t length = min(a.lengths[b_first + r], T), last = a.reverse ? 0 : length - 1;
            copy_rows<float>(1, units, units, {(length > 0 ? h[last * B + r] : h_0[r]) + u_first, 0}, h_n.from(r, u_first));
        }
        for (int64_t p = p_first; C::OWN > 0 && p < p_last; p++)
            copy_rows<float>(rows, min(L, H - p * L), 0, {carried + p * B * L, L}, {(float *)a.c_n + b_first * H + p * L, H});
    }
    void forward() {
        if (job.has_unit) configure_unit();
        begin();
        const bool large = is_large();
        for (int64_t s = 0; s < T; s++) {
            step(s);
            if (large && s + 1 < T) round_states(s);
        }
        finish();
        if (job.has_unit) release_unit();
    }
};

template <class C, int PIECES> void forward_int8(void *argument, int thread, int threads) {
    const Int8Job &job = *(const Int8Job *)argument;
    const fastlstm_forward_args &a = *job.args;
    Place place(job, thread, threads);
    if (thread >= place.everyone) return;
    const int64_t panels = ceil_div(a.H, Vector<float>::N);
    const Int8Packed<C> packed(a.I, a.H, job.packed);
    for (int64_t p = place.first(panels); p < place.last(panels); p++) {
        if (job.pack) pack_int8_panel<C>(a, p, packed);
        else if (a.changed && is_int8_changed<C>(a, packed.panels[p], p)) __atomic_add_fetch(a.changed, 1, __ATOMIC_RELAXED);
    }
    if (job.pack && place.parts > 1) place.meet_everyone();
    Int8Layer<C, PIECES>(job, place).forward();
}

}  // namespace

#define INT8_BOTH(function, cell) {function<cell, 1>, function<cell, 2>}
#define INT8_ALL(function) {INT8_BOTH(function, Lstm), INT8_BOTH(function, Gru)}
#define INT8_TABLES INT8_ALL(packed_size_int8), INT8_ALL(pack_int8), INT8_ALL(forward_int8)
#define INT8_KERNELS(name) {name, VECTOR_BYTES, HAS_UNIT, INT8_TABLES}
