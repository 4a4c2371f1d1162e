"""A layer of any cell in plain PyTorch, one step at a time: what the tests compare with, and what has no kernel runs.

All functions are differentiable and take weights of one layer or of a stack, see `Layer`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlstm.backends.base import (
    WEIGHTS,
    Gradients,
    Layer,
    Run,
    Traits,
    active_input,
    fill,
    given_states,
    heads_of,
    held_steps,
    hidden_size,
    reset_steps,
)
from fastlstm.backends.sums import Sums, for_rows, vector_gradient, weight_gradient
from fastlstm.cells.graph import HEADS
from fastlstm.cells.spec import Cell

# no 16 bits, since rounding at every operation would lose their digits
TRAITS = Traits(heads=True, products=True, projections=True)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"the reference backend needs floating-point tensors, got {dtype}"


def saved_shape(
    cell: Cell, T: int, B: int, H: int, dtype: torch.dtype, stack_size: int | None = None
) -> tuple[int, ...]:
    """Return the shape of the values that forward saves beside the states."""
    return T, B, len(cell.layout.saved) * H


def step_order(T: int, reverse: bool) -> range:
    """Return the order in which the time steps run."""
    return range(T - 1, -1, -1) if reverse else range(T)


def previous(a: Tensor, a_0: Tensor, layer: Layer, held: Tensor | None, reset: Tensor | None) -> Tensor:
    """Return the states (T, B, H) from which steps start: the last step's, `a_0` at first and for a row that runs
    backwards after the steps that `held` marks, of which `a` has none; zeros after a reset.
    """
    if held is not None:
        a = torch.where(held, a_0, a)
    first = a_0.unsqueeze(0)
    a = torch.cat([a[1:], first] if layer.reverse else [first, a[:-1]])
    return fill(a, reset)


def forward(layer: Layer, save: bool) -> Run:
    """Run one layer in one direction. With `save` the run has the inner states, (T, B, H) each, and the N values that
    the cell saves, (T, B, N H) in the order of `Layout.saved`.
    """
    return forward_with(Sums(layer.cell, layer.weights, hidden_size(layer)), layer, save)


def forward_with(sums: Sums, layer: Layer, save: bool) -> Run:
    """Do what `forward` does, with `sums` for the products of x and h."""
    cell, states, held = layer.cell, given_states(layer), held_steps(layer)
    x, reset = active_input(layer, held), reset_steps(layer, held)
    T, B, _ = x.shape
    params = _params(layer, B) | {HEADS: heads_of(layer)}
    # padding may be NaN, which a zero gradient would turn to NaN
    inputs = {name: fill(a, held).unbind(0) for name, a in zip(cell.inputs, layer.inputs)}
    start = sums.start(x).unbind(0)
    after: list[list[Tensor]] = [[state] * T for state in states]
    saved, names = [x] * T, [f"{name}_prev" for name in cell.states]
    for t in step_order(T, layer.reverse):
        if reset is not None:
            states = tuple(fill(state, reset[t]) for state in states)
        results = cell.derived().forward({
            **sums.split(sums.add_h(start[t], states[0])),
            **dict(zip(names, states)),
            **params,
            **{name: a[t] for name, a in inputs.items()},
        })  # fmt: skip
        new = [results[name] for name in cell.states]
        states = tuple(new) if held is None else tuple(torch.where(held[t], a, b) for a, b in zip(states, new))
        for steps, state in zip(after, states):
            steps[t] = state
        if save:
            parts = [results[name] for name in cell.layout.saved]
            saved[t] = torch.cat(parts, -1) if parts else x.new_empty(B, 0)
    output, *others = (torch.stack(steps) for steps in (after if save else after[:1]))
    saved_values = (*others, torch.stack(saved)) if save else ()
    return Run(fill(output, held), tuple(state.clone() for state in states), saved_values)


def run_of(layer: Layer, sequences: Sequence[Tensor]) -> Run:
    """Return the run of these outputs and inner states, (T, B, H) each, with saved values but not the last states."""
    cell, held = layer.cell, held_steps(layer)
    x, sums = active_input(layer, held), Sums(cell, layer.weights, hidden_size(layer))
    prev = _previous_of_all(layer, sequences, held)
    results = cell.derived().forward({
        **sums.split(sums.add_h(sums.start(x), prev[0])),
        **{f"{name}_prev": a for name, a in zip(cell.states, prev)},
        **{name: fill(a, held) for name, a in zip(cell.inputs, layer.inputs)},
        **_params(layer, x.shape[1]),
        HEADS: heads_of(layer),
    })  # fmt: skip
    # what depends on params alone has no steps
    parts = [results[name].expand(*x.shape[:2], -1) for name in cell.layout.saved]
    saved = torch.cat(parts, -1) if parts else x.new_empty(*x.shape[:2], 0)
    return Run(sequences[0], (None,) * len(cell.states), (*sequences[1:], saved))


def _previous_of_all(layer: Layer, sequences: Sequence[Tensor], held: Tensor | None) -> list[Tensor]:
    """Return `previous` of the outputs and of the inner states."""
    reset = reset_steps(layer, held)
    return [
        previous(a, a_0, layer, None if k else held, reset)
        for k, (a, a_0) in enumerate(zip(sequences, given_states(layer)))
    ]


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
    """Return the wanted gradients of a run's x, weights, states and inputs, from those of its results."""
    cell, layout, states, held = layer.cell, layer.cell.layout, given_states(layer), held_steps(layer)
    x, reset, H, heads = active_input(layer, held), reset_steps(layer, held), hidden_size(layer), heads_of(layer)
    T, B, _ = x.shape
    sums, params = Sums(layer.cell, layer.weights, H), _params(layer, B) | {HEADS: heads}
    *others, saved = run.saved
    inputs = [fill(a, held) for a in layer.inputs]
    h_prev, *_ = prev = _previous_of_all(layer, (run.h, *others), held)
    steps = {
        **dict(zip(layout.saved, saved.split(H, -1))),
        **dict(zip(cell.states, (run.h, *others))),
        **{f"{name}_prev": a for name, a in zip(cell.states, prev)},
        **dict(zip(cell.inputs, inputs)),
    }
    known = {name: a.unbind(0) for name, a in steps.items()}
    incoming = (grads.h, *(grads.saved or [None] * len(others)))
    d = [torch.zeros_like(a) if da is None else da for a, da in zip(states, grads.last)]
    none = x.new_zeros(B, H)
    beside = *cell.params, *cell.products, *cell.inputs
    results: list[list[Tensor]] = [[none] * T for _ in range(1 + len(beside))]
    for t in reversed(step_order(T, layer.reverse)):
        d = [da if out is None else da + (fill(out[t], None if held is None else held[t]) if k == 0 else out[t])
             for k, (da, out) in enumerate(zip(d, incoming))]  # fmt: skip
        gradients = cell.derived().backward({
            **{f"d{name}": da for name, da in zip(cell.states, d)},
            **{name: a[t] for name, a in known.items()},
            **params,
        })  # fmt: skip
        of_gates = [gradients.get(f"d{gate}_pre", none) for gate in layout.preacts]
        dpreact = torch.cat(of_gates, -1) if of_gates else none[:, :0]
        others_t = [gradients.get(f"d{name}", none) for name in beside]
        for place, a in zip(results, (dpreact, *others_t)):
            place[t] = fill(a, None if held is None else held[t])
        d_prev = [gradients.get(f"d{name}_prev") for name in cell.states]
        by_product = sums.h_gradient(results[0][t], heads)
        if by_product is not None:
            d_prev[0] = by_product if d_prev[0] is None else d_prev[0] + by_product
        new = [none if a is None else a for a in d_prev]
        if held is not None:
            new = [torch.where(held[t], a, b) for a, b in zip(d, new)]
        d = [fill(a, None if reset is None else reset[t]) for a in new]
    dpreact, *terms = (torch.stack(steps) for steps in results)
    dx = sums.x_gradient(dpreact) if needs.x else None
    first_product, first_input = len(cell.params), len(cell.params) + len(cell.products)
    multiplied = [fill(steps[cell.derived().multiplied[name]], held) for name in cell.products]
    of_weights, wanted = layer.weights[WEIGHTS:], needs.weights[WEIGHTS:]
    return Gradients(
        torch.zeros_like(x) if needs.x and dx is None else dx,  # a cell may multiply no x
        (
            *sums.weight_gradients(dpreact, x, fill(h_prev, held), needs.weights, layer.weights[2:WEIGHTS]),
            *(
                vector_gradient(a, param) if want else None
                for a, param, want in zip(terms[:first_product], of_weights, wanted)
            ),
            *(
                weight_gradient(a, value, weight) if want else None
                for a, value, weight, want in zip(
                    terms[first_product:], multiplied, of_weights[first_product:], wanted[first_product:]
                )
            ),
        ),
        tuple(da if want else None for da, want in zip(d, needs.states)),
        tuple(da if want else None for da, want in zip(terms[first_input:], needs.inputs)),
    )


def _params(layer: Layer, B: int) -> dict[str, Tensor]:
    weights = layer.weights[WEIGHTS:]
    params = {name: for_rows(a, B) for name, a in zip(layer.cell.params, weights)}
    return params | dict(zip(layer.cell.products, weights[len(params) :]))
