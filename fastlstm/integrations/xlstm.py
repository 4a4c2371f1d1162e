"""xLSTM and TiRex: sLSTM cells of the packages xlstm, tirex-ts and tirex-2 make one call for all steps, on the CPU.

All three run the sLSTM of Beck et al. (2024, arXiv:2405.04517) with heads. The layer around the cell multiplies x, so
that values of x come to the cell as inputs, and no gate sums x. The cell of tirex-ts rounds to bfloat16 at each step,
and ours does not. Calls without steps or rows, and with initial states of which some units have seen a step and others
have not, run the packages' own code.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Run
from fastlstm.cells import Cell, cell, clamp, exp, log_sigmoid, maximum, minimum, sigmoid, tanh, where
from fastlstm.integrations.calls import run_cell, takes
from fastlstm.integrations.places import Place, Places


def _slstm_of(package: str) -> Cell:
    """Return the sLSTM as a package computes it. While n of a unit is zero, the unit has seen nothing."""

    def slstm(i: Any, f: Any, z: Any, o: Any, c: Any, n: Any, m: Any, x_i: Any, x_f: Any, x_z: Any, x_o: Any) -> Any:
        i, f = i + x_i, f + x_f
        f_log = log_sigmoid(clamp(f, max=15.0) if package == "tirex_ts" else f) + m
        m = where(n > 0, maximum(i, f_log), i)
        i, f = exp(i - m), exp(f_log - m)
        if package != "tirex_2":
            i, f = minimum(i, 1.0), minimum(f, 1.0)
        c, n = f * c + i * tanh(z + x_z), f * n + i
        n = maximum(n, 1.0) if package == "tirex_2" else n
        return sigmoid(o + x_o) * c / n, c, n, m

    slstm.__qualname__ = f"slstm_of_{package}"  # exported programs and pickles name it
    states, inputs = ("h", "c", "n", "m"), ("x_i", "x_f", "x_z", "x_o")
    return cell(gates=dict.fromkeys("ifzo", "h"), states=states, inputs=inputs)(slstm)


slstm_of_xlstm, slstm_of_tirex_ts, slstm_of_tirex_2 = map(_slstm_of, ("xlstm", "tirex_ts", "tirex_2"))


def _run(module: Any, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> Any:  # noqa: A002
    """Do what `forward` of a cell of xlstm or tirex-ts does: return its output, (B, K, T, D) or as its `output_shape`
    says, and the last states h, c, n and m, (4, B, K D). The first ones are `state`, or zeros. `input` contains the
    values of x, (B, T, 4 K D) or as `input_shape` says.
    """
    R, b, K = module._recurrent_kernel_, module._bias_, module.config.num_heads
    if not _takes(input, state, R, b):
        return None
    if hasattr(module, "_permute_input"):  # a cell of xlstm
        module._check_input(input)
        x, slstm = module._permute_input(input), slstm_of_xlstm
        R, b = module._recurrent_kernel_int2ext(R), module._bias_int2ext(b)
    else:
        x, slstm = module._get_input(input), slstm_of_tirex_ts
        R, b = R.unflatten(2, (4, -1)), b.view(K, 4, -1)
    states = () if state is None else module._get_state(x, state).unbind()
    result = _of_heads(slstm, x.reshape(*x.shape[:2], 4, -1), R, b, states)
    return module._permute_output(result.h), torch.stack(result.last)


def _recurrence(module: Any, Wx: Tensor, states: Tensor | None = None) -> Any:
    """Do what `recurrence` of a layer of tirex-2 does, but return of the states of all steps the first alone, which are
    all that the layer reads: (1, B, T, K, D). The last states are (4, B, 1, K, D), and `Wx` contains the values of x,
    (B, T, 4, K, D).
    """
    R, b = module.get_R(), module.get_bias()
    if not _takes(Wx, states, R, b):
        return None
    given = () if states is None else states.flatten(2).unbind()
    result = _of_heads(slstm_of_tirex_2, Wx.transpose(0, 1).flatten(3), R, b, given)
    heads = Wx.shape[3:]
    return result.h.transpose(0, 1).unflatten(2, heads)[None], torch.stack(result.last).unflatten(2, heads).unsqueeze(2)


def _of_heads(slstm: Cell, x: Tensor, R: Tensor, b: Tensor, states: tuple[Any, ...]) -> Run:
    """Run a cell over values of x (T, B, 4, K D), with R (K, D, 4, D) and b (K, 4, D)."""
    weights = None, R.permute(2, 0, 3, 1).flatten(0, 2), None, b.transpose(0, 1).flatten()
    return run_cell(slstm, x.new_empty(*x.shape[:2], 0), weights, states, x.unbind(2))


def _takes(x: Tensor, state: Tensor | None, *weights: Tensor) -> bool:
    """Return whether fastlstm runs a call."""
    return takes(x, state, *weights) and (state is None or bool((state[2] > 0).all() or (state[2] == 0).all()))


def _unlike(module: Any) -> str:
    """Return what keeps a cell as it is."""
    config = module.config
    function, backend = getattr(config, "function", "slstm"), getattr(module, "backend", getattr(config, "backend", ""))
    plain = function == "slstm" and backend in ("vanilla", "torch")
    return "" if plain else "fastlstm runs those with the function slstm on the backend vanilla or torch"


_places = Places(
    __name__,
    Place("xlstm.blocks.slstm.cell", "sLSTMCell_vanilla", "xlstm", "2.0", _run, _unlike),
    Place("xlstm.blocks.slstm.cell", "sLSTMCell_cuda", "xlstm", "2.0", _run, _unlike),
    Place("tirex.models.slstm.cell", "sLSTMCell", "tirex-ts", "1.4", _run, _unlike),
    Place("tirex2.model.component", "sLSTMFlashRNNLayer", "tirex-2", "0.4", _recurrence, _unlike, "recurrence"),
)
accelerate, restore = _places.accelerate, _places.restore
