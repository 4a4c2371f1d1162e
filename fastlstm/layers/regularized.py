"""Recurrent dropout and zoneout, as options of `LSTM` and `GRU`.

Both are cells of `fastlstm.cells.regularized` whose inputs are random masks. Where neither option is set, and for
recurrent dropout in eval mode too, a module runs its plain cell, and they cost nothing.

**Recurrent dropout** with probability p, in training mode: h_{t-1} m takes the place of h_{t-1} in the products with
weight_hh, where m (B, H) has 0 with probability p and 1 / (1 - p) otherwise. A row has one m for all of its steps, and
another one in each layer and direction. What a GRU keeps of h_{t-1} is not masked.

Source: Gal and Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, 2016, with
tied weights. Equivalent to the ``recurrent_dropout`` of Keras' LSTM and GRU, if the masks that Keras draws for each
gate are one and the same.

**Zoneout** with probabilities p_c and p_h: each unit of each state keeps its value from the step before, or takes the
new one. In training mode it keeps it with probability p, drawn for each row, step and unit. In eval mode it takes the
mean, p times the old value and 1 - p times the new one. An LSTM's new h is computed from its new c, whether or not c
keeps its old value.

Source: Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden activations, 2017.

**Random numbers.** Each layer draws, one direction after the other, from torch's generator of the device:
``torch.nn.functional.dropout(ones, p)`` of (B, H) for m, then ``torch.bernoulli(empty, p)`` of (T, B, H) for h and then
for c.
A probability of 0 or 1 draws nothing for zoneout.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlstm.backends.base import Layer, held_steps
from fastlstm.cells import library
from fastlstm.layers import checks
from fastlstm.layers.like_torch import LikeTorch
from fastlstm.layers.recompute import Results
from fastlstm.layers.typed import States


class Regularized(LikeTorch[States]):
    """Layers of the cell `lstm` or `gru`, with recurrent dropout and zoneout."""

    @property
    def recurrent_dropout(self) -> float:
        """The probability of recurrent dropout. A new one is checked as the constructor checks it."""
        return self._regularizers[0] if self._regularizers else 0.0

    @recurrent_dropout.setter
    def recurrent_dropout(self, value: float) -> None:
        checks.check_probability("recurrent_dropout", value)
        self._set_regularizers(value, self.zoneout)

    @property
    def zoneout(self) -> Any:
        """The probability of zoneout, or for an LSTM a pair of those of c and h."""
        return self._regularizers[1] if self._regularizers else 0.0

    @zoneout.setter
    def zoneout(self, value: Any) -> None:
        if len(self._cell.states) == 2 and isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ValueError(f"zoneout must be a number or a pair, of c and of h, got {len(value)} numbers")
            for k, each in enumerate(value):
                checks.check_probability(f"zoneout[{k}]", each)
            value = tuple(value)
        else:
            checks.check_probability("zoneout", value)
        self._set_regularizers(self.recurrent_dropout, value)

    def _set_regularizers(self, recurrent_dropout: float, zoneout: Any) -> None:
        if recurrent_dropout:
            checks.check_option("recurrent_dropout", recurrent_dropout, self)
        keeps = any(zoneout) if isinstance(zoneout, tuple) else zoneout > 0
        if keeps:
            checks.check_option("zoneout", zoneout, self)
        self.release_memory()  # plans are of one cell
        self._regularizers = (recurrent_dropout, zoneout) if recurrent_dropout or keeps else None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name, value in zip(("recurrent_dropout", "zoneout"), self._regularizers or ()):
            if value not in (0, (0, 0)):
                text += f", {name}={value}"
        return text

    def _run_layer(self, k: int, layer: Layer, inner_states: bool) -> Results:
        zoneout = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * len(layer.cell.states)
        drops, keeps = self.training and self.recurrent_dropout > 0, any(zoneout)
        if not drops and not keeps:
            return super()._run_layer(k, layer, inner_states)
        layer, s = self._masked(layer, drops, zoneout[::-1] if keeps else ())
        plans = self._plans_of((k, layer.cell.name))
        output, last, others = self._run_with(layer, plans, inner_states or s)
        if not s:
            return output, last, others
        output, *others_of_cell = others  # of the states s, h and, for an LSTM, c: users do not get s, the masked h
        if (held := held_steps(layer)) is not None:
            output = output.masked_fill(held, 0)
        return output, last[1:], tuple(others_of_cell) if inner_states else ()

    def _masked(self, layer: Layer, drops: bool, zoneout: tuple[float, ...]) -> tuple[Layer, bool]:
        """Return the layer of a cell that takes masks, with `zoneout` or (), and whether masked h comes first."""
        from fastlstm.cells import regularized  # most modules need none of them, and each takes a while to trace

        T, B, H = layer.x.shape[0], layer.x.shape[1], self.hidden_size
        inputs: list[Tensor] = []
        states: tuple[Any, ...] = layer.states
        if drops:
            mask = F.dropout(layer.x.new_ones(B, H), self.recurrent_dropout)
            inputs.append(mask.expand(T, -1, -1))
            states = (None if states[0] is None else states[0] * mask, *states)
        for p in zoneout:
            if self.training and 0 < p < 1:  # not x.new_empty: vmap draws no equal numbers for a tensor that it batches
                inputs.append(torch.bernoulli(torch.empty(T, B, H, dtype=layer.x.dtype, device=layer.x.device), p))
            else:
                inputs.append(layer.x.new_full((1, 1, 1), p).expand(T, B, H))
        of = "lstm" if layer.cell is library.lstm else "gru"
        name = "_".join(word for word, wanted in (("dropped", drops), ("zoneout", bool(zoneout)), (of, True)) if wanted)
        return layer._replace(cell=getattr(regularized, name), states=states, inputs=tuple(inputs)), drops
