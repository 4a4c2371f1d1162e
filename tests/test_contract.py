"""`torch.nn.LSTM` and `fastlstm.LSTM` by the same calls, good and bad: results, exceptions and messages compared."""

import re
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm

TOLERANCE = 1e-12  # float64 sums of at most a few hundred terms, each below 10: 1e-14 apart at worst

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

sizes = st.sampled_from([1, 2, 3, 5])
bad_sizes = st.sampled_from([0, -1, 2.0, "a", None])


def outcome(call):
    """What `call` did: its result or exception, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as given_warnings:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        try:
            result = call()
        except Exception as error:
            result = error
    return result, [(w.category, str(w.message)) for w in given_warnings]


def assert_same_outcome(theirs, ours):
    (result, expected_warnings), (got, got_warnings) = theirs, ours
    assert got_warnings == expected_warnings
    if isinstance(result, Exception):
        assert type(got) is type(result), f"expected {result!r}, got {got!r}"
        assert str(got) == str(result)
        return
    assert not isinstance(got, Exception), repr(got)
    assert_same(result, got)


def assert_same(expected, got):
    """Equal in structure, types, shapes, strides and, to TOLERANCE, in values."""
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.device == expected.device
        assert got.shape == expected.shape
        assert got.stride() == expected.stride() or expected.numel() == 0
        assert got.requires_grad == expected.requires_grad
        if expected.device.type != "meta":
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    elif isinstance(expected, PackedSequence):
        assert type(got) is PackedSequence
        assert_same(expected.data, got.data)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            a, b = getattr(expected, name), getattr(got, name)
            assert (a is None and b is None) or torch.equal(a, b)
    else:
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for a, b in zip(expected, got, strict=True):
            assert_same(a, b)


def pair(seed=0, **arguments):
    """A `torch.nn.LSTM` and a `fastlstm.LSTM` from the same seed, float64 unless said otherwise."""
    arguments = {"dtype": torch.float64, **arguments}
    modules = []
    for cls in (nn.LSTM, fastlstm.LSTM):
        torch.manual_seed(seed)
        modules.append(cls(**arguments))
    return modules


# construction

constructor = st.fixed_dictionaries(
    {"input_size": sizes, "hidden_size": sizes},
    optional={
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0, 0.25, 1]),
        "bidirectional": st.booleans(),
        "proj_size": st.integers(0, 2),
        "dtype": st.sampled_from([None, torch.float64, torch.bfloat16]),
        "device": st.sampled_from([None, "cpu", "meta"]),
    },
)
faults = st.dictionaries(
    st.sampled_from(
        ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "proj_size", "dtype"]
    ),
    st.sampled_from([0, -1, 1, 2, 2.5, "x", None, True, float("nan"), 1j, torch.long, []]),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(constructor, faults, st.integers(0, 2**31))
def test_construction(arguments, faults, seed):
    arguments = {**arguments, **faults}

    def build(cls):
        torch.manual_seed(seed)
        return cls(**arguments)

    theirs, ours = outcome(partial(build, nn.LSTM)), outcome(partial(build, fastlstm.LSTM))
    assert theirs[1] == ours[1]
    (theirs, _), (ours, _) = theirs, ours
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return
    assert not isinstance(ours, Exception), repr(ours)
    assert_same_module(theirs, ours)


def assert_same_module(theirs, ours):
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        other = getattr(ours, name)
        assert type(other) is nn.Parameter
        assert (other.dtype, other.device, other.shape) == (parameter.dtype, parameter.device, parameter.shape)
        assert parameter.device.type == "meta" or torch.equal(other, parameter)
    for name in (*nn.LSTM.__constants__, "_flat_weights_names", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    assert fastlstm.LSTM.__constants__ == nn.LSTM.__constants__
    layers = zip(theirs.all_weights, ours.all_weights, strict=True)
    assert all(len(a) == len(b) for a, b in layers)
    assert all(a is getattr(ours, name) for a, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
    assert [ref() is a for ref, a in zip(ours._flat_weight_refs, ours._flat_weights, strict=True)] == [True] * len(
        theirs._flat_weight_refs
    )


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {"input_size": sizes | bad_sizes, "hidden_size": sizes | bad_sizes},
        optional={"bias": st.sampled_from([True, False, 0, "x"]), "dtype": st.sampled_from([None, torch.float64, 3])},
    ),
    st.integers(0, 2**31),
)
def test_cell_construction(arguments, seed):
    def build(cls):
        torch.manual_seed(seed)
        return cls(**arguments)

    (theirs, _), (ours, _) = outcome(partial(build, nn.LSTMCell)), outcome(partial(build, fastlstm.LSTMCell))
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return
    assert repr(ours) == repr(theirs)
    assert list(ours._parameters) == list(theirs._parameters)
    for name, parameter in theirs._parameters.items():
        other = ours._parameters[name]
        assert (parameter is None and other is None) or torch.equal(other, parameter)


def test_positional_order():
    arguments = (3, 4, 2, False, True, 0.5, True, 2, "meta", torch.float64)
    assert_same_module(nn.LSTM(*arguments), fastlstm.LSTM(*arguments))
    cell = fastlstm.LSTMCell(3, 4, False, "meta", torch.float64)
    assert repr(cell) == repr(nn.LSTMCell(3, 4, False, "meta", torch.float64))
    assert cell.weight_ih.device.type == "meta"
    assert cell.weight_ih.dtype == torch.float64


@pytest.mark.parametrize("arguments", [(), (3,), (3, 4, 1, True, False, 0.0, False, 0, None, None, None)])
def test_wrong_number_of_arguments(arguments):
    theirs, ours = outcome(lambda: nn.LSTM(*arguments)), outcome(lambda: fastlstm.LSTM(*arguments))
    assert type(ours[0]) is type(theirs[0]) is TypeError  # the words differ: ours name the class that was called


def test_unknown_argument():
    with pytest.raises(TypeError, match=r"LSTM.__init__\(\) got an unexpected keyword argument 'foo'"):
        fastlstm.LSTM(3, 4, foo=1)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_methods(batch_first, proj_size):
    arguments = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "proj_size": proj_size}
    theirs, ours = pair(input_size=3, hidden_size=4, **arguments)
    x, batch_sizes, order = torch.zeros(5, 2, 3, dtype=torch.float64), torch.tensor([2, 1]), torch.tensor([1, 0])
    B = 5 if batch_first else 2
    good = [torch.randn(4, B, n, dtype=torch.float64) for n in (proj_size or 4, 4)]
    bad = [good[0], good[1][..., :3]]
    for call in (
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_cell_size(x, None),
        lambda m: m.get_expected_hidden_size(x[0], batch_sizes),
        lambda m: m.get_expected_cell_size(x[0], batch_sizes),
        lambda m: m.check_input(x, None),
        lambda m: m.check_input(x, batch_sizes),
        lambda m: m.check_input(x[..., :2], None),
        lambda m: m.check_input(x.float(), None),
        lambda m: m.check_hidden_size(good[1], (4, B, 4)),
        lambda m: m.check_hidden_size(good[1], (4, B, 5)),
        lambda m: m.check_forward_args(x, good, None),
        lambda m: m.check_forward_args(x, bad, None),
        lambda m: m.permute_hidden(tuple(good), None),
        lambda m: m.permute_hidden(tuple(a[:, :2] for a in good), order),
        lambda m: m.flatten_parameters(),
        lambda m: [(torch.manual_seed(5), m.reset_parameters(), list(m.parameters()))[2]],
    ):
        (expected, _), (got, _) = outcome(partial(call, theirs)), outcome(partial(call, ours))
        if isinstance(expected, Exception):
            assert (type(got), str(got)) == (type(expected), str(expected))
        elif isinstance(expected, tuple | list) and not isinstance(expected[0], int):
            for a, b in zip(expected, got, strict=True):
                assert_same(a, b)
        else:
            assert got == expected


# forward

modules = st.fixed_dictionaries(
    {"input_size": sizes, "hidden_size": st.sampled_from([2, 3, 7])},
    optional={
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.4, 1.0]),
        "bidirectional": st.booleans(),
        "proj_size": st.sampled_from([0, 1]),
    },
)


@st.composite
def calls(draw):
    """Constructor arguments, an input and states for it."""
    arguments = draw(modules)
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    form = draw(st.sampled_from(["unbatched", "batched", "batched", "packed", "packed unsorted", "packed equal"]))
    batch_first, I, H = arguments.get("batch_first", False), arguments["input_size"], arguments["hidden_size"]
    states = arguments.get("num_layers", 1) * (2 if arguments.get("bidirectional") else 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    randn = partial(torch.randn, dtype=torch.float64, generator=generator)
    T, B = max(lengths), draw(st.sampled_from([0, 1, 2, 3])) if form == "batched" else len(lengths)
    if form == "unbatched":
        x, batch = randn(T, I), ()
    elif form == "batched":
        x, batch = randn(*((B, T) if batch_first else (T, B)), I), (B,)
        if draw(st.booleans()):
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        lengths = [T] * B if form == "packed equal" else lengths if "un" in form else sorted(lengths, reverse=True)
        x = pack_padded_sequence(randn(T, B, I), torch.tensor(lengths), enforce_sorted="un" not in form)
        batch = (B,)
    hx = None
    if draw(st.booleans()):
        h_0 = randn(states, *batch, arguments.get("proj_size", 0) or H)
        c_0 = randn(states, *batch, H)
        if draw(st.booleans()):  # any strides
            h_0, c_0 = h_0.mT.contiguous().mT, torch.stack([c_0, c_0], -1)[..., 0]
        hx = draw(st.sampled_from([tuple, list]))((h_0, c_0))
    return arguments, x, hx, draw(st.integers(0, 2**31)), draw(st.booleans())


def leaves(x, hx):
    """Copies of input and states that take gradients, strides kept."""
    copies = [
        a.detach().clone().requires_grad_() for a in (x.data if isinstance(x, PackedSequence) else x, *(hx or ()))
    ]
    data, *states = copies
    return copies, x._replace(data=data) if isinstance(x, PackedSequence) else data, type(hx)(states) if hx else None


def flat(result):
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


@settings(max_examples=150, deadline=None)
@given(calls())
def test_forward_and_gradients(call):
    arguments, x, hx, seed, training = call
    results, gradients = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = pair(seed, **arguments)
        for module in modules:
            module.train(training)
            torch.manual_seed(seed)  # the same seed drops the same features
            inputs, x_, hx_ = leaves(x, hx)
            results.append(module(x_, hx_))
            outputs = flat(results[-1])
            generator = torch.Generator().manual_seed(seed)
            cotangents = [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in outputs]
            weights = [*inputs, *module.parameters()]
            # with a dropout of 1 nothing depends on what lies below: a gradient of None or of zeros
            grads = torch.autograd.grad(outputs, weights, cotangents, allow_unused=True)
            gradients.append([torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)])
    assert_same(*results)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 2, 1], [1, 5, 2]])
def test_dropout_of_packed_input(lengths, bidirectional):
    """torch drops over the packed rows: the same seed must meet the same rows."""
    theirs, ours = pair(input_size=3, hidden_size=4, num_layers=3, dropout=0.5, bidirectional=bidirectional)
    packed = pack_padded_sequence(
        torch.randn(5, 3, 3, dtype=torch.float64), torch.tensor(lengths), enforce_sorted=False
    )
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append(module(packed))
    assert_same(*results)


def wrong(a, kind, I):
    """The tensor `a` with a fault."""
    return {
        "dims": lambda: a.unsqueeze(0),
        "no dims": lambda: a.reshape(-1)[:1].squeeze(0) if a.numel() else a.new_zeros(()),
        "features": lambda: a.new_zeros(*a.shape[:-1], a.shape[-1] + I),
        "rows": lambda: a.new_zeros(a.shape[0] + 1, *a.shape[1:]),
        "batch": lambda: torch.cat([a, a], -2) if a.dim() > 1 else a,
        "dtype": lambda: a.to(torch.float32),
        "integers": lambda: a.to(torch.long),
        "device": lambda: a.to("meta"),
        "none": lambda: None,
        "list": lambda: a.tolist(),
    }[kind]()


@settings(max_examples=300, deadline=None)
@given(
    calls().filter(lambda call: not isinstance(call[1], PackedSequence)),
    st.sampled_from([None, "dims", "no dims", "features", "dtype", "integers", "device", "none", "list"]),
    st.sampled_from([None, "dims", "no dims", "features", "rows", "batch", "device", "none", "list"]),
    st.sampled_from([None, "dims", "no dims", "features", "rows", "batch", "device", "none", "list"]),
)
def test_bad_calls(call, x_fault, h_fault, c_fault):
    arguments, x, hx, seed, training = call
    if x_fault:
        x = wrong(x, x_fault, 1)
    if hx:
        hx = (wrong(hx[0], h_fault, 1) if h_fault else hx[0], wrong(hx[1], c_fault, 2) if c_fault else hx[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = pair(seed, **arguments)

    def run(module):
        torch.manual_seed(seed)
        return module.train(training)(x, hx)

    assert_same_outcome(outcome(partial(run, theirs)), outcome(partial(run, ours)))


@pytest.mark.parametrize("call", [{"args": ()}, {"args": (1, 2, 3)}, {"args": (torch.zeros(1, 3),), "foo": 1}])
def test_wrong_forward_arguments(call):
    theirs, ours = pair(input_size=3, hidden_size=4)
    call = dict(call)
    args = call.pop("args")
    expected, got = outcome(lambda: theirs(*args, **call))[0], outcome(lambda: ours(*args, **call))[0]
    assert (type(got), str(got)) == (type(expected), str(expected))


def test_input_is_a_keyword():
    theirs, ours = pair(input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_same(theirs(input=x, hx=None), ours(input=x, hx=None))


@pytest.mark.parametrize("size", [(5, 2, 3), (5, 3)])
def test_meta_device(size):
    theirs, ours = pair(input_size=3, hidden_size=4, num_layers=2, bidirectional=True, device="meta")
    x = torch.zeros(size, dtype=torch.float64, device="meta")
    assert_same(theirs(x), ours(x))


# where ours is better on purpose


def test_packed_input_is_checked():
    ours = fastlstm.LSTM(3, 4)
    x = torch.randn(5, 2, 4)
    equal, unequal = (pack_padded_sequence(x, torch.tensor(lengths)) for lengths in ([5, 5], [5, 3]))
    for packed in (equal, unequal):  # torch returns numbers where the lengths are equal
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"):
            ours(packed)
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match weight dtype"):
        ours(pack_padded_sequence(x[..., :3].double(), torch.tensor([5, 3])))
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 1"):
        ours(pack_padded_sequence(x[..., 0], torch.tensor([5, 3])))
    with pytest.raises(RuntimeError, match="found input tensor at meta and parameter tensor at cpu"):
        ours(PackedSequence(torch.zeros(8, 3, device="meta"), torch.tensor([2, 2, 2, 1, 1])))


@pytest.mark.parametrize(
    ("h_size", "c_size", "message"),
    [
        ((1, 3, 4), (1, 2, 4), "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
        ((1, 2, 5), (1, 2, 5), "Expected hidden[0] size (1, 2, 4), got [1, 2, 5]"),
        ((2, 2, 4), (2, 2, 4), "Expected hidden[0] size (1, 2, 4), got [2, 2, 4]"),
        ((1, 2, 4), (1, 2, 5), "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]"),
        ((2, 4), (2, 4), "hx and cx should also be 3-D but got (2-D, 2-D) tensors"),
    ],
)
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3], [3, 5]])
def test_states_of_packed_input_are_checked(h_size, c_size, message, lengths):
    _, ours = pair(input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    hx = (torch.zeros(h_size, dtype=torch.float64), torch.zeros(c_size, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ours(packed, hx)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("size", [(0, 2, 3), (0, 3), (0, 0, 3)])
def test_no_time_steps(size, proj_size, bidirectional):
    _, ours = pair(input_size=3, hidden_size=4, num_layers=2, proj_size=proj_size, bidirectional=bidirectional)
    x = torch.zeros(size, dtype=torch.float64)  # torch: "Expected sequence length to be larger than 0 in RNN"
    D, H_out, batch = 2 if bidirectional else 1, proj_size or 4, size[1:-1]
    output, (h_n, c_n) = ours(x)
    assert output.shape == (0, *batch, D * H_out)
    assert h_n.shape == (2 * D, *batch, H_out)
    assert not h_n.any()
    assert not c_n.any()
    h_0, c_0 = (torch.randn(2 * D, *batch, n, dtype=torch.float64) for n in (H_out, 4))
    output, (h_n, c_n), cells = ours(x, (h_0, c_0), return_cells=True)
    assert torch.equal(h_n, h_0)
    assert torch.equal(c_n, c_0)
    assert cells.shape == (0, *batch, D * 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [  # torch raises in other words, and promotes the last
        (lambda h: torch.stack([h, h]), TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got Tensor"),
        (lambda h: h, TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got Tensor"),
        (lambda h: {0: h, 1: h}, TypeError, "hx must be a tuple of two tensors, h_0 and c_0, got dict"),
        (lambda h: (h,), RuntimeError, "lstm expects two hidden states"),
        (lambda h: (h, h, h), RuntimeError, "lstm expects two hidden states"),
        (lambda h: (h.float(), h), RuntimeError, "found input tensor with torch.float64 and hidden tensor with"),
        (lambda h: (h, h.float()), RuntimeError, "found input tensor with torch.float64 and hidden tensor with"),
    ],
)
def test_unsuitable_states(make, error, message):
    _, ours = pair(input_size=3, hidden_size=4)
    x, hx = torch.randn(5, 2, 3, dtype=torch.float64), make(torch.zeros(1, 2, 4, dtype=torch.float64))
    with pytest.raises(error, match=message):
        ours(x, hx)


# the cell


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, "dims", "no dims", "features", "none"]),
    st.sampled_from([None, None, "features", "rows", "cube", "none"]),
    st.sampled_from([None, None, "features", "rows", "cube", "none"]),
    st.integers(0, 2**31),
)
def test_cell(batched, B, with_states, bias, x_fault, h_fault, c_fault, seed):
    cells = []
    for cls in (nn.LSTMCell, fastlstm.LSTMCell):
        torch.manual_seed(seed)
        cells.append(cls(3, 5, bias, dtype=torch.float64))
    batch = (B,) if batched else ()
    x, h_0, c_0 = (torch.randn(*batch, n, dtype=torch.float64) for n in (3, 5, 5))

    def faulty(a, fault):
        if fault == "cube":
            return a[None, None]
        if fault == "rows" and a is not None and a.dim() == 1:
            return a
        return wrong(a, fault, 1) if fault else a

    x, h_0, c_0 = faulty(x, x_fault), faulty(h_0, h_fault), faulty(c_0, c_fault)
    hx = (h_0, c_0) if with_states else None
    assert_same_outcome(outcome(lambda: cells[0](x, hx)), outcome(lambda: cells[1](x, hx)))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cell_gradients(batched, bias):
    x, h_0, c_0 = (torch.randn(*((4,) if batched else ()), n, dtype=torch.float64) for n in (3, 5, 5))
    gradients = []
    for cls in (nn.LSTMCell, fastlstm.LSTMCell):
        torch.manual_seed(0)
        cell = cls(3, 5, bias, dtype=torch.float64)
        inputs = [a.clone().requires_grad_() for a in (x, h_0, c_0)]
        h, c = cell(inputs[0], tuple(inputs[1:]))
        gradients.append(torch.autograd.grad((h.sin() + 2 * c.cos()).sum(), [*inputs, *cell.parameters()]))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("x", "hx", "error", "message"),
    [
        (torch.zeros(2, 3).double(), None, RuntimeError, "found input tensor with torch.float64 and parameter tensor"),
        (torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(2, 5).double()), RuntimeError, "and hidden tensor with"),
        (torch.zeros(2, 3), (torch.zeros(2, 5, device="meta"),) * 2, RuntimeError, "hidden tensor at meta"),
        (
            torch.zeros(2, 3, device="meta"),
            None,
            RuntimeError,
            "found input tensor at meta and parameter tensor at cpu",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 2, 5), TypeError, "hx must be a tuple of two tensors"),
        (torch.zeros(2, 3), (torch.zeros(2, 5),), RuntimeError, "lstm_cell expects two hidden states"),
        (torch.zeros(2, 3), (torch.zeros(2, 5),) * 3, RuntimeError, "lstm_cell expects two hidden states"),
        (
            torch.zeros(5, 3),
            (torch.zeros(5), torch.zeros(5)),
            ValueError,
            "Expected hx[0] to be 2D as the input is, got 1D",
        ),
        (
            torch.zeros(3),
            (torch.zeros(5, 5), torch.zeros(5, 5)),
            ValueError,
            "Expected hx[0] to be 1D as the input is, got 2D",
        ),
        (
            torch.zeros(3),
            (torch.zeros(1, 5), torch.zeros(1, 5)),
            RuntimeError,
            "inconsistent hidden_size: got 1, expected 5",
        ),
    ],
)
def test_cell_messages(x, hx, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.LSTMCell(3, 5)(x, hx)
