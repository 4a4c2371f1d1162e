// What the kernels know of each cell: how its values lie, and its arithmetic. generate.py writes this file from
// fastlstm/cells, and a test compares the two.
//
// A cell has S pre-activations. x is multiplied for the first X of them, and h for the last Y. BLOCKS_IH and BLOCKS_HH
// have, for each of these, its block of H rows of weight_ih and weight_hh. The first of the STATES is h. The cell reads
// the states from FIRST_READ on, and carries their gradients to the step before. The forward pass stores SAVED values
// for the backward pass.
#pragma once

struct Lstm {  // pre-activations: i, f, g, o
    static constexpr int S = 4, X = 4, Y = 4, STATES = 2, SAVED = 4, FIRST_READ = 1;
    static constexpr int BLOCKS_IH[X] = {0, 1, 2, 3}, BLOCKS_HH[Y] = {0, 1, 2, 3};
    template <class V> static void forward(const V *preact, const V *prev, V *next, V *saved) {
        const V i_pre = preact[0], f_pre = preact[1], g_pre = preact[2], o_pre = preact[3], c_prev = prev[1];
        auto i = sigmoid(i_pre);
        auto f = sigmoid(f_pre);
        auto g = tanh(g_pre);
        auto o = sigmoid(o_pre);
        auto c = f * c_prev + i * g;
        auto h = o * tanh(c);
        next[0] = h, next[1] = c;
        saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    }
    template <class V> static void backward(const V *d, const V *saved, const V *prev, V *dpreact, V *d_prev) {
        const V dh = d[0], dc = d[1], i = saved[0], f = saved[1], g = saved[2], o = saved[3], c_prev = prev[1];
        auto v0 = tanh(f * c_prev + i * g);
        auto v1 = dc + dh * o * (1.0 - v0 * v0);
        auto dg_pre = v1 * i * (1.0 - g * g);
        auto di_pre = v1 * g * i * (1.0 - i);
        auto dc_prev = v1 * f;
        auto df_pre = v1 * c_prev * f * (1.0 - f);
        auto do_pre = dh * v0 * o * (1.0 - o);
        dpreact[0] = di_pre, dpreact[1] = df_pre, dpreact[2] = dg_pre, dpreact[3] = do_pre;
        d_prev[1] = dc_prev;
    }
};

struct Gru {  // pre-activations: n_x, r, z, n_h
    static constexpr int S = 4, X = 3, Y = 3, STATES = 1, SAVED = 4, FIRST_READ = 0;
    static constexpr int BLOCKS_IH[X] = {2, 0, 1}, BLOCKS_HH[Y] = {0, 1, 2};
    template <class V> static void forward(const V *preact, const V *prev, V *next, V *saved) {
        const V r_pre = preact[1], z_pre = preact[2], n_x_pre = preact[0], n_h_pre = preact[3], h_prev = prev[0];
        auto r = sigmoid(r_pre);
        auto z = sigmoid(z_pre);
        auto n = tanh(n_x_pre + r * n_h_pre);
        auto h = n + z * (h_prev - n);
        next[0] = h;
        saved[0] = n_h_pre, saved[1] = r, saved[2] = z, saved[3] = n;
    }
    template <class V> static void backward(const V *d, const V *saved, const V *prev, V *dpreact, V *d_prev) {
        const V dh = d[0], n_h_pre = saved[0], r = saved[1], z = saved[2], n = saved[3], h_prev = prev[0];
        auto dh_prev = dh * z;
        auto dz_pre = dh * (h_prev - n) * z * (1.0 - z);
        auto dn_x_pre = (dh - dh_prev) * (1.0 - n * n);
        auto dn_h_pre = dn_x_pre * r;
        auto dr_pre = dn_x_pre * n_h_pre * r * (1.0 - r);
        dpreact[0] = dn_x_pre, dpreact[1] = dr_pre, dpreact[2] = dz_pre, dpreact[3] = dn_h_pre;
        d_prev[0] = dh_prev;
    }
};
