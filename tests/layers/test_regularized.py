"""Recurrent dropout and zoneout beside plain loops that draw the same random numbers."""

import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from tests.helpers.modules import OURS, assert_same_gradients, copies_of, flat, pair, randn
from tests.helpers.tolerances import close

each = pytest.mark.parametrize("torch_s", [nn.LSTM, nn.GRU])


def lstm_step(of_x, of_h, _, c):
    i, f, g, o = (of_x + of_h).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(of_x, of_h, h, _):
    (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, -1), of_h.chunk(3, -1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    return (1 - z) * (n_x + r * n_h).tanh() + z * h, None


def loop(module, x, states, training):
    """What the papers write, one layer, direction and step after the other, time first: output and last states."""
    is_lstm, D, H = isinstance(module, fastlstm.LSTM), 2 if module.bidirectional else 1, module.hidden_size
    zoneout = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,) * 2
    p_c, p_h = zoneout
    T, B = x.shape[:2]
    last = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(D):
            k = layer * D + direction
            weight_ih, weight_hh, bias_ih, bias_hh = module.all_weights[k]
            mask = F.dropout(x.new_ones(B, H), module.recurrent_dropout) if training and module.recurrent_dropout else 1
            keep = {}
            for name, p in (("h", p_h), ("c", p_c))[: 1 + is_lstm]:
                keep[name] = torch.full((T, B, H), float(p), dtype=x.dtype)
                if training and 0 < p < 1:
                    keep[name] = torch.empty(T, B, H, dtype=x.dtype).bernoulli_(p)
            h, c = (a[k] for a in states) if is_lstm else (states[0][k], None)
            steps = [None] * T
            for t in range(T) if direction == 0 else reversed(range(T)):
                of_x, of_h = F.linear(x[t], weight_ih, bias_ih), F.linear(h * mask, weight_hh, bias_hh)
                new_h, new_c = (lstm_step if is_lstm else gru_step)(of_x, of_h, h, c)
                h = keep["h"][t] * h + (1 - keep["h"][t]) * new_h
                if is_lstm:
                    c = keep["c"][t] * c + (1 - keep["c"][t]) * new_c
                steps[t] = h
            outputs.append(torch.stack(steps))
            last.append((h, c) if is_lstm else (h,))
        x = torch.cat(outputs, -1)
        if module.dropout and training and layer < module.num_layers - 1:
            x = F.dropout(x, module.dropout)
    return x, [torch.stack(each) for each in zip(*last)]


def given(module, T=6, B=4):
    D, count = 2 if module.bidirectional else 1, 2 if isinstance(module, fastlstm.LSTM) else 1
    return randn(T, B, module.input_size), [randn(module.num_layers * D, B, module.hidden_size) for _ in range(count)]


def run(module, x, states, **options):
    output, *last = flat(module(x, states[0] if len(states) == 1 else tuple(states), **options))
    return output, last


OPTIONS = [
    {"recurrent_dropout": 0.4},
    {"zoneout": 0.3},
    {"zoneout": (0.2, 0.6)},
    {"zoneout": (0.0, 0.5)},
    {"zoneout": (0.5, 0.0), "recurrent_dropout": 0.3},
    {"recurrent_dropout": 1.0},
    {"zoneout": 1.0},
]


@pytest.mark.sampled(5)
@each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}, {"bias": True}])
def test_equals_a_loop(torch_s, training, options, shape):
    if torch_s is nn.GRU and isinstance(options.get("zoneout"), tuple):
        options = {**options, "zoneout": options["zoneout"][1]}
    module = OURS[torch_s](3, 5, dtype=torch.float64, **shape, **options).train(training)
    x, states = given(module)
    results = []
    for make in (lambda: run(module, x, states), lambda: loop(module, x, states, training)):
        torch.manual_seed(3)
        output, last = make()
        results.append([output, *last])
    assert_same_gradients(module, module, *results, [x, *states])
    torch.manual_seed(4)
    zeros = [torch.zeros_like(a) for a in states]
    expected = loop(module, x, zeros, training)
    torch.manual_seed(4)
    close(module(x)[0], expected[0], "sums")


@each
def test_off_is_the_plain_module(torch_s):
    """In eval mode, and with a dropout of zero: the same cell, the same bits, the same random numbers."""
    theirs, ours = pair(3, 5, like=torch_s, dtype=torch.float32)
    dropped = deepcopy(ours)
    dropped.recurrent_dropout = 0.5
    x = torch.randn(4, 2, 3)
    for mode in ("eval", "off"):
        dropped.eval()
        if mode == "off":
            dropped.train().recurrent_dropout = 0
        torch.manual_seed(0)
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(dropped(x)[0], ours(x)[0])
        assert torch.equal(dropped(x)[0], ours(x)[0])
        after = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(1))
    assert repr(dropped) == repr(ours)
    close(ours(x)[0], theirs(x.double())[0], "sums")


@each
def test_a_plan_of_one_mode_serves_no_other(torch_s):
    """Calls of one signature, without gradients, in both modes in turn and with options that change."""
    module, x = OURS[torch_s](3, 5, dtype=torch.float64, recurrent_dropout=0.5), torch.randn(4, 2, 3).double()
    zeros = [torch.zeros(1, 2, 5).double()] * 2
    with torch.no_grad():
        for training, p in ((False, 0.5), (True, 0.5), (False, 0.5), (True, 0.0), (True, 0.9), (True, 0.5)) * 2:
            module.train(training).recurrent_dropout = p
            torch.manual_seed(1)
            got = module(x)[0]
            torch.manual_seed(1)
            close(got, loop(module, x, zeros, training)[0], "sums")


@each
@pytest.mark.parametrize("training", [True, False])
def test_lengths_and_packed_input(torch_s, training):
    module = OURS[torch_s](3, 5, dtype=torch.float64, zoneout=0.3, recurrent_dropout=0.4).train(training)
    x, states = given(module)
    n = torch.tensor([6, 4, 2, 1])
    results = []
    for call in ({"lengths": n}, {}):
        torch.manual_seed(3)
        results.append(run(module, x, states, **call))
    (output, last), (whole, _) = results
    for b, steps in enumerate(n):
        close(output[:steps, b], whole[:steps, b], "sums")
        close(last[0][0, b], whole[steps - 1, b], "sums")
        assert not output[steps:, b].any()
    torch.manual_seed(3)
    packed, ends = run(module, pack_padded_sequence(x, n), states)
    close(packed, pack_padded_sequence(output, n).data, "sums")
    close(ends, last, "sums")


@each
def test_reset(torch_s):
    module = OURS[torch_s](3, 5, dtype=torch.float64, recurrent_dropout=0.4)
    x, states = given(module)
    reset = torch.zeros(6, 4, dtype=torch.bool)
    reset[0] = True
    torch.manual_seed(3)
    expected = run(module, x, [torch.zeros_like(a) for a in states])
    torch.manual_seed(3)
    close(run(module, x, states, reset=reset), expected, "sums")


def test_cells_of_an_lstm():
    for options in ({"recurrent_dropout": 0.4}, {"zoneout": 0.3}, {"recurrent_dropout": 0.4, "zoneout": 0.3}):
        module = fastlstm.LSTM(3, 5, 2, dtype=torch.float64, **options)
        x, states = given(module)
        torch.manual_seed(3)
        output, (h_n, c_n), cells = module(x, tuple(states), return_cells=True)
        assert cells.shape == (6, 4, 5)
        close(cells[-1], c_n[-1], "sums")
        close(output[-1], h_n[-1], "sums")
        torch.manual_seed(3)
        close(module(x, tuple(states))[0], output, "sums")


@each
@pytest.mark.parametrize("options", [{"recurrent_dropout": 0.5}, {"zoneout": 0.5}], ids=str)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_masks_under_vmap(torch_s, options, randomness):
    """Equal samples have equal results where vmap draws the same numbers for all of them, and only there."""
    module = OURS[torch_s](3, 5, dtype=torch.float64, **options)
    x = torch.randn(6, 4, 3, dtype=torch.float64)

    def call(x):
        return module(x)[0]

    torch.manual_seed(3)
    output = torch.vmap(call, randomness=randomness)(x.expand(3, -1, -1, -1))
    assert output.isfinite().all()
    if randomness == "same":
        torch.manual_seed(3)
        close(output, call(x).expand(3, -1, -1, -1), "sums")
    else:
        assert all(not torch.equal(output[a], output[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@each
def test_steps(torch_s):
    module = OURS[torch_s](3, 5, recurrent_dropout=0.5, zoneout=0.2)
    with pytest.raises(RuntimeError, match="recurrent_dropout must be 0 or the module in eval mode"):
        module.step(torch.zeros(2, 3))
    module.eval()
    x, state, outputs = torch.randn(4, 2, 3), None, []
    for x_t in x:
        h, state = module.step(x_t, state)
        outputs.append(h)
    close(torch.stack(outputs), module(x)[0], "sums")


@each
def test_copies_and_changes(torch_s):
    module = OURS[torch_s](3, 5, zoneout=0.2, recurrent_dropout=0.5)
    assert repr(module).endswith("recurrent_dropout=0.5, zoneout=0.2)")
    for copy in copies_of(module):
        assert (copy.recurrent_dropout, copy.zoneout) == (0.5, 0.2)
    assert list(module.state_dict()) == list(torch_s(3, 5).state_dict())
    module.zoneout = 0
    assert (module.recurrent_dropout, module.zoneout) == (0.5, 0)
    with pytest.warns(UserWarning, match=r"forgets recurrent_dropout=0.5 and zoneout=0"):
        assert type(module.to_torch()) is torch_s


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recurrent_dropout": "1"}, TypeError, "recurrent_dropout must be a number from 0 to 1, got str"),
        ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout must be a number from 0 to 1, got -0.1"),
        ({"recurrent_dropout": True}, TypeError, "recurrent_dropout must be a number from 0 to 1, got bool"),
        ({"zoneout": 1.5}, ValueError, "zoneout must be a number from 0 to 1, got 1.5"),
        ({"zoneout": (0.1,)}, ValueError, "zoneout must be a number or a pair, of c and of h, got 1 numbers"),
        ({"zoneout": (0.1, 2)}, ValueError, "zoneout[1] must be a number from 0 to 1, got 2"),
        ({"zoneout": 0.1, "proj_size": 2}, ValueError, "zoneout needs a module without projection, got zoneout=0.1"),
        ({"recurrent_dropout": 0.1, "proj_size": 2}, ValueError, "recurrent_dropout needs a module without projection"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.LSTM(3, 5, **arguments)
    if "proj_size" not in arguments and not isinstance(arguments.get("zoneout"), tuple):
        (name, value), module = *arguments.items(), fastlstm.GRU(3, 5)
        with pytest.raises(error, match=re.escape(message)):
            setattr(module, name, value)


def test_a_gru_s_zoneout_is_one_number():
    with pytest.raises(TypeError, match="zoneout must be a number from 0 to 1, got tuple"):
        fastlstm.GRU(3, 5, zoneout=(0.1, 0.2))
