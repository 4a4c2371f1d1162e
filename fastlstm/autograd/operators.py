"""The kernels as ``torch.library`` operators, for compilers, exporters and fake tensors. Eager calls go past them.

Each cell has two operators: ``fastlstm::gru_forward`` and ``fastlstm::gru_backward`` run one layer in one direction, on
the backend that their last argument names. Those of the LSTM are ``fastlstm::forward`` and ``fastlstm::backward``.

Their outputs never alias each other or an input. An output that is not wanted has no elements. The operators are for
this package alone. The forward ones check shapes and types, and all else `fastlstm.layers` checks.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm.autograd.modes import has_memory, is_plain, wants_gradient
from fastlstm.backends import dispatch
from fastlstm.backends.base import (
    Gradients,
    Layer,
    Run,
    count_tensors,
    flat_input,
    heads_of,
    hidden_size,
    output_size,
    stack_size_of,
)
from fastlstm.backends.layer_checks import check_layer
from fastlstm.cells.library import lstm
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import dual_level, library_of, outside_graphs

Optional = Tensor | None


LIBRARIES: dict[str, torch.library.Library] = {}


def define(name: str, schema: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> Any:
    """Define an operator without the wrappers of `torch.library.custom_op`, which take twice as long as all else."""
    library = LIBRARIES[name] = library_of(name)  # a module may be loaded again
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, outside_graphs(function), key)
    return getattr(torch.ops.fastlstm, name).default


class Operators(NamedTuple):
    """The operators of one cell, and the functions that they call."""

    forward: Any
    backward: Any
    layer: Any  # the operator that `torch.jit.trace` records
    run: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Tensor, ...]]


by_cell: dict[Cell, Operators] = {}  # filled by `fastlstm.autograd.rules`, which adds the rules of differentiation


def name_of(cell: Cell, kind: str) -> str:
    """Return the name of a cell's operator. Those of the LSTM came first, and have no cell's name in theirs."""
    return kind if cell is lstm else f"{cell.key}_{kind}"


def schema_of(cell: Cell) -> str:
    """Return the tensors of a layer, in the order of `Layer.tensors`, as a schema of torch.library writes them."""
    weights = [
        f"Tensor{'?' * (gates == 0)} weight_{of}" for of, gates in (("ih", cell.gates_of_x), ("hh", cell.gates_of_h))
    ]
    optional = ["bias_ih", "bias_hh"], [f"{name}_0" for name in cell.states], ["lengths", "reset"]
    biases, states, masks = ([f"Tensor? {name}" for name in names] for names in optional)
    params, inputs = [f"Tensor param_{name}" for name in cell.params], [f"Tensor input_{name}" for name in cell.inputs]
    params += [f"Tensor weight_{name}" for name in cell.products]
    return ", ".join(["Tensor x", *weights, *biases, *params, *states, *inputs, *masks])


def define_for(cell: Cell) -> Operators:
    """Define the operators of a cell, without rules of differentiation."""
    count, states = count_tensors(cell), len(cell.states)

    def run_layer(*args: Any) -> tuple[Tensor, ...]:
        *tensors, reverse, _, backend = args
        _check(Layer.of(cell, tensors, reverse), backend)
        return _run(cell, *args)

    def gradients(*args: Any) -> tuple[Tensor, ...]:
        x, needs = args[2 * states], args[-2]
        grads = _gradients(cell, *args)
        return (*(x.new_empty(0) if g is None or not need else g for g, need in zip(grads, needs)),)

    others = [f"{name}_all" for name in cell.states[1:]]
    incoming = ", ".join(f"Tensor? d{name}" for name in ("h", *(f"{name}_n" for name in cell.states), *others))
    saved = ", ".join(f"Tensor {name}" for name in ("output", *others, "gates"))
    tensors, options = schema_of(cell), "str backend"
    forward_name, backward_name = name_of(cell, "forward"), name_of(cell, "backward")
    forward_op = define(
        forward_name, f"({tensors}, bool reverse, bool save, {options}) -> {tensors_of(1 + 2 * states)}", run_layer
    )
    backward_op = define(
        backward_name,
        # lengths and reset, the last two tensors, have no gradients
        f"({incoming}, {tensors}, {saved}, bool reverse, bool[] needs, {options}) -> {tensors_of(count - 2)}",
        gradients,
    )

    @torch.library.register_fake(f"fastlstm::{forward_name}", lib=LIBRARIES[forward_name])
    def _(*args: Any) -> tuple[Tensor, ...]:
        *tensors, reverse, save, backend = args
        layer = Layer.of(cell, tensors, reverse)
        (T, B), H, stack = layer.x.shape[:2], hidden_size(layer), stack_size_of(layer) or None
        gates, P = dispatch.module(backend).saved_shape(cell, T, B, H, layer.x.dtype, stack), output_size(layer)
        saved = [(T, B, H)] * (states - 1) + [gates] if save else [(0,)] * states
        shapes = (T, B, P), (B, P), *[(B, H)] * (states - 1), *saved
        return (*(layer.x.new_empty(shape) for shape in shapes),)

    @torch.library.register_fake(f"fastlstm::{backward_name}", lib=LIBRARIES[backward_name])
    def _(*args: Any) -> tuple[Tensor, ...]:
        likes, needs = args[2 * states : 2 * states + count - 2], args[-2]  # without lengths and reset
        x = likes[0]
        return (*(x.new_empty(like.shape if need and like is not None else (0,)) for need, like in zip(needs, likes)),)

    return Operators(forward_op, backward_op, None, run_layer, gradients)


_checked: set[Any] = set()  # signatures of layers: a check would take a tenth of a short call


def _check(layer: Layer, backend: str) -> None:
    """Raise ValueError unless the tensors make one layer, or a stack, that the backend runs. A damaged program may have
    any, since torch looks at no checksum when it loads one.
    """
    signature = layer.cell, backend, *[a if a is None else (a.shape, a.dtype, a.device) for a in layer.tensors]
    if signature in _checked:
        return
    check_layer(layer._replace(stacked=bool(stack_size_of(layer))))
    if not dispatch.traits(backend).heads and (heads := heads_of(layer)) > 1:
        raise ValueError(f"weight_hh must have the columns of one head for the {backend} backend, got {heads} heads")
    if len(_checked) >= 4096:
        _checked.clear()
    _checked.add(signature)


def _run(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
    *tensors, reverse, save, backend = args
    layer = Layer.of(cell, tensors, reverse)
    check_memory(layer)
    run: Run = dispatch.module(backend).forward(layer, save)
    return run.h, *run.last, *(run.saved or [layer.x.new_empty(0) for _ in cell.states])


def check_memory(layer: Layer) -> None:
    """Raise ValueError if the storage of a layer's tensor was resized to nothing."""
    if all(a is None or a.data_ptr() for a in (*layer.tensors, *layer.scales)):
        return
    cell = layer.cell
    weights = (
        "weight_ih",
        "weight_hh",
        "bias_ih",
        "bias_hh",
        *cell.params,
        *(f"weight_{name}" for name in cell.products),
    )
    names = "x", *weights, *(f"{name}_0" for name in cell.states), *cell.inputs, "lengths", "reset"
    scales = zip(("weight_ih_scale", "weight_hh_scale"), layer.scales)
    for name, a in (*zip(names, layer.tensors), *scales):
        if a is not None and not has_memory(a):
            raise ValueError(f"{name} must have memory for its {a.numel()} numbers, got a storage of 0 bytes")


def tensors_of(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def _gradients(cell: Cell, *args: Any) -> tuple[Optional, ...]:
    *tensors, reverse, needs, backend = args
    grads, layer, run = unflatten(cell, reverse, tensors)
    check_memory(layer)
    gradients: Gradients = dispatch.module(backend).backward(grads, layer, run, Gradients.of(cell, needs))
    return gradients.flat


def unflatten(cell: Cell, reverse: bool, tensors: Any) -> tuple[Run, Layer, Run]:
    """Return the gradients of a run, the layer, and the run, from the tensors of `backward`'s arguments."""
    states, first = len(cell.states), 2 * len(cell.states)
    last = first + count_tensors(cell)
    run = Run(tensors[last], (None,) * states, tuple(tensors[last + 1 :]))
    return Run.of(states, tensors[:first]), Layer.of(cell, tensors[first:last], reverse), run


# Dispatch keys of an ordinary tensor outside any mode. Any mode, transform, tensor subclass or lazy view adds a key.
_PLAIN_KEYS = {
    "CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"
}  # fmt: skip


@cache
def _is_plain_key_set(text: str) -> bool:
    """Return whether all keys are plain, in a text such as ``DispatchKeySet(CPU, AutogradCPU)``."""
    keys = re.fullmatch(r"DispatchKeySet\((.*)\)", text)
    return keys is not None and _PLAIN_KEYS.issuperset(keys[1].split(", "))


def any_tangent(*arguments: Any) -> bool:
    """Return whether one of the arguments has an active tangent. Within a Function's forward no tangent is active."""
    return dual_level() and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None for a in arguments
    )


class _Taking(torch.library.Library):
    """Is passed to torch as `lib`, and takes the kernel that torch would register."""

    kernel: Callable[..., Any]

    def __init__(self) -> None:  # super().__init__ would make a second library
        pass

    def impl(self, op_name: Any, fn: Any, *args: Any, **options: Any) -> None:
        self.kernel = fn


def differentiate(
    name: str, function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Register a derivative as `torch.library.register_autograd` does, but tangents raise; a call that nobody
    differentiates goes straight to `function`, the kernel that the operator of this name calls; and torch makes its
    autograd kernel at the first call that needs it: for all cells that takes half as long as `import fastlstm`.
    """

    @cache
    def by_torch() -> Callable[..., Any]:
        taking: Any = _Taking()
        torch.library.register_autograd(f"fastlstm::{name}", backward, setup_context=setup_context, lib=taking)
        return cast(Callable[..., Any], taking.kernel)

    def run(keyset: Any, *arguments: Any) -> Any:
        if any_tangent(*arguments):  # torch would silently drop it
            raise NotImplementedError(
                f"fastlstm::{name} has no forward mode, since torch lets no operator define one: differentiate the "
                "module itself, or compile the function that does so"
            )
        if torch.is_grad_enabled() or not _is_plain_key_set(repr(keyset)):
            return by_torch()(keyset, *arguments)
        return function(*arguments)

    LIBRARIES[name].impl(name, outside_graphs(run), "Autograd", with_keyset=True)


def _is_direct(*tensors: Optional) -> bool:
    """Return whether a kernel may be called past the dispatcher, which records gradients and raises for tangents."""
    return not wants_gradient(*tensors) and is_plain(*tensors) and not any_tangent(*tensors)


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Return ``h`` (T, B, H), the last states (B, H), and, empty unless wanted, the other states (T, B, H) of all steps
    and the backend's gates. `args`: the tensors of a `Layer`, reverse, the cell, whether the other states and gates are
    wanted, and the backend's name.
    """
    *tensors, reverse, cell, save, backend = args
    if _is_direct(*tensors):
        return _run(cell, *tensors, reverse, save, backend)
    x, *others = tensors
    return cast(tuple[Tensor, ...], by_cell[cell].forward(flat_input(x), *others, reverse, save, backend))


def backward(*args: Any) -> tuple[Optional, ...]:
    """Return the gradients of x, the weights, the states and the inputs, None if not wanted.

    `args`: the gradients of h, of the last states, and of the other states of all steps, or Nones; the tensors of the
    `Layer`; h, the other states and gates of its run; reverse; the cell; booleans that say which gradients are wanted;
    and the backend's name.
    """
    *tensors, reverse, cell, needs, backend = args
    if _is_direct(*tensors):
        return _gradients(cell, *tensors, reverse, needs, backend)
    first = 2 * len(cell.states)
    tensors[first] = flat_input(tensors[first])
    gradients = by_cell[cell].backward(*tensors, reverse, needs, backend)
    return (*(g if need else None for g, need in zip(gradients, needs)),)
