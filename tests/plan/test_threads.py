"""Threads and processes: called from many at once, after a fork, in workers.

Nothing may abort, hang or change a bit.
"""

import multiprocessing
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import fastlstm
from fastlstm.backends.cpu import threads_now
from fastlstm.backends.numba.host import passes
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.threads import at_once

SIZE = (9, 24, 28, 100)  # large enough for a parallel region
both_backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system starts processes afresh alone")


def flat(tensors):
    """All numbers, put together by numpy: torch's own parallel copy hangs in a forked child."""
    return np.concatenate([a.detach().numpy().ravel() for a in tensors])


def work(backend, seed=0):
    """The results of one training step from a seed."""
    generator = torch.Generator().manual_seed(seed)
    T, B, I, H = SIZE
    model = fastlstm.LSTM(I, H, backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    output = model(torch.randn(T, B, I, generator=generator))[0]
    output.square().sum().backward()
    return flat([output, *(p.grad for p in model.parameters())])


@both_backends
def test_many_python_threads_at_once(backend, two_threads):
    want = [work(backend, seed) for seed in range(4)]
    wrong = []

    def loop(seed):
        for _ in range(15):
            if not np.array_equal(work(backend, seed), want[seed]):
                wrong.append(seed)

    at_once(*(partial(loop, seed) for seed in range(4)))
    assert wrong == []


def apart(check, *arguments):
    """Run a function of this file on two threads in a process of its own. Torch refuses backward passes in forked
    children of a process in which nested ones have once needed threads, as in another test.
    """
    names = f"import torch; torch.set_num_threads(2); from {__name__} import {check.__name__} as check"
    interpreter.run(f"{names}; check(*{arguments!r})", cwd=ROOT, check=True)


def put(queue, threads, function, *arguments):
    torch.set_num_threads(threads)
    queue.put((threads_now(), function(*arguments)))


def in_child(method, threads, function, *arguments):
    """How many threads a child process has of those that it asks for, and what the function returns there."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=put, args=(queue, threads, function, *arguments), daemon=True)
    process.start()
    result = queue.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    return result


def check_child_process(backend, method):
    want = work(backend)  # the parent has used its threads
    threads, got = in_child(method, 2, work, backend)
    assert threads == (1 if method == "fork" else 2)
    assert np.array_equal(got, want)


@both_backends
@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_child_processes(backend, method):
    apart(check_child_process, backend, method)


def both_directions(backend, trains):
    """The results or gradients of layers whose outputs torch would join, copy and add up on several threads."""
    T, B, I, H = SIZE
    torch.manual_seed(0)
    model = fastlstm.LSTM(I, H, 2, bidirectional=True, backend=backend)
    with torch.set_grad_enabled(trains):
        output, states = model(torch.randn(T, B, I))
    if not trains:
        return flat((output, *states))
    return flat(torch.autograd.grad(output, [*model.parameters()], torch.randn_like(output)))


def packed_in_child(model, x):
    """The weights are packed in the child, and are more than what one thread of torch's copies."""
    with torch.no_grad():
        return flat(model(x)[:1])


def gradients(output, parameters):
    return flat(torch.autograd.grad(output, parameters, torch.ones_like(output), retain_graph=True))


def check_forked(what, backend):
    torch.cat([torch.randn(1 << 20)] * 2), both_directions(backend, False)  # torch and we have used our threads
    if what == "weights packed by the child":
        model, x = fastlstm.LSTM(64, 128, backend=backend), torch.randn(20, 8, 64)
        want, call = flat(model(x)[:1]), (packed_in_child, model, x)  # a pass that trains packs for itself
    elif what == "a graph of the parent":
        lstm = fastlstm.LSTM(SIZE[2], SIZE[3], backend=backend)
        call = gradients, lstm(torch.randn(*SIZE[:3]))[0], list(lstm.parameters())
        want = None
    else:
        call = both_directions, backend, what == "training"
        want = both_directions(*call[1:]) if what == "inference" else None
    # of training torch's own operations hang on more threads than one, around nn.LSTM too
    _, got = in_child("fork", 1 if what == "training" else 2, *call)
    assert np.array_equal(got, call[0](*call[1:]) if want is None else want)


@both_backends
@needs_fork
@pytest.mark.parametrize("what", ["inference", "training", "weights packed by the child", "a graph of the parent"])
def test_a_forked_child(what, backend):
    """It runs on the one thread that it has, whatever its parent had."""
    apart(check_forked, what, backend)


@both_backends
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_no_threads_beyond_those_asked_for(backend, two_threads):
    work(backend)
    torch.randn(512, 512) @ torch.randn(512, 512)  # torch's own parallel region
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        work(backend)
        torch.randn(512, 512) @ torch.randn(512, 512)
    assert len(os.listdir("/proc/self/task")) == before


def test_set_num_threads_is_followed_at_once(two_threads, monkeypatch):
    used = []
    start = passes.Pass.start
    monkeypatch.setattr(passes.Pass, "start", lambda self, *a: used.append(self.threads) or start(self, *a))
    for count in (2, 1, 2):
        torch.set_num_threads(count)
        work("numba")
    assert used == [2, 2, 1, 1, 2, 2]


@both_backends
def test_a_team_smaller_than_asked_for(backend, two_threads, tmp_path):
    """OpenMP may give fewer threads than asked for, as inside another parallel region:
    the work is split by what came.
    """
    want = work(backend)
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    code = (
        "import sys, torch; torch.set_num_threads(2); "
        "from tests.plan.test_threads import work; torch.save(torch.from_numpy(work(sys.argv[2])), sys.argv[1])"
    )
    path = tmp_path / "result.pt"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code, path, backend], env=environment, check=True, timeout=120)
    assert np.array_equal(torch.load(path), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process that keeps its parent's memory")
def test_a_forked_child_does_not_write_into_its_parents_buffers(set_threads):
    """Buffers of a megabyte and more come from a pool: a child gets its own copy of it."""
    lstm = fastlstm.LSTM(28, 128, backend="numba")
    x = torch.randn(28, 128, 28)

    def step(child):
        lstm.zero_grad()
        loss = lstm(x)[0].square().sum(0).mean()  # sums that torch keeps on one thread
        if child:
            pid = os.fork()
            if pid == 0:
                lstm(2 * x)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        loss.backward()
        return [p.grad.clone() for p in lstm.parameters()]

    set_threads(1)
    want, got = step(child=False), step(child=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
