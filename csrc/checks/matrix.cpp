// Every cell and instruction set of this processor against plain loops in double, on arrays of exactly their sizes: for
// sanitizers. Prints one line and returns 0, or says what differed.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "../fastlstm.h"

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
#include "../cells.h"

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

// A layer of cell C, and its results. Arrays of states have h first; what a cell without c lacks is empty.
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
        for (int k = 0; k < C::STATES; k++) {
            first[k] = last[k] = randoms(BH), d[k] = randoms(TBH), d_n[k] = d_0[k] = randoms(BH), all[k] = Doubles(TBH);
        }
        for (double &w : weight_hh) w = (float)(w / sqrt((double)s.H));
        for (int64_t k = 0; s.masked && k < s.T * s.B; k++) reset.push_back(uniform() < -0.3);
        for (int64_t b = 0; s.masked && b < s.B; b++) lengths.push_back((int64_t)floor((uniform() + 1) / 2 * (s.T + 3)) - 1);
        if (s.masked && s.B > 1) lengths[0] = INT64_MIN, lengths[1] = INT64_MAX;
        dx = Doubles(x.size()), dweight_ih = Doubles(weight_ih.size()), dweight_hh = Doubles(weight_hh.size());
        dbias_ih = Doubles(bias_ih.size()), dbias_hh = Doubles(bias_hh.size());
        for (int64_t b = 0; b < s.B; b++) row(b);
    }
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
                double sums[C::S] = {}, prev[C::STATES], next[C::STATES];
                for (int g = 0; g < C::X; g++) {
                    const int64_t row = C::BLOCKS_IH[g] * H + u;
                    sums[g] += bias_ih[row];
                    for (int64_t k = 0; k < I; k++) sums[g] += x[at * I + k] * weight_ih[row * I + k];
                }
                for (int g = 0; g < C::Y; g++) {
                    const int64_t row = C::BLOCKS_HH[g] * H + u;
                    sums[FIRST_H + g] += bias_hh[row];
                    for (int64_t k = 0; k < H; k++) sums[FIRST_H + g] += seen[0][t * H + k] * weight_hh[row * H + k];
                }
                for (int k = 0; k < C::STATES; k++) prev[k] = seen[k][t * H + u];
                C::forward(sums, prev, next, &saved[(t * H + u) * C::SAVED]);
                for (int k = 0; k < C::STATES; k++) all[k][at * H + u] = last[k][b * H + u] = next[k];
            }
        }
        for (int64_t step = T - 1; step >= 0; step--) {
            const int64_t t = s.reverse ? T - 1 - step : step, at = t * B + b;
            const bool held = is_held(at), zero = s.masked && reset[at];
            for (int k = held; k < C::STATES; k++)
                for (int64_t u = 0; u < H; u++) d_0[k][b * H + u] += d[k][at * H + u];
            if (held) continue;
            std::vector<Doubles> dsums(C::S, Doubles(H));
            for (int64_t u = 0; u < H; u++) {
                double d_next[C::STATES], prev[C::STATES], d_prev[C::STATES] = {}, found[C::S];
                for (int k = 0; k < C::STATES; k++) d_next[k] = d_0[k][b * H + u], prev[k] = seen[k][t * H + u];
                C::backward(d_next, &saved[(t * H + u) * C::SAVED], prev, found, d_prev);
                for (int g = 0; g < C::S; g++) dsums[g][u] = found[g];
                for (int k = 0; k < C::STATES; k++) d_0[k][b * H + u] = zero ? 0 : d_prev[k];
            }
            for (int g = 0; g < C::X; g++) {
                for (int64_t u = 0; u < H; u++) {
                    const int64_t row = C::BLOCKS_IH[g] * H + u;
                    dbias_ih[row] += dsums[g][u];
                    for (int64_t k = 0; k < I; k++) {
                        dweight_ih[row * I + k] += dsums[g][u] * x[at * I + k];
                        dx[at * I + k] += dsums[g][u] * weight_ih[row * I + k];
                    }
                }
            }
            for (int g = 0; g < C::Y; g++) {
                for (int64_t u = 0; u < H; u++) {
                    const int64_t row = C::BLOCKS_HH[g] * H + u;
                    const double dsum = dsums[FIRST_H + g][u];
                    dbias_hh[row] += dsum;
                    for (int64_t k = 0; k < H; k++) {
                        dweight_hh[row * H + k] += dsum * seen[0][t * H + k];
                        if (!zero) d_0[0][b * H + k] += dsum * weight_hh[row * H + k];
                    }
                }
            }
        }
    }
};

static int failures = 0;

template <class E> void compare(const char *name, const std::vector<E> &got, const Doubles &want, double bound) {
    double scale = 0.1, worst = 0;
    for (double value : want) scale = fmax(scale, fabs(value));
    for (size_t k = 0; k < want.size(); k++) {
        double difference = fabs(got[k] - want[k]) / scale;
        if (!(difference <= worst)) worst = difference;  // NaN as well
    }
    if (!(worst <= bound)) printf("%s is off by %g, allowed %g\n", name, worst, bound), failures++;
}

template <class E> std::vector<E> as(const Doubles &values) { return {values.begin(), values.end()}; }

static void expect(bool right, const char *words) {
    if (!right) printf("%s\n", words), failures++;
}

template <class C, class E>
void check(const Layer<C> &l, int64_t dtype, int instructions, int64_t count, double bound) {
    constexpr int cell = std::is_same<C, Gru>::value ? FASTLSTM_GRU : FASTLSTM_LSTM;
    constexpr bool has_c = C::STATES > 1;
    const Case s = l.s;
    const int64_t BH = s.B * s.H, TBH = s.T * BH, of_c = has_c ? TBH : 0, of_c_n = has_c ? BH : 0;
    const auto x = as<E>(l.x), weight_ih = as<E>(l.weight_ih), weight_hh = as<E>(l.weight_hh);
    const auto bias_ih = as<E>(l.bias_ih), bias_hh = as<E>(l.bias_hh), h_0 = as<E>(l.first[0]), c_0 = as<E>(l.first[1]);
    const auto dh = as<E>(l.d[0]), dc = as<E>(l.d[1]), dh_n = as<E>(l.d_n[0]), dc_n = as<E>(l.d_n[1]);
    std::vector<E> h(TBH, NAN), c(of_c, NAN), h_n(BH, NAN), c_n(of_c_n, NAN);
    std::vector<char> gates(fastlstm_gates_size(dtype, instructions, cell, s.T, s.B, s.H), -1);
    std::vector<char> packed(fastlstm_packed_size(dtype, instructions, cell, s.I, s.H), -1);
    const fastlstm_threads threads = {count, nullptr, nullptr};
    const uint8_t *reset = s.masked ? l.reset.data() : nullptr;
    const int64_t *lengths = s.masked ? l.lengths.data() : nullptr;
    auto or_null = [](auto &values) { return has_c ? values.data() : nullptr; };
    fastlstm_forward_args f = {
        FASTLSTM_VERSION, dtype, instructions, cell, s.T, s.B, s.I, s.H, s.reverse, x.data(), s.B * s.I, s.I,
        weight_ih.data(), s.I, weight_hh.data(), s.H, bias_ih.data(), bias_hh.data(), nullptr, nullptr, nullptr, nullptr,
        h_0.data(), s.H, or_null(c_0), s.H, reset, lengths, h.data(), h_n.data(), or_null(c_n), or_null(c), gates.data(),
    };
    auto forward = [&] { return fastlstm_forward(&f, &threads); };
    int64_t changed = 0;
    for (int pass = 0; pass < 3; pass++) {  // packed inside the call, before it, and held against the weights
        expect(!forward(), "forward failed");
        compare("h", h, l.all[0], bound), compare("h_n", h_n, l.last[0], bound);
        compare("c", c, l.all[1], bound), compare("c_n", c_n, l.last[1], bound);
        if (pass == 0) expect(!fastlstm_pack(&f, packed.data()), "pack failed");
        const bool held = pass == 1;
        f.packed = packed.data(), f.changed = held ? &changed : nullptr;
        f.weight_ih = held ? weight_ih.data() : nullptr, f.weight_hh = held ? weight_hh.data() : nullptr;
        f.bias_ih = held ? bias_ih.data() : nullptr, f.bias_hh = held ? bias_hh.data() : nullptr;
        h.assign(TBH, NAN), h_n.assign(BH, NAN);
        expect(!changed, "unchanged weights were found changed");
    }
    f.weight_ih = weight_ih.data(), f.weight_hh = weight_hh.data(), f.changed = &changed;
    for (int other = 0; other < 2; other++) {
        f.bias_ih = other ? nullptr : bias_ih.data(), f.bias_hh = other ? bias_hh.data() : nullptr;
        expect(!forward() && changed, "a bias that is gone was not found");
    }
    f.c = nullptr, f.gates = nullptr, f.bias_ih = bias_ih.data();
    expect(!forward() && !changed, "unchanged weights were found changed");
    for (auto [weight, place] : {std::pair{&weight_ih, &f.weight_ih}, std::pair{&weight_hh, &f.weight_hh}}) {
        auto other = *weight;
        *place = other.data();
        for (size_t k = 0; k < other.size(); k += 1 + other.size() / 25) {
            other[k] += 1;
            expect(!forward() && changed, "a changed weight was not found");
            other[k] = (*weight)[k];
        }
        std::swap(other.front(), other.back());
        expect(other == *weight || (!forward() && changed), "two weights that changed places were not found");
        *place = weight->data();
    }
    int64_t *const strides[] = {&f.weight_ih_row, &f.weight_hh_row, &f.x_step, &f.x_row, &f.h_0_row, &f.c_0_row};
    for (int64_t *stride : strides) {
        const int64_t kept = *stride, far = INT64_C(1) << 60, wrong[] = {far, -far, kept - 1, 0, -kept};
        const int count = stride == &f.weight_ih_row || stride == &f.weight_hh_row ? 5 : 2;  // others may be any in reach
        for (int k = 0; k < count; k++) {
            *stride = wrong[k];
            expect(forward() == FASTLSTM_BAD_ARGUMENT, "a stride out of reach was taken");
        }
        *stride = kept;
    }
    for (int64_t wrong : {-1, 1 - cell, 2}) {  // to the other cell c is missing, or too much
        f.cell = wrong;
        expect(forward() == FASTLSTM_BAD_ARGUMENT, "a wrong cell was taken");
    }
    f.cell = cell;
    std::vector<E> next(BH, NAN), c_next(c_0);  // one step of x's first rows
    f.T = 1, f.reverse = 0, f.reset = nullptr, f.lengths = nullptr, f.h = nullptr;
    const bool stepped = !forward() && !fastlstm_step(dtype, instructions, cell, s.B, s.I, s.H, packed.data(), x.data(),
                                                      h_0.data(), or_null(c_next), next.data(), &threads);
    expect(stepped && !memcmp(next.data(), h_n.data(), BH * sizeof(E)), "h of a step differs");
    expect(c_n.empty() || !memcmp(c_next.data(), c_n.data(), of_c_n * sizeof(E)), "c of a step differs");
    expect(fastlstm_step(dtype, instructions, cell, s.B, s.I, s.H, packed.data(), x.data(), h_0.data(),
                         has_c ? nullptr : h_n.data(), next.data(), &threads) == FASTLSTM_BAD_ARGUMENT,
           "a step took the wrong states");

    h = as<E>(l.all[0]);
    std::vector<E> dx(l.dx.size(), NAN), dweight_ih(l.dweight_ih.size(), NAN), dweight_hh(l.dweight_hh.size(), NAN);
    std::vector<E> dbias_ih(bias_ih.size(), NAN), dbias_hh(bias_hh.size(), NAN), dh_0(BH, NAN), dc_0(of_c_n, NAN);
    fastlstm_backward_args b = {
        FASTLSTM_VERSION, dtype, instructions, cell, s.T, s.B, s.I, s.H, s.reverse, x.data(), s.B * s.I, s.I,
        weight_ih.data(), s.I, weight_hh.data(), s.H, h_0.data(), s.H, or_null(c_0), s.H, reset, lengths, h.data(),
        or_null(c), gates.data(), dh.data(), BH, s.H, or_null(dc), BH, s.H, dh_n.data(), s.H, or_null(dc_n), s.H,
        dx.data(), dweight_ih.data(), dweight_hh.data(), dbias_ih.data(), dbias_hh.data(), dh_0.data(), or_null(dc_0),
    };
    auto backward = [&] { return fastlstm_backward(&b, &threads); };
    expect(!backward(), "backward failed");
    compare("dx", dx, l.dx, bound), compare("dweight_ih", dweight_ih, l.dweight_ih, bound);
    compare("dweight_hh", dweight_hh, l.dweight_hh, bound), compare("dbias_ih", dbias_ih, l.dbias_ih, bound);
    compare("dbias_hh", dbias_hh, l.dbias_hh, bound), compare("dh_0", dh_0, l.d_0[0], bound);
    compare("dc_0", dc_0, l.d_0[1], bound);
    std::vector<E> *const gradients[] = {&dx, &dweight_ih, &dweight_hh, &dbias_ih, &dbias_hh, &dh_0, &dc_0};
    void **const wanted[] = {&b.dx, &b.dweight_ih, &b.dweight_hh, &b.dbias_ih, &b.dbias_hh, &b.dh_0, &b.dc_0};
    for (int k = 0; k < 6 + has_c; k++) {  // each alone: the same bits
        const std::vector<E> all = *gradients[k];
        for (void **other : wanted) *other = nullptr;
        gradients[k]->assign(all.size(), NAN), *wanted[k] = gradients[k]->data();
        expect(!backward() && *gradients[k] == all, "a gradient alone differs");
    }
    for (void **other : wanted) *other = nullptr;
    expect(!backward(), "backward of no gradient failed");
    b.dh_0 = dh_0.data(), b.dh = b.dc = b.dh_n = b.dc_n = nullptr;
    expect(!backward(), "backward of nothing failed");
    for (E value : dh_0) expect(value == 0, "a gradient of nothing is not zero");
    b.cell = 1 - cell;
    expect(backward() == FASTLSTM_BAD_ARGUMENT, "a wrong cell was taken");
}

static int sets = 0, cases = 0;

template <class C> void check_all(Case s) {
    const Layer<C> layer(s);
    for (int instructions = FASTLSTM_BASE; instructions <= FASTLSTM_AVX512; instructions++) {
        if (!fastlstm_instructions_name(instructions)) continue;
        sets |= 1 << instructions;
        for (int64_t threads = 1; threads <= 3; threads++, cases += 2) {
            check<C, float>(layer, FASTLSTM_FLOAT32, instructions, threads, 1.2e-5);
            check<C, double>(layer, FASTLSTM_FLOAT64, instructions, threads, 2.3e-14);
        }
    }
}

int main() {
    const int64_t sizes[][4] = {{1, 1, 1, 1},   {3, 7, 1, 7},   {5, 1, 7, 100}, {4, 9, 28, 64},
                                {2, 70, 30, 7}, {3, 2, 7, 130}, {2, 130, 65, 33}, {12, 40, 5, 48}, {24, 40, 3, 20}};
    for (const auto &size : sizes) {
        for (int kind = 0; kind < 4; kind++) {
            const Case s = {size[0], size[1], size[2], size[3], (kind & 1) != 0, (kind & 2) != 0};
            check_all<Lstm>(s), check_all<Gru>(s);
        }
    }
    printf("%d cases, instruction sets %x, %d failures\n", cases, sets, failures);
    return failures != 0;
}
