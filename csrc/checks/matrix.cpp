// Every instruction set of this processor against plain loops in double, on arrays of exactly their sizes: for sanitizers.
// Prints one line and returns 0, or says what differed.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../fastlstm.h"

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
#include "../cell.h"

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

struct Layer {
    Case s;
    Doubles x, weight_ih, weight_hh, bias, h_0, c_0, dh, dc, dh_n, dc_n;
    std::vector<uint8_t> reset; std::vector<int64_t> lengths;
    Doubles h, h_n, c_n, c, dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0;  // results

    explicit Layer(Case s) : s(s) {
        const int64_t TBH = s.T * s.B * s.H, BH = s.B * s.H;
        x = randoms(s.T * s.B * s.I), weight_ih = randoms(4 * s.H * s.I), weight_hh = randoms(4 * s.H * s.H);
        bias = randoms(4 * s.H), h_0 = randoms(BH), c_0 = randoms(BH);
        dh = randoms(TBH), dc = randoms(TBH), dh_n = randoms(BH), dc_n = randoms(BH);
        for (double &w : weight_hh) w = (float)(w / sqrt((double)s.H));
        for (int64_t k = 0; s.masked && k < s.T * s.B; k++) reset.push_back(uniform() < -0.3);
        for (int64_t b = 0; s.masked && b < s.B; b++) lengths.push_back((int64_t)floor((uniform() + 1) / 2 * (s.T + 3)) - 1);
        if (s.masked && s.B > 1) lengths[0] = INT64_MIN, lengths[1] = INT64_MAX;
        h = c = Doubles(TBH), h_n = h_0, c_n = c_0, dx = Doubles(x.size()), dh_0 = dh_n, dc_0 = dc_n;
        dweight_ih = Doubles(weight_ih.size()), dweight_hh = Doubles(weight_hh.size()), dbias = Doubles(4 * s.H);
        for (int64_t b = 0; b < s.B; b++) row(b);
    }
    bool is_held(int64_t at) const { return s.masked && at / s.B >= lengths[at % s.B]; }

    void row(int64_t b) {
        const int64_t T = s.T, B = s.B, I = s.I, H = s.H;
        Doubles gates(T * 4 * H), h_seen(T * H), c_seen(T * H);
        for (int64_t step = 0; step < T; step++) {
            const int64_t t = s.reverse ? T - 1 - step : step, at = t * B + b;
            const bool held = is_held(at), zero = s.masked && reset[at] && !held;
            for (int64_t k = 0; held && k < I; k++) x[at * I + k] = NAN;  // which nobody is to look at
            for (int64_t u = 0; held && u < H; u++) dh[at * H + u] = NAN;
            for (int64_t u = 0; u < H; u++) h_seen[t * H + u] = zero ? 0 : h_n[b * H + u];
            for (int64_t u = 0; u < H; u++) c[at * H + u] = c_seen[t * H + u] = zero ? 0 : c_n[b * H + u];
            for (int64_t u = 0; u < H && !held; u++) {
                double pre[4];
                for (int64_t g = 0; g < 4; g++) {
                    pre[g] = bias[g * H + u];
                    for (int64_t k = 0; k < I; k++) pre[g] += x[at * I + k] * weight_ih[(g * H + u) * I + k];
                    for (int64_t k = 0; k < H; k++) pre[g] += h_seen[t * H + k] * weight_hh[(g * H + u) * H + k];
                }
                Cell<double> cell = cell_forward(pre[0], pre[1], pre[2], pre[3], c_seen[t * H + u]);
                const double kept[4] = {cell.i, cell.f, cell.g, cell.o};
                for (int64_t g = 0; g < 4; g++) gates[(t * 4 + g) * H + u] = kept[g];
                h[at * H + u] = h_n[b * H + u] = cell.h, c[at * H + u] = c_n[b * H + u] = cell.c;
            }
        }
        double *dh_b = &dh_0[b * H], *dc_b = &dc_0[b * H];
        for (int64_t step = T - 1; step >= 0; step--) {
            const int64_t t = s.reverse ? T - 1 - step : step, at = t * B + b;
            const bool held = is_held(at), zero = s.masked && reset[at];
            for (int64_t u = 0; u < H; u++) dh_b[u] += held ? 0 : dh[at * H + u], dc_b[u] += dc[at * H + u];
            if (held) continue;
            Doubles dpreact(4 * H);
            for (int64_t u = 0; u < H; u++) {
                const double *gate = &gates[t * 4 * H + u];
                CellGradients<double> d =
                    cell_backward(dh_b[u], dc_b[u], gate[0], gate[H], gate[2 * H], gate[3 * H], c_seen[t * H + u]);
                dpreact[u] = d.di_pre, dpreact[H + u] = d.df_pre, dpreact[2 * H + u] = d.dg_pre;
                dpreact[3 * H + u] = d.do_pre, dc_b[u] = zero ? 0 : d.dc_prev, dh_b[u] = 0;
            }
            for (int64_t r = 0; r < 4 * H; r++) {
                dbias[r] += dpreact[r];
                for (int64_t k = 0; k < I; k++) {
                    dweight_ih[r * I + k] += dpreact[r] * x[at * I + k];
                    dx[at * I + k] += dpreact[r] * weight_ih[r * I + k];
                }
                for (int64_t k = 0; k < H; k++) {
                    dweight_hh[r * H + k] += dpreact[r] * h_seen[t * H + k];
                    if (!zero) dh_b[k] += dpreact[r] * weight_hh[r * H + k];
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

template <class E> void check(const Layer &l, int64_t dtype, int instructions, int64_t count, double bound) {
    const Case s = l.s;
    const int64_t BH = s.B * s.H, TBH = s.T * BH;
    const auto x = as<E>(l.x), weight_ih = as<E>(l.weight_ih), weight_hh = as<E>(l.weight_hh), bias = as<E>(l.bias);
    const auto h_0 = as<E>(l.h_0), c_0 = as<E>(l.c_0);
    const auto dh = as<E>(l.dh), dc = as<E>(l.dc), dh_n = as<E>(l.dh_n), dc_n = as<E>(l.dc_n);
    std::vector<E> h(TBH, NAN), c(TBH, NAN), h_n(BH, NAN), c_n(BH, NAN);
    std::vector<char> gates(fastlstm_gates_size(dtype, instructions, s.T, s.B, s.H), -1);
    std::vector<char> packed(fastlstm_packed_size(dtype, instructions, s.I, s.H), -1);
    const fastlstm_threads threads = {count, nullptr, nullptr};
    const uint8_t *reset = s.masked ? l.reset.data() : nullptr;
    const int64_t *lengths = s.masked ? l.lengths.data() : nullptr;
    fastlstm_forward_args f = {
        FASTLSTM_VERSION, dtype, instructions, s.T, s.B, s.I, s.H, s.reverse, x.data(), s.B * s.I, s.I,
        weight_ih.data(), s.I, weight_hh.data(), s.H, bias.data(), nullptr, nullptr, nullptr, h_0.data(), s.H, c_0.data(), s.H,
        reset, lengths, h.data(), h_n.data(), c_n.data(), c.data(), gates.data(),
    };
    int64_t changed = 0;
    for (int pass = 0; pass < 3; pass++) {  // packed inside the call, before it, and held against the weights
        if (fastlstm_forward(&f, &threads)) printf("forward failed\n"), failures++;
        compare("h", h, l.h, bound), compare("c", c, l.c, bound);
        compare("h_n", h_n, l.h_n, bound), compare("c_n", c_n, l.c_n, bound);
        if (pass == 0 && fastlstm_pack(&f, packed.data())) printf("pack failed\n"), failures++;
        const bool held = pass == 1;
        f.packed = packed.data(), f.changed = held ? &changed : nullptr;
        f.weight_ih = held ? weight_ih.data() : nullptr, f.weight_hh = held ? weight_hh.data() : nullptr;
        f.bias = held ? bias.data() : nullptr;
        h.assign(TBH, NAN), h_n.assign(BH, NAN);
        if (changed) printf("unchanged weights were found changed\n"), failures++;
    }
    f.weight_ih = weight_ih.data(), f.weight_hh = weight_hh.data(), f.changed = &changed;  // and the bias is gone
    if (fastlstm_forward(&f, &threads) || !changed) printf("a changed bias was not found\n"), failures++;
    f.c = f.gates = nullptr, f.bias = bias.data();
    if (fastlstm_forward(&f, &threads) || changed) printf("unchanged weights were found changed\n"), failures++;
    auto other = weight_hh;
    f.weight_hh = other.data();
    for (size_t k = 0; k < other.size(); k += 1 + other.size() / 50) {
        other[k] += 1;
        if (fastlstm_forward(&f, &threads) || !changed) printf("a changed weight was not found\n"), failures++;
        other[k] = weight_hh[k];
    }
    std::swap(other.front(), other.back());
    if (other != weight_hh && (fastlstm_forward(&f, &threads) || !changed))
        printf("two weights that changed places were not found\n"), failures++;
    f.weight_hh = weight_hh.data();
    int64_t *const strides[] = {&f.weight_ih_row, &f.weight_hh_row, &f.x_step, &f.x_row, &f.h_0_row, &f.c_0_row};
    for (int64_t *stride : strides) {
        const int64_t kept = *stride, far = INT64_C(1) << 60, wrong[] = {far, -far, kept - 1, 0, -kept};
        const int count = stride == &f.weight_ih_row || stride == &f.weight_hh_row ? 5 : 2;  // others may be any in reach
        for (int k = 0; k < count; k++) {
            *stride = wrong[k];
            if (fastlstm_forward(&f, &threads) != FASTLSTM_BAD_ARGUMENT) printf("stride %ld was taken\n", (long)wrong[k]), failures++;
        }
        *stride = kept;
    }
    h = as<E>(l.h);
    std::vector<E> dx(l.dx.size(), NAN), dweight_ih(l.dweight_ih.size(), NAN), dweight_hh(l.dweight_hh.size(), NAN);
    std::vector<E> dbias(4 * s.H, NAN), dh_0(BH, NAN), dc_0(BH, NAN);
    fastlstm_backward_args b = {
        FASTLSTM_VERSION, dtype, instructions, s.T, s.B, s.I, s.H, s.reverse, x.data(), s.B * s.I, s.I,
        weight_ih.data(), s.I, weight_hh.data(), s.H, h_0.data(), s.H, c_0.data(), s.H,
        reset, lengths, h.data(), c.data(), gates.data(), dh.data(), BH, s.H, dc.data(), BH, s.H,
        dh_n.data(), s.H, dc_n.data(), s.H, dx.data(), dweight_ih.data(), dweight_hh.data(), dbias.data(),
        dh_0.data(), dc_0.data(),
    };
    if (fastlstm_backward(&b, &threads)) printf("backward failed\n"), failures++;
    compare("dx", dx, l.dx, bound), compare("dweight_ih", dweight_ih, l.dweight_ih, bound);
    compare("dweight_hh", dweight_hh, l.dweight_hh, bound), compare("dbias", dbias, l.dbias, bound);
    compare("dh_0", dh_0, l.dh_0, bound), compare("dc_0", dc_0, l.dc_0, bound);
    std::vector<E> *const gradients[] = {&dx, &dweight_ih, &dweight_hh, &dbias, &dh_0, &dc_0};
    void **const wanted[] = {&b.dx, &b.dweight_ih, &b.dweight_hh, &b.dbias, &b.dh_0, &b.dc_0};
    for (int k = 0; k < 6; k++) {  // each alone: the same bits
        const std::vector<E> all = *gradients[k];
        for (void **other : wanted) *other = nullptr;
        gradients[k]->assign(all.size(), NAN), *wanted[k] = gradients[k]->data();
        if (fastlstm_backward(&b, &threads) || *gradients[k] != all) printf("gradient %d alone differs\n", k), failures++;
    }
    for (void **other : wanted) *other = nullptr;
    if (fastlstm_backward(&b, &threads)) printf("backward of no gradient failed\n"), failures++;
    b.dh_0 = dh_0.data(), b.dh = b.dc = b.dh_n = b.dc_n = nullptr;
    if (fastlstm_backward(&b, &threads)) printf("backward of nothing failed\n"), failures++;
    for (E value : dh_0)
        if (value != 0) failures++;
}

int main() {
    const int64_t sizes[][4] = {{1, 1, 1, 1},   {3, 7, 1, 7},   {5, 1, 7, 100}, {4, 9, 28, 64},
                                {2, 70, 30, 7}, {3, 2, 7, 130}, {2, 130, 65, 33}, {12, 40, 5, 48}, {24, 40, 3, 20}};
    int sets = 0, cases = 0;
    for (const auto &size : sizes) {
        for (int kind = 0; kind < 4; kind++) {
            const Layer layer({size[0], size[1], size[2], size[3], (kind & 1) != 0, (kind & 2) != 0});
            for (int instructions = FASTLSTM_BASE; instructions <= FASTLSTM_AVX512; instructions++) {
                if (!fastlstm_instructions_name(instructions)) continue;
                sets |= 1 << instructions;
                for (int64_t threads = 1; threads <= 3; threads++, cases += 2) {
                    check<float>(layer, FASTLSTM_FLOAT32, instructions, threads, 1.2e-5);
                    check<double>(layer, FASTLSTM_FLOAT64, instructions, threads, 2.3e-14);
                }
            }
        }
    }
    printf("%d cases, instruction sets %x, %d failures\n", cases, sets, failures);
    return failures != 0;
}
