"""The table of `pytest benchmarks/ --benchmark-only`, in the place of pytest-benchmark's. Its files keep all times."""

import pytest
import torch

HEAD = ("ratio", "95 % interval", "fastlstm, ms", "nn.LSTM, ms", "of peak", "shape", "mode")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    if not torch.cuda.is_available():  # the table of a GPU is pytest-benchmark's
        config.option.benchmark_quiet = True


def pytest_ignore_collect(collection_path):
    """Without a GPU its cases are not collected."""
    return True if collection_path.name == "test_gpu.py" and not torch.cuda.is_available() else None


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [bench.extra_info for bench in session.benchmarks] if session else []
    rows = [HEAD, *map(row, (info for info in measured if "nn.LSTM seconds" in info))]
    if len(rows) == 1:
        return
    terminalreporter.section("speed relative to torch.nn.LSTM with its better number of threads")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        terminalreporter.line("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def row(info):
    ratio = info["ratio to nn.LSTM"]
    return (
        f"{ratio['median']:.2f}",
        f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        f"{1e3 * info['seconds']:.3f}",
        f"{1e3 * info['nn.LSTM seconds']:.3f}",
        f"{100 * info['fraction of peak']:.0f} %",
        info["name"],
        info["mode"],
    )
