// Layers with int8 weights: every cell and instruction set of this processor against plain loops in double and, bit for
// bit, against each other, on arrays of exactly their sizes: for sanitizers. Prints one line and returns 0, or says what
// differed.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>
#include <vector>

#include "../fastlstm.h"

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
#include "../cells.h"

static unsigned long long state = 1;
static double uniform() {  // in [-1, 1), and exact in float32
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (double)(int)(state >> 41) / (1 << 22) - 1;
}

static int failures = 0, cases = 0, sets = 0;
static void expect(bool right, const char *words) {
    if (!right) printf("%s\n", words), failures++;
}

using Floats = std::vector<float>;
static Floats randoms(int64_t count, double factor = 1) {
    Floats values(count);
    for (float &value : values) value = (float)(uniform() * factor);
    return values;
}
static std::vector<int8_t> numbers(int64_t count) {
    std::vector<int8_t> values(count);
    for (int8_t &value : values) value = (int8_t)floor(uniform() * 127.5 + 0.5);
    return values;
}

struct Case {
    int64_t T, B, I, H;
    bool reverse, masked;
};

template <class C> struct Layer {
    static constexpr bool HAS_C = C::STATES > 1;
    static constexpr int CELL = HAS_C ? FASTLSTM_LSTM : FASTLSTM_GRU;
    Case s;
    std::vector<int8_t> weight_ih, weight_hh;
    Floats x, scale_ih, scale_hh, bias_ih, bias_hh, first[2], h, last[2];
    std::vector<uint8_t> reset;
    std::vector<int64_t> lengths;

    explicit Layer(Case s) : s(s) {
        const int64_t rows = C::X * s.H;
        x = randoms(s.T * s.B * s.I), weight_ih = numbers(rows * s.I), weight_hh = numbers(rows * s.H);
        scale_ih = randoms(rows, 1 / 127. / sqrt((double)s.I)), scale_hh = randoms(rows, 1 / 127. / sqrt((double)s.H));
        bias_ih = randoms(rows), bias_hh = randoms(rows);
        for (int k = 0; k < C::STATES; k++) first[k] = randoms(s.B * s.H);
        for (int64_t k = 0; s.masked && k < s.T * s.B; k++) reset.push_back(uniform() < -0.3);
        for (int64_t b = 0; s.masked && b < s.B; b++) lengths.push_back((int64_t)floor((uniform() + 1) / 2 * (s.T + 3)) - 1);
    }

    // The results in double, without rounding of x and h
    void plain(std::vector<double> &all, std::vector<double> (&states)[2]) const {
        for (int k = 0; k < C::STATES; k++) states[k].assign(first[k].begin(), first[k].end());
        all.assign(s.T * s.B * s.H, 0);
        for (int64_t step = 0; step < s.T * s.B; step++) {
            const int64_t t = s.reverse ? s.T - 1 - step / s.B : step / s.B, b = step % s.B, H = s.H;
            if (s.masked && t >= lengths[b]) continue;
            std::vector<double> before[2];
            for (int k = 0; k < C::STATES; k++) {
                before[k].assign(states[k].begin() + b * H, states[k].begin() + (b + 1) * H);
                if (s.masked && reset[t * s.B + b]) before[k].assign(H, 0);
            }
            for (int64_t u = 0; u < H; u++) {
                double sums[C::S] = {}, prev[C::STATES], next[C::STATES], saved[C::SAVED];
                for (int g = 0; g < C::X; g++) {
                    const int64_t row = C::BLOCKS_IH[g] * H + u;
                    double sum = 0;
                    for (int64_t k = 0; k < s.I; k++) sum += (double)x[(t * s.B + b) * s.I + k] * weight_ih[row * s.I + k];
                    sums[g] += sum * scale_ih[row] + bias_ih[row];
                }
                for (int g = 0; g < C::Y; g++) {
                    const int64_t row = C::BLOCKS_HH[g] * H + u;
                    double sum = 0;
                    for (int64_t k = 0; k < H; k++) sum += before[0][k] * weight_hh[row * H + k];
                    sums[C::S - C::Y + g] += sum * scale_hh[row] + bias_hh[row];
                }
                for (int k = 0; k < C::STATES; k++) prev[k] = before[k][u];
                C::forward(sums, prev, next, saved);
                for (int k = 0; k < C::STATES; k++) states[k][b * H + u] = next[k];
                all[(t * s.B + b) * H + u] = next[0];
            }
        }
    }

    static void compare(const Floats &got, const std::vector<double> &want, double bound) {
        double worst = 0;
        for (size_t k = 0; k < want.size(); k++)
            if (!(fabs(got[k] - want[k]) <= worst)) worst = fabs(got[k] - want[k]);
        if (!(worst <= bound)) printf("off by %g, allowed %g\n", worst, bound), failures++;
    }
    static bool alike(const Floats &a, const Floats &b) {
        return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(float)));
    }

    fastlstm_forward_args arguments(int64_t dtype, int instructions) {
        fastlstm_forward_args f = {};
        f.version = FASTLSTM_VERSION, f.dtype = dtype, f.instructions = instructions, f.cell = CELL;
        f.T = s.T, f.B = s.B, f.I = s.I, f.H = s.H, f.reverse = s.reverse;
        f.x = x.data(), f.x_step = s.B * s.I, f.x_row = s.I;
        f.weight_ih = weight_ih.data(), f.weight_ih_row = s.I, f.weight_hh = weight_hh.data(), f.weight_hh_row = s.H;
        f.bias_ih = bias_ih.data(), f.bias_hh = bias_hh.data();
        f.weight_ih_scale = scale_ih.data(), f.weight_hh_scale = scale_hh.data();
        f.h_0 = first[0].data(), f.h_0_row = s.H, f.c_0 = HAS_C ? first[1].data() : nullptr, f.c_0_row = s.H;
        if (s.masked) f.reset = reset.data(), f.lengths = lengths.data();
        h.assign(s.T * s.B * s.H, NAN), last[0].assign(s.B * s.H, NAN), last[1].assign(HAS_C ? s.B * s.H : 0, NAN);
        f.h = h.data(), f.h_n = last[0].data(), f.c_n = HAS_C ? last[1].data() : nullptr;
        return f;
    }

    void check(int64_t dtype, int instructions, int64_t count, const Floats (&want)[3]) {
        const fastlstm_threads threads = {count, nullptr, nullptr};
        std::vector<char> packed(fastlstm_packed_size(dtype, instructions, CELL, s.I, s.H), -1);
        int64_t changed = 0;
        for (int pass = 0; pass < 3; pass++) {  // packed inside the call, before it, and held against the weights
            fastlstm_forward_args f = arguments(dtype, instructions);
            if (pass == 0) expect(!fastlstm_pack(&f, packed.data()), "pack failed");
            if (pass > 0) f.packed = packed.data();
            if (pass == 1) f.weight_ih = f.weight_hh = f.bias_ih = f.bias_hh = f.weight_ih_scale = f.weight_hh_scale = nullptr;
            if (pass == 2) f.changed = &changed;
            expect(!fastlstm_forward(&f, &threads) && !changed, "forward failed");
            expect(alike(h, want[0]) && alike(last[0], want[1]) && alike(last[1], want[2]), "bits differ");
        }
        fastlstm_forward_args f = arguments(dtype, instructions);
        f.packed = packed.data(), f.changed = &changed;
        auto is_seen = [&](auto &values) {
            for (size_t k = 0; k < values.size(); k += 1 + values.size() / 9) {
                const auto kept = values[k];
                values[k] = (std::remove_reference_t<decltype(values[k])>)(kept ? kept / 2 : 1);
                expect(!fastlstm_forward(&f, &threads) && changed, "a change was not found");
                values[k] = kept;
            }
        };
        is_seen(weight_ih), is_seen(weight_hh), is_seen(bias_ih), is_seen(bias_hh), is_seen(scale_ih), is_seen(scale_hh);

        Floats next(s.B * s.H, NAN), c(first[1]);  // one step of x's first rows
        f = arguments(dtype, instructions);
        f.T = 1, f.reverse = 0, f.reset = nullptr, f.lengths = nullptr, f.h = nullptr;
        expect(!fastlstm_forward(&f, &threads), "one step failed");
        expect(!fastlstm_step(dtype, instructions, CELL, s.B, s.I, s.H, packed.data(), x.data(), first[0].data(),
                              HAS_C ? c.data() : nullptr, next.data(), &threads), "a step failed");
        expect(alike(next, last[0]) && (!HAS_C || alike(c, last[1])), "a step differs");
    }

    void check_all() {
        std::vector<double> all, states[2];
        plain(all, states);
        for (int64_t dtype : {FASTLSTM_INT8, FASTLSTM_INT8_BY_INT16}) {
            fastlstm_forward_args f = arguments(dtype, FASTLSTM_BASE);
            expect(!fastlstm_forward(&f, nullptr), "forward failed");
            const Floats want[3] = {h, last[0], last[1]};
            const double bound = dtype == FASTLSTM_INT8 ? 0.1 : 1e-3;
            compare(want[0], all, bound);
            for (int k = 0; k < C::STATES; k++) compare(want[1 + k], states[k], bound);
            for (int instructions = FASTLSTM_BASE; instructions <= FASTLSTM_AVX512; instructions++) {
                if (!fastlstm_packed_size(dtype, instructions, CELL, s.I, s.H)) continue;
                sets |= 1 << instructions;
                for (int64_t count = 1; count <= 3; count++, cases++) check(dtype, instructions, count, want);
            }
            Floats gates(4 * h.size());
            for (int wrong = 0; wrong < 4; wrong++) {
                f = arguments(dtype, FASTLSTM_BEST);
                if (wrong == 0) f.gates = gates.data(), f.c = HAS_C ? gates.data() : nullptr;
                if (wrong == 1) f.weight_ih_scale = nullptr;
                if (wrong == 2) f.weight_hh_scale = nullptr;
                if (wrong == 3) f.I = 1 << 17, f.weight_ih_row = f.I;
                expect(fastlstm_forward(&f, nullptr) == FASTLSTM_BAD_ARGUMENT, "a wrong argument was taken");
            }
        }
    }
};

int main() {
    const int64_t sizes[][4] = {{1, 1, 1, 1},   {3, 7, 1, 7},     {5, 1, 7, 100}, {4, 9, 28, 64},
                                {2, 70, 30, 7}, {2, 130, 65, 33}, {12, 40, 5, 48}, {30, 2, 18, 20}, {2, 21, 70, 80}};
    for (const auto &size : sizes) {
        for (int kind = 0; kind < 4; kind++) {
            const Case s = {size[0], size[1], size[2], size[3], (kind & 1) != 0, (kind & 2) != 0};
            Layer<Lstm>(s).check_all(), Layer<Gru>(s).check_all();
        }
    }
    printf("%d cases, instruction sets %x, %d failures\n", cases, sets, failures);
    return failures != 0;
}
