// The backward pass of a layer: dpreact step by step, and after each chunk of steps its part of the sums over rows.
//
// dpreact of a chunk is used while it is in the cache: there is memory for four. A thread computes a chunk's gradients
// after dpreact of the one that runs next, and so waits only for threads that are a whole chunk behind.
#pragma once

template <class C, class E> struct Backward : Gradients<C, E> {
    using Base = Gradients<C, E>;
    using Base::a, Base::job, Base::T, Base::B, Base::I, Base::H, Base::L, Base::panels, Base::products, Base::zeros;
    using Base::dpreact_product, Base::copy_step_input, Base::dpreact_of, Base::mask_of_step, Base::time_of;
    static constexpr bool CARRIES_DH = C::FIRST_READ == 0;
    ThreadPosition &position;
    alignas(64) E state_copies[C::STATES - C::FIRST_READ][ROW_BLOCK * L], dh_copy[ROW_BLOCK * L],
        held_carried[C::STATES][ROW_BLOCK * L], expanded[ROW_BLOCK * C::S * L];

    Backward(const BackwardJob &job, ThreadPosition &position) : Base(job), position(position) {}

    // The gradient of state k that the cell itself passes from step s + 1 to s: for h, all but dpreact times weight_hh.
    E *carried_of(int k, int64_t p, int64_t b) const {
        return (E *)job.carried + (((k - !CARRIES_DH) * panels + p) * B + b) * L;
    }
    E *held_dh_of(int64_t p, int64_t b) const { return carried_of(C::STATES, p, b); }  // dh of held rows
    // State k before step s and before resets
    Matrix<const E> state_before(int k, int64_t s) const {
        if (s == 0)
            return k ? Matrix<const E>{(const E *)a.c_0, a.c_0_row} : Matrix<const E>{(const E *)a.h_0, a.h_0_row};
        return {(const E *)(k ? a.c : a.h) + time_of(s - 1) * B * H, H};
    }

    // Computes dpreact of one panel. dh, whose rows are 4 vectors apart, is the gradient that comes from step s + 1.
    void cells(int64_t p, int64_t s, int64_t b, int64_t rows, Matrix<E> dh) {
        const int64_t t = time_of(s), u = p * L, valid = min(L, H - u);
        const Mask mask = mask_of_step(s, b);
        const bool resets = mask.any(RESET, rows), holds = mask.any(HOLD, rows);
        const Panel<C, E> panel(H, p);
        E *carried[C::STATES], *dpreact = panel.is_compact() ? expanded : dpreact_of(p, s, b);
        Matrix<const E> prev[C::STATES], dh_out{zeros, 0};
        for (int k = 0; k < C::STATES; k++) {
            carried[k] = carried_of(k, p, b), prev[k] = state_before(k, s).from(b, u);
            if (k && a.dc)
                add_rows<E>(rows, valid, {(const E *)a.dc + t * a.dc_step + b * a.dc_row + u, a.dc_row}, {carried[k], L});
            if (k < C::FIRST_READ || !(valid < L || resets || (!k && a.lengths))) continue;
            const Matrix<E> copy{state_copies[k - C::FIRST_READ], L};
            if (k) {
                copy_rows<E>(rows, valid, L, prev[k], copy);
                if (resets) mask.zero<E>(RESET, rows, L, copy);
            } else {
                copy_step_input(/*is_x=*/false, s, b, rows, u, valid, L, copy);
            }
            prev[k] = copy;
        }
        if (a.dh) dh_out = {(const E *)a.dh + t * a.dh_step + b * a.dh_row + u, a.dh_row};
        if (a.dh && valid < L) copy_rows<E>(rows, valid, L, dh_out, {dh_copy, L}), dh_out = {dh_copy, L};
        if (holds) {  // the gradients of a held row pass unchanged, and its dpreact is zero
            for (int k = 1; k < C::STATES; k++) copy_rows<E>(rows, L, L, {carried[k], L}, {held_carried[k], L});
            copy_rows<E>(rows, valid, L, dh, {held_dh_of(p, b), L});
        }
        const E *saved = (const E *)a.gates + ((t * panels + p) * B + b) * C::SAVED * L;
        cells_backward<C, E>(rows, valid, dh, dh_out, carried, saved, prev, dpreact);
        for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1)) {
            for (int k = 1; k < C::STATES; k++) copy_rows<E>(1, L, L, {held_carried[k] + r * L, 0}, {carried[k] + r * L, 0});
            zero_rows<E>(1, C::S * L, {dpreact + r * C::S * L, 0});
        }
        if (panel.is_compact()) panel.compact(rows, expanded, dpreact_of(p, s, b));
    }

    // Runs step s for some rows and one vector group of panels. Step -1 writes the gradients of the initial states.
    void step(int64_t s, int64_t b, int64_t rows, int64_t q) {
        const int64_t p_first = first_vector(panels, q), p_last = first_vector(panels, q + 1), column = p_first * L;
        const Mask next = mask_of_step(s + 1, b);
        const bool resets = next.any(RESET, rows), holds = next.any(HOLD, rows);
        const Matrix<E> dh_rows{products, 4 * L};
        if (s < T - 1 && (s >= 0 || a.dh_0)) {
            dpreact_product(rows, b, s + 1, Base::FIRST_H, C::Y, (const E *)job.packed_hh, panels, q);
            for (int64_t p = p_first; CARRIES_DH && p < p_last; p++)
                add_rows<E>(rows, L, {carried_of(0, p, b), L}, dh_rows.from(0, p * L - column));
        } else {
            int64_t dh_n_columns = s == T - 1 && a.dh_n ? min((p_last - p_first) * L, H - column) : 0;
            copy_rows<E>(rows, dh_n_columns, 4 * L,
                         dh_n_columns ? Matrix<const E>{(const E *)a.dh_n, a.dh_n_row}.from(b, column) : dh_rows, dh_rows);
        }
        if (resets) next.zero<E>(RESET, rows, 4 * L, dh_rows);
        for (int64_t p = p_first; p < p_last; p++) {
            const int64_t u = p * L, valid = min(L, H - u);
            const Matrix<E> dh = dh_rows.from(0, u - column);
            for (int k = 1; k < C::STATES; k++) {
                const Matrix<E> dc{carried_of(k, p, b), L};
                const Matrix<const E> dc_n{(const E *)a.dc_n, a.dc_n_row};
                if (s == T - 1) copy_rows<E>(rows, a.dc_n ? valid : 0, L, a.dc_n ? dc_n.from(b, u) : dc, dc);
                if (resets) next.zero<E>(RESET, rows, L, dc);
                if (s < 0 && a.dc_0) copy_rows<E>(rows, valid, valid, dc, Matrix<E>{(E *)a.dc_0, H}.from(b, u));
            }
            for (int64_t r = 0; holds && r < rows; r++)
                if (next.holds(r)) copy_rows<E>(1, L, L, {held_dh_of(p, b + r), 0}, {dh[r], 0});
            if (s >= 0) cells(p, s, b, rows, dh);
            else if (a.dh_0) copy_rows<E>(rows, valid, valid, dh, Matrix<E>{(E *)a.dh_0, H}.from(b, u));
        }
    }

    E *strips_of(int64_t chunk) const { return (E *)job.strips + chunk % job.ring * job.strip_size; }
    int64_t end_of(int64_t chunk) const { return min((chunk + 1) * job.chunk, T); }

    // Packs this thread's share of [x, h_in, 1] for the weight gradients of a chunk of steps.
    void pack_activations(int64_t chunk) {
        if (job.accumulators)
            this->template pack_strips<STRIP>(strips_of(chunk), /*ones=*/true, chunk * job.chunk, end_of(chunk),
                                              position.first(B), position.last(B));
        else if (job.strips)  // few pairs: there is one chunk
            this->template pack_strips<4 * L>(strips_of(chunk), /*ones=*/false, 0, T, position.first(B), position.last(B));
    }

    // Adds this thread's share of the gradients of the weights and of x, for a chunk whose dpreact is complete.
    void add_gradients(int64_t chunk) {
        const int64_t s = chunk * job.chunk, s_last = end_of(chunk), rows = (s_last - s) * B;
        if (job.accumulators) {
            for (int64_t k_set = 0; k_set < job.split_k_sets; k_set++) {  // mostly over rows that are in this thread's cache
                const int64_t first = max(position.first(job.split_k_sets * panels) - k_set * panels, 0);
                const int64_t last = min(position.last(job.split_k_sets * panels) - k_set * panels, panels);
                this->add_weight_gradients(strips_of(chunk), s, s_last, k_set, first, last);
            }
        } else if (job.strips) {
            write_weight_gradients<C, E>(*this, strips_of(chunk), position.first(panels), position.last(panels));
        }
        if (a.dx) this->input_gradient(s, position.first(rows), position.last(rows));
    }

    void pack() {
        const int64_t groups = vector_groups(panels), groups_x = vector_groups(ceil_div(I, L));
        if (job.packed_hh)
            pack_transposed<C, E>({(const E *)a.weight_hh, a.weight_hh_row}, C::BLOCKS_HH, C::Y, H, H,
                                  (E *)job.packed_hh, position.first(groups), position.last(groups));
        if (job.packed_ih)
            pack_transposed<C, E>({(const E *)a.weight_ih, a.weight_ih_row}, C::BLOCKS_IH, C::X, H, I,
                                  (E *)job.packed_ih, position.first(groups_x), position.last(groups_x));
    }

    void run() {
        pack();
        position.all_barrier();
        const int64_t groups = vector_groups(panels);
        const int64_t b_first = share(B, position.team, position.teams), b_last = share(B, position.team + 1, position.teams);
        const int64_t q_first = position.first_of_team(groups), q_last = position.last_of_team(groups);
        int64_t barrier = 0;  // where this thread arrived after its last chunk
        for (int64_t s = T - 1; s >= (a.dh_0 || a.dc_0 ? -1 : 0); s--) {
            PAUSE();
            for (int64_t j = q_first; j < q_last; j++) {  // serpentine order, as in the forward pass
                const int64_t q = s % 2 == 0 ? j : q_first + q_last - 1 - j;
                for (int64_t b = b_first; b < b_last; b += ROW_BLOCK) step(s, b, min(ROW_BLOCK, b_last - b), q);
            }
            position.team_barrier();
            if (s < 0 || s % job.chunk || (!job.strips && !a.dx)) continue;
            const int64_t chunk = s / job.chunk, previous_barrier = barrier;
            pack_activations(chunk);
            barrier = position.arrive_all();
            // A thread that has arrived at the barrier of chunk + 1 has read chunk + 3, which chunk - 1 is to overwrite.
            if (end_of(chunk) < T) position.wait_for_all(previous_barrier), add_gradients(chunk + 1);
        }
        if (!job.strips && !a.dx) return;
        position.wait_for_all(barrier);
        add_gradients(0);
        if (!job.accumulators) return;
        if (job.split_k_sets == 2) position.all_barrier();  // another thread may have summed the other set
        this->unpack_weight_gradients(position.first(panels), position.last(panels));
    }
};

template <class C, class E> void backward(void *argument, int thread, int threads) {
    const BackwardJob &job = *(const BackwardJob *)argument;
    ThreadPosition position(job, thread, threads);
    if (thread < position.used_threads) Backward<C, E>(job, position).run();
}
