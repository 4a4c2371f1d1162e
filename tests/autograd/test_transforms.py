"""Operators under opcheck, and the tools around autograd: checkpoints, hooks, autocast with a scaler, tracers."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastlstm
from tests.helpers.layers import TORCH, Layer, needs_native
from tests.helpers.transforms import BACKENDS, backends_but_slow, dtype_of, slow_in_the_interpreter


@pytest.mark.parametrize(
    ("backend", "stacked", "reverse", "masked", "requires_grad", "given"),
    [
        ("numba", False, False, False, True, False),
        pytest.param("numba", False, True, True, False, True, marks=pytest.mark.slow),
        pytest.param("numba", True, False, False, True, True, marks=pytest.mark.slow),
        ("numba", True, True, True, False, False),
        pytest.param("native", False, True, True, False, True, marks=needs_native),
        pytest.param("reference", False, False, True, False, True, marks=pytest.mark.slow),
        pytest.param("reference", False, False, True, True, False, marks=pytest.mark.slow),
        pytest.param("triton-ieee", False, True, True, True, True, marks=slow_in_the_interpreter),
        pytest.param("triton-ieee", True, False, False, False, False, marks=slow_in_the_interpreter),
    ],
    indirect=["backend"],
)
def test_opcheck(backend, stacked, reverse, masked, requires_grad, given):
    layer = Layer(3, 4, 5, 6, reverse=reverse, masked=masked)
    x, *states, w_ih, w_hh, b_ih, b_hh = layer.to(dtype_of(backend), requires_grad=False)
    weights = [torch.stack([a, a / 2]) if stacked else a for a in (w_ih, w_hh, b_ih, b_hh)]
    tensors = [a.requires_grad_(requires_grad) for a in (x, *weights, *states)]
    if not given:
        tensors[4:] = [None] * 3  # one bias, states of zeros
    args = (*tensors, layer.lengths, layer.reset, reverse)
    torch.library.opcheck(torch.ops.fastlstm.forward.default, (*args, True, backend))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.fastlstm.forward.default, (*args, False, backend))
        h, _, _, c, gates = torch.ops.fastlstm.forward(*args, True, backend)
    torch.library.opcheck(torch.ops.fastlstm.layer.default, (*args, masked, backend))  # with cells or without
    dh, dh_n, dc_n, _ = (g.to(x.dtype) for g in layer.gradients)
    inputs = (dh, dh_n, dc_n, None, *args[:9], h, c, gates, reverse)
    torch.library.opcheck(
        torch.ops.fastlstm.backward.default, (*inputs, [True, True, False, True, False, given, False], backend)
    )


@backends_but_slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(backend, use_reentrant):
    lstm = fastlstm.LSTM(5, 6, num_layers=2, dtype=dtype_of(backend), backend=backend)
    x = torch.randn(4, 3, 5, dtype=dtype_of(backend), requires_grad=True)
    checkpoint(lstm, x, use_reentrant=use_reentrant)[0].pow(2).sum().backward()
    got = [x.grad, *(p.grad for p in lstm.parameters())]
    want = torch.autograd.grad(lstm(x)[0].pow(2).sum(), [x, *lstm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def to_numpy(a):
    return a.device, a.cpu().numpy()


def from_numpy(saved):
    device, array = saved
    return torch.from_numpy(array).to(device)


@backends_but_slow
@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(to_numpy, from_numpy)])
def test_saved_tensors_may_be_moved(backend, hooks):
    lstm = fastlstm.LSTM(5, 6, num_layers=2, dtype=dtype_of(backend), backend=backend)
    x = torch.randn(4, 3, 5, dtype=dtype_of(backend))
    with hooks():
        output = lstm(x)[0]
    got = torch.autograd.grad(output.sum(), list(lstm.parameters()))
    want = torch.autograd.grad(lstm(x)[0].sum(), list(lstm.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("native", marks=needs_native)], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, None])
def test_autocast_training(backend, dtype, given):
    """Whatever the dtype of input and state, as under autocast every matrix product of torch takes it."""
    if backend == "triton-ieee" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as integers")
    lstm, x = fastlstm.LSTM(6, 7, backend=backend), torch.randn(5, 3, 6).to(given or dtype)
    state = torch.zeros(1, 3, 7, dtype=dtype), torch.zeros(1, 3, 7)
    device = x.device.type
    optimizer, scaler = torch.optim.SGD(lstm.parameters(), lr=0.1), torch.amp.GradScaler(device, init_scale=2.0**10)
    before = [p.detach().clone() for p in lstm.parameters()]
    with torch.autocast(device, dtype):
        output, (h_n, c_n) = lstm(x, state)
        loss = output.float().pow(2).mean()
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    scaler.scale(loss).backward()
    rounded = fastlstm.LSTM(6, 7, backend="reference")
    rounded.load_state_dict({k: v.to(dtype).float() for k, v in lstm.state_dict().items()})
    want = rounded(x.to(dtype).float())[0].pow(2).mean()
    wanted = torch.autograd.grad(want, list(rounded.parameters()))
    # the output, its gradient and the parameter's gradient are each rounded once; by kernels of 16 bits also the states
    # and gates of each step
    bound = (8 if backend == "triton-ieee" else 4) * torch.finfo(dtype).eps
    for p, gradient in zip(lstm.parameters(), wanted):
        assert p.grad.dtype == torch.float32
        atol = bound * gradient.abs().max().item()
        torch.testing.assert_close(p.grad / 2.0**10, gradient, rtol=bound, atol=atol)
    scaler.step(optimizer)
    scaler.update()
    for p, old, gradient in zip(lstm.parameters(), before, wanted):
        torch.testing.assert_close(p, old - 0.1 * gradient, rtol=0, atol=0.1 * bound * gradient.abs().max().item())


def test_mixed_dtypes_without_autocast_are_refused():
    with pytest.raises(ValueError, match=r"(?i)input .*type"):  # in torch.nn.LSTM's words, which releases have changed
        fastlstm.LSTM(6, 7)(torch.randn(5, 3, 6).bfloat16())


@pytest.mark.parametrize("trained", [True, False])
def test_an_operator_alone_refuses_a_tangent(trained):
    """Torch lets no operator define forward mode, and would answer zero: docs/limits.md."""
    lstm, x = fastlstm.LSTM(3, 4).requires_grad_(trained), torch.randn(5, 2, 3)
    alone = [torch.export.export(lstm, (x,)).module()]
    if not trained and TORCH < (2, 14):  # which lets no tangent into compiled code
        alone.append(torch.compile(lstm, backend="aot_eager"))
    assert jvp(lambda x: lstm(x)[0], (x,), (x,))[1].abs().max() > 0
    with pytest.raises(NotImplementedError, match="fastlstm::forward has no forward mode"):
        jvp(lambda x: alone[0](x)[0], (x,), (x,))
    for program in alone:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="fastlstm::forward has no forward mode"):
            program(forward_ad.make_dual(x, x))
        with torch.no_grad():  # nothing is left behind
            assert torch.equal(program(x)[0], lstm(x)[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="fastlstm::forward has no forward mode"):
        vmap(lambda x: alone[0](x)[0])(forward_ad.make_dual(torch.stack((x, x)), torch.randn(2, *x.shape)))


def test_an_operators_backward_refuses_a_tangent():
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    h = torch.compile(lstm, backend="aot_eager", fullgraph=True)(x)[0]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="fastlstm::backward has no forward mode"):
        torch.autograd.grad(h, lstm.weight_hh_l0, forward_ad.make_dual(torch.ones_like(h), torch.ones_like(h)))


def test_a_level_opened_around_what_is_compiled_already():
    lstm, x = fastlstm.LSTM(3, 4, backend="numba").requires_grad_(False), torch.randn(5, 2, 3)

    def compiled(fullgraph):
        torch._dynamo.reset()
        program = torch.compile(lstm, backend="eager", fullgraph=fullgraph)
        assert torch.equal(program(x)[0], lstm(x)[0])
        return program

    if TORCH >= (2, 14):  # torch breaks its graph at a dual number, and runs what follows uncompiled
        program = compiled(fullgraph=True)
        with forward_ad.dual_level(), pytest.raises(torch._dynamo.exc.Unsupported, match="dual tensor"):
            program(forward_ad.make_dual(x, x))
    program = compiled(fullgraph=TORCH < (2, 14))
    with forward_ad.dual_level():
        got, want = (forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))[0]).tangent for f in (program, lstm))
    assert torch.equal(got, want)


def test_script_is_refused():
    """TorchScript compiles no keyword-only arguments with defaults; in Python 3.10 an annotation stops it before."""
    refused = torch.jit.frontend.NotSupportedError, TypeError
    with pytest.raises(refused, match=r"keyword-only arguments|is not a valid constant"):
        torch.jit.script(fastlstm.LSTM(3, 4))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fastlstm.LSTM(3, 4)

    def forward(self, x):
        return self.lstm(x)[0].relu()


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, torch.nn.RNNBase) or super().is_leaf_module(module, name)


def test_symbolic_trace_needs_a_leaf():
    """FX cannot trace through checks of arguments, neither torch.nn.LSTM's nor ours; it spares modules of torch.nn."""
    for module in (torch.nn.LSTM(3, 4), fastlstm.LSTM(3, 4), Model()):
        with pytest.raises((torch.fx.proxy.TraceError, TypeError), match=r"control flow|got Proxy"):
            torch.fx.symbolic_trace(module)
    model, x = Model(), torch.randn(5, 2, 3)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))
