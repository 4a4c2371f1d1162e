"""What is kept of weights beside their packed form: biases, and how a change of them is seen."""

from fastlstm.backends.numba.intrinsics import call, get_int16, get_int32, set_int32
from fastlstm.backends.numba.shared import VECTOR, gate_at, jit, share

DIGEST = 1 << 14  # words of a block of weights that has one digest: 64 KB


@jit
def pack_biases(a, p, to):
    """The sum of the biases of panel p to [gate][lane], or its gates side by side (see `vectors_of`), then zeros."""
    L, S, H = a.lanes, a.size, a.H
    valid = min(L, H - p * L)
    call(a.copy_rows, 1, 0, 4 * L, to, 0, to, 0)
    for gate in range(4):
        unit, at = (gate * H + p * L) * S, to + gate_at(a, p, gate)
        if a.bias != 0:
            call(a.copy_rows, 1, valid, valid, a.bias + unit, 0, at, 0)
        if a.bias_hh != 0:
            call(a.add_rows, 1, valid, a.bias_hh + unit, 0, at, 0)


@jit
def meets(a, element, sample, keep):
    """Keep an element of the weights as a sample, or return whether it still has the sample's bits."""
    word = 0
    while word < a.size:
        if keep:
            set_int32(sample + word, get_int32(element + word))
        elif get_int32(element + word) != get_int32(sample + word):
            return False
        word += 4
    return True


@jit
def meets_original(element, size, sample, keep):
    """As `meets`, for an element of 16 or 32 bits."""
    word = get_int16(element) if size == 2 else get_int32(element)
    if keep:
        set_int32(sample, word)
    return word == get_int32(sample)


@jit
def first_column(a, gate, p):
    """The first column of weight_ih that has a sample in a gate's first row of panel p."""
    return (gate * a.H + p * a.lanes) % max(min(a.I, 4 * a.H), 1)


@jit
def sampled(a, p, keep, recurs):
    """Keep samples of panel p, or return whether the weights still have them: one element of each row, from a column
    that moves on with the row so that every column is met. `recurs`: whether weight_hh is looked at.
    """
    L, S, I, H = a.lanes, a.size, a.I, a.H
    at = a.samples + p * 4 * L * samples_of(I, H) * S
    for gate in range(4):
        column = first_column(a, gate, p)  # no division from row to row: it took as long as the samples
        for unit in range(p * L, min((p + 1) * L, H)):
            row, k = gate * H + unit, column
            if recurs and not meets(a, a.weight_hh + row * a.weight_hh_row + unit * S, at, keep):
                return False
            at += S
            while k < I:
                if not meets(a, a.weight_ih + row * a.weight_ih_row + k * S, at, keep):
                    return False
                at, k = at + S, k + 4 * H
            column = column + 1 if column + 1 < min(I, 4 * H) else 0
    return True


@jit
def sampled_originals(a, p, keep, recurs):
    """As `sampled`, of the weights and biases that these are copies of."""
    L, I, H, size = a.lanes, a.I, a.H, a.original_size
    at = a.samples + p * 4 * L * samples_of(I, H) * 4
    for gate in range(4):
        column = first_column(a, gate, p)
        for unit in range(p * L, min((p + 1) * L, H)):
            row, k = gate * H + unit, column
            if recurs and not meets_original(a.original_hh + (row * H + unit) * size, size, at, keep):
                return False
            at += 4
            for bias in (a.original_bias, a.original_bias_hh):
                if bias != 0:
                    if not meets_original(bias + row * size, size, at, keep):
                        return False
                    at += 4
            while k < I:
                if not meets_original(a.original_ih + (row * I + k) * size, size, at, keep):
                    return False
                at, k = at + 4, k + 4 * H
            column = column + 1 if column + 1 < min(I, 4 * H) else 0
    return True


@jit
def keep_samples(a, p):
    if a.samples != 0:
        if a.original_hh != 0:
            sampled_originals(a, p, True, True)
        else:
            sampled(a, p, True, True)


@jit
def samples_of(I, H):
    """Samples of a row, at most: of both weights, and of originals' biases."""
    return 3 + (I + 4 * H - 1) // (4 * H)


@jit
def is_stale(a, p, scratch, recurs):
    """True where a bias of panel p or a sample of its weights has changed: what changes a whole row, a whole column or
    everything is found. `recurs`: whether weight_hh is used at all.
    """
    if a.original_hh != 0:
        return not sampled_originals(a, p, False, recurs)
    pack_biases(a, p, scratch)
    bias = a.biases + p * 4 * VECTOR
    for k in range(0, 4 * VECTOR, 4):
        if get_int32(scratch + k) != get_int32(bias + k):
            return True
    return not sampled(a, p, False, recurs)


@jit
def digest_weights(a, thread, threads, recurs):
    """This thread's blocks of the weights, or of what these are copies of, digested to their vectors at `digests`, or
    compared to them. `recurs` is as in `is_stale`.
    """
    weight_ih, weight_hh, size = a.weight_ih, a.weight_hh, a.size
    if a.original_hh != 0:
        weight_ih, weight_hh, size = a.original_ih, a.original_hh, a.original_size
    of_ih, of_hh = a.H * a.I * size, a.H * a.H * size  # words
    blocks_ih = (of_ih + DIGEST - 1) // DIGEST
    blocks = blocks_ih + (of_hh + DIGEST - 1) // DIGEST if recurs else blocks_ih
    for n in range(share(blocks, thread, threads), share(blocks, thread + 1, threads)):
        source, words, k = (weight_ih, of_ih, n) if n < blocks_ih else (weight_hh, of_hh, n - blocks_ih)
        k *= DIGEST
        call(a.digest, min(DIGEST, words - k), source + k * 4, a.digests + n * VECTOR, a.stale)
