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
from fastlstm.backends.numba.host import passes, sizes
from fastlstm.backends.numba.host.thread_split import split_threads
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.numba import signature
from tests.helpers.threads import at_once

SIZE = (9, 24, 28, 100)  # large enough for a parallel region
both_backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system starts processes afresh alone")


@pytest.mark.parametrize(
    ("T", "B", "I", "H", "forward", "backward"),
    [
        (28, 128, 28, 128, (2, 2), (2, 2)),  # rows, to each thread those that fill a pass
        (28, 64, 128, 512, (2, 1), (2, 1)),  # many weights: units
        (512, 16, 64, 64, (2, 2), (2, 2)),  # few weights: rows, however few
        (28, 16, 28, 128, (2, 1), (2, 2)),  # steps back read weight_hh alone
        (28, 1, 28, 128, (2, 1), (2, 1)),  # one row has only units to split; a thread that pauses wakes late
        (28, 1, 28, 64, (1, 1), (1, 1)),  # and too few for a barrier a step
        (5, 16, 4, 4, (1, 1), (1, 1)),  # a call over before a second thread has woken
    ],
)
def test_how_threads_split_the_work(T, B, I, H, forward, backward):
    panels, layer = sizes.panels_of(H, 16), signature(T, B, I, H)
    assert split_threads(2, layer, panels) == forward
    assert split_threads(2, layer, panels, backward=True) == backward
    assert split_threads(1, layer, panels) == (1, 1)
    assert split_threads(8, signature(100, 1, 2000, 16), 1) == (1, 1)  # no more threads than have something to do


def work(backend, seed=0):
    """One training step from a seed, as one tensor."""
    generator = torch.Generator().manual_seed(seed)
    T, B, I, H = SIZE
    model = fastlstm.LSTM(I, H, backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    output = model(torch.randn(T, B, I, generator=generator))[0]
    output.square().sum().backward()
    # put together by numpy: torch's own parallel copy hangs in a forked child
    parts = [output.detach(), *(p.grad for p in model.parameters())]
    return torch.from_numpy(np.concatenate([part.numpy().ravel() for part in parts]))


@both_backends
def test_many_python_threads_at_once(backend, two_threads):
    want = [work(backend, seed) for seed in range(4)]
    wrong = []

    def loop(seed):
        for _ in range(15):
            if not torch.equal(work(backend, seed), want[seed]):
                wrong.append(seed)

    at_once(*(partial(loop, seed) for seed in range(4)))
    assert wrong == []


def apart(check, *arguments):
    """Run a function of this file on two threads in a process of its own. Torch refuses backward passes in forked
    children of a process in which nested ones have once needed threads, as in another test.
    """
    names = f"import torch; torch.set_num_threads(2); from {__name__} import {check.__name__} as check"
    interpreter.run(f"{names}; check(*{arguments!r})", cwd=ROOT, check=True)


def child(queue, count, backend):
    torch.set_num_threads(count)
    queue.put((threads_now(), work(backend).numpy()))


def check_child_process(backend, method):
    want = work(backend)  # the parent has used its threads
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, 2, backend))
    process.start()
    threads, got = queue.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert threads == (1 if method == "fork" else 2)
    assert torch.equal(torch.from_numpy(got), want)


@both_backends
@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_child_processes(backend, method):
    apart(check_child_process, backend, method)


def both_directions():
    """The results of layers whose outputs are so large that torch would join them on several threads."""
    T, B, I, H = SIZE
    torch.manual_seed(0)
    model = fastlstm.LSTM(I, H, 2, bidirectional=True, backend="numba")
    with torch.no_grad():
        output, states = model(torch.randn(T, B, I))
    return np.concatenate([a.numpy().ravel() for a in (output, *states)])


def send_both_directions(queue):
    queue.put(both_directions())


def check_both_directions():
    want = both_directions()
    torch.cat([torch.randn(1 << 20)] * 2)  # torch has used its threads
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=send_both_directions, args=(queue,))
    process.start()
    got = queue.get(timeout=60)
    process.join(timeout=60)
    assert np.array_equal(got, want)


@needs_fork
def test_both_directions_in_a_forked_child():
    apart(check_both_directions)


def gradients_of_both_directions(backend):
    """The gradients of layers whose outputs torch itself copies and adds up on several threads."""
    T, B, I, H = SIZE
    torch.manual_seed(0)
    model = fastlstm.LSTM(I, H, 2, bidirectional=True, backend=backend)
    output = model(torch.randn(T, B, I))[0]
    gradients = torch.autograd.grad(output, [*model.parameters()], torch.randn_like(output))
    return np.concatenate([a.numpy().ravel() for a in gradients])


def train_in_child(queue, backend):
    torch.set_num_threads(1)  # or torch's own operations hang, around nn.LSTM too
    queue.put(gradients_of_both_directions(backend))


def check_training_of_both_directions(backend):
    torch.cat([torch.randn(1 << 20)] * 2)  # torch has used its threads
    with torch.no_grad():
        fastlstm.LSTM(28, 100, 2, bidirectional=True, backend=backend)(torch.randn(9, 24, 28))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=train_in_child, args=(queue, backend), daemon=True)
    process.start()
    got = queue.get(timeout=60)
    process.join(timeout=60)
    assert np.array_equal(got, gradients_of_both_directions(backend))


@both_backends
@needs_fork
def test_a_forked_child_trains_both_directions(backend):
    apart(check_training_of_both_directions, backend)


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


def infer_in_child(queue, model, x):
    with torch.no_grad():
        queue.put(model(x)[0].numpy())


def check_inference(backend):
    """The weights are packed in the child, and are more than what one thread of torch's copies."""
    model, x = fastlstm.LSTM(64, 128, backend=backend), torch.randn(20, 8, 64)
    want = model(x)[0].detach()  # a pass that trains packs for itself
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=infer_in_child, args=(queue, model, x), daemon=True)
    process.start()
    got = queue.get(timeout=60)
    process.join(timeout=60)
    assert torch.equal(torch.from_numpy(got), want)


@both_backends
@needs_fork
def test_inference_in_a_forked_child(backend):
    apart(check_inference, backend)


def backward_in_child(queue, output, parameters):
    gradients = torch.autograd.grad(output, parameters, torch.ones_like(output))
    queue.put(np.concatenate([a.numpy().ravel() for a in gradients]))


def check_older_graph(backend):
    lstm = fastlstm.LSTM(SIZE[2], SIZE[3], backend=backend)
    output, parameters = lstm(torch.randn(*SIZE[:3]))[0], list(lstm.parameters())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=backward_in_child, args=(queue, output, parameters))
    process.start()
    got = queue.get(timeout=60)
    process.join(timeout=60)
    want = torch.autograd.grad(output, parameters, torch.ones_like(output))
    assert np.array_equal(got, np.concatenate([a.numpy().ravel() for a in want]))


@both_backends
@needs_fork
def test_a_graph_that_is_older_than_the_fork(backend):
    """The child runs the backward pass on the one thread that it has, whatever the forward pass had."""
    apart(check_older_graph, backend)


def test_set_num_threads_is_followed_at_once(two_threads, monkeypatch):
    used = []
    start = passes.Pass.start
    monkeypatch.setattr(passes.Pass, "start", lambda self, *a: used.append(self.kernel.threads) or start(self, *a))
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
        "from tests.plan.test_threads import work; torch.save(work(sys.argv[2]), sys.argv[1])"
    )
    path = tmp_path / "result.pt"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code, path, backend], env=environment, check=True, timeout=120)
    assert torch.equal(torch.load(path), want)


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
