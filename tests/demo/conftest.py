"""What the tests of the demonstration share."""

import pytest
import torch

from fastlstm.mnist import report
from tests.helpers.idx import tiny_arrays, write_set


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a set that needs no care: 90 training images of 4 x 3 pixels."""
    return write_set(tmp_path_factory.mktemp("tiny"), tiny_arrays())


@pytest.fixture(autouse=True)
def _threads():
    """The trainer sets the process's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than short runs."""
    monkeypatch.setattr(report, "draw", lambda *arguments: {})
