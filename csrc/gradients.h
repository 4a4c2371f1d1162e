// Products with dpreact: with the weights, for the gradients of h and x, and summed over rows, for those of the weights.
#pragma once

constexpr int64_t BLOCK_ROWS = 128;  // of dpreact and of a strip, which stay in the L1 cache together

// Transposed weights have their columns in vector groups of 4 or 3: one vector alone would use little of a tile.
inline int64_t vector_groups(int64_t vectors) { return ceil_div(vectors, 4); }
inline int64_t first_vector(int64_t vectors, int64_t q) { return ceil_div(vectors * q, vector_groups(vectors)); }

// Packs the vector groups `first` to `last` of weights (preacts H, columns) as [group][k][3 or 4 vectors].
template <class C, class E>
void pack_transposed(Matrix<const E> weight, const int *blocks, int64_t preacts, int64_t H, int64_t columns, E *packed,
                     int64_t first, int64_t last) {
    constexpr int64_t L = Vector<E>::N;
    const int64_t panels = ceil_div(H, L), vectors = ceil_div(columns, L);
    for (int64_t q = first; q < last; q++) {
        int64_t column = first_vector(vectors, q) * L,
                width = first_vector(vectors, q + 1) - first_vector(vectors, q) == 4 ? 4 * L : 3 * L;
        int64_t valid = min(width, columns - column);
        for (int64_t p = 0; p < panels; p++) {
            const Panel<C, E> panel(H, p);
            const Matrix<E> target{packed + q * panels * preacts * 4 * L * L + p * preacts * L * width, width};
            if (panel.valid < L) zero_rows<E>(panel.is_compact() ? panel.row_elements() : preacts * L, width, target);
            for (int64_t k = 0; k < preacts; k++) {
                const int64_t row = blocks[k] * H + p * L;
                copy_rows<E>(panel.valid, valid, width, weight.from(row, column), target.from(k * panel.gate_stride, 0));
            }
        }
    }
}

// What the parts of the backward pass share: addresses, and the product of a step
template <class C, class E> struct Gradients {
    static constexpr int64_t L = Vector<E>::N, FIRST_H = C::S - C::Y;  // the first pre-activation of h
    const BackwardJob &job;
    const fastlstm_backward_args &a;
    const int64_t T, B, I, H, panels;
    alignas(64) E products[ROW_BLOCK * 4 * L];  // results of one product, (rows, 4 vectors)
    alignas(64) E zeros[4 * L] = {};

    explicit Gradients(const BackwardJob &job)
        : job(job), a(*job.args), T(a.T), B(a.B), I(a.I), H(a.H), panels(ceil_div(H, L)) {}

    int64_t time_of(int64_t s) const { return a.reverse ? T - 1 - s : s; }
    Mask mask_of_step(int64_t s, int64_t b) const { return {a, time_of(s), b}; }
    // dpreact of panel p: rows from (s, b) on. All rows of a panel follow one another.
    E *dpreact_of(int64_t p, int64_t s, int64_t b) const {
        const int64_t ring_steps = job.ring * job.chunk;
        return (E *)job.dpreact + p * ring_steps * B * C::S * L + (s % ring_steps * B + b) * Panel<C, E>(H, p).row_elements();
    }
    Matrix<const E> x_of(int64_t s) const { return {(const E *)a.x + time_of(s) * a.x_step, a.x_row}; }
    // Copies `valid` columns of x, or of h_in of step s, then zeros. A row that was held at step s - 1 begins with h_0
    // at step s. Held rows become zero: they have no part in any sum, and their padding may be NaN.
    void copy_step_input(bool is_x, int64_t s, int64_t b, int64_t rows, int64_t column, int64_t valid, int64_t width,
                         Matrix<E> target) const {
        const Mask mask = mask_of_step(s, b), prev_mask = mask_of_step(s - 1, b);
        const Matrix<const E> h_0{(const E *)a.h_0, a.h_0_row};
        const Matrix<const E> h = s ? Matrix<const E>{(const E *)a.h + time_of(s - 1) * B * H, H} : h_0;
        copy_rows<E>(rows, valid, width, (is_x ? x_of(s) : h).from(b, column), target);
        for (int64_t r = 0; !is_x && prev_mask.lengths && r < rows; r++)
            if (prev_mask.holds(r)) copy_rows<E>(1, valid, width, h_0.from(b + r, column), {target[r], 0});
        if (!is_x) mask.zero<E>(RESET, rows, width, target);
        mask.zero<E>(HOLD, rows, width, target);
    }

    // Multiplies `count` pre-activations of dpreact of step s, from `first` on, by vector group q of their transposed
    // weights, into `products` (rows, 4 vectors).
    void dpreact_product(int64_t rows, int64_t b, int64_t s, int64_t first, int64_t count, const E *packed,
                      int64_t vectors, int64_t q) {
        const int64_t group_vectors = first_vector(vectors, q + 1) - first_vector(vectors, q) == 4 ? 4 : 3;
        const int64_t block_panels = ceil_div(panels, ceil_div(panels * count * L, BLOCK_K));  // panels
        const Panel<C, E> last(H, panels - 1);
        const E *last_dpreact = dpreact_of(panels - 1, s, b);
        Matrix<const E> init{zeros, 0};
        for (int64_t p = 0; p < panels; p += block_panels, init = {products, 4 * L}) {
            const E *w = packed + (q * panels * 4 + p * group_vectors) * count * L * L, *d = dpreact_of(p, s, b) + first * L;
            const int64_t separate_panels = p + block_panels >= panels && last.is_compact();  // of a width of its own
            multiply<E>(group_vectors, rows, {init.data, init.stride, products, 4 * L, w, d, C::S * L, 1, count * L,
                         min(block_panels, panels - p) - separate_panels, job.ring * job.chunk * B * C::S * L, last_dpreact,
                         last.row_elements(), separate_panels * last.row_elements()});
        }
    }

    // Packs rows (s, b) of [x, h_in, 1], for batch rows b_first to b_last, as [strip of WIDTH columns][row][column].
    // Without `ones`, x and h_in each begin a strip and end with zeros.
    template <int64_t WIDTH>
    void pack_strips(E *strips, bool ones, int64_t s_first, int64_t s_last, int64_t b_first, int64_t b_last) const {
        const int64_t strip = (s_last - s_first) * B * WIDTH, count = b_last - b_first;
        auto padded = [&](int64_t size) { return ones ? size : ceil_div(size, WIDTH) * WIDTH; };
        const int64_t first_h = padded(I), last_h = first_h + padded(H);
        for (int64_t s = s_first; s < s_last; s++) {
            for (int64_t k = 0, run; k < last_h + ones; k += run) {
                const Matrix<E> to{strips + k / WIDTH * strip + ((s - s_first) * B + b_first) * WIDTH + k % WIDTH, WIDTH};
                run = min(WIDTH - k % WIDTH, (k < first_h ? first_h : k < last_h ? last_h : k + 1) - k);
                for (int64_t r = 0; k == last_h && r < count; r++) *to[r] = 1;
                const int64_t column = k < first_h ? k : k - first_h, valid = min(run, (k < first_h ? I : H) - column);
                if (k < last_h) copy_step_input(k < first_h, s, b_first, count, column, valid, run, to);
            }
        }
    }

    E *accumulators_of(int64_t k_set, int64_t p) const {
        return (E *)job.accumulators + (k_set * panels + p) * (I + H + 1) * C::S * L;
    }

    // The rows of a chunk of steps over which a product sums
    struct Chunk {
        int64_t first, rows, block, s_first;  // pairs (step, row) from the first on, in blocks
        bool starts;                          // whether the accumulators start at zero
    };

    // Adds a chunk of steps to some panels of one split-K set of accumulators, over that set's share of the rows. Every
    // row is added in one order, from the last step on, whatever the number of threads.
    void add_weight_gradients(const E *strips, int64_t s_first, int64_t s_last, int64_t k_set, int64_t p_first,
                              int64_t p_last) const {
        const int64_t columns = I + H + 1, chunk_pairs = (s_last - s_first) * B, strip_count = ceil_div(columns, STRIP);
        const int64_t first = share(chunk_pairs, k_set, job.split_k_sets),
                      rows = share(chunk_pairs, k_set + 1, job.split_k_sets) - first;
        const Chunk chunk{first, rows, ceil_div(rows, ceil_div(rows, BLOCK_ROWS)), s_first, s_last == T};
        for (int64_t j = 0; j < strip_count; j++) {  // serpentine order: the accumulators used last are still in the L2 cache
            const int64_t k = (s_first / job.chunk % 2 ? strip_count - 1 - j : j) * STRIP;
            const E *strip = strips + k * chunk_pairs + first * STRIP;
            for (int64_t p = p_first; p < p_last; p++) {
                if constexpr (Panel<C, E>::JOINT) {
                    add_columns<0>(chunk, k_set, p, k, strip, 0, columns, 0);
                } else {
                    add_columns<C::X>(chunk, k_set, p, k, strip, 0, I, 0);
                    add_columns<C::Y>(chunk, k_set, p, k, strip, I, I + H, FIRST_H);
                    add_columns<C::S>(chunk, k_set, p, k, strip, I + H, columns, 0);
                }
            }
        }
    }

    // Does so for the columns `from` to `to`, as far as the strip that begins with column k has them. They are
    // multiplied by N pre-activations of dpreact from `first_preact` on, or by all if N is 0.
    template <int N>
    void add_columns(const Chunk &chunk, int64_t k_set, int64_t p, int64_t k, const E *strip, int64_t from, int64_t to,
                     int64_t first_preact) const {
        const int64_t first = max(k, from), columns = min(k + STRIP, to) - first, width = Panel<C, E>(H, p).row_elements();
        const E *dpreact = dpreact_of(p, chunk.s_first, chunk.first) + first_preact * L;
        E *out = accumulators_of(k_set, p) + (first * C::S + first_preact) * L;
        Matrix<const E> init{out, C::S * L};
        if (chunk.starts) init = {zeros, 0};
        for (int64_t r = 0; columns > 0 && r < chunk.rows; r += chunk.block, init = {out, C::S * L}) {
            const E *strip_rows = strip + first - k + r * STRIP;
            ProductArguments<E> s{init.data, init.stride, out, C::S * L, dpreact + r * width, strip_rows, 1, STRIP,
                     min(chunk.block, chunk.rows - r), 1, 0, strip_rows, 0, 0};
            if constexpr (N) product<E, N, C::S>(columns, (ProductArguments<E> &&)s);
            else multiply<E>(width / L, columns, (ProductArguments<E> &&)s);
        }
    }

    // Writes some panels of the accumulators to the wanted gradients of weights and biases.
    void unpack_weight_gradients(int64_t p_first, int64_t p_last) const {
        const int64_t size = (I + H + 1) * C::S * L;
        for (int64_t p = p_first; p < p_last; p++) {
            if (job.split_k_sets == 2)  // the unused elements of a compact panel too
                add_rows<E>(1, size, {accumulators_of(1, p), 0}, {accumulators_of(0, p), 0});
            unpack(p, 0, C::X, C::BLOCKS_IH, 0, I, (E *)a.dweight_ih, (E *)a.dbias_ih);
            unpack(p, FIRST_H, C::Y, C::BLOCKS_HH, I, H, (E *)a.dweight_hh, (E *)a.dbias_hh);
        }
    }

    // Writes `count` pre-activations of a panel, `columns` columns of [x, h_in, 1] to a weight and a bias, or to NULL.
    void unpack(int64_t p, int64_t first, int64_t count, const int *blocks, int64_t column, int64_t columns, E *weight,
                E *bias) const {
        const Panel<C, E> panel(H, p);
        for (int64_t k = 0; k < count; k++) {
            const int64_t row = blocks[k] * H + p * L;
            const Matrix<const E> from{accumulators_of(0, p) + (first + k) * panel.gate_stride, C::S * L};
            for (int64_t c = 0; weight && c < columns; c += L)
                transpose<E>(min(L, columns - c), panel.valid, from.from(column + c, 0),
                             {weight + row * columns + c, columns});
            if (bias) copy_rows<E>(1, panel.valid, panel.valid, from.from(I + H, 0), {bias + row, 0});
        }
    }

    // Computes dx = dpreact times weight_ih, for rows `first` to `last` of the steps from s_first on.
    void input_gradient(int64_t s_first, int64_t first, int64_t last) {
        const int64_t vectors = ceil_div(I, L);
        for (int64_t rows; first < last; first += rows) {
            int64_t s = s_first + first / B, b = first % B;
            rows = min(min(ROW_BLOCK, B - b), last - first);
            for (int64_t q = 0; q < vector_groups(vectors); q++) {
                int64_t column = first_vector(vectors, q) * L, width = min(first_vector(vectors, q + 1) * L, I) - column;
                dpreact_product(rows, b, s, 0, C::X, (const E *)job.packed_ih, vectors, q);
                copy_rows<E>(rows, width, width, {products, 4 * L}, Matrix<E>{(E *)a.dx, I}.from(time_of(s) * B + b, column));
            }
        }
    }
};
