"""What the tests of the demonstration share."""

import pytest
import torch

import fastlstm.train
from fastlstm.mnist import pictures, saved
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.state import Checkpoint
from tests.helpers.idx import tiny_arrays, write_set


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a set that needs no care: 90 training images of 4 x 3 pixels."""
    return write_set(tmp_path_factory.mktemp("tiny"), tiny_arrays())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory, with a model that was not trained."""
    directory = tmp_path_factory.mktemp("run")
    saved.save(directory / "model.pt", RowLSTM(28, 16, generator=torch.Generator().manual_seed(1)), (28, 28))
    return directory


@pytest.fixture(autouse=True)
def _threads(set_threads):
    """The trainer sets the process's threads."""


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than short runs."""
    monkeypatch.setattr(pictures, "of_runs", lambda *arguments: {})


@pytest.fixture
def train():
    """Trains by the command, to its end."""

    def call(*arguments, code=0):
        assert fastlstm.train.main([*map(str, arguments)]) == code

    return call


@pytest.fixture
def refused(capsys):
    """Runs a command that ends with one line and nothing else, and returns the line."""

    def call(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        assert stop.value.code == 2
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.count("\n") == 1
        return streams.err

    return call


@pytest.fixture
def interrupted(monkeypatch, ctrl_c):
    """Trains until Ctrl-C's signal, which comes once a checkpoint of so many iterations is written."""

    def call(iterations, *arguments):
        keep = Checkpoint.keep

        def interrupting(checkpoint, name, state):
            keep(checkpoint, name, state)
            if state.done == iterations:
                ctrl_c()

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "keep", interrupting)
            assert fastlstm.train.main([*map(str, arguments)]) == 130

    return call
