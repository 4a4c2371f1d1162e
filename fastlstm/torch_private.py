"""Every private name of torch that the package uses, and a public way for each, as a release of torch may rename any.

Each name is looked up once, when the package is imported, or is missing with ``FASTLSTM_PUBLIC_TORCH=1`` in the
environment. The public way gives the same results and takes longer. Times in this file are of one call, with the
private name and without it, on an Intel Xeon with AVX-512.
"""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

F = TypeVar("F", bound=Callable[..., Any])
PUBLIC = os.environ.get("FASTLSTM_PUBLIC_TORCH", "0") not in ("", "0")
NAMES: dict[str, bool] = {}  # every private name that was looked up, and whether torch has it


def _name(path: str) -> Any:
    """Return the value of a private name of torch, or None if torch lacks it."""
    try:
        value = None if PUBLIC else attrgetter(path)(torch)
    except AttributeError:
        value = None
    NAMES[path] = value is not None
    return value


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls functions right after a module has been imported for the first time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: list[Callable[[], object]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                for callback in self.waiting:
                    callback()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def _hook() -> _WhenImported | None:
    """Return a finder that waits for the import of Dynamo, torch's tracer. None if it is there, or has another name."""
    name = "torch._dynamo"
    NAMES["_dynamo"] = not PUBLIC and (name in sys.modules or importlib.util.find_spec(name) is not None)
    if not NAMES["_dynamo"] or name in sys.modules:
        return None
    hook = _WhenImported(name)
    sys.meta_path.insert(0, hook)
    return hook


_dynamo_import = _hook()


def when_compiling(callback: Callable[[], object]) -> None:
    """Call a function once somebody compiles, before anything is traced: when Dynamo is imported, or at once if it has
    another name. To mark a function by `torch.compiler` would import it, which takes long.
    """
    if _dynamo_import is None or _dynamo_import not in sys.meta_path:
        callback()
    else:
        _dynamo_import.waiting.append(callback)


def allow_in_graph(function: F) -> F:
    """Do what `torch.compiler.allow_in_graph` does, once somebody compiles."""
    when_compiling(lambda: torch.compiler.allow_in_graph(function))
    return function


def constant(function: F) -> F:
    """Do what `torch.compiler.assume_constant_result` does, once somebody compiles."""
    when_compiling(lambda: torch.compiler.assume_constant_result(function))
    return function


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `torch.compiler.disable` does. The private name imports Dynamo at the function's first call only."""
    return (_disable or torch.compiler.disable)(function)


_disable = _name("_disable_dynamo")


def _activity_reader() -> Callable[[], int]:
    """Return a function that returns the number of the first active dispatch key of those for which `fastlstm::active`
    has a kernel: 2 within a transform of torch.func, otherwise 1 within a trace or a mode that sees every operator,
    otherwise 0. If a key has another name, it always returns 3, which counts as both.
    """
    if not hasattr(torch.ops.fastlstm, "active"):  # a module may be loaded again
        library = torch.library.Library("fastlstm", "FRAGMENT")
        _libraries.append(library)
        library.define("active() -> int")
        try:
            library.impl("active", lambda: 2, "FuncTorchDynamicLayerFrontMode")
            library.impl("active", lambda: 1, "PythonTLSSnapshot")
            library.impl("active", lambda: 1, "Tracer")
            library.impl("active", lambda: 0, "CompositeExplicitAutograd")
        except RuntimeError:
            return lambda: 3
    return torch.ops.fastlstm.active.default


_libraries: list[torch.library.Library] = []
# Whether a transform of torch.func is active, in 0.04 us instead of 0.7.
transformed: Any = _name("_C._are_functorch_transforms_active")
# How many modes are active that see every operator, such as the mode of fake tensors, in 0.05 us instead of 0.8. The
# public way tells only whether there is any.
dispatch_mode_count: Any = _name("_C._len_torch_dispatch_stack")

if transformed is None or dispatch_mode_count is None:
    _active = _activity_reader()

if transformed is None:

    def transformed() -> bool:
        return torch.compiler.is_dynamo_compiling() or _active() >= 2


if dispatch_mode_count is None:

    def dispatch_mode_count() -> bool:
        return torch.compiler.is_compiling() or _active() > 0


_guards: Any = _name("_C._dynamo.guards.TensorGuards")


def recognizer(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Return a function of as many tensors, which returns whether they have the types, dtypes, devices, shapes and
    strides of these, and require gradients as they do. Four take 0.3 us, not 3 us. The public way recognizes none.
    """
    if _guards is None:
        return lambda *_: False
    sizes, strides = [[*a.shape] for a in tensors], [[*a.stride()] for a in tensors]
    return cast(Any, _guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check)


_counts_levels = _name("autograd.forward_ad._current_level") is not None
_opened_by_graph = False


def dual_level() -> bool:
    """Return whether a level of dual numbers is open, by torch.func or by torch.autograd. The private count takes 0.05
    us. Without it, `unpack_dual(None)` raises TypeError where a level is open, in 0.3 us.
    """
    if _counts_levels:
        return forward_ad._current_level >= 0 or _opened_by_graph
    try:
        forward_ad.unpack_dual(cast(Any, None))
    except TypeError:  # no other error is caught: a signal's handler, which may run here, may raise any
        return True
    return _opened_by_graph


@constant  # dynamo guards the level itself
def _dual_level_outside() -> bool:
    return dual_level()


def dual_level_in_graph() -> bool:
    """Return `dual_level`, in a function that Dynamo traces. Without the private count a level is assumed to be open,
    since nobody sees one that the graph opens, and a graph for inference then also computes saved values.
    """
    # `_dual_level_outside` comes before the count: it is a constant to Dynamo, which then guards no name for it. In the
    # count Dynamo sees the levels that the graph itself has opened so far.
    return not _counts_levels or _dual_level_outside() or forward_ad._current_level >= 0


@contextmanager
def opened_by_graph(dual: bool) -> Iterator[None]:
    """Make `dual_level` true inside the context if `dual` is true: a compiled graph opens levels without raising the
    private count. All threads share the flag, as they share a level.
    """
    global _opened_by_graph
    uncounted = dual and not dual_level()
    try:
        if uncounted:
            _opened_by_graph = True
        yield
    finally:
        if uncounted:
            _opened_by_graph = False


_plain_apply = _name("_C._FunctionBase.apply")


def plain_apply(function: type[Function]) -> Callable[..., Any]:
    """Return a faster ``function.apply`` for calls without a transform of torch.func: 3 us, not some 25. It skips
    checks for a transform, for tensors that one left behind, and for default arguments. The public way is `apply`.
    """
    if _plain_apply is not None:
        return super(Function, function).apply  # type: ignore[misc]
    public: Callable[..., Any] = vars(Function)["apply"].__get__(None, function)  # `function` may override it
    return public


# The kinds of transforms of torch.func, and a function that returns all that are active. Without them each may be one
# that differentiates.
Kind = _name("_C._functorch.TransformType")
all_levels = _name("_C._functorch.get_interpreter_stack")
KNOWS_LEVELS = None not in (Kind, all_levels)

# The number of the backward pass that this thread runs, whether it will run a node, and what sets a node's rank among
# those that are ready. Where one is missing, steps do not share the gradients of their weights, see
# `fastlstm.autograd.step_sums`.
current_pass: Any = _name("_C._current_graph_task_id")
will_run: Any = _name("_C._will_engine_execute_node")
set_rank: Any = _name("autograd.function.BackwardCFunction._set_sequence_nr")
if None in (will_run, set_rank):
    current_pass = None

_precision = _name("_C._get_fp32_precision_getter")


def _public_precision() -> str:
    backends: Any = torch.backends
    return cast(str, backends.mkldnn.rnn.fp32_precision)


# Returns `torch.backends.mkldnn.rnn.fp32_precision`, in 0.1 us instead of 0.7.
rnn_precision: Callable[[], str] = _public_precision if _precision is None else partial(_precision, "mkldnn", "rnn")


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.copy_(source)


# Copies each of many tensors, as `Tensor.copy_` does. For three of them it takes 1.3 us instead of 2.2.
copy_all: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = _name("_foreach_copy_") or _copy_each


def _content(a: Tensor) -> int:
    """Return a hash of the elements of a tensor."""
    return hash(a.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


# Returns a number that is another one after a tensor was written to. It counts the writes. The public way hashes the
# elements, in time that grows with their number.
version_of: Callable[[Tensor], int] = getattr(_name("Tensor._version"), "__get__", _content)


def _empty_on_cpu(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


# Makes a tensor on the CPU whose numbers are not set, in 0.4 us instead of 0.75: it goes past the dispatcher.
empty_on_cpu: Callable[..., Tensor] = _name("_C._dynamo.guards._empty_strided_cpu") or _empty_on_cpu

_keys = _name("_C.DispatchKey")
_keys_after = _name("_C._dispatch_keyset_full_after")
# Where the dispatcher goes on to from a kernel for autograd: kernels for devices, or Python's, which compilers
# ask for. None if torch lacks a name: the public way is the operator's form in Python.
DEVICE_KEYS: Any = None
if None not in (_keys, _keys_after):
    DEVICE_KEYS = _keys_after(_keys.BackendSelect)
    DEVICE_KEYS |= type(DEVICE_KEYS)(_keys.PythonDispatcher)

_keeps_kernels = _name("ops.aten.lstm.input._dispatch_cache") is not None


def forget_kernels(operators: Sequence[Any]) -> None:
    """Clear what tracers keep of these operators' kernels. Without the private name they keep it, to no effect."""
    for operator in operators if _keeps_kernels else ():
        operator._dispatch_cache.clear()


_overwriting = _name("_library.custom_ops.get_library_allowing_overwrite")


def library_of(operator: str) -> torch.library.Library:
    """Return a library that defines one operator, with the private name also where a notebook reloads a module."""
    return torch.library.Library("fastlstm", "FRAGMENT") if _overwriting is None else _overwriting("fastlstm", operator)
