"""Biases and digests of weights: what belongs to packed weights beside the packed matrices."""

from fastlstm.backends.numba.kernels.layout import block_hh, block_ih, first_h_preact, gate_offset
from fastlstm.backends.numba.llvm.digest import DIGEST_BYTES
from fastlstm.backends.numba.llvm.intrinsics import call

DIGEST = 1 << 14  # words of a block of weights: 64 KB


def pack_biases(a, p, target):
    """Store the sum of the biases of panel p as (S, L), or as the gates of a compact panel lie."""
    L, size, H = a.lanes, a.size, a.H
    valid = min(L, H - p * L)
    call(a.copy_rows, 1, 0, a.preacts * L, target, 0, target, 0)
    if a.bias != 0:
        for k in range(a.x_preacts):
            bias = a.bias + (block_ih(a, k) * H + p * L) * size
            call(a.copy_rows, 1, valid, valid, bias, 0, target + gate_offset(a, p, k), 0)
    if a.bias_hh != 0:
        for k in range(a.h_preacts):
            bias = a.bias_hh + (block_hh(a, k) * H + p * L) * size
            call(a.add_rows, 1, valid, bias, 0, target + gate_offset(a, p, first_h_preact(a) + k), 0)


def digest_weights(a, thread, threads, recurs):
    """Digest the original weights and biases, or compare them, without weight_hh unless the layer `recurs`."""
    size, I, H = a.original_size, a.I, a.H
    ih_gates, hh_gates = a.x_preacts if a.original_bias != 0 else 0, a.h_preacts if a.original_bias_hh != 0 else 0
    n = digest_words(a, a.original_ih, a.x_preacts * H * I * size // 4, 0, thread, threads)
    n = digest_words(a, a.original_bias, ih_gates * H * size // 4, n, thread, threads)
    n = digest_words(a, a.original_bias_hh, hh_gates * H * size // 4, n, thread, threads)
    n = digest_words(a, a.original_products, a.products * a.h_width * a.head * size // 4, n, thread, threads)
    column_count = a.h_width if a.heads == 1 else a.head
    digest_words(a, a.original_hh, a.h_preacts * H * column_count * size // 4 if recurs else 0, n, thread, threads)


def digest_words(a, source, words, n, thread, threads):
    """Store the digests of this thread's blocks of words, or compare them; return the number after the last block."""
    for k in range(0, words, DIGEST):
        if n % threads == thread:
            call(a.digest, min(DIGEST, words - k), source + k * 4, a.digests + n * DIGEST_BYTES, a.mismatches)
        n += 1
    return n
