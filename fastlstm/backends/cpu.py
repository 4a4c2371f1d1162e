"""What the CPU backends share: how many threads a call may use and whose, addresses, and weights that stay packed."""

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.memory import converted, unpooled
from fastlstm.torch_private import version

# Bytes of weights above which they and their packed form do not both stay in a second-level cache. One step without
# gradients then packs each panel as it comes to it: that reads the weights once, where to look at all of them and then
# at the packed ones reads as much twice, and takes 0.7 of the time at 512 units.
LARGE = 1 << 20
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the parent's threads do not exist here, and libgomp would wait for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_now() -> int:
    """Threads a call may use: torch's number, or one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


@cache
def openmp() -> Any:
    """The function GOMP_parallel and the addresses of omp_get_thread_num and omp_get_num_threads, of the libgomp that
    torch itself loaded, or None. One pool of threads for both: two pools would fight for the cores.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        return library.GOMP_parallel, address_of(library.omp_get_thread_num), address_of(library.omp_get_num_threads)
    except (OSError, AttributeError):
        return None


def address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def rows_contiguous(a: Tensor) -> Tensor:
    """`a` with a row's elements side by side. One number for all, as the gradient of a sum is, becomes one row."""
    strides = a.stride()
    if strides[-1] == 1 or a.shape[-1] == 1:
        return a
    if strides[-1] != 0 or a.numel() < 1 << 16:  # these calls take longer than to write so many
        return a.contiguous()
    sizes = [1 if stride == 0 else size for size, stride in zip(a.shape, strides)]
    return a.as_strided(sizes, strides).expand(*sizes[:-1], a.shape[-1]).contiguous().expand(a.shape)


class PackedWeights:
    """The weights of one layer that a backend keeps packed.

    A change that PyTorch counts is seen by `is_of`. One that it does not count, made through ``.data``, numpy or a
    fused optimizer, is seen by the kernel, which looks at all weights in every call. Weights that no product of a call
    has, as weight_hh for one step from zeros, need not be looked at.
    Python threads may share it: nothing writes to what a kernel reads.
    """

    backend: str  # whose they are, the name under which they were packed
    asked: Any = None  # what they were last found to answer, see `fastlstm.dispatch.asked`
    stale = False  # whether they were found to differ from the weights
    watches_originals = False  # whether its kernel looks at the weights that those it packed are copies of
    side_by_side = False  # whether `forward` leaves its output where it is told
    takes_bfloat16 = False  # whether `forward` takes x, and leaves h, of bfloat16 beside float32 states
    steps_back = False  # whether `step` can save for a backward pass, and `step_backward` is one

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        """`weights`: weight_ih (4H, I), weight_hh (4H, H), and bias_ih and bias_hh (4H,) or None, all contiguous."""
        self.keys = [None if a is None else (a, a.data_ptr(), version(a), a.shape) for a in weights]
        self.weight_ih, self.weight_hh, *self.biases = (a.detach() for a in weights if a is not None)
        # the detached hold on to the memory, whatever becomes of the parameters
        self.dtype, self.I, self.H = self.weight_ih.dtype, self.weight_ih.shape[1], self.weight_hh.shape[1]
        self.takes = self.dtype  # what inputs are of, or are cast to

    def is_of(self, weights: Sequence[Tensor | None]) -> bool:
        """True while these are the tensors that were packed, in the same memory and unchanged as far as is counted."""
        if self.stale:
            return False
        for a, key in zip(weights, self.keys):
            if a is None or key is None:
                if a is not None or key is not None:
                    return False
            elif (
                key[0] is not a
                or key[1] != a.data_ptr()
                or key[2] != version(a)
                or key[3] != a.shape
                or not a.is_contiguous()
                or a.dtype is not self.dtype
            ):
                return False
        return True

    def is_as_saved(self, weight_ih: Tensor, weight_hh: Tensor) -> bool:
        """True where what autograd saved are the weights themselves, unchanged as far as is counted."""
        for a, key in zip((weight_ih, weight_hh), self.keys):
            if key is None or key[2] is None or version(key[0]) != key[2] or a.data_ptr() != key[1]:
                return False
        return True

    @property
    def inner(self) -> "PackedWeights":
        """The packed weights that a step of training is computed with, which may be copies of these."""
        return self

    def forward(
        self,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        reverse: bool,
        *,
        mask: Tensor | None = None,
        hides: bool = False,
        out: Tensor | None = None,
        layer_axis: bool = False,
    ) -> tuple[Tensor, ...] | None:
        """``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H) from ``x`` (T, B, I) and states (B, H), or None for zeros.
        `hides`: ``h`` of held steps is zero. `out`: where to leave ``h``, rows of any stride, if `side_by_side`.
        `layer_axis`: ``h_n`` and ``c_n`` are (1, B, H).

        None when the weights are found to have changed: they have to be packed again.
        """
        raise NotImplementedError

    def step(self, x: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, ...] | None:
        """``h`` and ``c`` (B, H) from ``x`` (B, I) and states (B, H), or None as from `forward`."""
        result = self.forward(x.unsqueeze(0), (h_0, c_0), False)
        return None if result is None else (result[1], result[2])


def snapshot_of(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of weights that nobody writes to. What is packed and what later calls compare with are made of the same
    snapshot, so that it does not matter what other threads write to the weights meanwhile.
    """
    return [None if a is None else a.detach().clone() for a in weights]


def _bits(weights: Sequence[Tensor | None]) -> list[Tensor]:
    """The weights as integers, of which a NaN equals itself."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [a.view(integers[a.itemsize]) for a in weights if a is not None]


class PackedCopies(PackedWeights):
    """Packed weights of copies, in another type, of a layer's weights. A backend whose kernel sees no more than the
    copies leaves it to PyTorch to look at the weights themselves: every call compares all their bits with those kept.
    """

    packed: Any
    bits: list[Tensor] | None = None  # of the weights, where this class has to look at them

    def _unchanged(self) -> bool:
        if self.bits is not None:
            seen = _bits((self.weight_ih, self.weight_hh, *self.biases))
            self.stale = self.stale or not all(map(torch.equal, seen, self.bits))
        return not self.stale


class WidenedWeights(PackedCopies):
    """16-bit weights, packed as float32 by a backend that computes in it, or as they are by one that takes these."""

    side_by_side = True

    def __init__(
        self,
        weights: Sequence[Tensor | None],
        pack: Callable[..., Any],
        takes_bfloat16: bool,
        originals: Sequence[Tensor | None] = (),
        snapshot: Sequence[Tensor | None] = (),
    ) -> None:
        """`weights` as for `PackedWeights`; `pack`: the backend's, for float32 weights, or for these where it takes
        bfloat16. `originals`: the layer's weights, if `weights` are copies of a `snapshot` of them.
        """
        super().__init__(weights)
        narrow = weights if originals else snapshot_of(weights)
        taken = takes_bfloat16 and self.dtype == torch.bfloat16
        copies = narrow if taken else [a if a is None else a.float() for a in narrow]
        self.packed = pack(copies, originals or weights, snapshot or narrow)
        self.watches_originals = self.packed.watches_originals
        if not (originals or self.watches_originals):
            self.bits = _bits(narrow)

    @property
    def inner(self) -> Any:
        return self.packed

    def _narrowed(self, results: tuple[Tensor, ...] | None) -> Any:
        if results is None:
            self.stale = True
            return None
        return (*(converted(a, self.dtype, unpooled) for a in results),)

    def forward(
        self,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        reverse: bool,
        *,
        mask: Tensor | None = None,
        hides: bool = False,
        out: Tensor | None = None,
        layer_axis: bool = False,
    ) -> tuple[Tensor, ...] | None:
        if not self._unchanged():
            return None
        hx = None if hx is None else (hx[0].float(), hx[1].float())
        options: Any = {"mask": mask, "hides": hides, "layer_axis": layer_axis}
        if self.packed.takes_bfloat16:
            results = self.packed.forward(x, hx, reverse, out=out, **options)
            return self._narrowed(None) if results is None else (results[0], *self._narrowed(results[1:]))
        results = self.packed.forward(converted(x, torch.float32), hx, reverse, **options)
        if out is None or results is None:
            return self._narrowed(results)
        return out.copy_(results[0]), *self._narrowed(results[1:])

    def step(self, x: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.watches_originals:  # then it takes them as they are
            result: tuple[Tensor, Tensor] | None = self.packed.step(x, h_0, c_0)
            self.stale = self.stale or result is None  # another thread's finding stays
            return result
        if not self._unchanged():
            return None
        return self._narrowed(self.packed.step(x.float(), h_0.float(), c_0.float()))


class CastWeights(PackedCopies):
    """Weights as autocast casts them `to` 16 bits, which inputs and states are cast to as well."""

    def __init__(self, weights: Sequence[Tensor | None], to: torch.dtype, pack: Callable[..., Any]) -> None:
        """`weights` as for `PackedWeights`; `pack` gives a `WidenedWeights` of copies of 16 bits, of these weights, and
        of the snapshot of them that the copies are made of.
        """
        super().__init__(weights)
        self.takes, snapshot = to, snapshot_of(weights)
        self.packed = pack([a if a is None else a.to(to) for a in snapshot], weights, snapshot)
        self.watches_originals = self.packed.watches_originals
        if not self.watches_originals:
            self.bits = _bits(snapshot)

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, reverse: bool, **options: Any
    ) -> tuple[Tensor, ...] | None:
        if not self._unchanged():
            return None
        hx = None if hx is None else (hx[0].to(self.takes), hx[1].to(self.takes))
        result: tuple[Tensor, ...] | None
        result = self.packed.forward(x.to(self.takes), hx, reverse, **options)
        self.stale = self.stale or result is None  # parameters of 16 bits are their own copies
        return result
