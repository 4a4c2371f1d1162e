"""The contenders that are modules of torch: fastlstm's layers and their streams, and torch's own layers."""

from collections.abc import Callable
from typing import Any

import torch

import fastlstm
from benchmarks.runtimes.cases import Contender, LayerCase, torch_module
from benchmarks.shared.calls import inference, training


def _state(case: LayerCase) -> Any:
    states = [torch.from_numpy(a.copy()) for a in case.states]
    return tuple(states) if len(states) == 2 else states[0] if states else None


def _contender(case: LayerCase, forward: Callable[[Any, Any], Any]) -> Contender:
    """`forward` is called with x and the state, and returns the output and the new state."""
    x, state, is_step = torch.from_numpy(case.arrays["x"]), _state(case), case.mode == "step"

    def step() -> Any:
        nonlocal state
        output, new = forward(x, state)
        state = new if is_step else state
        return output

    call = inference(step)
    return Contender(call, lambda: [call().numpy().reshape(case.arrays["output"].shape)])


def _trained(case: LayerCase, module: Any) -> Contender:
    x, target = (torch.from_numpy(case.arrays[name]) for name in ("x", "target"))
    train = training(lambda: torch.nn.functional.mse_loss(module(x)[0], target), module.parameters())
    return Contender(train, lambda: [train()[0].numpy(), module.weight_hh_l0.grad.numpy()])


def modules(case: LayerCase) -> dict[str, Contender]:
    """Return the contenders of a case by their names. Of a single step "fastlstm" is the stream."""
    theirs, ours = torch_module(case), torch_module(case, fastlstm)
    if case.mode == "training":
        return {name: _trained(case, module) for name, module in (("fastlstm", ours), ("torch", theirs))}
    contenders = {"torch": _contender(case, theirs)}
    if case.mode == "inference":
        return {"fastlstm": _contender(case, ours), **contenders}
    x_t, stream = torch.from_numpy(case.arrays["x"][0]), ours.stream(case.shape.B)
    stream.state = _state(case)
    contenders = {"fastlstm": _contender(case, lambda x, state: (stream(x_t), state)), **contenders}
    contenders["stream.step"] = _contender(case, lambda x, state: stream.step(x_t, state))
    contenders["step"] = _contender(case, lambda x, state: ours.step(x_t, state))
    return contenders


def quantized(case: LayerCase) -> dict[str, Contender]:
    """Return layers, or the stream of a step, with weights and activations of fewer bits."""
    contenders = {}
    for name in ("int8",) if case.mode == "step" else ("int8", "int16"):
        module: Any = fastlstm.quantize(torch.nn.Sequential(torch_module(case, fastlstm)), name)[0]
        if case.mode == "inference":
            contenders[name] = _contender(case, module)
            continue
        stream, x_t = module.stream(case.shape.B), torch.from_numpy(case.arrays["x"][0])
        stream.state = _state(case)
        contenders["int8 stream"] = _contender(case, lambda x, state: (stream(x_t), state))  # noqa: B023
    return contenders
