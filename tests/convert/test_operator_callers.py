"""Who calls torch's recurrent operators under `fastlstm.patch_operators`: scripts, exports, C++, threads and processes.

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

import fastlstm
from tests.helpers.modules import flat, same
from tests.helpers.operators import of, ours
from tests.helpers.threads import at_once
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")


class Model(nn.Module):
    """Two layers that a script can call."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(11, 37, batch_first=True)
        self.decoder = nn.GRU(37, 19, batch_first=True)

    def forward(self, x):
        return self.decoder(self.encoder(x)[0])[0]


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


def test_an_ended_patch_leaves_no_kernel_to_torch_s_tracers():
    with fastlstm.patch_operators():
        torch.export.export(Model(), (torch.randn(5, 2, 11),))
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        assert not operator._dispatch_cache


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
