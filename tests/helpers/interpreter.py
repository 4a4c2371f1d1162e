"""Processes of their own for what must begin anew, without the seconds that importing torch takes in each.

Where the system can, one process imports torch and nothing else, and forks for every call: what runs there finds torch
imported and unused, and the rest as in a fresh interpreter. What Python itself reads at its start, as PYTHONWARNINGS,
does not reach it. A test of that, or of torch's import, starts an interpreter itself.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path

# It reads jobs by the line, and answers with the status of each once its process has ended.
FORKS = """
import json, os, signal, sys, traceback
import torch

def become(job):
    os.setsid()
    signal.alarm(job["timeout"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["cwd"] is not None:
        os.chdir(job["cwd"])
    for descriptor, name in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        file = os.open(name, os.O_RDWR)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    given = [path for path in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *given, *sys.path]
    sys.argv = ["-c", *job["arguments"]]

def run(job):
    status = 1
    try:
        become(job)
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(job["code"], "<string>", "exec"), vars(module))
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
sys.path[:] = [path for path in sys.path if path not in ("", *own)]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def forking() -> subprocess.Popen:
    """The process that forks, started by the first call; it ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    atexit.register(process.communicate)
    return process


def run(
    code: str,
    *arguments: object,
    cwd: Path | str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: int = 300,
    check: bool = False,
) -> subprocess.CompletedProcess:
    """`python -c code arguments`, in the environment given or this process's, and what it printed.

    With `check` anything but success fails the test with what was printed.
    """
    code, environment = textwrap.dedent(code), dict(os.environ if environment is None else environment)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if sys.platform == "linux":
        done = _forked(command, cwd, environment, timeout)
    else:  # forking is missing, or is not safe with what torch has loaded
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _forked(
    command: list[str], cwd: Path | str | None, environment: Mapping[str, str], timeout: int
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for path in files.values():
            path.touch()
        job = {
            "code": command[2],
            "arguments": command[3:],
            "cwd": None if cwd is None else str(cwd),
            "environment": dict(environment),
            "timeout": timeout,
            **{name: str(path) for name, path in files.items()},
        }
        process = forking()
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        return subprocess.CompletedProcess(
            command, status, *(path.read_text(encoding="utf-8", errors="replace") for path in files.values())
        )


def run_module(name: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """`python -m name arguments`."""
    return run(f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)", *arguments, **options)
