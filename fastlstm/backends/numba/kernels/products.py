"""The products that a kernel is built with: two records of functions, one of which each module of products fills.

Each takes the argument struct `a` first. p is a panel, q a vector group, s a step in the order of the run, b the first
of `rows` batch rows, `scratch` a thread's scratch. A team's rows are `b_first` to `b_last`.
"""

from collections.abc import Callable
from typing import NamedTuple

Kernel = Callable[..., object]


class ForwardProducts(NamedTuple):
    """The products of a forward kernel, see `forward.forward_with`.

    Attributes:
        pack_weights: (a, p, packed_index, scratch) packs a panel of both weights.
        preact: (a, s, p, packed_index, b, rows, scratch, x, h_in, h_in_stride) stores the pre-activations (rows, S, L)
            in scratch. `h_in`: the address of the units of h that the panel sees, 0 for zeros.
        pack_x_operand: (a, s, x_first, x_last, scratch) writes x of this thread's rows, `x_first` to `x_last`, to the
            row operand. None if products read x where it lies.
        pack_h_operand: (a, s, p, b, rows, h, h_stride, scratch) writes h before step s to the row operand. None if
            products read h where it lies.
    """

    pack_weights: Kernel
    preact: Kernel
    pack_x_operand: Kernel | None = None
    pack_h_operand: Kernel | None = None


class BackwardProducts(NamedTuple):
    """The products of a backward kernel, see `backward.backward_with`.

    Attributes:
        is_on_bf16_unit: whether the products of every step are on the bf16 unit, which then stays configured for them.
        pack_transposed: (a, weight, weight_row, N, of_h, packed, first, last, scratch) packs vector groups `first` to
            `last` of the N columns of a weight, transposed. `of_h`: it is weight_hh, else weight_ih.
        dpreact_target: (a, p, s, b, scratch) returns where the cell stores dpreact (rows, S, L).
        store_dpreact: (a, p, s, b, rows, dpre, phase) copies what is due after a phase into the layouts that products
            read.
        back_product: (a, rows, b, s, of_h, packed, vectors, q, scratch) stores the product of dpreact of step s with a
            vector group of the transposed weights, (rows, 4 L), in scratch.
        pack_activations: (a, chunk, thread, threads, scratch) packs this thread's share of x, h and ones of a time
            chunk.
        add_weight_gradients: (a, chunk, k_set, p_first, p_last) adds a time chunk to the accumulators of panels
            `p_first` to `p_last`, in one split-K set.
    """

    is_on_bf16_unit: bool
    pack_transposed: Kernel
    dpreact_target: Kernel
    store_dpreact: Kernel
    back_product: Kernel
    pack_activations: Kernel
    add_weight_gradients: Kernel
