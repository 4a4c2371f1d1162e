// Packed int8 weights: their layout, and whether they still equal those of the caller.
#pragma once

// What a panel has beside its packed weights. Packed memory needs no alignment.
template <class C> struct Int8Panel {
    static constexpr int64_t L = Vector<float>::N;
    int32_t starts_x[C::X * L];  // of the sums: -ZERO times the sum of each weight row
    float scales_x[C::X * L], biases[C::S * L], scales_h[C::Y * L];
    int32_t starts_h[C::Y * L];
    char digest[sizeof(Digest)];
};

// Packed memory: first all panels, then weight_ih of each, then weight_hh of each. A group of 4 columns has a vector
// for each gate, and each of its lanes has 4 weights of a unit.
template <class C> struct Int8Packed {
    int64_t groups_x, groups_h, x_panel_bytes, h_panel_bytes;  // column groups, and bytes of a panel's weights
    Int8Panel<C> *panels;
    int8_t *weights_x, *weights_h;

    Int8Packed(int64_t I, int64_t H, void *packed)
        : groups_x(ceil_div(I, 4)), groups_h(ceil_div(H, 4)), x_panel_bytes(groups_x * C::X * VECTOR_BYTES),
          h_panel_bytes(groups_h * C::Y * VECTOR_BYTES), panels((Int8Panel<C> *)packed) {
        const int64_t count = ceil_div(H, Vector<float>::N);
        weights_x = (int8_t *)(panels + count), weights_h = weights_x + count * x_panel_bytes;
    }
};
template <class C, int ACT_BYTES> size_t packed_size_int8(int64_t I, int64_t H) {
    const Int8Packed<C> packed(I, H, nullptr);
    return (size_t)ceil_div(H, Vector<float>::N) * (sizeof(Int8Panel<C>) + packed.x_panel_bytes + packed.h_panel_bytes);
}

// Packs the scales of panel p of one weight, with zeros after them.
inline void pack_scales(const fastlstm_forward_args &a, int64_t p, int count, const int *blocks, const float *from,
                        float *target) {
    constexpr int64_t L = Vector<float>::N;
    for (int64_t k = 0; k < count; k++)
        copy_rows<float>(1, min(L, a.H - p * L), L, {from + blocks[k] * a.H + p * L, 0}, {target + k * L, 0});
}

// Packs panel p of one weight (count H, columns), with zeros after its rows and columns.
NOINLINE void pack_bytes(const fastlstm_forward_args &a, int64_t p, int count, const int *blocks,
                         Matrix<const int8_t> weight, int64_t columns, int8_t *packed, int32_t *starts) {
    constexpr int64_t L = Vector<float>::N;
    __builtin_memset(packed, 0, ceil_div(columns, 4) * count * VECTOR_BYTES);
    __builtin_memset(starts, 0, count * L * 4);
    for (int64_t k = 0; k < count; k++) {
        for (int64_t r = 0; r < min(L, a.H - p * L); r++) {
            const int8_t *from = weight[blocks[k] * a.H + p * L + r];
            int8_t *lane = packed + k * VECTOR_BYTES + r * 4;
            int32_t sum = 0;
            for (int64_t c = 0; c < columns; c++) lane[c / 4 * count * VECTOR_BYTES + c % 4] = from[c], sum += from[c];
            starts[k * L + r] = -ZERO * sum;
        }
    }
}

template <class C> NOINLINE void pack_int8_panel(const fastlstm_forward_args &a, int64_t p, const Int8Packed<C> &packed) {
    Int8Panel<C> &panel = packed.panels[p];
    pack_scales(a, p, C::X, C::BLOCKS_IH, a.weight_ih_scale, panel.scales_x);
    pack_scales(a, p, C::Y, C::BLOCKS_HH, a.weight_hh_scale, panel.scales_h);
    pack_biases<C, float>(&a, p, panel.L, panel.biases);
    pack_bytes(a, p, C::X, C::BLOCKS_IH, {(const int8_t *)a.weight_ih, a.weight_ih_row}, a.I,
               packed.weights_x + p * packed.x_panel_bytes, panel.starts_x);
    pack_bytes(a, p, C::Y, C::BLOCKS_HH, {(const int8_t *)a.weight_hh, a.weight_hh_row}, a.H,
               packed.weights_h + p * packed.h_panel_bytes, panel.starts_h);
}

// Packs weights for later calls. The digest comes first, so that a change to the weights from then on makes it differ.
template <class C, int ACT_BYTES> void pack_int8(const fastlstm_forward_args *a, void *memory) {
    const Int8Packed<C> packed(a->I, a->H, memory);
    for (int64_t p = 0; p < ceil_div(a->H, Vector<float>::N); p++) {
        const Digest digest_of_p = digest<C, float, int8_t>(a, p);
        __builtin_memcpy(packed.panels[p].digest, &digest_of_p, sizeof digest_of_p);
        pack_int8_panel<C>(*a, p, packed);
    }
}

// Returns whether the weights, scales or biases of panel p have changed since they were packed.
template <class C> NOINLINE bool is_int8_changed(const fastlstm_forward_args &a, const Int8Panel<C> &panel, int64_t p) {
    constexpr int64_t L = Vector<float>::N;
    alignas(64) float current[(C::X + C::Y + C::S) * L];  // as they lie in the panel
    pack_scales(a, p, C::X, C::BLOCKS_IH, a.weight_ih_scale, current);
    pack_biases<C, float>(&a, p, L, current + C::X * L);
    pack_scales(a, p, C::Y, C::BLOCKS_HH, a.weight_hh_scale, current + (C::X + C::S) * L);
    if (__builtin_memcmp(current, panel.scales_x, sizeof current)) return true;
    const Digest current_digest = digest<C, float, int8_t>(&a, p);
    return __builtin_memcmp(&current_digest, panel.digest, sizeof current_digest) != 0;
}
