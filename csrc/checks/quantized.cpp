// Layers with int8 weights: every cell and instruction set against plain loops in double and, bit for bit, against each
// other, on arrays of exactly their sizes: for sanitizers. Prints one line and returns 0, or says what differed.
#include "layer.h"

// Draws int8 numbers and the scales of their rows, and returns what they stand for.
static Doubles draw(int64_t rows, int64_t columns, std::vector<int8_t> &numbers, std::vector<float> &scales) {
    Doubles weight;
    for (int64_t r = 0; r < rows; r++) {
        scales.push_back((float)(uniform() / 127 / sqrt((double)columns)));
        for (int64_t k = 0; k < columns; k++) {
            numbers.push_back((int8_t)floor(uniform() * 127.5 + 0.5));
            weight.push_back((double)numbers.back() * scales.back());
        }
    }
    return weight;
}

template <class C> void check(Case s) {
    Layer<C> l(s);
    std::vector<int8_t> ih, hh;
    std::vector<float> scale_ih, scale_hh;
    l.weight_ih = draw(C::X * s.H, s.I, ih, scale_ih), l.weight_hh = draw(C::Y * s.H, s.H, hh, scale_hh);
    l.run();
    for (int64_t dtype : {FASTLSTM_INT8, FASTLSTM_INT8_BY_INT16}) {
        Call<C, float, int8_t> base(l, dtype, FASTLSTM_BASE, 1, ih, hh, scale_ih, scale_hh);
        expect(!base.forward(), "forward failed");
        const double bound = dtype == FASTLSTM_INT8 ? 0.1 : 1e-3;
        compare("h", base.h, l.all[0], bound, 1);
        compare("h_n", base.h_n, l.last[0], bound, 1), compare("c_n", base.c_n, l.last[1], bound, 1);
        for (int instructions = FASTLSTM_BEST; instructions <= FASTLSTM_AVX512; instructions++) {
            if (!fastlstm_packed_size(dtype, instructions, base.CELL, s.I, s.H)) continue;
            sets |= 1 << instructions;
            on_two_splits([&](int64_t threads) {
                Call<C, float, int8_t> call(l, dtype, instructions, threads, ih, hh, scale_ih, scale_hh);
                call.check([&] { expect(call.h == base.h && call.h_n == base.h_n && call.c_n == base.c_n, "bits differ"); });
                cases++;
            });
        }
        std::vector<float> gates(4 * base.h.size());
        const fastlstm_forward_args right = base.f;
        for (int wrong = 0; wrong < 4; wrong++, base.f = right) {
            if (wrong == 0) base.f.gates = gates.data(), base.f.c = base.HAS_C ? gates.data() : nullptr;
            if (wrong == 1) base.f.weight_ih_scale = nullptr;
            if (wrong == 2) base.f.weight_hh_scale = nullptr;
            if (wrong == 3) base.f.I = 1 << 17, base.f.weight_ih_row = base.f.I;
            expect(base.forward() == FASTLSTM_BAD_ARGUMENT, "a wrong argument was taken");
        }
    }
}

int main() { return check_all([](Case s) { check<Lstm>(s), check<Gru>(s); }); }
