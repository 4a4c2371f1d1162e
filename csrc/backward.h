// The backward pass of a layer: dpreact step by step, and after each chunk of steps its part of the gradients that sum
// over rows.
//
// What a chunk leaves is used while it is in the cache, and never written out: dpreact of four chunks is all there is. A
// thread turns a chunk into gradients once it has the next one's dpreact, and so waits only when a whole chunk ahead.
#pragma once

template <class C, class E> struct Backward : Gradients<C, E> {
    using Base = Gradients<C, E>;
    using Base::a, Base::job, Base::T, Base::B, Base::I, Base::H, Base::L, Base::panels, Base::sums, Base::zeros;
    using Base::back_product, Base::copy_seen, Base::dpreact_of, Base::mask_at, Base::time_of;
    static constexpr bool HANDS_H_ON = C::OWN == 0;
    Place &place;
    alignas(64) E old[C::STATES - C::OWN][CHUNK * L], dh_old[CHUNK * L], held[C::STATES][CHUNK * L],
        apart[CHUNK * C::S * L];

    Backward(const BackwardJob &job, Place &place) : Base(job), place(place) {}

    // What a panel's step hands to the step before: gradients of states, of h only the part that is not by weight_hh
    E *carried_of(int k, int64_t p, int64_t b) const {
        return (E *)job.carried + (((k - !HANDS_H_ON) * panels + p) * B + b) * L;
    }
    E *dh_held_of(int64_t p, int64_t b) const { return carried_of(C::STATES, p, b); }  // what a held step hands on
    // State k that step s starts from, before resets
    Rows<const E> before(int k, int64_t s) const {
        if (s == 0) return k ? Rows<const E>{(const E *)a.c_0, a.c_0_row} : Rows<const E>{(const E *)a.h_0, a.h_0_row};
        return {(const E *)(k ? a.c : a.h) + time_of(s - 1) * B * H, H};
    }

    // dpreact of one panel; dh (rows, 4 vectors apart) is the gradient from the step after
    void cells(int64_t p, int64_t s, int64_t b, int64_t rows, Rows<E> dh) {
        const int64_t t = time_of(s), u = p * L, valid = min(L, H - u);
        const Mask mask = mask_at(s, b);
        const bool resets = mask.any(RESET, rows), holds = mask.any(HOLD, rows);
        const Panel<C, E> panel(H, p);
        E *carried[C::STATES], *dpreact = panel.is_narrow() ? apart : dpreact_of(p, s, b);
        Rows<const E> prev[C::STATES], dh_out{zeros, 0};
        for (int k = 0; k < C::STATES; k++) {
            carried[k] = carried_of(k, p, b), prev[k] = before(k, s).from(b, u);
            if (k && a.dc)
                add_rows<E>(rows, valid, {(const E *)a.dc + t * a.dc_step + b * a.dc_row + u, a.dc_row},
                            {carried[k], L});
            if (k < C::OWN || !(valid < L || resets || (!k && a.lengths))) continue;
            const Rows<E> aside{old[k - C::OWN], L};
            if (k) {
                copy_rows<E>(rows, valid, L, prev[k], aside);
                if (resets) mask.zero<E>(RESET, rows, L, aside);
            } else {
                copy_seen(false, s, b, rows, u, valid, L, aside);
            }
            prev[k] = aside;
        }
        if (a.dh) dh_out = {(const E *)a.dh + t * a.dh_step + b * a.dh_row + u, a.dh_row};
        if (a.dh && valid < L) {
            copy_rows<E>(rows, valid, L, dh_out, {dh_old, L});
            dh_out = {dh_old, L};
        }
        if (holds) {  // a held row hands on what the step after gave it: the gradients pass, dpreact is zero
            for (int k = 1; k < C::STATES; k++) copy_rows<E>(rows, L, L, {carried[k], L}, {held[k], L});
            copy_rows<E>(rows, valid, L, dh, {dh_held_of(p, b), L});
        }
        const E *saved = (const E *)a.gates + ((t * panels + p) * B + b) * C::SAVED * L;
        cells_backward<C, E>(rows, valid, dh, dh_out, carried, saved, prev, dpreact);
        for (int64_t r = mask.next(HOLD, rows); r < rows; r = mask.next(HOLD, rows, r + 1)) {
            for (int k = 1; k < C::STATES; k++) copy_rows<E>(1, L, L, {held[k] + r * L, 0}, {carried[k] + r * L, 0});
            zero_rows<E>(1, C::S * L, {dpreact + r * C::S * L, 0});
        }
        if (panel.is_narrow()) panel.gather(rows, apart, dpreact_of(p, s, b));
    }

    // Step s for some rows and one group of panels; step -1 is where the gradients arrive at the initial states
    void step(int64_t s, int64_t b, int64_t rows, int64_t q) {
        const int64_t p_first = group(panels, q), p_last = group(panels, q + 1), column = p_first * L;
        const Mask next = mask_at(s + 1, b);
        const bool resets = next.any(RESET, rows), holds = next.any(HOLD, rows);
        const Rows<E> all{sums, 4 * L};
        if (s < T - 1 && (s >= 0 || a.dh_0)) {
            back_product(rows, b, s + 1, Base::FIRST_H, C::Y, (const E *)job.packed_hh, panels, q);
            for (int64_t p = p_first; HANDS_H_ON && p < p_last; p++)
                add_rows<E>(rows, L, {carried_of(0, p, b), L}, all.from(0, p * L - column));
        } else {
            int64_t given = s == T - 1 && a.dh_n ? min((p_last - p_first) * L, H - column) : 0;
            copy_rows<E>(rows, given, 4 * L, given ? Rows<const E>{(const E *)a.dh_n, a.dh_n_row}.from(b, column) : all, all);
        }
        if (resets) next.zero<E>(RESET, rows, 4 * L, all);
        for (int64_t p = p_first; p < p_last; p++) {
            const int64_t u = p * L, valid = min(L, H - u);
            const Rows<E> dh = all.from(0, u - column);
            for (int k = 1; k < C::STATES; k++) {
                const Rows<E> dc{carried_of(k, p, b), L};
                const Rows<const E> dc_n{(const E *)a.dc_n, a.dc_n_row};
                if (s == T - 1) copy_rows<E>(rows, a.dc_n ? valid : 0, L, a.dc_n ? dc_n.from(b, u) : dc, dc);
                if (resets) next.zero<E>(RESET, rows, L, dc);
                if (s < 0 && a.dc_0) copy_rows<E>(rows, valid, valid, dc, Rows<E>{(E *)a.dc_0, H}.from(b, u));
            }
            for (int64_t r = 0; holds && r < rows; r++)
                if (next.holds(r)) copy_rows<E>(1, L, L, {dh_held_of(p, b + r), 0}, {dh[r], 0});
            if (s >= 0) cells(p, s, b, rows, dh);
            else if (a.dh_0) copy_rows<E>(rows, valid, valid, dh, Rows<E>{(E *)a.dh_0, H}.from(b, u));
        }
    }

    E *strips_of(int64_t chunk) const { return (E *)job.strips + chunk % job.ring * job.strip_size; }
    int64_t end_of(int64_t chunk) const { return min((chunk + 1) * job.chunk, T); }

    // This thread's share of what the weight gradients of a chunk of steps are sums over
    void pack_inputs(int64_t chunk) {
        if (job.dweights)
            this->template pack_strips<STRIP>(strips_of(chunk), true, chunk * job.chunk, end_of(chunk), place.first(B),
                                              place.last(B));
        else if (job.strips)
            this->template pack_strips<4 * L>(strips_of(chunk), false, 0, T, place.first(B), place.last(B));
    }

    // This thread's share of the gradients of the weights and of x, for a chunk of steps that all have been through
    void add_gradients(int64_t chunk) {
        const int64_t s = chunk * job.chunk, s_last = end_of(chunk), rows = (s_last - s) * B;
        if (job.dweights) {
            for (int64_t half = 0; half < job.halves; half++) {  // so far as that goes, sums over rows it has seen itself
                const int64_t first = max(place.first(job.halves * panels) - half * panels, 0);
                const int64_t last = min(place.last(job.halves * panels) - half * panels, panels);
                this->add_weight_gradients(strips_of(chunk), s, s_last, half, first, last);
            }
        } else if (job.strips) {
            write_weight_gradients<C, E>(*this, strips_of(chunk), place.first(panels), place.last(panels));
        }
        if (a.dx) this->input_gradient(s, place.first(rows), place.last(rows));
    }

    void pack() {
        const int64_t groups = groups_of(panels), groups_x = groups_of(ceil_div(I, L));
        if (job.packed_hh)
            pack_transposed<C, E>({(const E *)a.weight_hh, a.weight_hh_row}, C::BLOCKS_HH, C::Y, H, H,
                                  (E *)job.packed_hh, place.first(groups), place.last(groups));
        if (job.packed_ih)
            pack_transposed<C, E>({(const E *)a.weight_ih, a.weight_ih_row}, C::BLOCKS_IH, C::X, H, I,
                                  (E *)job.packed_ih, place.first(groups_x), place.last(groups_x));
    }

    void run() {
        pack();
        place.meet_everyone();
        const int64_t groups = groups_of(panels);
        const int64_t b_first = share(B, place.part, place.parts), b_last = share(B, place.part + 1, place.parts);
        const int64_t q_first = place.first_of_team(groups), q_last = place.last_of_team(groups);
        int64_t meeting = 0;  // of the last chunk that this thread has been through
        for (int64_t s = T - 1; s >= (a.dh_0 || a.dc_0 ? -1 : 0); s--) {
            for (int64_t j = q_first; j < q_last; j++) {  // to and fro, as in the forward pass
                const int64_t q = s % 2 == 0 ? j : q_first + q_last - 1 - j;
                for (int64_t b = b_first; b < b_last; b += CHUNK) step(s, b, min(CHUNK, b_last - b), q);
            }
            place.meet_team();
            if (s < 0 || s % job.chunk || (!job.strips && !a.dx)) continue;
            const int64_t chunk = s / job.chunk, before = meeting;
            pack_inputs(chunk);
            meeting = place.come();
            // Who came to the meeting before this one has read the chunk two before that: the next takes its place.
            if (end_of(chunk) < T) place.wait_for(before), add_gradients(chunk + 1);
        }
        if (!job.strips && !a.dx) return;
        place.wait_for(meeting);
        add_gradients(0);
        if (!job.dweights) return;
        if (job.halves == 2) place.meet_everyone();  // another's half is added
        this->unpack_weight_gradients(place.first(panels), place.last(panels));
    }
};

template <class C, class E> void backward(void *argument, int thread, int threads) {
    const BackwardJob &job = *(const BackwardJob *)argument;
    Place place(job, thread, threads);
    if (thread < place.everyone) Backward<C, E>(job, place).run();
}
