"""The host side of the Triton kernels on tensors without values, while no kernel runs.

To read a value, as waiting for the device does, or to have a size depend on one, raises there: what passes can be
captured in a CUDA graph.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlstm import cells
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Gradients, Layer, Run

pytest.importorskip("triton", reason="triton is made for Linux on x86-64")

from fastlstm.backends.triton import backward_pass, launch, resident, stepwise
from fastlstm.backends.triton import device as gpu


def test_the_tensors_device_becomes_the_current_one(monkeypatch):
    current, second = [0], SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))

    def exchange(device):
        before, current[0] = current[0], device
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    with launch.on_device(second.device):
        assert current == [1]
    assert current == [0]


@pytest.fixture
def launches(monkeypatch):
    """For each launch whether it was made where its tensors' device was the current one."""
    found, current = [], []

    @contextmanager
    def on_device(place):
        current.append(place)
        yield
        current.pop()

    class Recorded:
        def __getitem__(self, places):
            return self.run

        def warmup(self, *arguments, grid, **options):
            self.run(*arguments)

        def run(self, *arguments, **options):
            found.append({a.device for a in arguments if isinstance(a, torch.Tensor)} == {*current})

    for module in (launch, backward_pass):
        monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "pack_kernel", Recorded())
    for kernels in (resident, stepwise):
        for name in ("forward_kernel", "backward_kernel"):
            monkeypatch.setattr(kernels, name, Recorded())
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stack_size", [None, 2])
@pytest.mark.parametrize("precision", ["native", "tf32", "ieee"])
@pytest.mark.parametrize("H", [40, 300])
def test_launches_wait_for_nothing(launches, H, precision, stack_size, masked):
    T, B, I = 5, 6, 28

    def empty(*shape, dtype=torch.bfloat16 if precision == "native" else torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    stack = () if stack_size is None else (stack_size,)
    x, states = empty(B, T, I).transpose(0, 1), (empty(1, H).expand(B, H), empty(B, H))
    masks = (empty(B, dtype=torch.int64), empty(T, B, dtype=torch.bool)) if masked else (None, None)
    biases = (empty(*stack, 4 * H) for _ in range(2))
    layer = Layer(x, (empty(*stack, 4 * H, I), empty(*stack, 4 * H, H), *biases), states, *masks, True, cells.lstm)
    run = backend.forward(layer, True, precision)
    incoming = Run(empty(1, 1, 1).expand(T, B, H), (None, empty(B, H)), ())
    found = backend.backward(incoming, layer, run, Gradients.of(cells.lstm, [True] * 7), precision)
    assert [a.shape for a in found.flat] == [layer.tensors[n].shape for n in range(7)]
    # one a pass, and one to pack the weights for it; or one a step, and one for dh_0
    assert len(launches) == ((2 if precision == "native" else 4) if H == 40 else 2 * T + 1)
    assert all(launches)


class Products(TorchDispatchMode):
    """The names of torch's products of matrices."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "zero" not in function.overloadpacket.__name__  # a launch that the kernels can do without
        if "mm" in function.overloadpacket.__name__:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("zeros", [False, True])
def test_torch_multiplies_all_steps_at_once(launches, zeros):
    """A batch-first input is no reason for a product a step, and states that are zero are no reason for a launch."""
    T, B, I, H = 5, 6, 28, 40
    x, states = torch.empty(B, T, I, device="meta").transpose(0, 1), (torch.empty(B, H, device="meta"),) * 2
    weights = (torch.empty(4 * H, *end, device="meta") for end in ((I,), (H,), (), ()))
    layer = Layer(x, tuple(weights), (None, None) if zeros else states, None, None, False, cells.lstm)
    with Products() as products:
        run = backend.forward(layer, True, "tf32")
        backend.backward(Run(run.h, (None, None), ()), layer, run, Gradients.of(cells.lstm, [True] * 7), "tf32")
    # x; dx, dweight_ih, dweight_hh of the first step and of the others
    assert products.names == ["addmm", "mm", "mm", "mm", *["addmm"] * (not zeros)]
