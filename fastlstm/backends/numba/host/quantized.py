"""int8 layers: weights packed once, and calls that run on them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Layer, Run
from fastlstm.backends.cpu import address, rows_contiguous, snapshot_of
from fastlstm.backends.memory import PAGE, Pages, new_of
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.frames import Kernel, zeros
from fastlstm.backends.numba.host.kept_weights import Packed, digest_bytes
from fastlstm.backends.numba.host.signature import Signature, contiguous, signature_of
from fastlstm.backends.quantized import TOP

FEW_ROWS, FED_ROWS = 15, 32  # batch rows up to which several steps of x are multiplied at once; (step, row) pairs then
UNIT_ROWS = 16  # from which the matrix unit multiplies, where there is one
FASTER = 4  # than products of float32


class QuantizedKernel(Kernel):
    """The kernel of int8 layers of one signature, with the arguments that all its calls share.

    Attributes:
        counts: elements of each weight, bias and scale, in the order of a layer's.
        constants: a row of h's bytes that stand for zeros, then the scale of a row within 1.
    """

    def __init__(self, s: Signature, activations: int, lanes: int, offset: int) -> None:
        """`offset`: what is added to the bytes of x and h."""
        from fastlstm.backends.numba.host import arguments, tasks

        T, B, I, H, pieces = s.T, s.B, s.I, s.H, activations // 8
        of_x, of_h, panels = s.counts.of_x, s.counts.of_h, sizes.panels_of(H, lanes)
        feed = 1 if B > FEW_ROWS else min(T, max(1, FED_ROWS // max(B, 1)))
        groups_ih, groups_hh = -(-I // 4), -(-H // 4)
        unit_rows = UNIT_ROWS if sizes.most_pieces() > 1 else 1 << 62
        x_piece, h_piece = _lines(4 * groups_ih), _lines(panels * lanes)
        buffers = {
            "scratch": 16 + 64 * lanes * (1 + of_x), "x_bytes": 2 * B * feed * pieces * x_piece // 4,
            "h_bytes": 2 * B * pieces * h_piece // 4, "x_scales": 2 * B * feed, "h_scales": 3 * B,
            "carried": panels * B * lanes, "fed": panels * feed * B * of_x * lanes if feed > 1 else 0,
        }  # fmt: skip
        threads, parts = sizes.split(s.threads, s, panels, faster=FASTER)
        self.lay_out(threads, parts, buffers, 4, 1)
        self.task, self.tails = "quantized", {}
        self.constants = torch.full((h_piece + 4,), offset, dtype=torch.uint8, device="cpu")
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        self.constants[h_piece:] = (one / TOP[activations]).view(torch.uint8)
        self.counts = of_x * H * I, of_h * H * H, of_x * H * s.biased[0], of_h * H * s.biased[1], of_x * H, of_h * H
        self.arguments = arguments.QuantizedArguments(
            **tasks.cell_primitives(s.cell, 4, pieces), relax=tasks.relax(), parts=parts,
            scratch_bytes=self.steps["scratch"], lanes=lanes, panels=panels, T=T, B=B, rows=B, I=I, H=H, of_x=of_x,
            of_h=of_h, pieces=pieces, groups_ih=groups_ih, groups_hh=groups_hh, panel_ih=groups_ih * of_x * lanes * 4,
            panel_hh=groups_hh * of_h * lanes * 4, feed=feed, unit_rows=unit_rows, reverse=s.reverse,
            h_step=B * H * 4, x_pitch=pieces * x_piece, x_piece=x_piece, h_pitch=pieces * h_piece, h_piece=h_piece,
            zeros=self.constants.data_ptr(), clean=self.constants.data_ptr() + h_piece,
        )  # fmt: skip


class Plan:
    """How int8 layers of one signature run.

    `forward` runs a layer, on packed weights that it keeps, if they are still those of the layer. Who holds weights
    that do not change calls `pack` once, and then `run`.
    """

    def __init__(self, signature: Signature, activations: int, kept: dict[Any, Any] | None = None) -> None:
        """`kept`: where packed weights stay from call to call, which plans of one layer share. None: they are packed in
        each call.
        """
        from fastlstm.backends.numba.host import arguments
        from fastlstm.backends.numba.llvm import bytes as dots

        self.signature, s = signature, signature
        self.lanes, self.offset, self.panels = dots.LANES, dots.OFFSET, sizes.panels_of(s.H, dots.LANES)
        self.kernel = QuantizedKernel(s, activations, self.lanes, self.offset)
        names = arguments.QUANTIZED_CALL.split()
        self.write = struct.Struct(f"{len(names)}n").pack_into
        self.at = getattr(arguments.QuantizedArguments, names[0]).offset
        self.like = torch.empty(0, dtype=torch.float32, device="cpu")
        self.new, self.no_state, self.flip = new_of(self.like, (s.T, s.B, s.H)), zeros(4 * s.H), 0
        # weights of less than a word have no digest
        self.kept = kept if min(self.kernel.counts[:2]) >= 4 else None
        self.key, self.ends = (s.cell, s.I, s.H, s.biased), (*s.ends, s.B, s.H)

    def pack(self, weights: Sequence[Any]) -> Packed:
        """Weights as `arguments.QUANTIZED_KEPT` says, without digests: `run` then does not compare them with any."""
        s = self.signature
        layout, (ih, hh, bias_ih, bias_hh, scale_ih, scale_hh) = s.cell.layout, weights
        of_ih, of_hh = (
            None if bias is None else bias.view(-1, s.H)[list(blocks)]
            for bias, blocks in ((bias_ih, layout.blocks_ih), (bias_hh, layout.blocks_hh))
        )
        of_x, of_h = layout.of_x, layout.of_h
        biases = torch.zeros(len(layout.sums), s.H, dtype=torch.float32, device="cpu")
        if of_ih is not None:
            biases[of_x.start : of_x.stop] += of_ih
        if of_hh is not None:
            biases[of_h.start : of_h.stop] += of_hh
        parts = [
            *self._packed(ih, scale_ih, biases[of_x.start : of_x.stop], layout.blocks_ih),
            *self._packed(hh, scale_hh, biases[of_h.start : of_h.stop], layout.blocks_hh),
        ]
        memory, places = zip(*map(_settled, parts))
        return Packed(memory, (*places, 0, 0))

    def _packed(self, weight: Tensor, scale: Tensor, bias: Tensor, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A weight (panels, groups, gates, lanes) of four bytes, and its constants (panels, 3, gates, lanes)."""
        H, lanes, panels, gates = self.signature.H, self.lanes, self.panels, len(blocks)
        columns = weight.shape[1]
        groups = -(-columns // 4)
        padded = torch.zeros(gates, panels * lanes, groups * 4, dtype=torch.int8, device="cpu")
        padded[:, :H, :columns] = weight.view(gates, H, columns)[list(blocks)]
        constants = torch.zeros(3, gates, panels * lanes, dtype=torch.float32, device="cpu")
        constants[0, :, :H], constants[1, :, :H] = scale.view(gates, H)[list(blocks)], bias
        constants[2] = (padded.sum(-1, dtype=torch.int32) * -self.offset).view(torch.float32)
        words = padded.view(torch.int32).view(gates, panels, lanes, groups)
        return words.permute(1, 3, 0, 2), constants.view(3, gates, panels, lanes).permute(2, 0, 1, 3)

    def forward(self, layer: Layer) -> Run:
        """Run a layer."""
        weights = (*map(contiguous, layer.weights),)
        if self.kept is None:
            return self.run(self.pack(weights), layer)[0]
        packed = self.kept.get(self.key)
        if packed is not None:
            run, stale = self.run(packed, layer, weights)
            if not stale:
                return run
        weights = (*snapshot_of(weights),)  # it does not matter what is written to them meanwhile
        packed = self.pack(weights)
        counts = [count if n > 1 else count // 4 for n, count in enumerate(self.kernel.counts)]
        bytes_ = digest_bytes((*counts, 1, 1), torch.float32)
        digests = torch.empty(bytes_, dtype=torch.uint8, device="cpu")
        run, _ = self.run(Packed(packed.memory, (*packed.addresses[:4], digests.data_ptr(), 0)), layer, weights)
        self.kept[self.key] = Packed((*packed.memory, digests), (*packed.addresses[:4], digests.data_ptr(), 1))
        return run

    def run(self, packed: Packed, layer: Layer, weights: Sequence[Any] = (None,) * 6) -> tuple[Run, int]:
        """The run of a layer on packed weights, and whether their digests are those of `weights`.

        What the digests' address is followed by says what is done with them: 0, they are stored; 1, compared.
        """
        s, kernel = self.signature, self.kernel
        x, states = layer.x, layer.states
        if x.stride(-1) != 1:
            x = rows_contiguous(x)
        new, h = self.like.new_empty, self.new(self.like, s.T, s.B, s.H)
        last = tuple([new(*self.ends) for _ in states])
        first, start, lengths, reset = states[0], states[-1], layer.lengths, layer.reset
        of_first = of_start = ctypes.addressof(self.no_state), 0
        if first is not None:
            first, start = rows_contiguous(first), rows_contiguous(start)
            of_first, of_start = (first.data_ptr(), 4 * first.stride(-2)), (start.data_ptr(), 4 * start.stride(-2))
        if lengths is not None:
            lengths = lengths.contiguous()
        if reset is not None:
            reset = reset.contiguous()
        self.flip ^= 1
        frame = kernel.borrow()
        *places, compares = packed.addresses
        self.write(
            frame.arguments, self.at, *places, frame.stale if compares else 0, *map(address, weights), x.data_ptr(),
            x.stride(0) * 4, x.stride(1) * 4, *of_first, *of_start, address(lengths), address(reset), h.data_ptr(),
            last[0].data_ptr(), last[-1].data_ptr(), self.flip,
        )  # fmt: skip
        frame.run()
        _, stale = frame.look()
        kernel.take_back(frame)
        return Run(h, last, ()), stale


def _lines(size: int) -> int:
    """Bytes of whole cache lines."""
    return -(-size // sizes.LINE) * sizes.LINE


def _settled(a: Tensor) -> tuple[Any, int]:
    """A contiguous copy, in huge pages if it is large: what holds its memory, and its address."""
    size = a.numel() * a.itemsize
    if size < PAGE:
        a = a.contiguous()
        return a, a.data_ptr()
    pages = Pages(size)
    torch.frombuffer(pages.memory, dtype=a.dtype, count=a.numel()).view(a.shape).copy_(a)
    return pages, pages.address


_plans = lru_cache(1024)(Plan)


def quantized_plan(layer: Layer, activations: int, kept: dict[Any, Any] | None, ends: tuple[int, ...]) -> Plan:
    """How int8 layers like this one run, of the same sizes and number of threads.

    Args:
        layer: its weights are (weight_ih int8, weight_hh int8, bias_ih, bias_hh, weight_ih_scale, weight_hh_scale).
        activations: 8 or 16, bits of x and h in the products.
        kept: where packed weights stay between calls, or None.
        ends: the leading axes of the states, ``(1,)`` or ``()``.
    """
    return Plan(signature_of(layer, ends, 0), activations, kept)


def quantized_forward(layer: Layer, activations: int) -> Run:
    """Run an int8 layer, with weights that are packed for this call. See `fastlstm.backends.quantized`."""
    return _plans(signature_of(layer, (), 0), activations).forward(layer)
