// Times one sample a call: fastlstm_step beside the layers of RTNeural, whose sizes are compiled in, on one thread.
//
// docs/native.md has the commands. Without RTNeural on the include path fastlstm_step is timed alone. Each line has the
// median time of 31 blocks, which take turns, and the largest difference of the outputs over ten steps.
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <vector>

#include "../fastlstm.h"
#if __has_include(<RTNeural/RTNeural.h>)
#include <RTNeural/RTNeural.h>
#define HAS_RTNEURAL
#endif

using Floats = std::vector<float>;

static Floats randoms(size_t count, float limit) {
    static std::mt19937 generator(0);
    std::uniform_real_distribution<float> uniform(-limit, limit);
    Floats values(count);
    for (float &value : values) value = uniform(generator);
    return values;
}

template <class Call> double nanoseconds_of(Call call) {  // a call's time in one block
    constexpr int CALLS = 2000;
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < CALLS; k++) call();
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / CALLS;
}

static double median(std::vector<double> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// A layer of one row, in torch's layout. Its states stay between calls.
struct Layer {
    const int64_t cell, I, H, gates;
    Floats weight_ih, weight_hh, bias_ih, bias_hh, states[3];
    float *h, *c, *h_next;
    fastlstm_steps *steps = nullptr;

    Layer(int64_t cell, int64_t I, int64_t H) : cell(cell), I(I), H(H), gates(cell == FASTLSTM_LSTM ? 4 : 3) {
        const float limit = 1 / sqrtf((float)H);
        weight_ih = randoms(gates * H * I, limit), weight_hh = randoms(gates * H * H, limit);
        bias_ih = randoms(gates * H, limit), bias_hh = randoms(gates * H, limit);
        for (Floats &state : states) state.resize(H);
        h = states[0].data(), h_next = states[1].data(), c = cell == FASTLSTM_LSTM ? states[2].data() : nullptr;
        fastlstm_forward_args args = {};
        args.version = FASTLSTM_VERSION, args.cell = cell, args.B = 1, args.I = I, args.H = H;
        args.weight_ih = weight_ih.data(), args.weight_ih_row = I, args.weight_hh = weight_hh.data(), args.weight_hh_row = H;
        args.bias_ih = bias_ih.data(), args.bias_hh = bias_hh.data();
        if (int code = fastlstm_steps_make(&args, nullptr, &steps)) puts(fastlstm_error_text(code)), exit(1);
    }
    Layer(const Layer &) = delete;
    ~Layer() { fastlstm_steps_free(steps); }
    void step(const float *x) { fastlstm_step(steps, x, h, c, h_next, c), std::swap(h, h_next); }
};

#ifdef HAS_RTNEURAL
// RTNeural's layer with the same weights. Its GRU has the gates in the order z, r, n, and torch's in the order r, z, n.
template <int CELL, class Theirs> void set_weights(Theirs &theirs, const Layer &l) {
    std::vector<Floats> ih(l.I, Floats(l.gates * l.H)), hh(l.H, Floats(l.gates * l.H)), biases(2, Floats(l.gates * l.H));
    for (int64_t row = 0; row < l.gates * l.H; row++) {
        const bool swaps = CELL == FASTLSTM_GRU && row < 2 * l.H;
        const int64_t place = swaps ? (row + l.H) % (2 * l.H) : row;
        for (int64_t k = 0; k < l.I; k++) ih[k][place] = l.weight_ih[row * l.I + k];
        for (int64_t k = 0; k < l.H; k++) hh[k][place] = l.weight_hh[row * l.H + k];
        biases[0][place] = l.bias_ih[row], biases[1][place] = l.bias_hh[row];
    }
    theirs.setWVals(ih), theirs.setUVals(hh);
    if constexpr (CELL == FASTLSTM_GRU) {
        theirs.setBVals(biases);
    } else {
        for (int64_t row = 0; row < l.gates * l.H; row++) biases[0][row] += biases[1][row];
        theirs.setBVals(biases[0]);
    }
}
#endif

template <int CELL, int I, int H> void run() {
    Layer layer(CELL, I, H);
    alignas(64) float x[(I + 15) / 16 * 16] = {};
    std::copy_n(randoms(I, 1).begin(), I, x);
    std::vector<double> ours, theirs;
    printf("%-4s I %2d  H %3d  ", CELL == FASTLSTM_LSTM ? "LSTM" : "GRU", I, H);
#ifdef HAS_RTNEURAL
    using LSTM = RTNeural::LSTMLayerT<float, I, H>;
    using GRU = RTNeural::GRULayerT<float, I, H>;
    auto model = std::make_unique<RTNeural::ModelT<float, I, H, std::conditional_t<CELL == FASTLSTM_LSTM, LSTM, GRU>>>();
    set_weights<CELL>(model->template get<0>(), layer), model->reset();
    float error = 0;
    for (int t = 0; t < 10; t++) {
        layer.step(x), model->forward(x);
        for (int k = 0; k < H; k++) error = fmaxf(error, fabsf(layer.h[k] - model->getOutputs()[k]));
    }
#endif
    for (int block = 0; block < 31; block++) {
        ours.push_back(nanoseconds_of([&] { layer.step(x); }));
#ifdef HAS_RTNEURAL
        theirs.push_back(nanoseconds_of([&] { model->forward(x); }));
#endif
    }
    printf("fastlstm_step %5.0f ns", median(ours));
#ifdef HAS_RTNEURAL
    printf("  RTNeural %5.0f ns  ratio %.2f  error %.1e", median(theirs), median(ours) / median(theirs), error);
#endif
    puts("");
}

template <int CELL> void run_all() {
    run<CELL, 1, 8>(), run<CELL, 1, 16>(), run<CELL, 1, 20>(), run<CELL, 1, 32>(), run<CELL, 1, 40>(), run<CELL, 1, 64>();
    run<CELL, 40, 128>();
}

int main() { run_all<FASTLSTM_LSTM>(), run_all<FASTLSTM_GRU>(); }
