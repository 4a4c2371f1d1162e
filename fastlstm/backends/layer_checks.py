"""Whether tensors make one layer of a cell."""

import torch
from torch import Tensor

from fastlstm.backends.base import Layer, hidden_size, stack_size_of

Optional = Tensor | None


def check_layer(layer: Layer) -> None:
    """Raise ValueError, with the argument's shape, dtype or device, unless the tensors make one layer of its cell in
    one direction, or a stack that is `stacked`, whose weights all have the same leading axis.
    """
    if layer.stacked:
        M, B = stack_size_of(layer), layer.x.shape[1]
        if B % M:
            raise ValueError(f"x must have as many batch rows for each of the {M} stacked modules, got {B} in all")
        layer = layer._replace(weights=tuple([None if a is None else a[0] for a in layer.weights]))
    x, (weight_ih, weight_hh, bias_ih, bias_hh, *others), states, lengths, reset, _, cell, inputs, *_ = layer
    params, products = others[: len(cell.params)], others[len(cell.params) :]
    if x.dim() != 3:
        raise ValueError(f"x must have shape (T, B, I), got {tuple(x.shape)}")
    T, B, I = x.shape
    _check_presence(layer)
    hidden = _hidden(layer, I)
    of_x, of_h = cell.gates_of_x * hidden, cell.gates_of_h * hidden
    out = products[0].shape[0] if cell.has_projection and products[0].dim() else hidden
    recurrent = next((a for a in (weight_hh, *products) if a is not None), None)
    columns = 0 if out != hidden or recurrent is None or recurrent.dim() != 2 else recurrent.shape[1]
    head = columns if columns and out % columns == 0 else out  # its units
    widths = [out] + [hidden] * (len(states) - 1)
    named = [
        ("weight_ih", weight_ih, (of_x, I)),
        ("weight_hh", weight_hh, (of_h, head)),
        ("bias_ih", bias_ih, (of_x,)),
        ("bias_hh", bias_hh, (of_h,)),
        *((name, a, (hidden,)) for name, a in zip(cell.params, params)),
        *((f"weight_{name}", a, (out, head if out == hidden else hidden)) for name, a in zip(cell.products, products)),
        *((f"{name}_0", a, (B, width)) for name, a, width in zip(cell.states, states, widths)),
        *((name, a, (T, B, hidden)) for name, a in zip(cell.inputs, inputs)),
    ]
    for name, a, *_ in (("x", x), *named):
        if hasattr(type(a), "full_tensor"):  # of torch.distributed.tensor, which takes long to import
            raise ValueError(
                f"{name} must be a whole tensor, got a DTensor: gather it with full_tensor(), or shard the module with "
                "torch.distributed.fsdp.fully_shard, which gathers weights for each call"
            )
    masks = ("lengths", lengths, (B,), torch.int64), ("reset", reset, (T, B), torch.bool)
    entries = *((*entry, x.dtype) for entry in named), *masks
    if out > hidden or (out < hidden and products[0].shape != (out, hidden)):
        most = " and P of at most H" * (out > hidden)
        shape_wanted = f"weight_{cell.products[0]} must have shape (P, H) with H = {hidden}{most}"
        raise ValueError(f"{shape_wanted}, got {tuple(products[0].shape)}")
    for name, a, shape, _ in entries:
        if a is not None and a.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(a.shape)}")
    for name, a, _, wanted in entries:
        if a is None:
            continue
        if a.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {a.device}")
        if a.dtype is not wanted:
            of_x_too = "of x, " if wanted is x.dtype else ""
            raise ValueError(f"{name} must have the dtype {of_x_too}{wanted}, got {a.dtype}")


def _check_presence(layer: Layer) -> None:
    """Raise where a tensor is missing, or is there for nothing."""
    cell, (weight_ih, weight_hh, bias_ih, bias_hh, *others) = layer.cell, layer.weights
    params, products = others[: len(cell.params)], others[len(cell.params) :]
    for of, operand, gates, weight, bias in (
        ("x", "ih", cell.gates_of_x, weight_ih, bias_ih),
        ("h", "hh", cell.gates_of_h, weight_hh, bias_hh),
    ):
        if gates and weight is None:
            raise ValueError(f"weight_{operand} must be given: {gates} gates of cell {cell.name} sum {of}")
        for name, a in ((f"weight_{operand}", weight), (f"bias_{operand}", bias)):
            if not gates and a is not None:
                raise ValueError(f"{name} must be None: cell {cell.name} has no gate for it, got {tuple(a.shape)}")
    for kind, names, tensors in (
        ("params", cell.params, params), ("inputs", cell.inputs, layer.inputs), ("products", cell.products, products),
    ):  # fmt: skip
        there = sum(a is not None for a in tensors)
        if there != len(names) or there != len(tensors):
            raise ValueError(f"{kind} must be {', '.join(names) or 'none'}, got {there} tensors")
    absent = [a is None for a in layer.states]
    if len(absent) != len(cell.states) or any(absent) != all(absent):
        raise ValueError(
            f"states must be {', '.join(cell.states)}, or all None, got {len(absent) - sum(absent)} tensors"
        )


def _hidden(layer: Layer, I: int) -> int:
    """Return H, from weight_ih, or where there is none from the rows of weight_hh, or from another tensor."""
    weight_ih, weight_hh = layer.weights[:2]
    gates = layer.cell.gates_of_x
    if weight_ih is None:
        return hidden_size(layer) if weight_hh is None else int(weight_hh.shape[0] // layer.cell.gates_of_h)
    form = "(H, I)" if gates == 1 else f"({gates}H, I)"
    rows = weight_ih.shape[0]
    if weight_ih.dim() != 2 or weight_ih.shape[1] != I or rows % gates:
        raise ValueError(f"weight_ih must have shape {form} with I = {I}, got {tuple(weight_ih.shape)}")
    if rows == 0:
        raise ValueError(f"weight_ih must have shape {form} with H of 1 or more, got {tuple(weight_ih.shape)}")
    return int(rows // gates)
