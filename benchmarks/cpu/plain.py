"""Cells as one writes them in plain PyTorch: a loop over time, before which x is multiplied for all steps at once."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlstm
from fastlstm import cells

HEADS, UNITS = 4, 128
States = tuple[Tensor, ...]


class Loop(nn.Module):
    """A layer of any cell without norms, with the weights of a layer of fastlstm."""

    def __init__(self, rnn: fastlstm.RNN) -> None:
        super().__init__()
        self.cell, self.hidden_size = rnn.cell, rnn.hidden_size
        self.takes = tuple(inspect.signature(rnn.cell.function).parameters)
        self.of_x, self.of_h = ([gate for gate, sums in rnn.cell.gates.items() if k in sums] for k in "xh")
        self.joint = bool(self.of_x) and self.of_x == self.of_h
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        states: States = tuple([x.new_zeros(x.shape[1], self.hidden_size) for _ in self.cell.states])
        outputs, from_x = [], x
        if self.of_x:
            from_x = F.linear(x, self.weight_ih, self.bias_ih + self.bias_hh if self.joint else self.bias_ih)
        for part, *of_step in zip(from_x.unbind(0), *(a.unbind(0) for a in inputs.values())):
            states = self.step(states, part, dict(zip(inputs, of_step)))
            outputs.append(states[0])
        return torch.stack(outputs)

    def step(self, states: States, from_x: Tensor, inputs: dict[str, Tensor]) -> States:
        """The states after a step whose product with x, of all gates that sum it, is `from_x`."""
        values: dict[str, Any] = {}
        if self.joint:
            sums = torch.addmm(from_x, states[0], self.weight_hh.t())
            values = dict(zip(self.of_x, sums.chunk(len(self.of_x), 1)))
        else:
            if self.of_x:
                values = dict(zip(self.of_x, from_x.chunk(len(self.of_x), 1)))
            if self.of_h:
                from_h = F.linear(states[0], self.weight_hh, self.bias_hh)
                for gate, part in zip(self.of_h, from_h.chunk(len(self.of_h), -1)):
                    values[gate] = values[gate] + part if gate in values else part
        values |= {name: partial(F.linear, weight=getattr(self, f"weight_{name}")) for name in self.cell.products}
        values |= (
            {name: getattr(self, name) for name in self.cell.params} | dict(zip(self.cell.states, states)) | inputs
        )
        new = self.cell.function(**{name: values[name] for name in self.takes})
        return new if isinstance(new, tuple) else (new,)


def layer_norm_lstm(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`layer_norm_lstm` as one writes it in PyTorch."""
    H = weights["weight_hh"].shape[1]
    gain_x, gain_h = (torch.cat([weights[f"gain_{gate}_{kind}"] for gate in "ifgo"]) for kind in "xh")
    bias = torch.cat([weights[f"bias_{gate}"] for gate in "ifgo"])
    from_x = F.layer_norm(F.linear(x, weights["weight_ih"], weights["bias_ih"]), (4 * H,), gain_x, bias)
    h = c = x.new_zeros(x.shape[1], H)
    outputs = []
    for part in from_x.unbind(0):
        from_h = F.linear(h, weights["weight_hh"], weights["bias_hh"])
        i, f, g, o = (part + F.layer_norm(from_h, (4 * H,), gain_h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (H,), weights["gain_c"], weights["bias_c"]))
        outputs.append(h)
    return torch.stack(outputs)


def dreamer_gru(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`dreamer_gru` as one writes it in PyTorch."""
    H = weights["weight_hh"].shape[1]
    gain, bias = (torch.cat([weights[f"{kind}_{gate}"] for gate in "rnu"]) for kind in ("gain", "bias"))
    from_x = F.linear(x, weights["weight_ih"], weights["bias_ih"] + weights["bias_hh"])
    h = x.new_zeros(x.shape[1], H)
    outputs = []
    for part in from_x.unbind(0):
        gates = torch.addmm(part, h, weights["weight_hh"].t())
        r, n, u = F.layer_norm(gates, (3 * H,), gain, bias, 1e-3).chunk(3, 1)
        h = torch.lerp(h, torch.tanh(torch.sigmoid(r) * n), torch.sigmoid(u - 1))
        outputs.append(h)
    return torch.stack(outputs)


def slstm_of_heads(inputs: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """`slstm_of_inputs` as one writes it in PyTorch: one product a step for all heads."""
    B, H = inputs[0].shape[1:]
    blocks = weight.view(4, HEADS, UNITS, UNITS).permute(1, 3, 0, 2).reshape(HEADS, UNITS, 4 * UNITS)
    h = c = n = m = inputs[0].new_zeros(B, H)
    outputs = []
    for x_i, x_f, x_z, x_o in zip(*(a.unbind(0) for a in inputs)):
        sums = torch.bmm(h.view(B, HEADS, UNITS).transpose(0, 1), blocks).view(HEADS, B, 4, UNITS).permute(2, 1, 0, 3)
        i, f, z, o = (part.reshape(B, H) + a for part, a in zip(sums, (x_i, x_f, x_z, x_o)))
        f_log = F.logsigmoid(f) + m
        m = torch.maximum(f_log, i)
        i, f = torch.exp(i - m), torch.exp(f_log - m)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs)


@cells.cell(gates=dict.fromkeys("ifzo", "h"), states=("h", "c", "n", "m"), inputs=("x_i", "x_f", "x_z", "x_o"))
def slstm_of_inputs(i: Any, f: Any, z: Any, o: Any, c: Any, n: Any, m: Any, x_i: Any, x_f: Any, x_z: Any, x_o: Any):
    """`slstm` without a product of x: what x adds to the pre-activations comes as inputs."""
    return cells.slstm(z + x_z, i + x_i, f + x_f, o + x_o, c, n, m)


def normed_lstm(of: str) -> cells.Cell:
    """Return an LSTM with a norm of its cell state over the units of a row or of a head."""

    @cells.cell(gates=dict.fromkeys("ifgo", "xh"), states=("h", "c"), params={"gain": 1.0, "shift": 0.0})
    def normed(i: Any, f: Any, g: Any, o: Any, c: Any, gain: Any, shift: Any) -> tuple[Any, Any]:
        c = cells.sigmoid(f) * c + cells.sigmoid(i) * cells.tanh(g)
        return cells.sigmoid(o) * cells.layer_norm(c, weight=gain, bias=shift, of=of), c

    return normed


def normed_lstm_of_heads(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`normed_lstm` of heads as one writes it in PyTorch."""
    B, H, gain, shift = x.shape[1], HEADS * UNITS, weights["gain"], weights["shift"]
    blocks = weights["weight_hh"].view(4, HEADS, UNITS, UNITS).permute(1, 3, 0, 2).reshape(HEADS, UNITS, 4 * UNITS)
    h = c = x.new_zeros(B, H)
    outputs = []
    for part in F.linear(x, weights["weight_ih"], weights["bias_ih"] + weights["bias_hh"]).unbind(0):
        sums = torch.bmm(h.view(B, HEADS, UNITS).transpose(0, 1), blocks).view(HEADS, B, 4, UNITS).permute(1, 2, 0, 3)
        i, f, g, o = (part + sums.reshape(B, 4 * H)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = F.layer_norm(c.view(B, HEADS, UNITS), (UNITS,)).view(B, H)
        h = torch.sigmoid(o) * torch.addcmul(shift, normed, gain)
        outputs.append(h)
    return torch.stack(outputs)
