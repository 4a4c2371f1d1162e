"""Weights packed once and kept between calls, with the arguments of a call made ready."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.cpu import LARGE, PackedWeights, address, rows_contiguous, snapshot_of, threads_now
from fastlstm.backends.memory import SMALL, pooled, unpooled
from fastlstm.backends.numba import host
from fastlstm.backends.numba.prepared import Call, Prepared, backward_call, prepare, template
from fastlstm.backends.numba.primitives import DIGEST_BYTES
from fastlstm.backends.numba.shared import CHUNK
from fastlstm.backends.numba.weights import digested_blocks
from fastlstm.torch_private import copy_all

SHAPES = 64  # of calls whose arguments a layer keeps


def _addresses(biases: Sequence[Tensor]) -> tuple[int, ...]:
    return *(bias.data_ptr() for bias in biases), *(0,) * (2 - len(biases))


class PackedLayer(PackedWeights):
    """See `PackedWeights`. It serves a step of training too: `forward` and `step` save what the backward pass needs,
    and `transpose` has that pass's own products ready.
    """

    side_by_side = steps_back = watches_originals = True

    def __init__(
        self,
        weights: Sequence[Tensor | None],
        pieces: int,
        originals: Sequence[Tensor | None] = (),
        snapshot: Sequence[Tensor | None] = (),
        unit: bool = True,
    ) -> None:
        """`pieces`: of a number, for the matrix unit; with 0 only products that `host.input_pieces` names take it, and
        none without `unit`. `originals`: the layer's weights, if `weights` are copies of a `snapshot` of them; then
        changes of these are looked for. With one piece `weights` may be of bfloat16, and then `forward` takes x of it.
        """
        super().__init__(weights)
        self.takes_bfloat16, self.copies = self.dtype == torch.bfloat16, len(originals) > 0
        if self.takes_bfloat16:
            self.dtype, self.biases = torch.float32, [bias.float() for bias in self.biases]
        self.originals: Any = originals or weights
        self.weights, self.pieces = weights, pieces
        if not self.copies:
            snapshot = snapshot_of(weights)
        self.lanes = host.lanes_of(self.dtype)
        self.panels = host.panels_of(self.H, self.lanes)
        self.of_x = host.input_pieces(self.I, self.H, self.dtype, pieces, unit)
        plain = not (self.copies or self.pieces or self.of_x)
        self.large = plain and 4 * self.H * (self.I + self.H) * self.dtype.itemsize > LARGE
        if not self._pack_forward(snapshot):  # a weight that the matrix unit cannot take
            self.pieces = self.of_x = 0
            self._pack_forward(snapshot)
        self.transposed: Any = None
        self.plain: PackedLayer | None = None
        self.calls = 0
        self.wide: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = {}  # float32 for a 16-bit step, by batch rows
        self.prepared: dict[tuple[int, int, bool, bool, bool, int], Prepared] = {}

    def _pack_forward(self, snapshot: Sequence[Tensor | None]) -> bool:
        weight_ih, weight_hh = (self.weight_ih, self.weight_hh) if self.copies else snapshot[:2]
        biases = self.biases if self.copies else [bias for bias in snapshot[2:] if bias is not None]
        size = self.originals[1].itemsize
        words = [self.H * n * size for n in (self.I, self.H, *(1 for _ in self.biases))]
        sizes = {
            "packed": host.packed_size(self.I, self.H, self.lanes, self.pieces, self.of_x, self.panels),
            "biases": self.panels * 4 * self.lanes,
            "digests": sum(map(digested_blocks.py_func, words)) * DIGEST_BYTES // self.dtype.itemsize,
        }
        kernel = host.forward_task(self.pieces, self.of_x)
        a = template("ForwardArguments", self.dtype, self.of_x, narrow_weights=self.takes_bfloat16)
        a, memory = prepare(kernel, a, self.dtype, 1, 1, scratch=0, **sizes).start(self.weight_ih)
        self.memory = memory, self._new(self.H)
        a.bias, a.bias_hh = _addresses(biases)
        a.h_0 = a.c_0 = self.memory[1].data_ptr()
        a.places, a.original_size = self.panels, size
        a.original_ih, a.original_hh, a.original_bias, a.original_bias_hh = map(address, snapshot)
        done = self._pack(kernel, a, weight_ih, weight_hh)
        # from here on the weights themselves are read
        a.original_ih, a.original_hh, a.original_bias, a.original_bias_hh = map(address, self.originals)
        a.weight_ih, a.weight_hh = self.weight_ih.data_ptr(), self.weight_hh.data_ptr()
        a.bias, a.bias_hh = _addresses(self.biases)
        self.arguments = a
        return done

    def _new(self, *shape: int) -> Tensor:
        """Zeros in the kernel's own type."""
        return self.weight_ih.new_zeros(shape, dtype=self.dtype)

    def _pack(self, name: str, a: Any, weight_ih: Any, weight_hh: Any) -> bool:
        """Run a kernel for no steps and no rows: it only packs. False for a weight that the matrix unit cannot take."""
        a.I, a.H, a.tail = self.I, self.H, host.tail_of(self.H, self.dtype, self.pieces)
        a.weight_ih, a.weight_ih_row = host.row(weight_ih)
        a.weight_hh, a.weight_hh_row = host.row(weight_hh)
        threads, _ = host.split(threads_now(), 1, 1, self.I, self.H, self.panels, self.pieces)
        scratch = 7 * CHUNK * self.lanes
        prepared = prepare(name, a, self.dtype, threads, 1, scratch=scratch)
        large, _ = prepared.run(prepared.call(self.weight_ih))
        return not large

    def transpose(self) -> tuple[Any, list[Tensor]] | None:
        """Arguments of the backward kernel that have the transposed weights packed, and what keeps these alive; None
        where the weights are no longer those that were packed. Every call looks.
        """
        made, prepared, call = self.transposed, *self._call(self.weight_ih, 0, 0, save=True)
        weights: Any = self.weight_ih, self.weight_hh
        if made is None and not self.copies:
            weights = snapshot_of(weights)
            call.arguments.original_ih, call.arguments.original_hh = map(address, weights)
        if not self._run(prepared, call):  # of no steps: it only looks
            return None
        if made is None:
            sizes = host.transposed_sizes(self.I, self.H, self.panels, self.lanes, self.pieces, self.of_x)
            kernel = host.backward_task(self.pieces, self.of_x, 0)
            options = {"packs": 1, "rows_kept": 1, "narrow_weights": self.takes_bfloat16}
            a = template("BackwardArguments", self.dtype, self.of_x, **options)
            a, memory = prepare(kernel, a, self.dtype, 1, 1, scratch=0, **sizes).start(self.weight_ih)
            self._pack(kernel, a, *weights)
            self.transposed = made = a, memory  # complete: another thread may be making its own
        return made

    def _call(
        self, like: Tensor, T: int, B: int, masked: bool = False, narrow: bool = False, save: bool = False
    ) -> tuple[Prepared, Call]:
        """A call of the forward kernel for T steps of B rows, of bfloat16 if `narrow`, as `_run` takes it. `save`: for
        a backward pass, which may use what is packed here.
        """
        size = T, B, masked, narrow, save, threads_now()
        prepared = self.prepared.get(size)
        if prepared is None:
            if len(self.prepared) >= SHAPES:
                self.prepared.clear()
            prepared = self.prepared[size] = self._prepare(*size)
        call, self.calls = prepared.call(like), self.calls + 1
        call.arguments.flip = self.calls % 2
        if call.arguments.digests:  # otherwise it packs the weights itself
            call.arguments.stale = call.stale
        return prepared, call

    def _prepare(self, T: int, B: int, masked: bool, narrow: bool, save: bool, team: int) -> Prepared:
        # of no steps, which only looks at the weights, as many threads as have them for one
        threads, parts = host.split(team, T or 1, B or 1, self.I, self.H, self.panels, self.pieces)
        products = self.I, self.H, self.dtype, self.pieces, self.of_x
        fields, sizes = host.forward_sizes(T, B, *products, parts, masked, narrow)
        if self.large and T == 1 and parts == 1 and not save:
            fields |= {"places": threads, "digests": 0}
            packed = host.packed_size(self.I, self.H, self.lanes, 0, 0, threads)
            sizes |= {"packed": packed, "biases": self.panels * 4 * self.lanes}
        kernel = host.forward_task(self.pieces, self.of_x)
        prepared = prepare(kernel, self.arguments, self.dtype, threads, parts, **sizes)
        for field, value in fields.items():
            setattr(prepared.arguments, field, value)
        prepared.arguments.rows = B
        return prepared

    def _run(self, prepared: Prepared, call: Call) -> bool | None:
        """Run the forward kernel; False when it finds that the weights have changed, None for an input that the
        matrix unit cannot take."""
        large, stale = prepared.run(call)
        self.stale = self.stale or stale
        return False if stale else None if large else True

    def _plain(self) -> "PackedLayer":
        """The same without the matrix unit, for inputs that it cannot take."""
        if self.plain is None or not self.plain.is_of(self.weights):
            self.plain = PackedLayer(self.weights, 0, unit=False)
        return self.plain

    def forward(
        self,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        reverse: bool,
        save: bool = False,
        *,
        mask: Tensor | None = None,
        hides: bool = False,
        out: Tensor | None = None,
        layer_axis: bool = False,
    ) -> tuple[Tensor, ...] | None:
        """As `PackedWeights.forward`; with `save` also ``c`` (T, B, H) and the gates."""
        (T, B, _), H = x.shape, self.H
        x = rows_contiguous(x)
        h, narrow, dtype = unpooled(x, T, B, H) if out is None else out, x.itemsize < self.dtype.itemsize, self.dtype
        like = x.new_empty(0, dtype=dtype) if narrow else x
        states = (1, B, H) if layer_axis else (B, H)
        h_n, c_n = like.new_empty(*states), like.new_empty(*states)
        prepared, call = self._call(x, T, B, mask is not None, narrow, save)
        a = call.arguments
        a.reverse = reverse
        assert not (save and narrow), "steps of bfloat16 are not saved"
        if mask is not None:
            mask = mask.int().contiguous()
            a.mask, a.hides = mask.data_ptr(), hides
        a.x, a.x_step, a.x_row = host.step_row(x)
        if narrow:
            a.out, a.out_step, a.out_row = host.step_row(h)
        elif out is None:
            a.h = h.data_ptr()
        else:
            a.h, a.h_step, a.h_row = host.step_row(h)
        a.h_n, a.c, a.c_n = h_n.data_ptr(), c_n.data_ptr(), c_n.data_ptr()
        saved: tuple[Tensor, ...] = ()
        if save:
            c, gates = saved = unpooled(x, T, B, H), pooled(x, T, self.panels, B, 4 * self.lanes)
            a.c, a.c_step, a.gates = c.data_ptr(), B * H * x.element_size(), gates.data_ptr()
        if hx is not None:
            a.recurs = save  # whose gradient goes through weight_hh
            h_0, c_0 = (rows_contiguous(state) for state in hx)
            a.h_0, a.h_0_row = host.row(h_0)
            a.c_0, a.c_0_row = host.row(c_0)
        done = self._run(prepared, call)
        if done is None:
            options: Any = {"mask": mask, "hides": hides, "out": out, "layer_axis": layer_axis}
            return self._plain().forward(x, hx, reverse, save, **options)
        return (h, h_n, c_n, *saved) if done else None

    def step(self, x: Tensor, h_0: Tensor, c_0: Tensor, save: bool = False) -> tuple[Tensor, ...] | None:
        """As `PackedWeights.step`; with `save` also one tensor for `step_backward`, of the gates and ``c``."""
        if x.itemsize < self.dtype.itemsize:
            return self._narrow_step(x, h_0, c_0)
        B, size = x.shape[0], self.dtype.itemsize
        x, h_0, c_0 = rows_contiguous(x), rows_contiguous(h_0), rows_contiguous(c_0)
        h, c = x.new_empty(B, self.H), x.new_empty(B, self.H)
        prepared, call = self._call(x, 1, B, save=save)
        a = call.arguments
        a.x, a.x_row = host.row(x)
        a.h_0, a.h_0_row = host.row(h_0)
        a.c_0, a.c_0_row = host.row(c_0)
        a.h = a.h_n = h.data_ptr()
        a.c = a.c_n = c.data_ptr()
        saved: tuple[Tensor, ...] = ()
        if save:
            gates = self.panels * B * 4 * self.lanes
            saved = (pooled(x, gates + B * self.H),)
            a.gates = saved[0].data_ptr()
            a.c, a.c_step = a.gates + gates * size, B * self.H * size
            a.recurs = True
        done = self._run(prepared, call)
        if done is None:
            return self._plain().step(x, h_0, c_0, save)
        return (h, c, *saved) if done else None

    def _narrow_step(self, x: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor] | None:
        """`step` for 16-bit tensors: through copies in memory that is used again, all of them at once each way."""
        B = x.shape[0]
        idle = self.wide.get(B)
        if idle is None:
            if len(self.wide) >= SHAPES:
                self.wide.clear()
            idle = self.wide.setdefault(B, [])
        try:
            given, made = idle.pop()  # atomic: Python threads may share the layer
        except IndexError:
            with torch.inference_mode(False):  # to be written to outside it as well
                given = [self._new(*a.shape) for a in (x, h_0, c_0)]
                made = [self._new(*a.shape) for a in (h_0, c_0)]
        copy_all(given, [x, h_0, c_0])
        prepared, call = self._call(given[0], 1, B)
        a, size = call.arguments, self.dtype.itemsize
        a.x, a.h_0, a.c_0 = (wide.data_ptr() for wide in given)
        a.x_row, a.h_0_row = self.I * size, self.H * size
        a.c_0_row = a.h_0_row
        a.h, a.c = (wide.data_ptr() for wide in made)
        a.h_n, a.c_n = a.h, a.c
        done = self._run(prepared, call)
        results = None if done is False else made if done else self._plain().step(given[0], given[1], given[2])
        if results is None:
            return None
        states = x.new_empty(h_0.shape), x.new_empty(c_0.shape)
        copy_all(list(states), list(results))
        if B * (self.I + 4 * self.H) * size < SMALL:  # what is large goes back to malloc
            idle.append((given, made))
        return states

    def step_backward(
        self, dh: Tensor | None, dc: Tensor | None, x: Tensor, h_0: Tensor, c_0: Tensor, kept: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, ...] | None:
        """Gradients of x (B, I), weight_ih, weight_hh, bias, h_0 and c_0, so far as they are wanted, of a `step`; None
        where the matrix unit cannot take a number, and where the weights have changed.
        """
        B, I, H = x.shape[0], self.I, self.H
        products = needs[0] or needs[4]
        ready = self.transpose() if products else None
        if products and ready is None:
            return None
        prepared = backward_call(
            1, B, 1, I, H, self.dtype, self.pieces, True, False, threads_now(), any(needs[1:4]), needs[0], False, False
        )
        if needs[0] and prepared.of_x != self.of_x:  # a weight that the matrix unit cannot take
            return None
        call = prepared.call(x)
        a = call.arguments
        a.rows = a.gate_rows = B
        if ready is not None:
            a.packed_ih, a.packed_hh = ready[0].packed_ih, ready[0].packed_hh
        x, h_0, c_0 = rows_contiguous(x), rows_contiguous(h_0), rows_contiguous(c_0)
        a.x, a.x_row = host.row(x)
        a.h_0, a.h_0_row = host.row(h_0)
        a.c_0, a.c_0_row = host.row(c_0)
        a.gates = kept.data_ptr()
        a.c = a.gates + self.panels * B * 4 * self.lanes * self.dtype.itemsize
        if dh is not None:
            dh = rows_contiguous(dh)
            a.dh_n, a.dh_n_row = host.row(dh)
        if dc is not None:
            dc = rows_contiguous(dc)
            a.dc_n, a.dc_n_row = host.row(dc)
        shapes = (B, I), (4 * H, I), (4 * H, H), (4 * H,), (B, H), (B, H)
        gradients = (*(x.new_empty(shape) if need else None for shape, need in zip(shapes, needs)),)
        a.dx, a.dweight_ih, a.dweight_hh, a.dbias, a.dh_0, a.dc_0 = map(address, gradients)
        large, _ = prepared.run(call)
        return None if large else gradients
