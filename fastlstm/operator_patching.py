"""Torch's recurrent operators run our kernels, for callers that no module of Python stands for."""

from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlstm.autograd.modes import autocast_of, is_untransformed
from fastlstm.backends import aten
from fastlstm.forks import waited_for
from fastlstm.layers.elman import Elman
from fastlstm.layers.gru import GRU
from fastlstm.layers.lstm import LSTM
from fastlstm.layers.packing import pack, unpack
from fastlstm.torch_private import DEVICE_KEYS, forget_kernels

_CLASSES: dict[str, tuple[Any, dict[str, str]]] = {
    "lstm": (LSTM, {}),
    "gru": (GRU, {}),
    "rnn_tanh": (Elman, {}),
    "rnn_relu": (Elman, {"nonlinearity": "relu"}),
}
_GATES = {"lstm": 4, "gru": 3}
# The second serves inference mode, which passes by autograd. A kernel for the key CPU would do, but compilers take an
# operator that has one for a piece of the machine, and do not decompose it.
_KEYS = "AutogradCPU", "BackendSelect"
_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16

_lock = waited_for(RLock())
_active: list["patch_operators"] = []
_library: torch.library.Library | None = None  # holds the kernels while a patch is active
_operators = [getattr(getattr(torch.ops.aten, name), form) for name in _CLASSES for form in ("input", "data")]


class patch_operators:
    """From this call on, torch's recurrent operators run fastlstm's kernels on the CPU, whoever calls them.

    It is for what `fastlstm.replace` and `fastlstm.patch` do not reach: scripted, traced, loaded and frozen modules,
    programs of `torch.export`, C++, and libraries that ask whether a module is a `torch.nn.LSTM`. The operators are
    ``aten::lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu``, for sequences and for packed sequences. Torch's modules stay
    what they are. Their results, gradients and dtypes are those of torch but for rounding, and all runs give the same
    bits. Single-cell operators, such as ``aten::lstm_cell``, stay torch's, since they would take longer.

    As a context manager, ``with fastlstm.patch_operators():``, it ends with the context. Otherwise it lasts until
    `unpatch_operators`. Patches nest, and hold for all threads. No other thread may run such an operator while a patch
    begins or ends.

    Torch's own code still runs:

    * operators on other devices, on sparse, nested and other special tensors and subclasses of Tensor, and on float8;
    * LSTMs with a projection under autocast, calls without time steps, batch rows or features, and calls whose sizes or
      dtypes differ from what torch's module would pass;
    * calls under transforms of torch.func, forward mode, and modes that see every operator, such as the counter of
      floating-point operations;
    * what compilers and exporters make of an operator, and what `torch.ao.quantization` makes of a module;
    * fastlstm's own backend `aten`.

    A short call takes longer than after `fastlstm.replace`, which spares it the way through torch's module and
    dispatcher. `fastlstm.use_backend` holds for the operators too.
    """

    def __init__(self) -> None:
        self.__enter__()

    def __enter__(self) -> "patch_operators":
        global _library
        with _lock:
            if self not in _active:
                _active.append(self)
            if _library is None:
                _library = torch.library.Library("aten", "IMPL")
                for operator in _operators:
                    kernel = _Kernel(operator)
                    for key in _KEYS[: 1 if DEVICE_KEYS is None else 2]:
                        _library.impl(operator, kernel.run, key, with_keyset=True)
        return self

    def __exit__(self, *exception: object) -> None:
        global _library
        with _lock:
            if self in _active:  # `unpatch_operators` may have ended it
                _active.remove(self)
            if not _active:
                _library = None  # whose finalizer gives the operators back
                forget_kernels(_operators)


def unpatch_operators() -> None:
    """End every `patch_operators` of the process."""
    with _lock:
        for each in _active[:]:
            each.__exit__()


class _Kernel:
    """What runs one operator: modules of ours, which compute with the weights of each call in place of their own."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.name, form = operator.__name__.split(".")
        self.is_packed = form == "data"
        self.make, self.options = _CLASSES[self.name]
        self.modules: dict[int, tuple[ref[Tensor], dict[Any, Any]]] = {}  # by the id of the first weight
        self.shared: dict[Any, dict[Any, Any]] = {}  # by its shape: for weights that have not been met before

    def run(self, keys: Any, *arguments: Any) -> Any:
        """Run a call of the operator, whose arguments are those of its schema. The dispatcher gives its keys."""
        results = self.results(*arguments) if arguments[0].is_cpu else None
        if results is not None:
            return results
        if DEVICE_KEYS is None:
            return self.operator.decompose(*arguments)
        return self.operator.redispatch(keys & DEVICE_KEYS, *arguments)

    def results(self, x: Tensor, *arguments: Any) -> tuple[Tensor, ...] | None:
        """Return our kernels' results of a call, or None if it is for torch's own code."""
        hx, params, has_biases, layers, dropout, train, bidirectional, *batch_first = arguments[self.is_packed :]
        if aten.thread.runs_here or not params or not is_untransformed(x, *params):
            return None
        weights, is_lstm = params, self.name == "lstm"
        is_projected = is_lstm and len(params) == layers * (1 + bidirectional) * (3 + 2 * has_biases)
        if is_projected and autocast_of(x) is not None:  # torch's outputs then have another dtype than ours
            return None
        if not has_biases:
            steps = range(0, len(params), 2 + is_projected)
            weights = [
                a for k in steps for a in (*params[k : k + 2], None, None, *params[k + 2 : k + 2 + is_projected])
            ]
        modules, caches_tensors = self.modules_of(params[0])
        options = has_biases, layers, dropout, train, bidirectional, is_projected
        module = modules.get(options)
        is_transposed = batch_first == [True]  # which packed sequences lack
        given = x.transpose(0, 1) if is_transposed else x  # (T,B,I), or packed (N,I)
        results = (
            None if module is None or self.is_packed else module._planned(given, tuple(hx) if is_lstm else hx, weights)
        )
        if results is None:
            states, batch_sizes = tuple(hx) if is_lstm else (hx,), arguments[0] if self.is_packed else None
            if not self.takes(given, batch_sizes, states, params, *options):
                return None
            if module is None:
                module = modules[options] = self.module_for(x, params, caches_tensors, *options)
            lengths = rows = None
            if batch_sizes is not None:
                given, lengths, rows = unpack(given, batch_sizes, True)
            output, last, _ = module._run(given, states, (lengths, None), rows, False, weights)
            results = output if batch_sizes is None else pack(output, rows), last if is_lstm else last[0]
        output, last = results
        output = output.transpose(0, 1) if is_transposed else output
        flat = (output, *last) if is_lstm else (output, last)
        dtype = self.autocast_type(x, hx)
        return flat if dtype is None else tuple([a.to(dtype) for a in flat])

    def modules_of(self, weight: Tensor) -> tuple[dict[Any, Any], bool]:
        """Return the modules of a call with this first weight, and whether they keep packed copies of any tensors. What
        is no Parameter is new in each call, or a scripted module's: it has modules of its own from its second call on.
        """
        key = id(weight)
        entry = self.modules.get(key)
        if entry is not None and entry[0]() is weight:
            return entry[1], True
        modules: dict[Any, Any] = {}
        self.modules[key] = ref(weight, lambda _: self.modules.pop(key, None)), modules
        return (modules, True) if type(weight) is Parameter else (self.shared.setdefault(weight.shape, {}), False)

    def module_for(self, x: Tensor, params: list[Tensor], caches_tensors: bool, *options: Any) -> Any:
        """Return a module for calls of these options, whose own parameters have no memory."""
        has_biases, layers, dropout, train, bidirectional, is_projected = options
        rows, state_size = params[1].shape
        sizes = x.shape[-1], rows // _GATES.get(self.name, 1), layers
        more = {**self.options, "proj_size": state_size} if is_projected else self.options
        module = self.make(*sizes, bias=has_biases, bidirectional=bidirectional, device="meta", **more)
        module.dropout, module.training, module._caches_tensors = dropout, train, caches_tensors
        return module

    def takes(
        self, x: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], params: list[Tensor], *options: Any
    ) -> bool:
        """Return whether our kernels run a call: one of plain tensors that torch's module could have made."""
        has_biases, layers, _, _, bidirectional, is_projected = options
        if len(states) != 1 + (self.name == "lstm") or not all(a.dim() for a in (*states, *params)):
            return False
        if not is_untransformed(x, *states, *params) or x.dim() != (3 if batch_sizes is None else 2) or 0 in x.shape:
            return False
        if x.dtype not in _DTYPES or (autocast_of(x) is None and any(a.dtype != x.dtype for a in (*states, *params))):
            return False
        B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        directions, rows, P, H = 1 + bidirectional, params[0].shape[0], states[0].shape[-1], states[-1].shape[-1]
        sizes: list[Any] = []
        for k in range(layers * directions):
            sizes += [(rows, x.shape[-1] if k < directions else directions * P), (rows, P), *[(rows,)] * 2 * has_biases]
            sizes += [(P, H)] * is_projected
        sizes += [(layers * directions, B, size) for size in (P, H)[: len(states)]]
        if not (0 < P < H if is_projected else P == H):
            return False
        return rows == _GATES.get(self.name, 1) * H > 0 and [a.shape for a in (*params, *states)] == sizes

    def autocast_type(self, x: Tensor, hx: Any) -> torch.dtype | None:
        """Return the dtype of torch's results under autocast where ours differ, else None. Torch's products are of 16
        bits, a state that follows from another has that one's dtype, and LSTMs in oneDNN are of 16 bits throughout.
        """
        cast_type = autocast_of(x)
        if cast_type is None or self.make is Elman:
            return None
        if self.name == "lstm":
            one_dnn: Any = torch.backends.mkldnn
            if not self.is_packed and one_dnn.is_available() and one_dnn.enabled:
                return None
            hx = hx[0]
        return torch.promote_types(cast_type, hx.dtype)
