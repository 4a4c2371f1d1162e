"""What the tests of kept weights share."""

import pytest

import fastlstm
from tests.helpers.calls import CPU, Calls
from tests.helpers.layers import CPU_BACKENDS


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch, *CPU)


@pytest.fixture(params=CPU_BACKENDS, scope="module")
def cpu_backend(request):
    """The default of a module of tests, each CPU backend in turn."""
    with fastlstm.use_backend(request.param):
        yield request.param
