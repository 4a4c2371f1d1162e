"""Every call computes with the weights as they are, whoever has written to them since the last one, and how.

Calls without gradients keep packed copies of the weights. Each test calls a module, writes to its weights, and calls it
again. The answer must be, bit for bit, that of a new module which is given clones of the weights as they are now. It
must also differ from the answer before the write: otherwise the test could not fail.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.writes.forms import FORMS, written
from tests.helpers.writes.kinds import KINDS, LARGE, SETTINGS, Kind, each_setting, names_of, same
from tests.helpers.writes.ways import problems, random_like, ways


@pytest.fixture(autouse=True, params=[1])
def threads(request, set_threads):
    """One thread, unless a test asks for more: calls as small as these gain nothing from others."""
    set_threads(request.param)


@pytest.mark.parametrize("kind", KINDS)
@each_setting
def test_a_write_is_seen(setting, kind):
    """With each setting a few of the ways, so that several kinds of calls have each way in some test."""
    known, number = [parameter.values[0] for parameter in SETTINGS], list(KINDS).index(kind)
    parts = 2 * len(known)
    start = (known.index(setting) + number + number % 2 * len(known)) % parts
    kind = KINDS[kind]
    assert problems(kind, setting, itertools.islice(ways(kind, setting), start, None, parts)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@each_setting
def test_a_write_to_any_weight_is_seen(setting, kind):
    kind = KINDS[kind]
    assert problems(kind, setting, ways(kind, setting, every=True)) == {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "threads"), [("T1-B1", 1), ("T4-B2", 2), ("step", 2), ("cell", 1)], indirect=["threads"]
)
@each_setting
def test_many_weights(setting, kind, threads):
    """One step packs each panel of them as it comes to it, and looks for no change. Threads share the looking."""
    kind = LARGE[kind]
    forms, names = ("element", "last element", "swapped rows", "two signs"), names_of(kind.module(setting))
    table = [(name, partial(written, "data", form, name), True) for form, name in zip(forms, names, strict=True)]
    assert problems(kind, setting, table) == {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [Kind(16, 32, 30, 150), Kind(1, 512, 30, 150, how="cell")], ids=["forward", "cell"])
@each_setting
def test_single_elements_of_any_place(setting, kind):
    """In many rows, and in weights that have more than one digest."""
    module, arguments = kind.module(setting), kind.arguments(setting.dtype)
    got, wrong = kind.call(module, arguments, setting), []
    for name, p in module.named_parameters():
        for place in torch.randint(p.numel(), (5,)).tolist():
            before = got
            p.data.view(-1)[place] += 0.5
            got = kind.call(module, arguments, setting)
            if same(got, before) or not same(got, kind.call(kind.fresh(module, setting), arguments, setting)):
                wrong.append((name, place))
    assert wrong == []


@pytest.mark.sampled(3)
@each_setting
@pytest.mark.parametrize("kind", ["T4-B2", "cell"])
def test_finite_differences(setting, kind):
    """Each element in turn is moved up, then down, then back, as whoever checks a derivative does."""
    kind = KINDS[kind]._replace(I=2, H=3)
    module, arguments, eps = kind.module(setting), kind.arguments(setting.dtype), 2.0**-4
    start, wrong = kind.call(module, arguments, setting), []
    with torch.no_grad():
        for name, p in module.named_parameters():
            for i in range(p.numel()):
                kept = p.data.view(-1)[i].clone()
                for move in (eps, -2 * eps, None):
                    if move is None:
                        p.data.view(-1)[i] = kept
                        want = start
                    else:
                        p.data.view(-1)[i] += move
                        want = kind.call(kind.fresh(module, setting), arguments, setting)
                    if not same(kind.call(module, arguments, setting), want):
                        wrong.append((name, i, move))
    assert wrong == []


@each_setting
@pytest.mark.parametrize("kind", ["T1-B1", "T4-B2", "step", "cell"])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("form", ["add", "NaN"])
def test_what_a_call_from_zeros_may_leave_unseen_is_seen_by_the_next(setting, kind, name, form):
    """A step from zeros need not look at weight_hh where it has no product of it."""
    kind = KINDS[kind]
    module, zeros, states = kind.module(setting), *(kind.arguments(setting.dtype, z) for z in (True, False))
    before = [kind.call(module, arguments, setting) for arguments in (zeros, states, zeros, states)][-1]
    FORMS[form](getattr(module, name if kind.how == "cell" else name + "_l0").data)
    new = kind.fresh(module, setting)
    for arguments in (zeros, states, zeros, states):
        assert same(kind.call(module, arguments, setting), kind.call(new, arguments, setting))
    assert not same(before, kind.call(new, states, setting))


@each_setting
@pytest.mark.parametrize("kind", ["T1-B1", "T4-B2", "two-layers-both-directions", "cell"])
@pytest.mark.parametrize("type_", [torch.Tensor, nn.Parameter])
def test_other_weights_for_one_call(setting, kind, type_):
    """They are the weights of this call alone, as they are when it is made."""
    kind = KINDS[kind]
    module, arguments = kind.module(setting), kind.arguments(setting.dtype)
    own = [kind.call(module, arguments, setting) for _ in range(2)][1]
    other = {name: type_(random_like(p)) for name, p in module.named_parameters()}

    def call(*arguments):
        return torch.func.functional_call(module, other, arguments)

    results = []
    for name in (None, *other):
        if name is not None:
            other[name].data.add_(0.5)
        got = kind.call(call, arguments, setting)
        new = kind.module(setting)
        new.load_state_dict(other)
        assert same(got, kind.call(new, arguments, setting))
        assert same(kind.call(module, arguments, setting), own)
        results.append(got)
    assert not any(same(a, b) for a, b in itertools.combinations([own, *results], 2))


@each_setting
def test_writes_within_one_autocast(setting):
    """What autocast itself keeps of a cast, for as long as it lasts, is no part of a call."""
    kind = KINDS["T4-B2"]
    module, arguments = kind.module(setting), kind.arguments(setting.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for name in names_of(module):
            before = [kind.call(module, arguments, setting) for _ in range(2)][1]
            getattr(module, name).data.add_(0.5)
            got = kind.call(module, arguments, setting)
            assert same(got, kind.call(kind.fresh(module, setting), arguments, setting))
            assert not same(got, before)


CALLS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


@each_setting
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_writes_between_any_calls(setting, data):
    draw = data.draw
    how = draw(st.sampled_from(["forward", "step", "cell"]))
    I, H = draw(st.sampled_from([1, 2, 7, 16, 33, 100])), draw(st.sampled_from([1, 2, 7, 16, 33, 100]))
    options = {"bias": draw(st.booleans())}
    module = Kind(1, 1, I, H, how, options=options).module(setting)
    for _ in range(draw(st.integers(2, 6))):
        for _ in range(draw(st.integers(0, 3))):
            p = draw(st.sampled_from(list(module.parameters())))
            places = draw(st.lists(st.integers(0, p.numel() - 1), min_size=1, max_size=3))
            value = draw(st.floats(-4, 4, width=16) | st.sampled_from([math.nan, math.inf, -0.0]))
            w = draw(st.sampled_from([p.data, p.detach(), p]))
            with torch.no_grad():
                w.view(-1)[places] = value
        kind = Kind(draw(st.sampled_from([1, 2, 9])), draw(st.sampled_from([1, 3, 40])), I, H, how, options=options)
        arguments, mode = kind.arguments(setting.dtype, draw(st.booleans())), draw(st.sampled_from(list(CALLS)))
        got = kind.call(module, arguments, setting, CALLS[mode])
        assert same(got, kind.call(kind.fresh(module, setting), arguments, setting, CALLS[mode]))
