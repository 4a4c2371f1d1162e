// What the kernels know of each cell: how its values lie, and its arithmetic. generate.py writes this file from
// fastlstm/cells, and a test compares the two.
//
// A cell has S sums. x is multiplied for the first X of them, and h for the last Y. BLOCKS_IH and BLOCKS_HH say which
// block of H rows of weight_ih and weight_hh each of these has. The first of the STATES is h. The cell itself reads the
// states from OWN on, and hands their gradients on. SAVED values go from the forward pass to the backward pass.
#pragma once

template <class V> struct LstmForward { V h, c, i, f, g, o; };
template <class V> inline LstmForward<V> lstm_forward(V i_pre, V f_pre, V g_pre, V o_pre, V c_prev) {
    auto i = sigmoid(i_pre);
    auto f = sigmoid(f_pre);
    auto g = tanh(g_pre);
    auto o = sigmoid(o_pre);
    auto c = f * c_prev + i * g;
    auto h = o * tanh(c);
    return {h, c, i, f, g, o};
}

template <class V> struct LstmBackward { V di_pre, df_pre, dg_pre, do_pre, dc_prev; };
template <class V> inline LstmBackward<V> lstm_backward(V dh, V dc, V i, V f, V g, V o, V c_prev) {
    auto v0 = tanh(f * c_prev + i * g);
    auto v1 = dc + dh * o * (1.0 - v0 * v0);
    auto dg_pre = v1 * i * (1.0 - g * g);
    auto di_pre = v1 * g * i * (1.0 - i);
    auto dc_prev = v1 * f;
    auto df_pre = v1 * c_prev * f * (1.0 - f);
    auto do_pre = dh * v0 * o * (1.0 - o);
    return {di_pre, df_pre, dg_pre, do_pre, dc_prev};
}

struct Lstm {  // sums: i, f, g, o
    static constexpr int S = 4, X = 4, Y = 4, STATES = 2, SAVED = 4, OWN = 1;
    static constexpr int BLOCKS_IH[X] = {0, 1, 2, 3}, BLOCKS_HH[Y] = {0, 1, 2, 3};
    template <class V> static void forward(const V *sums, const V *prev, V *next, V *saved) {
        LstmForward<V> made = lstm_forward<V>(sums[0], sums[1], sums[2], sums[3], prev[1]);
        next[0] = made.h, next[1] = made.c;
        saved[0] = made.i, saved[1] = made.f, saved[2] = made.g, saved[3] = made.o;
    }
    template <class V> static void backward(const V *d, const V *saved, const V *prev, V *dsums, V *d_prev) {
        LstmBackward<V> made = lstm_backward<V>(d[0], d[1], saved[0], saved[1], saved[2], saved[3], prev[1]);
        dsums[0] = made.di_pre, dsums[1] = made.df_pre, dsums[2] = made.dg_pre, dsums[3] = made.do_pre;
        d_prev[1] = made.dc_prev;
    }
};

template <class V> struct GruForward { V h, n_h_pre, r, z, n; };
template <class V> inline GruForward<V> gru_forward(V r_pre, V z_pre, V n_x_pre, V n_h_pre, V h_prev) {
    auto r = sigmoid(r_pre);
    auto z = sigmoid(z_pre);
    auto n = tanh(n_x_pre + r * n_h_pre);
    auto h = n + z * (h_prev - n);
    return {h, n_h_pre, r, z, n};
}

template <class V> struct GruBackward { V dr_pre, dz_pre, dn_x_pre, dn_h_pre, dh_prev; };
template <class V> inline GruBackward<V> gru_backward(V dh, V n_h_pre, V r, V z, V n, V h_prev) {
    auto dh_prev = dh * z;
    auto dz_pre = dh * (h_prev - n) * z * (1.0 - z);
    auto dn_x_pre = (dh - dh_prev) * (1.0 - n * n);
    auto dn_h_pre = dn_x_pre * r;
    auto dr_pre = dn_x_pre * n_h_pre * r * (1.0 - r);
    return {dr_pre, dz_pre, dn_x_pre, dn_h_pre, dh_prev};
}

struct Gru {  // sums: n_x, r, z, n_h
    static constexpr int S = 4, X = 3, Y = 3, STATES = 1, SAVED = 4, OWN = 0;
    static constexpr int BLOCKS_IH[X] = {2, 0, 1}, BLOCKS_HH[Y] = {0, 1, 2};
    template <class V> static void forward(const V *sums, const V *prev, V *next, V *saved) {
        GruForward<V> made = gru_forward<V>(sums[1], sums[2], sums[0], sums[3], prev[0]);
        next[0] = made.h;
        saved[0] = made.n_h_pre, saved[1] = made.r, saved[2] = made.z, saved[3] = made.n;
    }
    template <class V> static void backward(const V *d, const V *saved, const V *prev, V *dsums, V *d_prev) {
        GruBackward<V> made = gru_backward<V>(d[0], saved[0], saved[1], saved[2], saved[3], prev[0]);
        dsums[0] = made.dn_x_pre, dsums[1] = made.dr_pre, dsums[2] = made.dz_pre, dsums[3] = made.dn_h_pre;
        d_prev[0] = made.dh_prev;
    }
};
