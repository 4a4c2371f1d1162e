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
    std::vector<E> dx(l.dx.size(), NAN), dweight_ih(l.dweight_ih.size(), NAN), dweight_hh(l.dweight_hh.size(), NAN);
    std::vector<E> dbias_ih(l.dbias_ih.size(), NAN), dbias_hh(l.dbias_hh.size(), NAN), dh_0(f.B * f.H, NAN);
    std::vector<E> dc_0(call.c_n.size(), NAN);
    fastlstm_backward_args b = {
        FASTLSTM_VERSION, dtype, instructions, f.cell, f.T, f.B, f.I, f.H, f.reverse, f.x, f.x_step, f.x_row,
        f.weight_ih, f.I, f.weight_hh, f.H, f.h_0, f.H, f.c_0, f.H, f.reset, f.lengths, h.data(), f.c, f.gates,
        dh.data(), f.B * f.H, f.H, call.or_null(dc), f.B * f.H, f.H, dh_n.data(), f.H, call.or_null(dc_n), f.H, dx.data(),
        dweight_ih.data(), dweight_hh.data(), dbias_ih.data(), dbias_hh.data(), dh_0.data(), call.or_null(dc_0),
    };
    auto backward = [&] { return fastlstm_backward(&b, &call.threads); };
    expect(!backward(), "backward failed");
    compare("dx", dx, l.dx, bound), compare("dweight_ih", dweight_ih, l.dweight_ih, bound);
    compare("dweight_hh", dweight_hh, l.dweight_hh, bound), compare("dbias_ih", dbias_ih, l.dbias_ih, bound);
    compare("dbias_hh", dbias_hh, l.dbias_hh, bound), compare("dh_0", dh_0, l.d_0[0], bound);
    compare("dc_0", dc_0, l.d_0[1], bound);
    std::vector<E> *const gradients[] = {&dx, &dweight_ih, &dweight_hh, &dbias_ih, &dbias_hh, &dh_0, &dc_0};
    void **const wanted[] = {&b.dx, &b.dweight_ih, &b.dweight_hh, &b.dbias_ih, &b.dbias_hh, &b.dh_0, &b.dc_0};
    for (int k = 0; k < 5 + C::STATES; k++) {  // each alone: the same bits
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
    b.cell = 1 - f.cell;
    expect(backward() == FASTLSTM_BAD_ARGUMENT, "a wrong cell was taken");
}

template <class C> void check_cell(Case s) {
    Layer<C> layer(s);
    layer.run();
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
    return check_all([](Case s) { check_cell<Lstm>(s), check_cell<Gru>(s); });
}
