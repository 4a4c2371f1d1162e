"""What torch's recurrent operators compute under `fastlstm.patch_operators`, and which calls stay torch's.

Ours are told from torch's by their bits, which are those of the same model after `fastlstm.replace`.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves

import fastlstm
from tests.helpers.calls import CPU, Calls
from tests.helpers.contract import LAYERS
from tests.helpers.modules import OURS, flat, same
from tests.helpers.operators import layer, of, ours, packed
from tests.helpers.tolerances import close

each_layer = pytest.mark.parametrize("name", LAYERS)
FORMS = {
    "whole": lambda x, batch_first: x,
    "packed": packed,
    "equal": lambda x, batch_first: pack_padded_sequence(x, [6] * 6, batch_first),
    "alone": lambda x, batch_first: x[0],
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@settings(max_examples=60)
@given(
    name=st.sampled_from([*LAYERS, "LSTM with a projection"]),
    options=st.fixed_dictionaries(
        {"num_layers": st.integers(1, 2), **dict.fromkeys(("bidirectional", "batch_first", "bias"), st.booleans())}
    ),
    form=st.sampled_from(list(FORMS)),
    has_states=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
)
def test_every_operator(name, options, form, has_states, dtype):
    """The results of a module are those of ours and near those in float64."""
    sizes = {"LSTM": [23, 23], "LSTM with a projection": [5, 23]}.get(name, [23]) * has_states
    if name in LAYERS:
        module = layer(name, 7, 23, dtype=dtype, **options)
    else:
        dtype = torch.float32
        module = nn.LSTM(7, 23, proj_size=5, **options)
    count = module.num_layers * (1 + module.bidirectional)
    x, *states = (torch.randn(shape) for shape in ((6, 6, 7), *((count, *[6] * (form != "alone"), n) for n in sizes)))

    def results(module, dtype=dtype):
        given = [a.to(dtype) for a in (x, *states)]
        return of(module, *given, given=lambda x: FORMS[form](x, module.batch_first))

    with fastlstm.patch_operators():
        got = results(module)
    assert same(got, results(ours(module)))
    assert {a.dtype for a in got} == {dtype}
    if dtype is not torch.bfloat16:
        close(got, results(copy.deepcopy(module).double(), torch.float64), "gradients")


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives(name, bias):
    module = layer(name, 4, 4, bias=bias, dtype=torch.float64)
    x = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        return tuple(flat(module(x)))

    with fastlstm.patch_operators():
        assert gradcheck(run, x)
        assert gradgradcheck(run, x)


@pytest.mark.parametrize("is_packed", [False, True])
def test_dropout_draws_what_torch_draws(is_packed):
    """In one module, whose probability changes."""
    module, x = nn.GRU(7, 23, 3), torch.randn(6, 6, 7)
    given = packed(x) if is_packed else x

    def results():
        found = []
        torch.manual_seed(0)
        for module.dropout in (0.5, 0.0, 0.2, 1.0):
            for training in (True, False):
                found += flat(module.train(training)(given))
        return found

    want = results()
    with fastlstm.patch_operators():
        got = results()
    close(got, want, "values")


@pytest.mark.sampled(5)
@each_layer
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_under_autocast(name, is_packed, dtype):
    module, x = layer(name, 7, 23, 2), torch.randn(6, 6, 7, dtype=dtype)
    module = module.double() if dtype == torch.float64 else module
    given = packed(x) if is_packed else x
    weights = module.state_dict()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            outputs = flat(module(given))
        return outputs, torch.autograd.grad([a.double().cos().sum() for a in outputs], module.parameters())

    theirs, _ = run()
    with fastlstm.patch_operators():
        got, gradients = run()
        with torch.backends.mkldnn.flags(enabled=False):
            without, _ = run()
    with torch.backends.mkldnn.flags(enabled=False):
        theirs_without, _ = run()
    for results, references in ((got, theirs), (without, theirs_without)):
        assert [a.dtype for a in results] == [a.dtype for a in references]
        for a, b in zip(results, references):  # numbers of 8 bits, in a few layers and steps
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=5e-2)
    assert [a.dtype for a in gradients] == [a.dtype for a in weights.values()]


def fake(module, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = flat(module(mode.from_tensor(x)))
    return [torch.empty(a.shape, device="meta") for a in outputs]


def count_operations(module, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        outputs = flat(module(x))
    return [*outputs, torch.tensor(counter.get_total_flops())]


def compiled(module, x):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        return of(torch.compile(module, fullgraph=True, backend="aot_eager"), x)


def gru(x, hx, weights, batch_first=False):
    return [*torch.gru(x, hx, weights, True, 1, 0.0, False, False, batch_first)]


PLAIN = True, 1, 0.0, False, False, False  # the options of an operator


def projected(H, P):
    """Weights of an LSTM with a projection, whose sizes torch's module refuses."""
    return [torch.randn(shape) for shape in ((4 * H, 7), (4 * H, P), (4 * H,), (4 * H,), (P, H))]


class Mine(torch.Tensor):
    """A subclass that does nothing."""


TORCH_S_OWN = {
    "a projection to as many": lambda m, x: [*torch.lstm(x, [torch.zeros(1, 6, 5)] * 2, projected(5, 5), *PLAIN)],
    "a projection to more": lambda m, x: [
        *torch.lstm(x, [torch.zeros(1, 6, a) for a in (9, 5)], projected(5, 9), *PLAIN)
    ],
    "a projection under autocast": lambda m, x: under_autocast(nn.LSTM(7, 23, proj_size=5), x),
    "no steps": lambda m, x: flat(m(x[:0])),
    "no rows": lambda m, x: flat(m(x[:, :0])),
    "other sizes": lambda m, x: gru(x, torch.zeros(1, 6, 22), [*m.parameters()]),
    "a missing weight": lambda m, x: gru(x, torch.zeros(1, 6, 23), [*m.parameters()][:3]),
    "no weights": lambda m, x: gru(x, torch.zeros(1, 6, 23), []),
    "other dtypes": lambda m, x: gru(x.double(), torch.zeros(1, 6, 23), [*m.parameters()]),
    "one step alone": lambda m, x: gru(x[0], torch.zeros(1, 6, 23), [*m.parameters()]),
    "one step alone, batch first": lambda m, x: gru(x[0], torch.zeros(1, 6, 23), [*m.parameters()], True),
    "one vector": lambda m, x: gru(x[0, 0], torch.zeros(1, 6, 23), [*m.parameters()], True),
    "grad": lambda m, x: tree_leaves(torch.func.grad(lambda p: total(m, p, x))(dict(m.named_parameters()))),
    "jvp": lambda m, x: tree_leaves(torch.func.jvp(lambda a: m(a)[0], (x,), (x,))),
    "vmap": lambda m, x: torch.vmap(lambda a: m(a)[0])(x.unsqueeze(2)),
    "dual numbers": lambda m, x: dual(m, x),
    "fake tensors": fake,
    "counted operations": count_operations,
    "compiled": compiled,
    "subclass": lambda m, x: [a.as_subclass(torch.Tensor) for a in flat(m(x.as_subclass(Mine)))],
    "quantized": lambda m, x: flat(quantized(m)(x)),
    "cell": lambda m, x: [nn.GRUCell(7, 23)(x[0])],
    "backend": lambda m, x: flat(backend_of_ours(m)(x)),
    "default backend": lambda m, x: flat(with_default("aten", m, x)),
}


def total(module, parameters, x):
    return torch.func.functional_call(module, parameters, (x,))[0].cos().sum()


def under_autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return flat(module(x))


def dual(module, x):
    with torch.autograd.forward_ad.dual_level():
        output = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))[0]
        return list(torch.autograd.forward_ad.unpack_dual(output))


def quantized(module):
    with pytest.warns(DeprecationWarning, match="quantization"):
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(module)))


def backend_of_ours(module):
    new = ours(module)
    new.backend = "aten"
    return new


def with_default(backend, module, x):
    with fastlstm.use_backend(backend):
        return module(x)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "compiled")) for case in TORCH_S_OWN]
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_stays_torch_s(case):
    """The same bits, or the same error."""
    module, x = nn.GRU(7, 23), torch.randn(6, 6, 7)

    def outcome():
        torch.manual_seed(0)
        try:
            return TORCH_S_OWN[case](module, x)
        except (RuntimeError, IndexError) as error:
            return str(error)

    want = outcome()
    with fastlstm.patch_operators():
        for _ in range(2):  # the call has a plan, which may not serve here
            module(x)
        got = outcome()
    if isinstance(want, str):
        assert got == want
    else:
        assert len(tree_leaves(want)) > 0
        torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=0, atol=0)


def test_weights_that_are_computed_anew(monkeypatch):
    """A module with weight_norm has a new tensor in each call, of which nothing is kept packed."""
    module, x, calls = nn.GRU(7, 23), torch.randn(6, 3, 7), Calls(monkeypatch, *CPU)
    exact = copy.deepcopy(module).double()
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(module, "weight_ih_l0")
    with fastlstm.patch_operators(), torch.no_grad():
        for _ in range(3):
            got = flat(module(x))
            module.weight_ih_l0_g.mul_(1.5)
    assert calls.count("plan") > calls.count("pack") == 0
    with torch.no_grad():
        exact.weight_ih_l0.mul_(1.5**2)  # the norm of each row, in the last call
    close(got, flat(exact(x.double())), "sums")


def test_symbolic_sizes_of_weights_stay_torch_s():
    x, h = torch.randn(6, 3, 7), torch.zeros(1, 3, 23)
    weights = [a.detach() for a in nn.GRU(7, 23).parameters()]
    expected = gru(x, h, weights)
    with fastlstm.patch_operators():
        traced = make_fx(lambda *arguments: gru(*arguments), tracing_mode="symbolic")(x, h, weights)
    close(traced(x, h, weights), expected, "values")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_states_is_refused_as_by_torch(count):
    x, weights, h = torch.randn(6, 3, 7), [a.detach() for a in nn.LSTM(7, 5).parameters()], torch.zeros(1, 3, 5)
    with fastlstm.patch_operators():
        for _ in range(2):
            torch.lstm(x, (h, h), weights, *PLAIN)
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            torch.lstm(x, [h] * count, weights, *PLAIN)


INFOS = [info for info in module_db if info.module_cls in OURS]


@pytest.mark.parametrize("info", INFOS, ids=[info.module_cls.__name__ for info in INFOS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_inputs_and_errors_of_module_db(info, dtype):
    """Torch's own inputs for its modules, run on those under the patch and on ours."""
    options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": True}
    for sample in info.module_inputs_func(info, **options):
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **{"dtype": dtype, **made.kwargs})
        want = flat(module(*given.args, **given.kwargs))
        close(flat(ours(module)(*given.args, **given.kwargs)), want, "sums")
        with fastlstm.patch_operators():
            close(flat(module(*given.args, **given.kwargs)), want, "sums")
    for error in info.module_error_inputs_func(info, **options):
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        for kind in (info.module_cls, OURS[info.module_cls]):
            with fastlstm.patch_operators(), pytest.raises(error.error_type, match=error.error_regex):
                kind(*made.args, **{"dtype": dtype, **made.kwargs})(*given.args, **given.kwargs)
