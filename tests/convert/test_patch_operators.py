"""Torch's recurrent operators under `fastlstm.patch_operators`: ours for every caller, or torch's own where ours has no
kernel.

Ours are told from torch's by their bits, which are those of the same model after `fastlstm.replace`.
"""

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastlstm
from tests.helpers.contract import LAYERS
from tests.helpers.modules import flat, same
from tests.helpers.threads import at_once
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")

each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def leaves_no_trace():
    yield
    fastlstm.unpatch_operators()


def layer(name, *sizes, **options):
    kind, more = LAYERS[name]
    return kind(*sizes, **more, **options)


class Model(nn.Module):
    """Two layers that a script can call."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(11, 37, batch_first=True)
        self.decoder = nn.GRU(37, 19, batch_first=True)

    def forward(self, x):
        return self.decoder(self.encoder(x)[0])[0]


def of(model, x):
    """The output of a model, and the gradients of its input and its parameters where it has any."""
    x = x.clone().requires_grad_()
    outputs = flat(model(x))
    gradients = torch.autograd.grad([a.double().cos().sum() for a in outputs], [x, *model.parameters()])
    return [*outputs, *gradients]


class Given(nn.Module):
    """A module whose input a function makes."""

    def __init__(self, module, given):
        super().__init__()
        self.module, self.given = module, given

    def forward(self, x):
        return self.module(self.given(x))


def ours(module):
    """The same module, of fastlstm's classes."""
    return fastlstm.replace(copy.deepcopy(module))


def saved_and_loaded(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


CALLERS = {
    "module": lambda model, x: model,
    "scripted": lambda model, x: torch.jit.script(model),
    "traced": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "loaded": saved_and_loaded,
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.script(copy.deepcopy(model).eval())),
    "exported": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("is_made_under_the_patch", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:The tensor attributes self")
def test_every_caller(caller, is_made_under_the_patch):
    """Twice, since the weights of a script are kept packed from their second call on."""
    model, x = Model(), torch.randn(5, 9, 11)
    with fastlstm.patch_operators() if is_made_under_the_patch else nullcontext():
        program = CALLERS[caller](model, x)
    want, before = of(ours(model), x), program(x)
    with fastlstm.patch_operators():
        if caller == "frozen":
            got, want = [program(x)], want[:1]
        else:
            got = of(program, x)
            assert same(of(program, x), got)
        with torch.no_grad():
            assert same([program(x), program(x)], [got[0]] * 2)
        with torch.inference_mode():
            assert same([program(x)], got[:1])
    assert same(got, want)
    close(got[0], copy.deepcopy(model).double()(x.double()), "values")
    assert same([program(x)], [before])


@pytest.mark.sampled(5)
@each_layer
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False, "bidirectional": True}],
    ids=["plain", "deep", "biasless"],
)
@pytest.mark.parametrize("form", ["whole", "packed", "equal", "alone"])
def test_every_operator(name, options, form):
    module, x = layer(name, 7, 23, **options), torch.randn(6, 6, 7)
    module_of_ours = ours(module)
    lengths = torch.tensor([3, 6, 1, 4, 6, 2] if form == "packed" else [6] * 6)

    def given(x):
        if form == "alone":
            return x[0]
        return x if form == "whole" else pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)

    with fastlstm.patch_operators():
        got = of(Given(module, given), x)
    assert same(got, of(Given(module_of_ours, given), x))
    exact = copy.deepcopy(module).double()
    close(got, of(Given(exact, given), x.double()), "gradients")


def test_states_that_are_given():
    module, x = nn.LSTM(7, 23, 2), torch.randn(6, 3, 7)
    hx = torch.randn(2, 3, 23, requires_grad=True), torch.randn(2, 3, 23, requires_grad=True)

    def run(module):
        outputs = flat(module(x, hx))
        return [*outputs, *torch.autograd.grad([a.cos().sum() for a in outputs], hx)]

    with fastlstm.patch_operators():
        got = run(module)
    assert same(got, run(ours(module)))


@pytest.mark.parametrize("is_packed", [False, True])
def test_dropout_draws_what_torch_draws(is_packed):
    module, x = nn.GRU(7, 23, 3, dropout=0.5), torch.randn(6, 3, 7)
    given = pack_padded_sequence(x, [6, 4, 1]) if is_packed else x

    def run(training):
        torch.manual_seed(0)
        return flat(module.train(training)(given))

    want = run(True), run(False)
    with fastlstm.patch_operators():
        got = run(True), run(False)
    close(got, want, "values")


@pytest.mark.sampled(5)
@each_layer
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_under_autocast(name, is_packed, dtype):
    module, x = layer(name, 7, 23, 2), torch.randn(6, 3, 7, dtype=dtype)
    module = module.double() if dtype == torch.float64 else module
    given = pack_padded_sequence(x, [6, 4, 1]) if is_packed else x
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


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    module, x = layer(name, 7, 23, dtype=dtype), torch.randn(6, 3, 7, dtype=dtype)
    with fastlstm.patch_operators():
        got = flat(module(x))
    assert same(got, flat(ours(module)(x)))
    assert {a.dtype for a in got} == {dtype}


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


def gru(x, hx, weights):
    return [*torch.gru(x, hx, weights, True, 1, 0.0, False, False, False)]


class Mine(torch.Tensor):
    """A subclass that does nothing."""


TORCH_S_OWN = {
    "projection": lambda m, x: of(nn.LSTM(7, 23, proj_size=5), x),
    "no steps": lambda m, x: flat(m(x[:0])),
    "no rows": lambda m, x: flat(m(x[:, :0])),
    "other sizes": lambda m, x: gru(x, torch.zeros(1, 3, 22), [*m.parameters()]),
    "a missing weight": lambda m, x: gru(x, torch.zeros(1, 3, 23), [*m.parameters()][:3]),
    "no weights": lambda m, x: gru(x, torch.zeros(1, 3, 23), []),
    "other dtypes": lambda m, x: gru(x.double(), torch.zeros(1, 3, 23), [*m.parameters()]),
    "one step alone": lambda m, x: gru(x[0], torch.zeros(1, 3, 23), [*m.parameters()]),
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
    module, x = nn.GRU(7, 23), torch.randn(6, 3, 7)

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


def test_patches_nest_and_end():
    module, x = nn.LSTM(11, 37), torch.randn(9, 5, 11)
    theirs, want = flat(module(x)), flat(ours(module)(x))
    assert not same(theirs, want)  # in so many numbers some bits differ
    with fastlstm.patch_operators():
        with fastlstm.patch_operators():
            assert same(flat(module(x)), want)
        assert same(flat(module(x)), want)
        fastlstm.unpatch_operators()
        assert same(flat(module(x)), theirs)
    patch = fastlstm.patch_operators()
    with patch:
        assert same(flat(module(x)), want)
    assert same(flat(module(x)), theirs)
    fastlstm.patch_operators()
    assert same(flat(module(x)), want)
    fastlstm.unpatch_operators()
    fastlstm.unpatch_operators()  # nothing is left to end
    assert same(flat(module(x)), theirs)
    with pytest.raises(KeyError), fastlstm.patch_operators():
        raise KeyError
    assert same(flat(module(x)), theirs)


@pytest.mark.parametrize("change", ["in place", "data", "new", "dtype"])
def test_weights_that_change(change):
    """Those of a loaded script, whose packed copies are kept."""
    model, x = Model(), torch.randn(1, 3, 11)
    program = saved_and_loaded(model, x).eval()

    @torch.no_grad()
    def alter(model):
        weight = model.encoder.weight_hh_l0
        if change == "in place":
            weight.mul_(2)
        elif change == "data":
            weight.data.numpy()[3, 5] = 7.0
        elif change == "new":
            weight.data = torch.ones_like(weight)
        else:
            model.double()

    with fastlstm.patch_operators(), torch.no_grad():
        for _ in range(3):
            program(x)
        alter(program)
        x = x.double() if change == "dtype" else x
        got = [program(x), program(x), program(x)]
    alter(model)
    with torch.no_grad():
        assert same(got, [ours(model)(x)] * 3)


def test_weights_that_are_computed_anew():
    """A module with weight_norm has a new tensor in each call."""
    module, x = nn.GRU(7, 23), torch.randn(6, 3, 7)
    exact = copy.deepcopy(module).double()
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(module, "weight_ih_l0")
    with fastlstm.patch_operators(), torch.no_grad():
        for _ in range(3):
            got = flat(module(x))
            module.weight_ih_l0_g.mul_(1.5)
    with torch.no_grad():
        exact.weight_ih_l0.mul_(1.5**2)  # the norm of each row, in the last call
    close(got, flat(exact(x.double())), "sums")


def test_nothing_keeps_a_model():
    x = torch.randn(1, 3, 11)
    with fastlstm.patch_operators():
        for make in (lambda: Model(), lambda: saved_and_loaded(Model(), x)):
            model = make()
            of(model, x)
            with torch.no_grad():
                model(x)
            weights = [weakref.ref(a) for a in model.parameters()]
            del model
            gc.collect()
            assert [weight() for weight in weights] == [None] * 8


def test_a_model_is_moved_and_copied():
    model, x = Model(), torch.randn(5, 9, 11)
    with fastlstm.patch_operators():
        model(x)
        again = copy.deepcopy(model).double()
        assert same([again(x.double())], [ours(again)(x.double())])
        assert type(again.encoder) is nn.LSTM


def test_second_derivatives():
    model, x = Model().double(), torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)

    def twice():
        (gradient,) = torch.autograd.grad(model(x).cos().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), [x, *model.parameters()])

    want = twice()
    with fastlstm.patch_operators():
        close(twice(), want, "gradients")


def test_a_profile_names_the_operators():
    model, x = Model(), torch.randn(5, 9, 11)
    with fastlstm.patch_operators():
        want = model(x)
        with torch.profiler.profile() as profile:
            got = model(x)
    assert same([got], [want])
    assert {"aten::lstm", "aten::gru"} <= {event.key for event in profile.key_averages()}


def test_an_export_has_the_same_nodes():
    model, x = Model(), torch.randn(5, 2, 11)  # of few steps, since each becomes nodes of its own

    def nodes():
        program = torch.export.export(model, (x,))
        programs = program, program.run_decompositions(), program.run_decompositions({})
        return [[str(node.target) for node in each.graph.nodes] for each in programs]

    want = nodes()
    with fastlstm.patch_operators():
        assert nodes() == want


def test_compiled_code_runs_what_it_ran(recwarn):
    model, x = Model(), torch.randn(5, 9, 11)

    def results():
        torch._dynamo.reset()
        return of(torch.compile(model, backend="aot_eager"), x)

    want = results()
    with fastlstm.patch_operators():
        assert same(results(), want)


def test_threads():
    model, x = Model(), torch.randn(5, 9, 11)
    program, results = saved_and_loaded(model, x), []

    def work():
        for _ in range(20):
            results.append(program(x))
            results.append(model(x))

    with fastlstm.patch_operators():
        at_once(*[work] * 4)
    assert same(results, [ours(model)(x)] * len(results))


@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_forked_processes():
    """Workers of a data loader, which fork."""
    model = Model()
    rows = [torch.randn(9, 11) for _ in range(6)]
    with fastlstm.patch_operators(), torch.no_grad():
        want = [ours(model)(row[None]) for row in rows]
        loader = torch.utils.data.DataLoader(
            rows, batch_size=1, num_workers=2, multiprocessing_context="fork", collate_fn=Collated(model)
        )
        assert same(list(loader), want)


class Collated:
    def __init__(self, model):
        self.model = model

    def __call__(self, rows):
        with torch.no_grad():
            return self.model(torch.stack(rows))


PROGRAM_IN_CPP = r"""
#include <torch/extension.h>
#include <torch/script.h>

std::vector<torch::Tensor> by_operator(torch::Tensor x, std::vector<torch::Tensor> weights) {
    torch::NoGradGuard guard;
    auto zeros = torch::zeros({1, x.size(1), weights[1].size(1)});
    auto results = torch::lstm(x, {zeros, zeros}, weights, true, 1, 0.0, false, false, false);
    return {std::get<0>(results), std::get<1>(results), std::get<2>(results)};
}

torch::Tensor by_module(torch::Tensor x, std::vector<torch::Tensor> weights) {
    torch::nn::LSTM lstm(torch::nn::LSTMOptions(x.size(2), weights[1].size(1)));
    torch::NoGradGuard guard;
    auto parameters = lstm->parameters();
    for (size_t k = 0; k < weights.size(); ++k) parameters[k].copy_(weights[k]);
    return std::get<0>(lstm->forward(x));
}

torch::Tensor by_script(std::string file, torch::Tensor x) {
    torch::NoGradGuard guard;
    return torch::jit::load(file).forward({x}).toTensor();
}
"""


@pytest.mark.slow
def test_callers_in_cpp(tmp_path):
    from torch.utils.cpp_extension import load_inline

    functions = ["by_operator", "by_module", "by_script"]
    program = load_inline(
        "patched_callers", PROGRAM_IN_CPP, functions=functions, build_directory=str(tmp_path), extra_cflags=["-O0"]
    )
    module, model, x = nn.LSTM(11, 37), Model(), torch.randn(9, 5, 11)
    weights, file = [a.detach() for a in module.parameters()], str(tmp_path / "model.pt")
    torch.jit.script(model).save(file)
    with torch.no_grad(), fastlstm.patch_operators():
        got = [*program.by_operator(x, weights), program.by_module(x, weights), program.by_script(file, x)]
    with torch.no_grad():
        want = flat(ours(module)(x))
        assert same(got, [*want, want[0], ours(model)(x)])


@pytest.mark.slow
def test_a_library_of_aot_inductor(tmp_path):
    """It is what torch's compiler made of the operators, whether it was made under the patch or not."""
    model, x = Model().eval(), torch.randn(5, 9, 11)

    def made(name):
        with torch.no_grad():
            program = torch.export.export(model, (x,))
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / name))
            return torch._inductor.aoti_load_package(package)

    before = made("before.pt2")
    want = before(x)
    with fastlstm.patch_operators():
        meanwhile = made("meanwhile.pt2")
        got = [before(x), meanwhile(x)]
    close([*got, meanwhile(x)], [want] * 3, "values")
    close(want, copy.deepcopy(model).double()(x.double()), "values")


def test_symbolic_sizes_of_weights_stay_torch_s():
    x, h = torch.randn(6, 3, 7), torch.zeros(1, 3, 23)
    weights = [a.detach() for a in nn.GRU(7, 23).parameters()]
    expected = gru(x, h, weights)
    with fastlstm.patch_operators():
        traced = make_fx(gru, tracing_mode="symbolic")(x, h, weights)
    close(traced(x, h, weights), expected, "values")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_states_is_refused_as_by_torch(count):
    x, weights, h = torch.randn(6, 3, 7), [a.detach() for a in nn.LSTM(7, 5).parameters()], torch.zeros(1, 3, 5)
    options = True, 1, 0.0, False, False, False
    with fastlstm.patch_operators():
        for _ in range(2):
            torch.lstm(x, (h, h), weights, *options)
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            torch.lstm(x, [h] * count, weights, *options)
