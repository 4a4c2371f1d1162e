"""No call has more threads than processors that the process may use."""

import json
import math
import os
import subprocess
import sys

import pytest

from fastlstm.backends.cpu import time_quota, usable_processors
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import UNAVAILABLE


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"},
            0.5,
        ),  # a group's is its parts' too
        ("0::/a\n", {"a/cpu.max": "400000 100000\n", "cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../../a\n", {"cpu.max": "300000 100000\n"}, 3.0),  # of a container that sees its own group alone
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu,cpuacct:/a\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "25000\n"}, 2.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("7:cpuset:/a\n", {"cpu.max": "50000 100000\n"}, math.inf),  # not of the group that limits time
        ("0::/\n", {"cpu.max": "many\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("nothing\n", {"cpu.max": "50000 100000\n"}, 0.5),
    ],
)
def test_quotas_of_control_groups(tmp_path, membership, files, quota):
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert time_quota(tmp_path / "groups", tmp_path / "membership") == quota
    assert time_quota(tmp_path / "groups", tmp_path / "absent") == math.inf  # as where there are no control groups


def test_a_part_of_a_processor_is_a_thread(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_processors(0.5, 4) == (1, "a quota of 0.5")
    assert usable_processors(1.5, 4) == (2, "a quota of 1.5")
    assert usable_processors(4.0, 4) == usable_processors(math.inf, 4) == (4, "affinity")
    assert usable_processors(math.inf, 8) == (8, None)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity of processes")
@pytest.mark.parametrize("binding", ["OMP_PROC_BIND", "GOMP_CPU_AFFINITY"])
def test_a_bound_first_thread_is_no_affinity_of_the_process(binding):
    """OpenMP may bind the thread that imports torch to one processor, and its others to others."""
    allowed = sorted(os.sched_getaffinity(0))
    value = "true" if binding == "OMP_PROC_BIND" else " ".join(map(str, allowed))
    code = "import fastlstm; print(fastlstm.info()['processor']['usable'])"
    command, environment = [sys.executable, "-c", code], os.environ | {binding: value}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)  # not forked
    assert int(done.stdout) == len(allowed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity of processes")
@pytest.mark.skipif(os.cpu_count() == 1, reason="there are no cores to be kept from")
def test_a_process_on_one_processor_has_one_thread():
    code = """
        import json, os, sys
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before torch's OpenMP reads it
        import torch, fastlstm
        from fastlstm.__main__ import lines
        torch.set_num_threads(3)
        info, tasks = fastlstm.info(), [len(os.listdir("/proc/self/task"))]
        for backend in sys.argv[1:]:
            fastlstm.LSTM(8, 128, backend=backend)(torch.zeros(200, 16, 8))  # too few numbers for threads of torch's
            tasks.append(len(os.listdir("/proc/self/task")))
        print(json.dumps([info, list(lines(info)), tasks]))
    """
    backends = (name for name in ("numba", "native") if UNAVAILABLE[name] is None)
    done = interpreter.run(code, *backends, cwd=ROOT, check=True)
    info, lines, tasks = json.loads(done.stdout)
    assert (info["processor"]["usable"], info["processor"]["reason"]) == (1, "affinity")
    limit = "of which this process may use 1 (affinity); torch uses 3 threads, and a call at most 1"
    assert lines[1].endswith(limit)
    assert any(note.endswith("torch.set_num_threads(1).") for note in info["notes"])
    assert len(set(tasks)) == 1  # no call has started a thread


@pytest.mark.skipif(sys.platform != "linux", reason="has libgomp stand in for a Mac's libomp")
def test_threads_of_a_mac_are_torchs_own():
    """torch's library there has another name. Its dependency libomp has libgomp's functions."""
    code = """
        import ctypes, sys, torch
        opened, load = [], ctypes.CDLL
        ctypes.CDLL = lambda name: opened.append(name) or load(name.replace(".dylib", ".so"))
        sys.platform = "darwin"
        from fastlstm.backends import cpu
        print(cpu.openmp() is not None, any(name.endswith("/torch/lib/libtorch_cpu.dylib") for name in opened))
    """
    assert interpreter.run(code, cwd=ROOT, check=True).stdout.split() == ["True", "True"]
