// One LSTM cell, forward and backward: fastlstm/cell.py line by line. A test holds the two to each other.
#pragma once

template <class V> struct Cell { V h, c, i, f, g, o; };
template <class V> struct CellGradients { V di_pre, df_pre, dg_pre, do_pre, dc_prev; };

// The new state and the four gates from the pre-activations and the old cell state.
template <class V> inline Cell<V> cell_forward(V i_pre, V f_pre, V g_pre, V o_pre, V c_prev) {
    V i = sigmoid(i_pre), f = sigmoid(f_pre), g = tanh(g_pre), o = sigmoid(o_pre);
    V c = f * c_prev + i * g;
    return {o * tanh(c), c, i, f, g, o};
}

// The gradients of the four pre-activations, and of c_prev. dh and dc are the gradients of the new state.
// `do` is a word of C's, hence do_.
template <class V> inline CellGradients<V> cell_backward(V dh, V dc, V i, V f, V g, V o, V c_prev) {
    V tanh_c = tanh(f * c_prev + i * g);
    dc = dh * o * (1.0 - tanh_c * tanh_c) + dc;
    V di = dc * g, df = dc * c_prev, dg = dc * i, do_ = dh * tanh_c;
    return {di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do_ * o * (1.0 - o), dc * f};
}
