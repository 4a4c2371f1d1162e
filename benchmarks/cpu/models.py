"""Models that others wrote, before and after `fastlstm.replace`. A training step has that of Adam."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

import fastlstm
from benchmarks.cpu.third_party import MODELS, Run, ThirdParty
from benchmarks.shared.calls import check, inference, of_model
from benchmarks.shared.case import OURS, Case, Runs

TOLERANCE = 1e-3  # float32 through whole models
PART = "torch's recurrent layers alone"


def recurrent_part(model: nn.Module, call: Run) -> Callable[[], object]:
    """Return what calls the recurrent layers of a model alone, on what a call of the model gives them."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        layer.register_forward_hook(lambda *arguments: calls.append(arguments[:3]), with_kwargs=True)
        for layer in model.modules()
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase))
    ]
    inference(lambda: call(model))()
    for hook in hooks:
        hook.remove()
    return inference(lambda: [layer(*arguments, **options) for layer, arguments, options in calls])


def before_and_after(model: ThirdParty, mode: str) -> Runs:
    theirs, call = model.build()
    ours = fastlstm.replace(deepcopy(theirs), keep_type=model.keep_type)
    with torch.no_grad():
        check(call(ours.eval()), call(theirs.eval()), TOLERANCE)  # in training dropout draws
    part = {PART: recurrent_part(theirs, call)} if mode == "inference" else {}
    models = {OURS: ours.train(mode == "training"), "torch": theirs.train(mode == "training")}
    return {name: of_model(mode, each, call) for name, each in models.items()} | part


CASES = [
    Case("models", f"{name} ({model.package}), {model.call}", partial(before_and_after, model), needs=(model.package,),
         tolerance=None)
    for name, model in MODELS.items()
]  # fmt: skip
