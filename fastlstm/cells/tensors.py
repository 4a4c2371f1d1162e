"""Derived functions that run on torch tensors."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastlstm.cells import on_tensors
from fastlstm.cells.derive import Derived
from fastlstm.cells.emit import load, python
from fastlstm.cells.function import Function
from fastlstm.cells.on_tensors import ON_TENSORS

Named = Mapping[str, Tensor]


class Code:
    """A derived function on tensors, with arguments and results by name. Autograd differentiates it. A result that does
    not depend on anything is a number.
    """

    def __init__(self, function: Function) -> None:
        self.takes, self.gives = tuple(function.arguments), tuple(function.results)
        self._run: Callable[..., Any] = load(python(function), function.name, ON_TENSORS, on_tensors.__name__)

    def __call__(self, given: Named) -> dict[str, Any]:
        return dict(zip(self.gives, self._run(*[given[name] for name in self.takes])))


class OnTensors:
    """All functions of a `Derived`, by the same names."""

    def __init__(self, derived: Derived) -> None:
        self.forward, self.backward = Code(derived.forward), Code(derived.backward)
        self.tangent, self.curvature = Code(derived.tangent), Code(derived.curvature)
        self.jacobian = Code(derived.jacobian)
