// What the checks share: a layer in plain loops of double, and calls of the library on arrays of exactly their sizes.
#pragma once

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <utility>
#include <vector>

#include "../fastlstm.h"

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
#include "../cells.h"

static int failures = 0, cases = 0, sets = 0;
static void expect(bool right, const char *words) {
    if (!right) printf("%s\n", words), failures++;
}

// Calls check(threads) for one thread, and for the next of several numbers of teams and threads of each, on which all
// calls in it run. Sizes as small as those of the checks would have one thread.
extern "C" int64_t fastlstm_forced_split[2];
template <class Check> void on_two_splits(Check check) {
    static const int64_t splits[][2] = {{1, 2}, {2, 1}, {1, 3}, {2, 2}, {3, 1}};
    static int next = 0;
#ifndef __SANITIZE_THREAD__  // one thread has no races
    check(1);
#endif
    const int64_t *split = splits[next++ % 5];
    fastlstm_forced_split[0] = split[0], fastlstm_forced_split[1] = split[1];
    check(split[0] * split[1]);
    fastlstm_forced_split[0] = 0;
}

static unsigned long long state = 1;
static double uniform() {  // in [-1, 1), and exact in float32
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (double)(int)(state >> 41) / (1 << 22) - 1;
}

struct Case {
    int64_t T, B, I, H;
    bool reverse, masked;
};

using Doubles = std::vector<double>;
static Doubles randoms(int64_t count) {
    Doubles values(count);
    for (double &value : values) value = uniform();
    return values;
}

// A layer of cell C, and its results, which `run` computes. Arrays of states have h first, and may be empty.
template <class C> struct Layer {
    static constexpr int64_t FIRST_H = C::S - C::Y;
    Case s;
    Doubles x, weight_ih, weight_hh, bias_ih, bias_hh, first[2], d[2], d_n[2];
    std::vector<uint8_t> reset; std::vector<int64_t> lengths;
    Doubles all[2], last[2], dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh, d_0[2];  // results

    explicit Layer(Case s) : s(s) {
        const int64_t TBH = s.T * s.B * s.H, BH = s.B * s.H;
        x = randoms(s.T * s.B * s.I), weight_ih = randoms(C::X * s.H * s.I), weight_hh = randoms(C::Y * s.H * s.H);
        bias_ih = randoms(C::X * s.H), bias_hh = randoms(C::Y * s.H);
        for (int k = 0; k < C::STATES; k++)
            first[k] = last[k] = randoms(BH), d[k] = randoms(TBH), d_n[k] = d_0[k] = randoms(BH), all[k] = Doubles(TBH);
        for (double &w : weight_hh) w = (float)(w / sqrt((double)s.H));
        for (int64_t k = 0; s.masked && k < s.T * s.B; k++) reset.push_back(uniform() < -0.3);
        for (int64_t b = 0; s.masked && b < s.B; b++) lengths.push_back((int64_t)floor((uniform() + 1) / 2 * (s.T + 3)) - 1);
        if (s.masked && s.B > 1) lengths[0] = INT64_MIN, lengths[1] = INT64_MAX;
        dx = Doubles(x.size()), dweight_ih = Doubles(weight_ih.size()), dweight_hh = Doubles(weight_hh.size());
        dbias_ih = Doubles(bias_ih.size()), dbias_hh = Doubles(bias_hh.size());
    }
    void run() { for (int64_t b = 0; b < s.B; b++) row(b); }
    bool is_held(int64_t at) const { return s.masked && at / s.B >= lengths[at % s.B]; }

    void row(int64_t b) {
        const int64_t T = s.T, B = s.B, I = s.I, H = s.H;
        Doubles saved(T * H * C::SAVED), seen[2] = {Doubles(T * H), Doubles(T * H)};
        for (int64_t step = 0; step < T; step++) {
            const int64_t t = s.reverse ? T - 1 - step : step, at = t * B + b;
            const bool held = is_held(at), zero = s.masked && reset[at] && !held;
            for (int64_t k = 0; held && k < I; k++) x[at * I + k] = NAN;  // which nobody is to look at
            for (int64_t u = 0; held && u < H; u++) d[0][at * H + u] = NAN;
            for (int k = 0; k < C::STATES; k++)
                for (int64_t u = 0; u < H; u++) seen[k][t * H + u] = zero ? 0 : last[k][b * H + u];
            for (int k = 1; k < C::STATES; k++)
                for (int64_t u = 0; u < H; u++) all[k][at * H + u] = seen[k][t * H + u];
            for (int64_t u = 0; u < H && !held; u++) {
                double preacts[C::S] = {}, prev[C::STATES], next[C::STATES];
                auto add = [&](double &sum, int64_t row, const Doubles &bias, const Doubles &weight, double *from, int64_t n) {
                    sum += bias[row];
                    for (int64_t k = 0; k < n; k++) sum += from[k] * weight[row * n + k];
                };
                for (int g = 0; g < C::X; g++) add(preacts[g], C::BLOCKS_IH[g] * H + u, bias_ih, weight_ih, &x[at * I], I);
                double *const h = &seen[0][t * H];
                for (int g = 0; g < C::Y; g++) add(preacts[FIRST_H + g], C::BLOCKS_HH[g] * H + u, bias_hh, weight_hh, h, H);
                for (int k = 0; k < C::STATES; k++) prev[k] = seen[k][t * H + u];
                C::forward(preacts, prev, next, &saved[(t * H + u) * C::SAVED]);
                for (int k = 0; k < C::STATES; k++) all[k][at * H + u] = last[k][b * H + u] = next[k];
            }
        }
        for (int64_t step = T - 1; step >= 0; step--) {
            const int64_t t = s.reverse ? T - 1 - step : step, at = t * B + b;
            const bool held = is_held(at), zero = s.masked && reset[at];
            for (int k = held; k < C::STATES; k++)
                for (int64_t u = 0; u < H; u++) d_0[k][b * H + u] += d[k][at * H + u];
            if (held) continue;
            Doubles dh(H);
            for (int64_t u = 0; u < H; u++) {
                double d_next[C::STATES], prev[C::STATES], d_prev[C::STATES] = {}, dpreacts[C::S];
                for (int k = 0; k < C::STATES; k++) d_next[k] = d_0[k][b * H + u], prev[k] = seen[k][t * H + u];
                C::backward(d_next, &saved[(t * H + u) * C::SAVED], prev, dpreacts, d_prev);
                for (int k = 0; k < C::STATES; k++) d_0[k][b * H + u] = zero ? 0 : d_prev[k];
                for (int g = 0; g < C::X; g++) {
                    const int64_t row = C::BLOCKS_IH[g] * H + u;
                    const double dpreact = dpreacts[g];
                    dbias_ih[row] += dpreact;
                    for (int64_t k = 0; k < I; k++)
                        dweight_ih[row * I + k] += dpreact * x[at * I + k], dx[at * I + k] += dpreact * weight_ih[row * I + k];
                }
                for (int g = 0; g < C::Y; g++) {
                    const int64_t row = C::BLOCKS_HH[g] * H + u;
                    const double dpreact = dpreacts[FIRST_H + g];
                    dbias_hh[row] += dpreact;
                    for (int64_t k = 0; k < H; k++)
                        dweight_hh[row * H + k] += dpreact * seen[0][t * H + k], dh[k] += dpreact * weight_hh[row * H + k];
                }
            }
            for (int64_t k = 0; k < H && !zero; k++) d_0[0][b * H + k] += dh[k];
        }
    }
};

// `bound` is of the largest number that is wanted, or of `scale` if that is larger.
template <class E>
void compare(const char *name, const std::vector<E> &got, const Doubles &want, double bound, double scale = 0.1) {
    double worst = 0;
    for (double value : want) scale = fmax(scale, fabs(value));
    for (size_t k = 0; k < want.size(); k++) {
        double difference = fabs(got[k] - want[k]) / scale;
        if (!(difference <= worst)) worst = difference;  // NaN as well
    }
    if (!(worst <= bound)) printf("%s is off by %g, allowed %g\n", name, worst, bound), failures++;
}

template <class E> std::vector<E> as(const Doubles &values) { return {values.begin(), values.end()}; }

// The forward pass of a layer whose numbers are of E and its weights of W
template <class C, class E, class W> struct Call {
    static constexpr bool HAS_C = C::STATES > 1;
    static constexpr int CELL = HAS_C ? FASTLSTM_LSTM : FASTLSTM_GRU;
    const Case s;
    const fastlstm_threads threads;
    std::vector<W> weight_ih, weight_hh;
    std::vector<float> scale_ih, scale_hh;  // or empty
    std::vector<E> x, bias_ih, bias_hh, h_0, c_0, h, h_n, c_n, c;
    std::vector<char> gates, packed;
    int64_t changed = 0;
    fastlstm_forward_args f;

    Call(const Layer<C> &l, int64_t dtype, int64_t instructions, int64_t count, std::vector<W> ih, std::vector<W> hh,
         std::vector<float> scale_ih = {}, std::vector<float> scale_hh = {})
        : s(l.s), threads{count, nullptr, nullptr}, weight_ih(ih), weight_hh(hh), scale_ih(scale_ih), scale_hh(scale_hh),
          x(as<E>(l.x)), bias_ih(as<E>(l.bias_ih)), bias_hh(as<E>(l.bias_hh)), h_0(as<E>(l.first[0])),
          c_0(as<E>(l.first[1])), h(s.T * s.B * s.H), h_n(s.B * s.H), c_n(HAS_C ? s.B * s.H : 0),
          c(HAS_C && scale_ih.empty() ? s.T * s.B * s.H : 0),
          gates(fastlstm_gates_size(dtype, instructions, CELL, s.T, s.B, s.H), -1),
          packed(fastlstm_packed_size(dtype, instructions, CELL, s.I, s.H), -1) {
        f = {FASTLSTM_VERSION, dtype, instructions, CELL, s.T, s.B, s.I, s.H, s.reverse, x.data(), s.B * s.I, s.I,
             weight_ih.data(), s.I, weight_hh.data(), s.H, bias_ih.data(), bias_hh.data(), or_null(this->scale_ih),
             or_null(this->scale_hh), nullptr, nullptr, h_0.data(), s.H, or_null(c_0), s.H,
             s.masked ? l.reset.data() : nullptr, s.masked ? l.lengths.data() : nullptr, h.data(), h_n.data(),
             or_null(c_n), or_null(c), or_null(gates)};
    }
    static bool alike(const std::vector<E> &a, const std::vector<E> &b) {  // NaN as well
        return a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(E));
    }
    template <class T> static T *or_null(std::vector<T> &values) { return values.empty() ? nullptr : values.data(); }
    int forward() {
        for (auto *values : {&h, &h_n, &c_n, &c}) values->assign(values->size(), NAN);
        return fastlstm_forward(&f, &threads);
    }

    // `compare_results` is called after each call of which results are wanted.
    template <class Compare> void check(Compare compare_results) {
        const fastlstm_forward_args whole = f;
        for (int pass = 0; pass < 3; pass++) {  // packed inside the call, before it, and held against the weights
            f = whole;
            if (pass == 0) expect(!fastlstm_pack(&f, packed.data()), "pack failed");
            else f.packed = packed.data();
            if (pass == 1) f.weight_ih = f.weight_hh = f.bias_ih = f.bias_hh = f.weight_ih_scale = f.weight_hh_scale = nullptr;
            if (pass == 2) f.changed = &changed;
            expect(!forward() && !changed, "forward failed, or unchanged weights count as changed");
            compare_results();
        }
        const std::vector<E> saving = h;
        for (const void **bias : {&f.bias_ih, &f.bias_hh}) {
            const void *const original = std::exchange(*bias, nullptr);
            expect(!forward() && changed, "a bias that is gone was not noticed");
            *bias = original;
        }
        must_be_noticed(weight_ih), must_be_noticed(weight_hh), must_be_noticed(bias_ih), must_be_noticed(bias_hh);
        must_be_noticed(scale_ih), must_be_noticed(scale_hh);
        f.c = nullptr, f.gates = nullptr;
        expect(!forward() && !changed, "unchanged weights count as changed");
        expect(alike(h, saving), "a call that saves nothing differs");
        check_arguments();
        check_step(whole);
        f = whole, f.packed = packed.data();
        expect(!forward(), "forward failed");
    }
    template <class T> void must_be_noticed(std::vector<T> &values) {
        for (size_t k = 0; k < values.size(); k += 1 + values.size() / (threads.count > 1 ? 3 : 15)) {
            const T original = std::exchange(values[k], values[k] == 0 ? T(1) : T(values[k] / 2));
            expect(!forward() && changed, "a change was not noticed");
            values[k] = original;
        }
        if (values.empty() || values.front() == values.back()) return;
        std::swap(values.front(), values.back());
        expect(!forward() && changed, "two numbers that changed places were not noticed");
        std::swap(values.front(), values.back());
    }
    void check_arguments() {
        int64_t *const strides[] = {&f.weight_ih_row, &f.weight_hh_row, &f.x_step, &f.x_row, &f.h_0_row, &f.c_0_row};
        for (int64_t *stride : strides) {
            const int64_t original = *stride, far = INT64_C(1) << 60, wrong[] = {far, -far, original - 1, 0, -original};
            const int count = stride == &f.weight_ih_row || stride == &f.weight_hh_row ? 5 : 2;  // others may be any in reach
            for (int k = 0; k < count; k++)
                *stride = wrong[k], expect(forward() == FASTLSTM_BAD_ARGUMENT, "a stride out of reach was taken");
            *stride = original;
        }
        for (int64_t wrong : {-1, 1 - CELL, 2})  // to the other cell c is missing, or too much
            f.cell = wrong, expect(forward() == FASTLSTM_BAD_ARGUMENT, "a wrong cell was taken");
    }
    void check_step(fastlstm_forward_args whole) {  // one step of x's first rows
        f = whole, f.T = 1, f.reverse = 0, f.reset = nullptr, f.lengths = nullptr, f.h = f.c = f.gates = nullptr;
        expect(!forward(), "a call of one step failed");
        std::vector<E> next(h_n.size(), NAN), c_next(c_0);
        fastlstm_steps *steps = nullptr;
        auto step = [&](E *c) { return fastlstm_step(steps, x.data(), h_0.data(), c, next.data(), c); };
        expect(step(or_null(c_next)) == FASTLSTM_BAD_ARGUMENT, "steps of nothing were run");
        f.weight_ih = nullptr;
        expect(fastlstm_steps_make(&f, &threads, &steps) == FASTLSTM_BAD_ARGUMENT && !steps, "no weights were taken");
        f.weight_ih = whole.weight_ih;
        expect(!fastlstm_steps_make(&f, &threads, &steps), "steps cannot be made");
        expect(step(HAS_C ? nullptr : h_n.data()) == FASTLSTM_BAD_ARGUMENT, "a step took the wrong states");
        expect(!step(or_null(c_next)) && alike(next, h_n) && alike(c_n, c_next), "a step differs");
        fastlstm_steps_free(steps);
    }
};

// Of the four kinds, a build that takes many times as long runs two, by a step of 3: plain, and in reverse with masks.
#ifndef KIND_STEP
#define KIND_STEP 1
#endif
template <class Check> int check_all(Check check) {
    const int64_t sizes[][4] = {{1, 1, 1, 1},   {3, 7, 1, 7},     {5, 1, 7, 100},  {4, 9, 28, 64},
                                {2, 70, 30, 7}, {3, 2, 7, 130},   {12, 40, 5, 48}, {24, 40, 3, 20},
                                {30, 2, 18, 20}, {2, 21, 70, 80}, {2, 130, 65, 33}};
    for (const auto &size : sizes)
        for (int kind = 0; kind < 4; kind += KIND_STEP)
            check(Case{size[0], size[1], size[2], size[3], (kind & 1) != 0, (kind & 2) != 0});
    printf("%d cases, instruction sets %x, %d failures\n", cases, sets, failures);
    return failures != 0;
}
