"""The table of `pytest benchmarks/ --benchmark-only`, in the place of pytest-benchmark's. Its files keep all times."""

import itertools
import statistics

import pytest
import torch

from benchmarks.shared import machine
from benchmarks.shared.tables import NOISY

HEAD = ("what", "mode", "ratio", "95 % interval", "fastlstm, ms", "torch, ms", "threads", "")
LEFT = {"what", "mode", ""}  # columns of words, whose rows begin together
MACHINE = pytest.StashKey[list[str]]()
LEGEND = """\
T time steps, B batch rows, I inputs, H hidden units, L layers, bi both directions. A ratio of 2 means that fastlstm
takes half the time of torch. It is the ratio of the two times beside it, which are lower quartiles over the rounds, and
lies in its interval, which is that of the same ratio over rounds drawn anew. Half of the rounds come after all other
rows have been visited. The interval is of this run alone: on a machine that others share, another run may leave it.
Each side runs on one thread and on all, and its faster way counts; "threads" has fastlstm's and torch's. A row has no
result where its rounds scatter, or where other processes worked beside it."""


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    config.option.benchmark_quiet = True


def pytest_sessionstart(session):
    """The load is that before the run."""
    cards = [f"GPU: {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else []
    session.config.stash[MACHINE] = [machine.header(), *cards]


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    infos = [bench.extra_info for bench in session.benchmarks if "group" in bench.extra_info] if session else []
    measured = list({(info["name"], info["mode"]): info for info in infos}.values())  # the last visit of each row
    if not measured:
        return
    terminalreporter.section("speed relative to torch")
    for text in (*config.stash[MACHINE], LEGEND):
        terminalreporter.line(text)
    cells = [row(info) for info in measured]
    widths = [max(map(len, column)) for column in zip(HEAD, *cells)]
    for group, pairs in itertools.groupby(zip(measured, cells), lambda pair: pair[0]["group"]):
        terminalreporter.line(f"\n{group}")
        for line in (HEAD, *(cells_of for _, cells_of in pairs)):
            texts = [t.ljust(w) if name in LEFT else t.rjust(w) for name, t, w in zip(HEAD, line, widths)]
            terminalreporter.line("  ".join(texts).rstrip())
    ratios = [info["ratio to nn.LSTM"]["quartile"] for info in measured if not info["noisy"]]
    mean = f"{statistics.geometric_mean(ratios):.2f}" if ratios else "unknown"
    left = f"; {len(measured) - len(ratios)} rows have no result" * (len(ratios) < len(measured))
    terminalreporter.line(f"\ngeometric mean of {len(ratios)} rows: {mean}{left}")


def row(info):
    ratio = info["ratio to nn.LSTM"]
    figures = [f"{ratio['quartile']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}"]
    figures += [f"{1e3 * info['seconds']:.3f}", f"{1e3 * info['nn.LSTM seconds']:.3f}"]
    figures = ["", NOISY, "", ""] if info["noisy"] else figures
    return info["name"], info["mode"], *figures, f"{info['threads']} and {info['nn.LSTM threads']}", info["note"]
