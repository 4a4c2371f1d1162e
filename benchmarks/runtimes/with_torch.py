"""The contenders that are modules of torch: fastlstm's layers, their streams, and torch's own layers."""

from collections.abc import Callable
from typing import Any

import torch

import fastlstm
from benchmarks.runtimes.cases import Case, Contender, Unsupported, torch_module


def _state(case: Case) -> Any:
    states = list(map(torch.from_numpy, case.states))
    return tuple(states) if len(states) == 2 else states[0] if states else None


def _contender(case: Case, threads: int, module: Any, forward: Callable[[Any, Any], Any]) -> Contender:
    """`forward` is called with x and the state, and returns the output and the new state."""
    x, state, is_step = torch.from_numpy(case.arrays["x"]), _state(case), case.mode == "step"

    def begin() -> None:
        torch.set_num_threads(threads)

    begin()
    if case.mode == "training":
        target = torch.from_numpy(case.arrays["target"])

        def train() -> Any:
            module.zero_grad()
            loss = torch.nn.functional.mse_loss(module(x)[0], target)
            loss.backward()
            return loss

        return Contender(train, lambda: [train().detach().numpy(), module.weight_hh_l0.grad.numpy()], begin)

    def call() -> Any:
        nonlocal state
        with torch.no_grad():
            output, new = forward(x, state)
        if is_step:
            state = new
        return output

    return Contender(call, lambda: [call().numpy().reshape(case.arrays["output"].shape)], begin)


def nn_layer(case: Case, threads: int) -> Contender:
    module = torch_module(case)
    return _contender(case, threads, module, module)


def fastlstm_layer(case: Case, threads: int) -> Contender:
    module, x_t = torch_module(case, fastlstm), torch.from_numpy(case.arrays["x"][0])
    return _contender(
        case, threads, module, (lambda x, state: module.step(x_t, state)) if case.mode == "step" else module
    )


def fastlstm_stream(case: Case, threads: int) -> Contender:
    """A stream keeps the state itself."""
    if case.mode != "step":
        raise Unsupported
    torch.set_num_threads(threads)
    stream, x_t = torch_module(case, fastlstm).stream(case.shape.B), torch.from_numpy(case.arrays["x"][0])
    stream.state = _state(case)
    return _contender(case, threads, stream, lambda x, state: (stream(x_t), state))
