"""Models over to fastlstm and back."""

import re
import warnings
from abc import ABC, abstractmethod
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastlstm
from fastlstm.convert import replace, replace_lstm, restore, restore_lstm
from tests.helpers.layers import TORCH
from tests.helpers.modules import OURS, Double, copies_of
from tests.helpers.tolerances import close


class Tagger(nn.Module):
    """All kinds at several depths, one module under two names, one outside the registered modules."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.encoder = nn.Sequential(nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True, dropout=0.4))
        self.layers = nn.ModuleList([nn.GRU(10, 5, 2, dropout=0.4, batch_first=True), nn.RNN(5, 5, 1, "relu")])
        self.cells = nn.ModuleDict({"a": nn.LSTMCell(5, 6), "b": nn.LSTMCell(6, 6, bias=False)})
        self.others = nn.ModuleList([nn.GRUCell(6, 6), nn.RNNCell(6, 6, bias=False)])
        self.tied = self.encoder[0]
        self.seen = [self.encoder[0]]
        self.double()

    def forward(self, x):
        output, (h_n, _) = self.tied(self.embed(x))
        for layer in self.layers:
            output, _ = layer(output)
        h, c = self.cells["a"](output[:, -1])
        h, c = self.cells["b"](h, (h, c))
        for cell in self.others:
            h = cell(h)
        return h.sum() + h_n.cos().sum()


class Bare(nn.LSTM):
    """A subclass that adds to a method and inherits the rest."""

    def forward(self, input, hx=None):  # noqa: A002
        output, state = super().forward(input, hx)
        return 2 * output, state


class Recurrent(ABC, nn.RNNBase):
    @abstractmethod
    def zero_state(self, batch): ...

    def run(self, x):
        return super().forward(x, self.zero_state(x.shape[1]))


class Abstract(Recurrent, nn.LSTM):
    """Two levels and a metaclass, as forecasting libraries have them."""

    def zero_state(self, batch):
        zeros = torch.zeros(self.num_layers, batch, self.hidden_size, dtype=self.weight_ih_l0.dtype)
        return zeros, zeros


class OfGRU(nn.GRU):
    pass


class OfCell(nn.RNNCell):
    def forward(self, *args):
        return -super().forward(*args)


DERIVED = (Bare, OfGRU, OfCell)


@pytest.mark.parametrize(("change", "undo"), [(replace, restore), (replace_lstm, restore_lstm)])
def test_replace_and_restore(change, undo):
    torch.manual_seed(0)
    model = Tagger().train()
    model.encoder[0].weight_hh_l1.requires_grad_(False)
    reference = deepcopy(model)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert change(model, backend="reference") is model
    for a, b in zip(model.modules(), reference.modules(), strict=True):
        changes = type(b) in (OURS if change is replace else (nn.LSTM, nn.LSTMCell))
        assert type(a) is (OURS[type(b)] if changes else type(b))
        assert not changes or a.backend == "reference"
    assert model.tied is model.encoder[0] is model.seen[0]
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(reference.state_dict())
    assert not model.encoder[0].weight_hh_l1.requires_grad

    x, losses = torch.randn(3, 6, 4, dtype=torch.float64), []
    for m, optim in ((model, optimizer), (reference, torch.optim.SGD(reference.parameters(), lr=0.1))):
        torch.manual_seed(1)  # the same features dropped
        losses.append(m(x))
        optim.zero_grad()
        losses[-1].backward()
        optim.step()
    close(*losses, "sums")
    close(list(model.parameters()), list(reference.parameters()), "sums")

    assert undo(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    for a, b in zip(model.modules(), reference.modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
    close(model.eval()(x), reference.eval()(x), "sums")


def test_only_lstms_are_restored():
    model = restore_lstm(replace(Tagger()))
    assert type(model.tied) is nn.LSTM
    assert [type(m) for m in (*model.layers, *model.others)] == [
        fastlstm.GRU, fastlstm.Elman, fastlstm.GRUCell, fastlstm.ElmanCell,
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_dtype_mode_and_hooks_stay(device):
    lstm = nn.LSTM(3, 5, device=device, dtype=torch.bfloat16).eval()
    calls = []
    lstm.register_forward_pre_hook(lambda module, args: calls.append("before"))
    lstm.register_forward_hook(lambda module, args, output: calls.append("after"))
    lstm.register_full_backward_hook(lambda module, dx, dy: calls.append("backward"))
    lstm.register_state_dict_post_hook(lambda *args: calls.append("state"))
    lstm.note = "mine"
    replace_lstm(lstm)
    assert not lstm.training
    assert lstm.note == "mine"
    x = torch.zeros(4, 2, 3, device=device, dtype=torch.bfloat16, requires_grad=True)
    output, _ = lstm(x)
    assert (output.device.type, output.dtype) == (device, torch.bfloat16)
    output.sum().backward()
    lstm.state_dict()
    assert calls == ["before", "after", "backward", "state"]


@st.composite
def modules(draw):
    """A module of torch, or of a class derived from one, in float64. One of its weights may be parametrized."""
    cls, options = draw(st.sampled_from([*OURS, *DERIVED])), {"bias": draw(st.booleans())}
    if issubclass(cls, nn.RNNBase):
        flags = {name: draw(st.booleans()) for name in ("batch_first", "bidirectional")}
        options |= {"num_layers": draw(st.integers(1, 2)), "dropout": draw(st.sampled_from([0.0, 0.4]))} | flags
    module = cls(3, 5, dtype=torch.float64, **options).eval()
    name = draw(st.none() | st.sampled_from([name for name, _ in module.named_parameters()]))
    if name:
        parametrize.register_parametrization(module, name, Double())
    return cls, module, name


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@settings(max_examples=100)
@given(drawn=modules(), keep_type=st.booleans(), is_restored_first=st.booleans())
def test_a_module_over_and_back(drawn, keep_type, is_restored_first):
    """Its class, parameters, attributes and results; those of copies, and of others that its class makes."""
    cls, module, name = drawn
    base = next(base for base in OURS if issubclass(cls, base))
    x, original, parameters = torch.randn(4, 3, dtype=torch.float64), deepcopy(module), list(module.parameters())
    want = module(x)
    for keeps in (keep_type, True):  # a model that turns out to ask for torch's class is replaced once more
        assert replace(module, keep_type=keeps) is module
        assert isinstance(module, OURS[base])
        assert isinstance(module, base) is (keeps or cls in DERIVED)
        assert name or type(module).__name__ == (cls if keeps or cls in DERIVED else OURS[base]).__name__
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
        assert name is None or parametrize.is_parametrized(module, name)
        for copy in (module, deepcopy(module)) if name else (module, *copies_of(module)):
            assert type(copy) is type(module)
            close(copy(x), want, "sums")
    if name is None:
        torch.manual_seed(0)
        another = type(module)(3, 5, dtype=torch.float64)
        torch.manual_seed(0)
        plain = cls(3, 5, dtype=torch.float64)
        close(another(x), plain(x), "sums")
        assert type(restore(another)) is cls
    if is_restored_first or name is None:
        restore(module)
        assert isinstance(module, cls)
        assert vars(module).keys() == vars(original).keys()
    if name:
        close(module(x), want, "sums")
        parametrize.remove_parametrizations(module, name)
    assert isinstance(module, OURS[base]) is not (is_restored_first or name is None)
    close(module(x), want, "sums")
    assert type(restore(module)) is cls
    assert not isinstance(module, OURS[base])


@pytest.mark.parametrize("cls", [Bare, Abstract])
def test_methods_of_a_subclass_run_ours(cls):
    lstm, x = cls(3, 5, 2, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    method = "run" if cls is Abstract else "forward"
    expected = getattr(lstm, method)(x)[0]
    replace_lstm(lstm)
    calls = []
    lstm._run, run_layers = lambda *args: calls.append(args) or run_layers(*args), lstm._run
    close(getattr(lstm, method)(x)[0], expected, "sums")
    assert len(calls) == 1
    del lstm._run
    for copy in copies_of(lstm):
        close(getattr(copy, method)(x)[0], expected, "sums")


@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell, Bare])
def test_a_module_of_a_kept_type_is_compiled(cls):
    """As torch's own is."""
    module, x = cls(3, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    original, expected = deepcopy(module), module(x)[0]
    replace_lstm(module, keep_type=True)
    assert repr(module) == (repr(original) if cls is Bare else f"fastlstm.{original!r}")
    if cls is Bare and TORCH == (2, 15):  # torch's gap: it was so before, too
        for each in (original, module):
            with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match="DelayGraphBreakVariable"):
                torch.compile(deepcopy(each), backend="eager")(x)
    else:
        close(torch.compile(deepcopy(module), backend="eager")(x)[0], expected, "sums")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        close(torch.compile(deepcopy(module), backend="eager", fullgraph=True)(x)[0], expected, "sums")


def test_own_subclasses_stay():
    class Mine(fastlstm.LSTM):
        pass

    model = nn.Sequential(Mine(3, 5))
    with pytest.warns(UserWarning, match="Mine is a subclass of LSTM and stays"):
        restore_lstm(model)
    assert type(model[0]) is Mine


def test_restore_what_was_built_as_ours():
    lstm = restore_lstm(fastlstm.LSTM(3, 5, 2, bidirectional=True, backend="reference", forget_bias=1.0))
    assert vars(lstm).keys() == vars(nn.LSTM(3, 5)).keys()
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    assert lstm(torch.zeros(4, 2, 3))[0].shape == (4, 2, 10)


def test_a_model_is_replaced_whole_or_not_at_all():
    class Final(nn.LSTM):
        def __init_subclass__(cls):
            raise TypeError("no subclasses")

    model = nn.Sequential(nn.LSTM(3, 5), Final(5, 5))
    with pytest.raises(TypeError, match="no subclasses"):
        replace_lstm(model)
    with pytest.raises(ValueError, match="backend must be one of"):
        replace_lstm(model, backend="cudnn")
    assert [type(module) for module in model] == [nn.LSTM, Final]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        *((nn.LSTM, name) for name in ("backend", "forget_bias", "zoneout", "recurrent_dropout", "_cell", "_run")),
        *((nn.GRU, name) for name in ("backend", "zoneout", "recurrent_dropout", "_cell")),
        *((nn.LSTMCell, name) for name in ("backend", "forget_bias")),
    ],
)
def test_a_name_that_ours_means_something_else_by(base, name):
    class Own(base):
        pass

    on_class, on_instance = Own(3, 5), Own(3, 5)
    setattr(on_instance, name, "mine")
    model = nn.Sequential(base(3, 5), on_instance)
    for function in (replace, replace_lstm) if base is not nn.GRU else (replace,):
        message = f"{function.__name__} cannot replace a Own that has a '{name}' of its own"
        with pytest.raises(TypeError, match=message):
            function(model)
        assert type(model[0]) is base
    setattr(Own, name, "mine")
    with pytest.raises(TypeError, match=f"cannot replace a Own that has a '{name}' of its own"):
        replace(on_class)


def test_a_backend_for_what_is_ours_already():
    model = replace_lstm(nn.Sequential(nn.LSTM(3, 5), fastlstm.LSTMCell(5, 5)))
    assert replace_lstm(model, backend="reference")[0].backend == model[1].backend == "reference"
    assert replace_lstm(model)[0].backend == "reference"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("function", [replace_lstm, restore_lstm])
def test_what_cannot_be_replaced(function):
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name} takes a torch.nn.Module, got list"):
        function([nn.LSTM(3, 5)])
    traced = torch.jit.trace(nn.Linear(3, 5), torch.zeros(1, 3))
    with pytest.raises(TypeError, match=f"{name} cannot change a scripted module"):
        function(nn.Sequential(traced))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([], ""),
        ([nn.GRU], "; what it has of torch.nn.GRU is not replaced"),
        ([nn.RNN, nn.GRU, nn.GRU], "; what it has of torch.nn.GRU and torch.nn.RNN is not replaced"),
        ([nn.GRUCell, nn.RNNCell], "; what it has of torch.nn.GRUCell and torch.nn.RNNCell is not replaced"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"keep_type": True}])
def test_a_model_without_lstms_is_warned_of(others, named, options):
    model = nn.Sequential(nn.Linear(3, 3), *(cls(3, 5) for cls in others))
    types = [type(module) for module in model]
    with pytest.warns(UserWarning, match="replace_lstm found no") as caught:
        assert replace_lstm(model, **options) is model
    assert [type(module) for module in model] == types
    found = "replace_lstm found no torch.nn.LSTM or torch.nn.LSTMCell in the Sequential"
    assert [str(warning.message) for warning in caught] == [found + named]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("make", [nn.LSTM, nn.LSTMCell, fastlstm.LSTM, fastlstm.LSTMCell, Bare])
def test_a_model_with_lstms_is_not_warned_of(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = replace_lstm(nn.Sequential(nn.GRU(3, 3), make(3, 5)), keep_type=True)
        replace_lstm(model, backend="reference")


# one module, not in place


@pytest.mark.parametrize("theirs", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4}])
def test_from_and_to_torch(theirs, options):
    module, cls = theirs(3, 5, dtype=torch.float64, **options).eval(), OURS[theirs]
    module.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    ours = cls.from_torch(module)
    assert "_flat_weights" not in vars(ours)  # a second list would keep weights alive that were replaced
    ours.backend = "reference"
    back = ours.to_torch()
    assert vars(back).keys() == vars(module).keys()
    ours.backend = None
    assert (type(module), type(ours), type(back)) == (theirs, cls, theirs)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for other in (ours, back):
        assert all(a is b for a, b in zip(other.parameters(), module.parameters(), strict=True))
        assert repr(other).removeprefix("fastlstm.").replace("Elman", "RNN") == repr(module)
        assert not other.training
        close(other(x), module(x), "sums")
    ours.register_forward_hook(lambda module, args, output: (0 * output[0], output[1]))
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    assert module(x)[0].any()  # its hooks and attributes are its own
    assert module.weight_hh_l0.any()
    message = f"module must be a torch.nn.modules.rnn.{theirs.__name__}, got Linear"
    with pytest.raises(TypeError, match=re.escape(message)):
        cls.from_torch(nn.Linear(3, 5))


def test_from_torch_takes_plain_lstms():
    parametrized = parametrizations.weight_norm(nn.LSTM(3, 5), "weight_hh_l0")
    with pytest.raises(TypeError, match="got ParametrizedLSTM"):
        fastlstm.LSTM.from_torch(parametrized)
    with pytest.raises(TypeError, match="got ParametrizedLSTM"):
        parametrizations.weight_norm(fastlstm.LSTM(3, 5), "weight_hh_l0").to_torch()
