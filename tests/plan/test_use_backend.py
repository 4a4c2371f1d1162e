"""`use_backend` as a call, a context and a decorator."""

import re
from functools import partial
from typing import get_args

import pytest
import torch

import fastlstm
from fastlstm.backends import dispatch, settings
from fastlstm.backends.base import Traits


@pytest.fixture(autouse=True)
def default():
    """What each test starts with, and nothing of what it leaves behind is seen by the next."""
    with fastlstm.use_backend("auto"):
        yield


def current():
    return settings.named(None)


def test_layers_follow_a_call():
    lstm, x, reset = fastlstm.LSTM(3, 5), torch.randn(4, 2, 3), torch.zeros(4, 2, dtype=torch.bool)
    lstm(x, reset=reset)
    fastlstm.use_backend("aten")
    with pytest.raises(RuntimeError, match="aten backend has no reset"):
        lstm(x, reset=reset)
    lstm.backend = "reference"  # a module's own wins
    lstm(x, reset=reset)


@pytest.mark.parametrize("name", ["nativ", "NATIVE", "", None, 3])
def test_a_name_is_checked_at_once(name):
    fastlstm.use_backend("reference")
    message = f"backend must be one of {', '.join(settings.NAMES)}, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        fastlstm.use_backend(name)
    assert current() == "reference"


def test_contexts_put_back_what_was_there():
    fastlstm.use_backend("reference")
    with fastlstm.use_backend("aten"):
        assert current() == "aten"
        with fastlstm.use_backend("numba"):
            assert current() == "numba"
        assert current() == "aten"
        fastlstm.use_backend("native")  # until the context ends
        assert current() == "native"
    assert current() == "reference"


def test_a_context_that_is_left_by_an_exception():
    with pytest.raises(KeyError), fastlstm.use_backend("aten"), fastlstm.use_backend("reference"):
        raise KeyError
    assert current() == "auto"


def test_a_context_that_is_entered_later():
    context = fastlstm.use_backend("aten")
    fastlstm.use_backend("numba")
    with context:
        assert current() == "aten"
    assert current() == "auto"


def test_decorated_functions():
    @fastlstm.use_backend("aten")
    @fastlstm.use_backend("reference")
    def names(depth, *, fails=False):
        """What it says."""
        if fails:
            raise KeyError
        return [current(), *(names(depth - 1) if depth else ())]

    assert current() == "auto"  # and not what the functions are to run with
    assert names.__name__ == "names"
    assert names.__doc__ == "What it says."
    for before in ("auto", "numba"):
        fastlstm.use_backend(before)
        assert names(2) == ["reference"] * 3
        with pytest.raises(KeyError):
            names(0, fails=True)
        assert current() == before


def within(lstm, x):
    with fastlstm.use_backend("reference"):
        return [lstm(x)[0], current()]


def decorated(lstm, x):
    return fastlstm.use_backend("reference")(within)(lstm, x)


def left_by_an_exception(lstm, x):
    try:
        with fastlstm.use_backend("reference"):
            result = [lstm(x)[0], current()]
            raise KeyError
    except KeyError:
        return result


def called(lstm, x):
    fastlstm.use_backend("reference")
    return [lstm(x)[0], current()]


@pytest.mark.parametrize(
    ("function", "after"),
    [(within, "auto"), (decorated, "auto"), (left_by_an_exception, "auto"), (called, "reference")],
)
def test_in_a_compiled_function(function, after):
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 2, 3)
    compiled = torch.compile(partial(function, lstm), backend="eager", fullgraph=True)
    output, inside = compiled(x)
    assert inside == "reference"
    assert current() == after
    torch.testing.assert_close(output, lstm(x)[0])


def test_compiled_functions_follow_a_call():
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 2, 3)
    compiled = torch.compile(lambda x: [lstm(x)[0], current()], backend="eager", fullgraph=True)
    for name in ("auto", "reference", "aten", "auto"):
        fastlstm.use_backend(name)
        assert compiled(x)[1] == name


def test_type_checkers_know_every_name():
    assert get_args(settings.Backend) == settings.NAMES


@pytest.mark.parametrize("name", settings.NAMES[1:])
def test_a_backend_states_what_it_can_do(name):
    found, module = dispatch.traits(name), dispatch.module(name)
    assert type(found) is Traits
    assert found.plans == hasattr(module, "plan")
    assert found.prepares_steps == hasattr(module, "steps")


def test_a_trait_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="takes_16_bits"):
        Traits(takes_16_bits=True)
