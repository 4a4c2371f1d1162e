"""What plans of the Triton backend start, beside what Triton itself starts, on a device that does nothing."""

import json
import os

import pytest

from tests.helpers import ROOT, interpreter
from tests.helpers.transforms import needs_triton

# Prints for each step of training how many launches were Triton's own, and all launches.
STEPS = """
import json, sys
import torch, triton
import fastlstm
from benchmarks.gpu import host

backend, dtype, H, masked, other = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
launches, own, stream = [], [], [0]

def told(a):
    if isinstance(a, torch.Tensor):
        return [str(a.dtype), list(a.shape), list(a.stride()), a.data_ptr() % 16]
    return list(map(told, a)) if isinstance(a, tuple) else str(a)

def launched(x, y, z, stream, function, metadata, of_launch, enter, leave, *arguments):
    launches.append([[x, y, z], stream, enter is hook, told(arguments)])

def counted(self, *arguments, **options):
    own.append(self)
    return original(self, *arguments, **options)

def hook(metadata):
    pass

def shifted(a):
    return torch.cat([a.flatten()[:1], a.flatten()])[1:].view(a.shape)

with host.idle(launched, lambda device: stream[0]):
    original = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = counted
    lstm = fastlstm.LSTM(4, H, 2, backend=backend, dtype=dtype)
    x, lengths = torch.randn(3, 2, 4, dtype=dtype), torch.tensor([3, 2]) if masked else None
    gradients = torch.ones(3, 2, H, dtype=dtype), torch.ones(2, 2, H, dtype=dtype)
    for step in range(3):
        output, (h_n, c_n) = lstm(x, lengths=lengths)
        number = 1 if step == 2 and other == "gradients" else 2
        torch.autograd.backward((output, h_n)[:number], gradients[:number])
        print(json.dumps([len(own), launches]))
        launches.clear(), own.clear()
        if step == 1 and other == "stream":
            stream[0] = 7
        if step == 1 and other == "hook":
            triton.knobs.runtime.launch_enter_hook = hook
        if step == 1 and other == "memory":
            x, *gradients = map(shifted, (x, *gradients))
            for parameter in lstm.parameters():
                parameter.data = shifted(parameter.data)
        if step == 1 and other == "precision":
            torch.backends.cudnn.rnn.fp32_precision = "ieee"
"""


def steps(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = interpreter.run(STEPS, json.dumps(arguments), cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr
    return map(json.loads, done.stdout.splitlines())


@needs_triton
@pytest.mark.sampled(5)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["triton", "triton-tf32", "triton-ieee"])
@pytest.mark.parametrize("H", [32, 200])
def test_a_plan_starts_what_triton_starts(H, backend, masked):
    dtype = "bfloat16" if backend == "triton" else "float32"
    (first, by_triton), (second, again), (third, by_plan) = steps(backend, dtype, H, masked, "")
    assert first > 0
    assert second == third == 0
    assert by_triton == again == by_plan


@needs_triton
@pytest.mark.parametrize(("change", "place", "value"), [("stream", 1, 7), ("hook", 2, True)])
def test_streams_and_hooks_are_those_of_the_call(change, place, value):
    (_, first), _, (own, last) = steps("triton", "float32", 32, False, change)
    assert own == 0
    assert {launch[place] for launch in last} == {value}
    assert [launch[3] for launch in last] == [launch[3] for launch in first]


@needs_triton
@pytest.mark.parametrize("H", [32, 200])
def test_kernels_get_aligned_memory_wherever_tensors_lie(H):
    """What was compiled for the first call's alignments would else read wrong addresses."""
    (_, first), _, (own, last) = steps("triton", "bfloat16", H, False, "memory")
    assert own == 0
    assert last == first


@needs_triton
@pytest.mark.parametrize("change", ["precision", "gradients"])
def test_other_kernels_are_taken_where_they_have_to_be(change):
    """For another precision, or a gradient that does not come in, neither of which plans are found by."""
    (_, first), (second, again), (third, last) = steps("triton", "float32", 32, False, change)
    assert (second, again) == (0, first)
    assert third > 0
    assert last != first
