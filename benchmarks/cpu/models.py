"""Models that others wrote, before and after `fastlstm.replace`. A training step has that of Adam."""

from copy import deepcopy
from functools import partial

import torch

import fastlstm
from benchmarks.cpu.third_party import MODELS, ThirdParty
from benchmarks.shared.calls import check, of_model
from benchmarks.shared.case import OURS, Case, Runs

TOLERANCE = 1e-3  # float32 through whole models


def before_and_after(model: ThirdParty, mode: str) -> Runs:
    theirs, call = model.build()
    ours = fastlstm.replace(deepcopy(theirs), keep_type=model.keep_type)
    with torch.no_grad():
        check(call(ours.eval()), call(theirs.eval()), TOLERANCE)  # in training dropout draws
    models = {OURS: ours.train(mode == "training"), "torch": theirs.train(mode == "training")}
    return {name: of_model(mode, each, call) for name, each in models.items()}


CASES = [
    Case("models", f"{name} ({model.package}), {model.call}", partial(before_and_after, model), needs=(model.package,),
         tolerance=None)
    for name, model in MODELS.items()
]  # fmt: skip
