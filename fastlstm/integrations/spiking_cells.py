"""The neurons of norse, snnTorch and spikingjelly as cells."""

from functools import cache
from typing import Any

import torch

from fastlstm.cells import Cell, abs, cell, sigmoid, square, stop_gradient, surrogate, where  # noqa: A004

SLOPES = {  # by the name of a surrogate in lower case: its derivative at a distance from the threshold
    "atan": lambda x, width: width / 2 / (1 + square(torch.pi / 2 * width * x)),
    "fast_sigmoid": lambda x, width: 1 / square(width * abs(x) + 1),
    "sigmoid": lambda x, width: width * sigmoid(width * x) * (1 - sigmoid(width * x)),
}


@cell(gates={}, states=("spike", "v", "i"), inputs=("x",), params=("rate", "loss", "leak", "threshold", "v_reset"))
def of_norse(v: Any, i: Any, x: Any, rate: Any, loss: Any, leak: Any, threshold: Any, v_reset: Any) -> Any:
    i = i + x
    v = v + rate * ((leak - v) + i)
    spike = surrogate(v - threshold, SLOPES["fast_sigmoid"](v - threshold, 1.0))
    return spike, (1 - spike) * v + spike * v_reset, i + loss * i


@cache
def of_snntorch(slope: str) -> Cell:
    @cell(gates={}, states=("spike", "v"), inputs=("x",), params=("width", "beta", "threshold"))
    def leaky(v: Any, x: Any, width: Any, beta: Any, threshold: Any) -> Any:
        v = beta * v + x - stop_gradient(where(v - threshold > 0, 1.0, 0.0)) * threshold
        return surrogate(v - threshold, SLOPES[slope](v - threshold, width)), v

    return leaky


@cache
def of_spikingjelly(slope: str, decays_input: bool, is_hard: bool, is_detached: bool) -> Cell:
    @cell(gates={}, states=("spike", "v"), inputs=("x",), params=("width", "tau", "threshold", "v_reset"))
    def lif(v: Any, x: Any, width: Any, tau: Any, threshold: Any, v_reset: Any) -> Any:
        v = v + (x - (v - v_reset)) / tau if decays_input else v - (v - v_reset) / tau + x
        spike = 1 - surrogate(threshold - v, SLOPES[slope](v - threshold, width))  # which spikes at its threshold, too
        reset = stop_gradient(spike) if is_detached else spike
        return spike, (1 - reset) * v + reset * v_reset if is_hard else v - reset * threshold

    return lif
