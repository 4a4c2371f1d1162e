// Register tiles of matrix products, and small loops over rows: copies, transposes, cells.
//
// C is a cell of cells.h: S pre-activations, of which X have a product with x and Y one with h; STATES states, of which
// it reads those from FIRST_READ on; SAVED saved values. E is float or double, and a vector has L of them.
#pragma once

template <class E> using Raw = typename Vector<E>::Raw;

// Arguments of out[m, n] = init[m, n] + sum over k of a[m, k] w[k, n], for some rows m and up to 4 vectors of n.
//
// k runs over `blocks` blocks of `count` columns of a, which are a_block elements apart, then over `count2` columns of
// a2. a_row and a_step are the strides of a's rows and columns. w is contiguous, or has rows of W vectors. A row's
// tile does not change the order of its sums. `init` is added last: rounding errors grow with the length of a K block.
template <class E> struct ProductArguments {
    const E *init;
    int64_t init_row;
    E *out;
    int64_t out_row;
    const E *w, *a;
    int64_t a_row, a_step, count, blocks, a_block;
    const E *a2;
    int64_t a2_row, count2;
};

template <class E, int R, int N, int W>
inline const E *accumulate(Raw<E> (&acc)[R][N], const E *a, int64_t row_stride, int64_t k_stride, const E *w, int64_t count) {
    for (; count > 0; count--, a += k_stride, w += W * Vector<E>::N) {
        if (R * N + N >= REGISTERS) {  // too few registers for the weights: they are loaded one at a time
            Raw<E> loaded[R];
            UNROLL for (int m = 0; m < R; m++) loaded[m] = Vector<E>(a[m * row_stride]).raw;
            UNROLL for (int n = 0; n < N; n++) {
                Raw<E> factor = Vector<E>::load(w + n * Vector<E>::N).raw;
                UNROLL for (int m = 0; m < R; m++) acc[m][n] = fused(loaded[m], factor, acc[m][n]);
            }
        } else {
            Raw<E> loaded[N];
            UNROLL for (int n = 0; n < N; n++) loaded[n] = Vector<E>::load(w + n * Vector<E>::N).raw;
            UNROLL for (int m = 0; m < R; m++) {
                Raw<E> factor = Vector<E>(a[m * row_stride]).raw;
                UNROLL for (int n = 0; n < N; n++) acc[m][n] = fused(factor, loaded[n], acc[m][n]);
            }
        }
    }
    return w;
}

template <class E, int R, int N, int W> NOINLINE void tile(const ProductArguments<E> &s) {
    Raw<E> acc[R][N] = {};
    const E *w = s.w, *a = s.a;
    for (int64_t k = 0; k < s.blocks; k++, a += s.a_block)
        w = accumulate<E, R, N, W>(acc, a, s.a_row, s.a_step, w, s.count);
    accumulate<E, R, N, W>(acc, s.a2, s.a2_row, 1, w, s.count2);
    const E *init = s.init;  // copies, since a store might change s
    E *out = s.out;
    const int64_t init_row = s.init_row, out_row = s.out_row;
    UNROLL for (int m = 0; m < R; m++) {
        UNROLL for (int n = 0; n < N; n++) {
            Vector<E> start = Vector<E>::load(init + m * init_row + n * Vector<E>::N);
            (start + Vector<E>(acc[m][n])).store(out + m * out_row + n * Vector<E>::N);
        }
    }
}

// Multiplies all rows. Full tiles come first, as the first one loads the weights from memory. Where a full tile would
// leave a single row (rows == height + 1), all tiles have 2 or 3 rows: one of a single row runs at half the speed.
template <class E, int N, int W = N> NOINLINE void product(int64_t rows, ProductArguments<E> &&s) {
    constexpr int height = TILE_ROWS * 4 / N < 12 ? TILE_ROWS * 4 / N : 12;
    for (int64_t count; rows > 0; rows -= count) {
        count = rows >= height && rows != height + 1 ? height : rows <= min(height, 4) ? rows : rows % 3 == 1 ? 2 : 3;
        if (count == height) tile<E, height, N, W>(s);
        else if (count == 4) tile<E, 4, N, W>(s);
        else if (count == 3) tile<E, 3, N, W>(s);
        else if (count == 2) tile<E, 2, N, W>(s);
        else tile<E, 1, N, W>(s);
        s.init += count * s.init_row, s.out += count * s.out_row, s.a += count * s.a_row, s.a2 += count * s.a2_row;
    }
}

template <class E> void multiply(int64_t vectors, int64_t rows, ProductArguments<E> &&s) {
    if (vectors == 4) product<E, 4>(rows, (ProductArguments<E> &&)s);
    else if (vectors == 3) product<E, 3>(rows, (ProductArguments<E> &&)s);
    else if (vectors == 2) product<E, 2>(rows, (ProductArguments<E> &&)s);
    else product<E, 1>(rows, (ProductArguments<E> &&)s);
}

// A matrix whose rows are `stride` elements apart
template <class E> struct Matrix {
    E *data;
    int64_t stride;
    E *operator[](int64_t r) const { return data + r * stride; }
    Matrix from(int64_t r, int64_t column) const { return {data + r * stride + column, stride}; }
    operator Matrix<const E>() const { return {data, stride}; }
};

// Copies `valid` elements of each row, and writes zeros after them up to `width`.
template <class E>
NOINLINE void copy_rows(int64_t rows, int64_t valid, int64_t width, Matrix<const E> source, Matrix<E> target) {
    for (int64_t r = 0; r < rows; r++) {
        const E *from = source[r];
        E *to = target[r];
        int64_t k = 0;
        for (; k + Vector<E>::N <= valid; k += Vector<E>::N) Vector<E>::load(from + k).store(to + k);
        partial_store<E, Vector<E>::N / 2>(valid - k, from + k, to + k);
        for (k = valid; k < width; k++) to[k] = 0;
    }
}

// Returns whether every bit of the rows is zero. To leave out their product with finite weights changes no sum then.
template <class E> NOINLINE bool is_zero(int64_t rows, int64_t width, Matrix<const E> source) {
    for (int64_t r = 0; r < (source.stride ? rows : min(rows, 1)); r++) {
        for (int64_t k = 0; k < width; k++) {
            char bits[sizeof(E)] = {};
            if (__builtin_memcmp(source[r] + k, bits, sizeof bits)) return false;
        }
    }
    return true;
}

template <class E> void zero_rows(int64_t rows, int64_t width, Matrix<E> target) {
    copy_rows<E>(rows, 0, width, target, target);
}

template <class E> NOINLINE void add_rows(int64_t rows, int64_t width, Matrix<const E> source, Matrix<E> target) {
    for (int64_t r = 0; r < rows; r++) {
        const E *from = source[r];
        E *to = target[r];
        int64_t k = 0;
        for (; k + Vector<E>::N <= width; k += Vector<E>::N)
            (Vector<E>::load(to + k) + Vector<E>::load(from + k)).store(to + k);
        for (; k < width; k++) to[k] += from[k];
    }
}

// How the pre-activations of a panel lie in its weights, preact and dpreact: a vector each. A compact panel has
// fewer vectors, without padding: the last one, if both products fill all of them (JOINT) and H ends within the panel.
template <class C, class E> struct Panel {
    static constexpr int64_t L = Vector<E>::N;
    static constexpr bool JOINT = C::X == C::S && C::Y == C::S;
    int64_t valid, vectors, gate_stride;  // units, vectors of a row, elements from gate to gate

    Panel(int64_t H, int64_t p)
        : valid(min(L, H - p * L)), vectors(JOINT ? ceil_div(C::S * valid, L) : C::S),
          gate_stride(vectors < C::S ? valid : L) {}
    bool is_compact() const { return vectors < C::S; }
    int64_t x_vectors() const { return JOINT ? vectors : C::X; }  // of a column of the packed weights
    int64_t h_vectors() const { return JOINT ? vectors : C::Y; }
    int64_t row_elements() const { return vectors * L; }
    // Copies rows (S, lanes) to compact ones, with zeros after them.
    void compact(int64_t rows, const E *source, E *target) const {
        for (int64_t k = 0; k < C::S; k++)
            copy_rows<E>(rows, valid, valid, {source + k * L, C::S * L}, {target + k * gate_stride, row_elements()});
        zero_rows<E>(rows, row_elements() - C::S * gate_stride, {target + C::S * gate_stride, row_elements()});
    }
};

// Which batch rows from b on are reset before the step at time t, or held at it: none, where the layer has no time t.
enum Event { RESET, HOLD };
struct Mask {
    const uint8_t *reset;
    const int64_t *lengths, t;

    template <class Args> Mask(const Args &a, int64_t t, int64_t b)
        : reset(a.reset && 0 <= t && t < a.T ? a.reset + t * a.B + b : nullptr),
          lengths(a.lengths && 0 <= t && t < a.T ? a.lengths + b : nullptr), t(t) {}
    bool holds(int64_t r) const { return lengths && t >= lengths[r]; }
    bool is(Event event, int64_t r) const { return event == HOLD ? holds(r) : reset && reset[r] && !holds(r); }
    int64_t next(Event event, int64_t rows, int64_t r = 0) const {  // the first such row from r on, or `rows`
        return (event == HOLD ? !lengths : !reset) ? rows : next_of_any(event, rows, r);
    }
    NOINLINE int64_t next_of_any(Event event, int64_t rows, int64_t r) const {
        while (r < rows && !is(event, r)) r++;
        return r;
    }
    bool any(Event event, int64_t rows) const { return next(event, rows) < rows; }
    template <class E> void zero(Event event, int64_t rows, int64_t width, Matrix<E> target) const {
        for (int64_t r = next(event, rows); r < rows; r = next(event, rows, r + 1)) zero_rows<E>(1, width, {target[r], 0});
    }
};

// Swaps the off-diagonal blocks of HALF elements of two vectors of a square.
template <class E, int HALF> inline void exchange(Raw<E> &low, Raw<E> &high) {
    constexpr int N = Vector<E>::N;
    Raw<E> x = low, y = high;
#ifdef __clang__
    UNROLL for (int k = 0; k < N; k++) {
        low[k] = k / HALF % 2 ? y[k - HALF] : x[k];
        high[k] = k / HALF % 2 ? y[k] : x[k + HALF];
    }
#else
    typename Vector<E>::Bits low_lanes, high_lanes;
    UNROLL for (int k = 0; k < N; k++) {
        low_lanes[k] = k + (N - HALF) * (k / HALF % 2);
        high_lanes[k] = low_lanes[k] + HALF;
    }
    low = __builtin_shuffle(x, y, low_lanes), high = __builtin_shuffle(x, y, high_lanes);
#endif
}

template <class E, int HALF> inline void exchange_all(Raw<E> (&rows)[Vector<E>::N]) {
    UNROLL for (int r = 0; r < Vector<E>::N; r++)
        if (r / HALF % 2 == 0) exchange<E, HALF>(rows[r], rows[(r + HALF) % Vector<E>::N]);
    if constexpr (HALF * 2 < Vector<E>::N) exchange_all<E, HALF * 2>(rows);
}

// Sets target[k, r] = source[r, k], for at most as many rows as a vector has lanes and any number of columns.
template <class E> NOINLINE void transpose(int64_t rows, int64_t columns, Matrix<const E> source, Matrix<E> target) {
    constexpr int N = Vector<E>::N;
    if (rows == N && columns >= N) {
        for (int64_t next = 0; next < columns; next += N) {
            int64_t k = next + N < columns ? next : columns - N;  // the last may overlap
            Raw<E> square[N];
            UNROLL for (int r = 0; r < N; r++) square[r] = Vector<E>::load(source[r] + k).raw;
            exchange_all<E, 1>(square);
            UNROLL for (int r = 0; r < N; r++) Vector<E>(square[r]).store(target[k + r]);
        }
    } else {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < columns; k++) target[k][r] = source[r][k];
    }
}

// Runs the cell's forward function on the units of one panel and some batch rows: from preact, as `panel` orders it, and
// the states `prev` to the states `next` and, with SAVE, `saved` (rows, SAVED, lanes).
template <class C, class E, bool SAVE>
NOINLINE void cells_forward(int64_t rows, Panel<C, E> panel, const E *preact, const Matrix<const E> *prev,
                            const Matrix<E> *next, E *saved) {
    using V = Vector<E>;
    constexpr int64_t L = V::N;
    for (int64_t r = 0; r < rows; r++, preact += panel.row_elements()) {
        V preacts[C::S], old_states[C::STATES], new_states[C::STATES], saved_values[C::SAVED];
        UNROLL for (int k = 0; k < C::S; k++) preacts[k] = V::load(preact + k * panel.gate_stride, panel.valid);
        UNROLL for (int k = C::FIRST_READ; k < C::STATES; k++) old_states[k] = V::load(prev[k][r], panel.valid);
        C::forward(preacts, old_states, new_states, saved_values);
        UNROLL for (int k = 0; k < C::STATES; k++) new_states[k].store(next[k][r], panel.valid);
        if (!SAVE) continue;
        UNROLL for (int k = 0; k < C::SAVED; k++) saved_values[k].store(saved + k * L);
        saved += C::SAVED * L;
    }
}

// Runs the cell's backward function on one vector of units and some batch rows, and writes dpreact (rows, S, lanes),
// with zeros from lane `valid` on, since a product sums over them. The gradient of h is dh + dh_out. carried[k] (rows,
// lanes) holds that of state k > 0 after this step, and gets what the cell passes to state k >= FIRST_READ before it.
template <class C, class E>
NOINLINE void cells_backward(int64_t rows, int64_t valid, Matrix<const E> dh, Matrix<const E> dh_out, E *const *carried,
                             const E *saved, const Matrix<const E> *prev, E *dpreact) {
    using V = Vector<E>;
    constexpr int64_t L = V::N;
    for (int64_t r = 0; r < rows; r++, saved += C::SAVED * L, dpreact += C::S * L) {
        V d[C::STATES], saved_values[C::SAVED], old_states[C::STATES], dpreacts[C::S], d_prev[C::STATES];
        d[0] = V::load(dh[r]) + V::load(dh_out[r]);
        UNROLL for (int k = 1; k < C::STATES; k++) d[k] = V::load(carried[k] + r * L);
        UNROLL for (int k = 0; k < C::SAVED; k++) saved_values[k] = V::load(saved + k * L);
        UNROLL for (int k = C::FIRST_READ; k < C::STATES; k++) old_states[k] = V::load(prev[k][r]);
        C::backward(d, saved_values, old_states, dpreacts, d_prev);
        UNROLL for (int k = C::FIRST_READ; k < C::STATES; k++) d_prev[k].store(carried[k] + r * L);
        UNROLL for (int k = 0; k < C::S; k++) dpreacts[k].first(valid).store(dpreact + k * L);
    }
}
