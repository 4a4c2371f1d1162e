"""What the GPU benchmark times, checks and shows to the sanitizers, on the CPU."""

import contextlib
import json

import pytest
import torch

from benchmarks import gpu, gpu_layers
from benchmarks.gpu_layers import TINY, Bench
from fastlstm.backends import sums
from tests.helpers import stand_in
from tests.helpers.transforms import needs_triton


class Wrong(torch.nn.LSTM):
    def forward(self, *args):
        output, states = super().forward(*args)
        return output * 1.1, states


@pytest.fixture
def torch_flags_stay(monkeypatch):
    """In a process of its own the benchmark sets them; torch's testing tools, which other tests import, forbid it."""
    monkeypatch.setattr(gpu_layers, "set_precision", lambda name: gpu_layers.PRECISIONS[name][0])


@needs_triton
def test_rivals_are_checked_and_left_out_one_by_one(monkeypatch, torch_flags_stay):
    """Without a device: one that computes something else, and one that no graph can hold."""
    bench = Bench(TINY[0], "tf32", "cpu", [])  # torch's default
    for name, kind in (("wrong", Wrong), ("ungraphed", torch.nn.LSTM)):
        bench.modules[name] = kind(4, 8)
        bench.modules[name].load_state_dict(bench.modules["nn.LSTM"].state_dict())
    bench.check()
    assert list(bench.modules) == ["nn.LSTM", "fastlstm", "ungraphed"]
    assert "AssertionError: wrong is " in bench.left_out["wrong"]

    def graphed(run):
        graphed.calls += 1
        if graphed.calls == 6:  # ours, nn.LSTM's and the first of the rival's can
            raise RuntimeError("it waits")
        return run

    graphed.calls = 0
    stand_in.install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "graphed", graphed)
    rows = list(bench.rows(1))
    ways = {(row["way"], row["mode"]): sorted(row["seconds"]) for row in rows}
    usual = ["fastlstm", "nn.LSTM"]
    assert ways == {
        (way, mode): usual if (way, mode) == ("graph", "training") else [*usual, "ungraphed"]
        for way in gpu_layers.WAYS
        for mode in gpu_layers.MODES
    }
    assert bench.left_out["ungraphed training from a graph"] == "RuntimeError: it waits"


@needs_triton
@pytest.mark.parametrize(("fails", "failed"), [(1, True), (3, False)])
def test_no_graph_is_captured_after_a_failed_one(fails, failed, monkeypatch, torch_flags_stay, capsys):
    """nn.LSTM's is left out, with all later ones; ours fails its item. Either way another process goes on."""
    calls = []

    def graphed(run):
        calls.append(run)
        if len(calls) == fails:
            raise RuntimeError("it waits")
        return run

    stand_in.install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "graphed", graphed)
    with pytest.raises(SystemExit, match="5"):
        gpu_layers.measure("0:tf32:", 1, dry_run=True)
    assert len(calls) == fails
    found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert any("failed" in line for line in found) == failed
    graphs = [line["row"]["mode"] for line in found if "row" in line and line["row"]["way"] == "graph"]
    assert graphs == ([] if failed else ["inference", "training"])
    if not failed:
        reasons = found[-1]["left_out"]
        assert reasons["nn.LSTM inference from a graph"] == "RuntimeError: it waits"
        assert "not tried" in reasons["nn.LSTM training from a graph"]


def test_a_failed_capture_leaves_the_current_stream(monkeypatch):
    """As torch does it: `graph` makes its stream the current one, and leaves it so where the capture cannot end."""

    class Stream(str):
        def wait_stream(self, other):
            pass

    current = [Stream("usual")]

    @contextlib.contextmanager
    def stream(name):
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(_):
        current[0] = Stream("the capture's")
        yield
        raise RuntimeError("the capture cannot end")

    stand_in.install(monkeypatch)
    fakes = {"stream": stream, "graph": graph, "current_stream": lambda: current[0]}
    for name, fake in {**fakes, "Stream": lambda: Stream("warm-up")}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="cannot end"):
        gpu_layers.graphed(lambda: None)
    assert current == ["usual"]


@needs_triton
@pytest.mark.parametrize("way", gpu_layers.WAYS)
def test_calls_from_the_host_begin_when_the_flush_has_ended(way, monkeypatch, torch_flags_stay):
    done = []
    stand_in.install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "WARM_UP", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(gpu_layers, "seconds_of", lambda run, device: run() or 1.0)
    bench = Bench(TINY[0], "tf32", "cpu", [])
    bench.graphs = {"inference": {"a": lambda: done.append("ran")}}
    monkeypatch.setattr(bench, "modules", {"a": None})
    monkeypatch.setattr(bench, "run", lambda name, mode: bench.graphs[mode][name])
    bench.times("inference", way, 2)
    assert done == (["waited", "ran"] if way == "eager" else ["ran"]) * 2


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "triton-ieee"])
def test_the_sanitizers_see_every_variant(backend, monkeypatch):
    from fastlstm.backends.triton import launch, products, resident, stepwise

    monkeypatch.setattr(launch, "project", launch.project)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    calls = {}
    for module, names in ((resident, gpu.OURS), (stepwise, gpu.OURS), (launch, ["kns=pack_kernel"])):
        for name in (option.removeprefix("kns=") for option in names if hasattr(module, option.removeprefix("kns="))):
            arguments = getattr(products if module is launch else module, name).arg_names
            made = calls[module, name] = []

            class Recorded:
                def __getitem__(self, grid, arguments=arguments, made=made):
                    return lambda *given, **_: made.append(dict(zip(arguments, given)))

            monkeypatch.setattr(module, name, Recorded())
    gpu_layers.exercise(backend, "cpu")
    for module in (resident, stepwise):
        forward, backward = (calls[module, f"{name}_kernel"] for name in ("forward", "backward"))
        absent = {
            "saved": lambda call: call["saved_ptr"] is None,
            "dh": lambda call: call["dh_ptr"] is None,
            "dc": lambda call: call["douts"][0] is None,
            "dh_n": lambda call: call["dends"][0] is None,
        }
        for made, names in ((forward, ("saved",)), (backward, ("dh", "dc", "dh_n"))):
            masks = {(call["lengths_ptr"] is None, call["reset_ptr"] is None) for call in made}
            assert masks == {(False, False), (False, True), (True, False), (True, True)}
            for name in names if module is resident or made is forward else names[:-1]:
                assert set(map(absent[name], made)) == {False, True}, name
            assert {call["rows"] < call["B"] for call in made} == {False, True}  # groups
            if module is resident:
                assert {call["reverse"] for call in made} == {0, 1}
            else:
                assert {call["t"] > call["t_prev"] for call in made} == {False, True}
    if backend == "triton":
        assert {call["bias_ptr"] is None for call in calls[resident, "forward_kernel"]} == {False, True}
    assert bool(calls[launch, "pack_kernel"]) == (backend != "triton")


def test_layers_are_projected_without_the_matrix_unit():
    x = torch.randn(3, 4, 5)
    for weight, bias in ((torch.randn(8, 5), torch.randn(8)), (torch.randn(2, 8, 5), torch.randn(2, 8))):
        for given in (bias, None):
            want = sums.add_bias(sums.linear(x, weight), given)
            torch.testing.assert_close(gpu_layers.project(x, weight, given), want)


@needs_triton
def test_layers_are_timed_by_events_and_from_graphs(monkeypatch, torch_flags_stay, capsys):
    stand_in.install(monkeypatch)
    gpu_layers.measure("0:tf32:", 2, dry_run=True)
    gpu_layers.compile_kernels("1:tf32:", dry_run=True)
    began, *found = map(json.loads, capsys.readouterr().out.splitlines())
    assert began == {"item": "0:tf32:", "began": True}
    assert [(line["row"]["way"], line["row"]["mode"]) for line in found] == [
        (way, mode) for way in gpu_layers.WAYS for mode in gpu_layers.MODES
    ]


def test_rivals_that_are_not_installed_say_so(monkeypatch, torch_flags_stay):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench = Bench(TINY[0], "bf16", "cpu", ["torchrl"])
    assert bench.left_out == {"torchrl": "the package torchrl is not installed"}
