// Every cell and instruction set of this processor against plain loops in double, on arrays of exactly their sizes: for
// sanitizers. Prints one line and returns 0, or says what differed.
#include "layer.h"

template <class C, class E>
void check(const Layer<C> &l, int64_t dtype, int instructions, int64_t count, double bound) {
    Call<C, E, E> call(l, dtype, instructions, count, as<E>(l.weight_ih), as<E>(l.weight_hh));
    call.check([&] {
        compare("h", call.h, l.all[0], bound), compare("h_n", call.h_n, l.last[0], bound);
        compare("c", call.c, l.all[1], bound), compare("c_n", call.c_n, l.last[1], bound);
    });

    const fastlstm_forward_args &f = call.f;
    auto dh = as<E>(l.d[0]), dc = as<E>(l.d[1]), dh_n = as<E>(l.d_n[0]), dc_n = as<E>(l.d_n[1]);
    const auto h = as<E>(l.all[0]);
    fastlstm_backward_args b = {
        FASTLSTM_VERSION, dtype, instructions, f.cell, f.T, f.B, f.I, f.H, f.reverse, f.x, f.x_step, f.x_row,
        f.weight_ih, f.I, f.weight_hh, f.H, f.h_0, f.H, f.c_0, f.H, f.reset, f.lengths, h.data(), f.c, f.gates,
        dh.data(), f.B * f.H, f.H, call.or_null(dc), f.B * f.H, f.H, dh_n.data(), f.H, call.or_null(dc_n), f.H,
        nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
    };
    struct Gradient {
        const char *name;
        const Doubles &want;
        void **place;
        std::vector<E> got{};
    } gradients[] = {{"dweight_ih", l.dweight_ih, &b.dweight_ih}, {"dweight_hh", l.dweight_hh, &b.dweight_hh},
                     {"dbias_ih", l.dbias_ih, &b.dbias_ih}, {"dbias_hh", l.dbias_hh, &b.dbias_hh},
                     {"dx", l.dx, &b.dx}, {"dh_0", l.d_0[0], &b.dh_0}, {"dc_0", l.d_0[1], &b.dc_0}};
    for (Gradient &g : gradients) g.got.assign(g.want.size(), NAN), *g.place = call.or_null(g.got);
    auto backward = [&] { return fastlstm_backward(&b, &call.threads); };
    expect(!backward(), "backward failed");
    for (const Gradient &g : gradients) compare(g.name, g.got, g.want, bound), *g.place = nullptr;
    for (Gradient &g : gradients) {  // each alone: the same bits
        const std::vector<E> all = g.got;
        g.got.assign(all.size(), NAN), *g.place = call.or_null(g.got);
        expect(!backward() && g.got == all, "a gradient alone differs");
        *g.place = nullptr;
    }
    expect(!backward(), "backward of no gradient failed");
    std::vector<E> dh_0(dh_n.size(), NAN);
    b.dh_0 = dh_0.data(), b.dh = b.dc = b.dh_n = b.dc_n = nullptr;
    expect(!backward(), "backward of nothing failed");
    for (E value : dh_0) expect(value == 0, "a gradient of nothing is not zero");
    b.cell = 1 - f.cell;
    expect(backward() == FASTLSTM_BAD_ARGUMENT, "a wrong cell was taken");
}

template <class C> void check_cell(Case s) {
    Layer<C> layer(s);
    layer.run();
    for (int instructions = FASTLSTM_BASE; instructions <= FASTLSTM_AVX512; instructions++) {
        if (!fastlstm_instructions_name(instructions)) continue;
        sets |= 1 << instructions;
        on_two_splits([&](int64_t threads) {
            check<C, float>(layer, FASTLSTM_FLOAT32, instructions, threads, 1.2e-5);
            check<C, double>(layer, FASTLSTM_FLOAT64, instructions, threads, 2.3e-14);
            cases += 2;
        });
    }
}

int main() { return check_all([](Case s) { check_cell<Lstm>(s), check_cell<Gru>(s); }); }
