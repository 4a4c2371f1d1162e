"""What `auto` does where a GPU is there and its kernels do not run: one warning, right results, and no exception.

CPU tensors count as those of a GPU here. Triton really compiles for it, and fails in its own way.
"""

import json
import os

import pytest

from tests.helpers import ROOT, interpreter
from tests.helpers.transforms import needs_triton

CODE = """
import json, os, sys, warnings
import torch, fastlstm
from fastlstm.backends import dispatch
from fastlstm.backends.triton import device as gpu

how = sys.argv[1]
gpu.INTERPRET = True  # CPU tensors are taken
gpu.is_gpu = lambda device: device.type == "cpu"
torch.cuda.is_current_stream_capturing = lambda: how == "too large in a capture"
if how != "broken package":
    from types import SimpleNamespace
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from benchmarks.gpu.host import UTILITIES

    def without_compiler(source, metadata):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    utilities = SimpleNamespace(**vars(UTILITIES))
    if how.startswith("too large"):
        utilities.get_device_properties = lambda device: {"max_shared_mem": 64 << 10}
    driver.set_active(SimpleNamespace(
        utils=utilities, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=without_compiler if how == "no C compiler" else lambda source, metadata: lambda *_: None,
    ))

def results(module, x, lengths):
    for parameter in module.parameters():
        parameter.grad = None
    output, states = module(x, lengths=lengths)
    output.sum().backward()
    return [output, *states, *(parameter.grad for parameter in module.parameters())]

x, lengths = torch.randn(5, 3, 7), torch.tensor([5, 0, 3])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for H in (128, 120):
        module = fastlstm.LSTM(7, H)
        for given in (None, None, lengths):
            found = results(module, x, given)
            with fastlstm.use_backend("reference"):
                wanted = results(module, x, given)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
try:
    fastlstm.LSTM(7, 128, backend="triton")(x)
except RuntimeError as error:
    by_name = str(error)
other = fastlstm.LSTM(7, 32)
options = {"cell": fastlstm.cells.lstm, "masked": False, "inner_states": False}
weights = tuple(parameter.detach() for parameter in other.parameters())
layer = fastlstm.backends.base.Layer(x, weights, (None, None), None, None, False, fastlstm.cells.lstm)
os.environ["FASTLSTM_CHECK"] = "0"  # whose kernels do nothing, so that a comparison would fail
smaller = dispatch.choose("auto", x.device, x.dtype, **options, layer=layer, warn=False)
messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
print(json.dumps([messages, by_name, smaller]))
"""
HOW = {  # what Triton's own error says, and what runs smaller layers
    "broken package": ("cannot use the triton that is installed: OSError: no driver library", "aten"),
    "broken compiler": ("PTXAS", "aten"),
    "no C compiler": ("Failed to find C compiler", "aten"),
    "no cache": ("NotADirectoryError", "aten"),
    "too large": ("OutOfResources: out of resource: shared memory", "triton"),
    "too large in a capture": ("OutOfResources: out of resource: shared memory", "triton"),
}


@needs_triton
@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] * (how in ("no C compiler", "too large"))) for how in HOW]
)
def test_one_warning_and_right_results(how, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    if how == "broken package":
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise OSError('no driver library')")
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    if how == "broken compiler":
        (tmp_path / "ptxas").write_text("#!/bin/sh\n[ $1 = --version ] && echo release 12.9, V12.9.0 || exit 1\n")
        (tmp_path / "ptxas").chmod(0o755)
        environment |= dict.fromkeys(("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"), str(tmp_path / "ptxas"))
    if how == "no cache":
        (tmp_path / "cache").write_text("a file, in which no folder can be made")
    done = interpreter.run(CODE, how, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    warned, by_name, smaller = json.loads(done.stdout.splitlines()[-1])  # after what Triton prints
    text, expected = HOW[how]
    assert len(warned) == 1, "\n".join(warned)
    assert text in warned[0]
    assert "auto runs a layer of lstm in torch's own layer" in warned[0]
    if how != "broken package":
        assert all(part in warned[0] for part in ("Please report this with", "torch 2.", "triton 3.", "H 128"))
    assert text in by_name
    assert smaller == expected
