"""Threads that write to weights while others call: what is kept of the weights is of one state of them."""

import pytest
import torch

import fastlstm
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.modules import pair
from tests.helpers.threads import at_once
from tests.helpers.tolerances import close

KINDS = [torch.float32, torch.bfloat16, torch.float16]


def infer(module, x):
    with torch.no_grad():
        return module(x)[0]


def write_elements(module):
    elements = module.weight_hh_l0.data.view(-1)
    for k in range(6):
        elements[37 * k] += 1


def swap_in_and_out(module):
    """As an average of the weights is evaluated between two training steps."""
    weights = module.weight_hh_l0.data
    own = weights.clone()
    for _ in range(6):
        weights.copy_(own + 1)
        weights.copy_(own)


@pytest.mark.parametrize("write", [write_elements, swap_in_and_out])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_call_after_the_writes_sees_them(backend, dtype, write):
    module, x = fastlstm.LSTM(40, 100, backend=backend, dtype=dtype), torch.randn(2, 3, 40, dtype=dtype)
    for _ in range(25):
        module.release_memory()  # what the threads then pack
        at_once(lambda: infer(module, x), lambda: infer(module, x), lambda: write(module))
        got = infer(module, x)
        module.release_memory()
        assert torch.equal(got, infer(module, x))


def test_gradients_after_the_writes_are_right():
    module, x = fastlstm.LSTM(40, 100), torch.randn(1, 3, 40, requires_grad=True)

    def gradients():
        return torch.autograd.grad(module(x)[0].sum(), x)[0]

    for _ in range(25):
        module.release_memory()
        at_once(gradients, gradients, lambda: swap_in_and_out(module))
        got = gradients()
        module.release_memory()
        assert torch.equal(got, gradients())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["cell", "sequence"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_weights_written_between_the_passes_count_in_both_as_torchs_do(backend, kind, warm):
    """A write that PyTorch does not count is no error there: each pass takes the weights as it finds them."""
    like, results = torch.nn.LSTMCell if kind == "cell" else torch.nn.LSTM, []
    theirs, ours = pair(5, 33, like=like, exact=torch.float32, dtype=torch.float32, backend=backend)
    x, h_0, c_0 = torch.randn(3, 5), torch.randn(3, 33), torch.randn(3, 33)
    for module in (theirs, ours):
        shape = () if kind == "cell" else (1,)
        inputs = [a.expand(*shape, -1, -1).clone().requires_grad_() for a in (x, h_0, c_0)]

        def call(module=module, inputs=inputs):
            return module(inputs[0], (inputs[1], inputs[2]))[0].sum()

        for _ in range(2 * warm):
            call().backward()
        loss = call()
        dict(module.named_parameters())["weight_hh" if kind == "cell" else "weight_hh_l0"].data.mul_(3)
        results.append(torch.autograd.grad(loss, inputs))
    close(*results, "sums")
