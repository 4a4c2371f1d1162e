"""`recompute=True`: the same results and gradients from less memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fastlstm
from tests.helpers.cases import CELLS, DRAWS, PROJECTED, cases, largest_error
from tests.helpers.modules import same
from tests.helpers.threads import split, splits
from tests.helpers.tolerances import F64, close
from tests.helpers.transforms import exporting

PART = 128  # the steps of a part, of sequences that are no longer than its square
LONG = 3 * PART + 7  # three parts and a short one


def both(kind, *sizes, **options):
    """A module that recomputes, and its twin that does not."""
    module = kind(*sizes, recompute=True, **options).double()
    twin = copy.deepcopy(module)
    twin.recompute = False
    return module, twin


@settings(max_examples=25, **DRAWS)
@given(data=st.data(), threads=splits)
def test_results_and_gradients(data, threads):
    """Of any cell, masks, layers and directions, and of one part, several, and a short one."""
    sizes = st.tuples(st.sampled_from([1, PART, PART + 1, LONG]), *[st.integers(1, 9)] * 3)
    names = st.sampled_from([name for name in CELLS if name != PROJECTED])
    backend = data.draw(st.sampled_from(["numba", "reference"]))
    case = data.draw(cases(backend, (F64,), name=names, size=sizes))
    with split(*threads):
        outputs, gradients = case.results()
        case.module.recompute = True
        outputs_of_parts, gradients_of_parts = case.results()
    assert same(outputs_of_parts, outputs)
    assert largest_error(gradients_of_parts, gradients) < 1e-12  # sums over hundreds of steps, added up part by part


def test_transforms_and_autocast():
    module, twin = both(fastlstm.GRU, 2, 3)
    x = torch.randn(PART + 3, 2, 2, dtype=torch.double)

    def loss(parameters, m):
        return functional_call(m, parameters, (x,))[0].square().sum()

    got, want = (grad(loss)(dict(m.named_parameters()), m) for m in (module, twin))
    close(list(got.values()), list(want.values()), "sums")
    module, twin, x = module.float(), twin.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (m(x)[0] for m in (module, twin))
    assert first.dtype == second.dtype
    first.float().sum().backward()
    second.float().sum().backward()
    of_module, of_twin = ([p.grad.bfloat16() for p in m.parameters()] for m in (module, twin))
    close(of_module, of_twin, "long")


def kept_bytes(module, x):
    """What autograd keeps of a call, beside parameters and the input."""
    kept = {}

    def pack(a):
        kept[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        output = module(x)[0]
    given = {a.untyped_storage().data_ptr() for a in (x, *module.parameters())}
    return sum(size for place, size in kept.items() if place not in given), output.nbytes


def test_less_is_kept():
    module, twin = both(fastlstm.LSTM, 8, 16)
    x = torch.randn(40 * PART, 2, 8, dtype=torch.double)
    (kept, output), (all_kept, _) = (kept_bytes(m, x) for m in (module, twin))
    assert kept < 0.1 * output  # states between parts
    assert all_kept > 5 * output  # h, c and gates


def test_the_option():
    module = fastlstm.LSTM(3, 5, recompute=True)
    assert module.recompute
    assert "recompute=True" in repr(module)
    assert not module.to_torch().__dict__.get("_recompute")
    with pytest.raises(TypeError, match="recompute should be a bool, got: int"):
        fastlstm.GRU(3, 5, recompute=1)
    with pytest.raises(ValueError, match="recompute needs a module without projection, got recompute=True and"):
        fastlstm.LSTM(3, 5, proj_size=2, recompute=True)


def test_second_derivatives_of_calls_that_depend_on_each_other():
    """The state of one call goes into the next, and h_0 is computed from x: each gradient counts once."""
    module, twin = both(fastlstm.LSTM, 2, 3)
    x = torch.randn(2, PART + 3, 2, 2, dtype=torch.double, requires_grad=True)
    found = []
    for m in (module, twin):
        first = x[0].mean((0, 2)).view(1, 2, 1).expand(1, 2, 3).contiguous()
        _, states = m(x[0], (first, first.cos()))
        outputs = m(x[1], states)[0].square().sum()
        gradients = torch.autograd.grad(outputs, [x, *m.parameters()], create_graph=True)
        found.append([*gradients, *torch.autograd.grad(sum(a.square().sum() for a in gradients), [x, *m.parameters()])])
    close(*found, "derivatives")


def test_within_a_checkpoint():
    """Its hooks let a saved tensor be read once."""
    module, twin = both(fastlstm.LSTM, 2, 3)
    x = torch.randn(PART + 3, 2, 2, dtype=torch.double, requires_grad=True)
    found = []
    for m in (module, twin):
        output = checkpoint(lambda x, m=m: m(x)[0], x, use_reentrant=False)
        found.append(torch.autograd.grad(output.square().sum(), [x, *m.parameters()]))
    close(*found, "sums")


def test_the_backward_pass_runs_on_the_backend_of_the_forward_pass():
    module = fastlstm.LSTM(2, 3, recompute=True)
    x = torch.randn(PART + 3, 2, 2, requires_grad=True)
    with fastlstm.use_backend("reference"):
        output = module(x, lengths=[5, PART + 3])[0]
    with fastlstm.use_backend("aten"):  # which takes no lengths
        output.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are checked, and traced as they are
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_a_trace_and_an_export_leave_the_number_of_steps_open():
    module, x = fastlstm.LSTM(2, 3, recompute=True), torch.randn(LONG, 2, 2)
    traced = torch.jit.trace(module, (x,))
    with exporting():
        exported = torch.export.export(module, (x,), dynamic_shapes={"input": {0: Dim("T", max=10_000)}}).module()
    for steps in (2, PART, 5 * PART + 3):
        other = torch.randn(steps, 2, 2)
        want = module(other)[0]
        for program in (traced, exported):
            assert torch.equal(program(other)[0], want)


def test_open_sizes_compile_once():
    module = fastlstm.LSTM(2, 3, recompute=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, compilations = torch.compile(module, backend=counter, fullgraph=True, dynamic=True), set()
    for steps in (LONG, 5, 5 * PART):
        x = torch.randn(steps, 4, 2, requires_grad=True)
        got, want = compiled(x)[0], module(x)[0]
        compilations.add(counter.frame_count)
        assert torch.equal(got, want)
        directions = torch.randn_like(want)
        close(torch.autograd.grad(got, x, directions)[0], torch.autograd.grad(want, x, directions)[0], "gradients")
    assert len(compilations) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_type_that_changes_before_the_backward_pass(dtype):
    module, x = fastlstm.LSTM(2, 3, recompute=True), torch.randn(LONG, 2, 2)
    errors = []
    for module.recompute in (True, False):
        output = module.float()(x)[0]
        module.to(dtype)
        with pytest.raises(RuntimeError, match=f"torch.float32 that .* has become {dtype} since") as error:
            output.sum().backward()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_sums_of_sixteen_bits_are_wide():
    module = fastlstm.LSTM(4, 5, recompute=True).bfloat16()
    exact = copy.deepcopy(module).double()
    exact.recompute = False
    x = torch.randn(30 * PART, 2, 4).bfloat16()
    module(x)[0].float().sum().backward()
    exact(x.double())[0].sum().backward()
    for p, q in zip(module.parameters(), exact.parameters()):
        assert (p.grad.double() - q.grad).norm() < 5e-3 * q.grad.norm()  # one rounding is 2e-3


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_a_tensor_that_is_written_to_before_the_backward_pass(changed):
    module, x = fastlstm.LSTM(2, 3, recompute=True), torch.randn(LONG, 2, 2)
    output = module(x)[0]
    with torch.no_grad():
        (x if changed == "x" else module.weight_hh_l0).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
