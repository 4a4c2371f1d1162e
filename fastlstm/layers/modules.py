"""What all modules have in common: a cell, the form of its states, and the plans that are kept."""

import warnings
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fastlstm.autograd.modes import is_plain
from fastlstm.backends import dispatch, settings
from fastlstm.backends.base import Layer
from fastlstm.cells.spec import Cell
from fastlstm.layers.streams import Stream, may_prepare
from fastlstm.plan_cache import Plans


class Words(NamedTuple):
    """What a module's messages say: its `name`; `dims`, for an input of a wrong number of dimensions, which has a place
    in it; `argument`, the name of the argument for the states; `states`, where their dimensions are wrong; and
    `number`, for a wrong number of them, or None for a message that says what they are.
    """

    name: str
    dims: str
    argument: str = "hx"
    states: str = "hx"
    number: str | None = None


_ROOMS = "fastlstm.layers.", "fastlstm.int8."  # the folders of all modules that users have


class CellModule:
    """A module that runs a cell, and keeps `Plans` for each of its layers and directions. The first call makes them."""

    backend: settings.Backend | None = None
    _has_bare_state = False  # whether users hold the only state as a tensor, and not as a tuple
    _caches_tensors = False  # whether packed copies are kept of weights that are no Parameters
    _is_stacked = False  # whether the parameters are of several modules, see fastlstm.layers.ensemble
    _words: Words
    _plans: dict[Any, Plans] | None = None  # there is none before the first call

    @property
    def _cell(self) -> Cell:
        """The cell: a property, since the strict exporter of torch 2.9 takes no attributes of its type."""
        raise NotImplementedError

    def _states_of(self, cell: Cell, hx: Any) -> tuple[Any, ...] | None:
        """Return `hx` as a tuple of states, or of Nones; None if it has not their form, of which little is checked."""
        if self._has_bare_state:
            return (hx,) if hx is None or isinstance(hx, Tensor) else None
        if hx is None:
            return (None,) * len(cell.states)
        return hx if type(hx) is tuple and len(hx) == len(cell.states) and hx[0] is not None else None

    def _example(self, weights: list[Any]) -> Any:
        """Return a tensor with the dtype and device that inputs must have."""
        return weights[0]

    def stream(self, batch_size: int = 1) -> Stream:
        """Return a `fastlstm.Stream`: a copy of this module that runs one time step a call, on states of its own.

        The weights are packed now, and later changes do not reach the stream. It computes what a step of this module
        computes in eval mode, without gradients and without hooks.

        Args:
            batch_size: B, the rows of each step.

        Raises:
            ValueError: for a `batch_size` that is no int of at least 1, and for a bidirectional module.
            RuntimeError: from a backend asked for by name that cannot run.
        """
        return Stream(self, batch_size)

    def _steps_of(self, layer: Layer, packed_weights: dict[Any, Any]) -> Any:
        """Return what runs single steps of a layer for a stream, which keeps `packed_weights`, or None."""
        x, cell = layer.x, layer.cell
        zoneout = getattr(self, "zoneout", 0)
        if zoneout not in (0, (0, 0)) or cell.inputs or not may_prepare(self):
            return None
        name = dispatch.choose(
            self.backend, x.device, x.dtype, cell=cell, masked=False, inner_states=False,
            layer=layer.squeezed(False),
        )  # fmt: skip
        if not dispatch.traits(name).prepares_steps or x.dtype not in (torch.float32, torch.float64):
            return None
        return dispatch.module(name).steps(layer, packed_weights) if is_plain(*layer.weights) else None

    def _plans_of(self, key: Any = 0) -> Plans | None:
        """Return the plans of this key, or None under a compiler or tracer. The key 0 is that of a module which does
        nothing but run its cell, all in one call. Then a call that has a plan needs nothing else. Each part that runs
        alone, and each of its cells, has another.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a later call of a trace must record the same
            return None
        plans: dict[Any, Plans] = vars(self).setdefault("_plans", {})
        return plans.get(key) or plans.setdefault(key, Plans(caches_tensors=self._caches_tensors))

    def __getstate__(self) -> dict[str, Any]:
        of_torch = getattr(super(), "__getstate__", None)  # RNNBase has one; objects of Python 3.10 have none
        state = dict(vars(self) if of_torch is None else of_torch())
        state.pop("_plans", None)  # pickles must not refer to Plans
        return state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_plans", None)  # packed copies would stay behind on the old device
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def release_memory(self) -> None:
        """Give back the memory of plans and packed copies of the weights, which later calls make again. Nobody needs to
        call it when weights change, since a call that uses a packed copy compares it with the weights.
        """
        vars(self).pop("_plans", None)

    def _get_name(self) -> str:
        """Return what `repr` calls the module: ``fastlstm.LSTM`` for torch's LSTM, a user's class by its own name."""
        cls: Any = type(self)
        declared = cls.__bases__[0] if parametrize.is_parametrized(self) else cls  # type: ignore[arg-type]
        if not declared.__module__.startswith(("torch.", "fastlstm.")):  # the first is kept by `keep_type`
            return str(cls.__name__)
        return "fastlstm." + next(each.__name__ for each in cls.__mro__ if each.__module__.startswith(_ROOMS))

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        return text if self.backend is None else f"{text}, backend={self.backend}"

    def _set_backend(self, backend: settings.Backend | None) -> None:
        if backend is not None:
            settings.check_name(backend)
            self.backend = backend


def with_class(module: Any, expected: type, cls: Any) -> Any:
    """Return a shallow copy of `module` as an instance of `cls`: the same tensors, its own dictionaries."""
    if type(module) is not expected:
        raise TypeError(f"module must be a {expected.__module__}.{expected.__name__}, got {type(module).__name__}")
    new = cls.__new__(cls)
    new.__dict__.update({k: copy(v) if isinstance(v, dict | list | set) else v for k, v in vars(module).items()})
    return new


# attributes that torch's modules lack
OWN = "backend", "forget_bias", "_recompute", "_regularizers", "_plans"


def warn_of_regularizers(module: Any, stacklevel: int) -> None:
    """Give a UserWarning where torch's module would not compute what `module` computes."""
    if getattr(module, "_regularizers", None) is not None:
        name = type(module).__name__
        text = f"the {name} forgets recurrent_dropout={module.recurrent_dropout} and zoneout={module.zoneout}"
        warnings.warn(text, stacklevel=stacklevel + 1)
