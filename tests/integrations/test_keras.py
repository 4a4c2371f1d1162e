"""Keras's recurrent layers compute the same with fastlstm as with Keras's own code."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlstm.integrations import keras as integration
from tests.helpers import ROOT
from tests.helpers.libraries import gradients, library
from tests.helpers.tolerances import close

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = library("keras")
if keras.backend.backend() != "torch":
    pytest.skip(f"needs Keras on torch, and KERAS_BACKEND is {keras.backend.backend()}", allow_module_level=True)

B, T, I, H = 5, 9, 3, 7
LENGTHS = torch.tensor([9, 4, 0, 1, 7])
SUFFIX = torch.arange(T) < LENGTHS[:, None]
GAPS = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.6
MASKS = {
    "no mask": None,
    "padded behind": SUFFIX,
    "padded in front": SUFFIX.flip(1),
    "gaps": GAPS,
    "all": torch.ones(B, T).bool(),
}
LAYERS = {
    "LSTM": (keras.layers.LSTM, {}),
    "LSTM without bias": (keras.layers.LSTM, {"use_bias": False}),
    "unrolled LSTM": (keras.layers.LSTM, {"unroll": True}),
    "GRU": (keras.layers.GRU, {}),
    "GRU without bias": (keras.layers.GRU, {"use_bias": False}),
    "GRU with its reset before": (keras.layers.GRU, {"reset_after": False}),
    "GRU with its reset before and no bias": (keras.layers.GRU, {"reset_after": False, "use_bias": False}),
    "SimpleRNN": (keras.layers.SimpleRNN, {}),
    "rectified SimpleRNN": (keras.layers.SimpleRNN, {"activation": "relu"}),
}


@pytest.fixture(autouse=True)
def leaves_no_trace(monkeypatch):
    """Every layer of a test that has no other expectation runs fastlstm, without a warning."""
    classes = keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU
    before = [cls.inner_loop for cls in classes]
    integration._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fastlstm lacks Keras's")
        yield
    integration.disable()
    assert [cls.inner_loop for cls in classes] == before


@pytest.fixture
def calls(monkeypatch):
    """The cells that fastlstm has run."""
    cells, run = [], integration.run

    def recorded(layer, **options):
        cells.append(layer.cell.name)
        return run(layer, **options)

    monkeypatch.setattr(integration, "run", recorded)
    return cells


def built(cls, **options):
    keras.utils.set_random_seed(1)
    layer = cls(H, bias_initializer="uniform", seed=3, **options)
    layer.build((B, T, I))
    return layer


def results(layer, mask=None, initial=None, training=False):
    """What a layer returns, the gradients of its input, weights and initial states, and the state that it keeps."""
    torch.manual_seed(2)
    x = torch.randn(B, T, I, requires_grad=True)
    outputs = layer(x, mask=mask, training=training, **({} if initial is None else {"initial_state": initial}))
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    weights = [v.value for v in layer.trainable_variables]
    return [a.detach() for a in outputs], gradients(outputs, [x, *weights, *(initial or ())])


def check(make, calls, **arguments):
    expected = results(make(), **arguments)
    assert calls == []
    integration.enable()
    got = results(make(), **arguments)
    assert calls
    close(got[0], expected[0], "values")
    close(got[1], expected[1], "gradients")


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("sequences", [False, True], ids=["last", "sequences"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, mask, sequences, backwards, calls):
    cls, options = LAYERS[name]
    if options.get("unroll") and backwards and MASKS[mask] is not None:
        pytest.skip("Keras's own code raises for this combination")
    options = {**options, "return_sequences": sequences, "return_state": True, "go_backwards": backwards}
    check(lambda: built(cls, **options), calls, mask=MASKS[mask])


@pytest.mark.parametrize("case", ["initial states", "dropout", "recurrent dropout without training"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_options(name, case, calls):
    cls, states = LAYERS[name][0], [torch.randn(B, H, requires_grad=True) for _ in range(2 if name == "LSTM" else 1)]
    options, arguments = {
        "initial states": ({"return_state": True}, {"mask": SUFFIX, "initial": states}),
        "dropout": ({"dropout": 0.5}, {"training": True}),
        "recurrent dropout without training": ({"recurrent_dropout": 0.5}, {}),
    }[case]
    check(lambda: built(cls, return_sequences=True, **options), calls, **arguments)


@pytest.mark.parametrize("name", ["GRU", "SimpleRNN"])
def test_a_single_state_may_be_a_bare_tensor(name, calls):
    layer, x, h_0 = built(LAYERS[name][0]), torch.randn(B, T, I), torch.randn(B, H)
    expected = layer(x, initial_state=h_0)
    integration.enable()
    close(layer(x, initial_state=h_0), expected, "values")
    assert calls


@pytest.mark.parametrize("merge", ["concat", "sum", None])
@pytest.mark.parametrize("mask", ["no mask", "padded behind", "gaps"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_both_directions(name, mask, merge, calls):
    def make():
        layer = keras.layers.Bidirectional(built(LAYERS[name][0], return_sequences=True), merge_mode=merge)
        layer.build((B, T, I))
        return layer

    check(make, calls, mask=MASKS[mask])
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_states_of_a_stateful_layer(name, calls):
    def make():
        layer = built(LAYERS[name][0], stateful=True)
        torch.manual_seed(2)
        x = torch.randn(3, B, T, I)
        outputs = [layer(x[0]), layer(x[1]), *(v.value.clone() for v in layer.states)]
        layer.reset_state()
        return [*outputs, layer(x[2])]

    expected = make()
    integration.enable()
    close(make(), expected, "values")
    assert len(calls) == 3


def test_gradients_of_a_stateful_layer():
    """Keras's own LSTM raises here, since it writes over the states that its backward pass reads."""
    integration.enable()
    layer, plain = built(keras.layers.LSTM, stateful=True), built(keras.layers.LSTM)
    results(layer)
    states = [v.value.clone() for v in layer.states]
    plain.set_weights(layer.get_weights()[:3])
    torch.manual_seed(2)
    x = torch.randn(B, T, I)
    outputs = layer(x), plain(x, initial_state=states)
    close(*(gradients([a], each.cell.kernel.value) for a, each in zip(outputs, (layer, plain))), "gradients")


def around(make, **options):
    """A layer of Keras around a single cell."""
    keras.utils.set_random_seed(1)
    layer = keras.layers.RNN(make(), **options)
    layer.build((B, T, I))
    return layer


def test_a_cell_in_keras_layers_rnn(calls):
    check(lambda: around(lambda: keras.layers.GRUCell(H), return_sequences=True), calls)


def test_a_cell_of_ones_own_is_keras_matter(calls):
    class Cell(keras.layers.LSTMCell):
        def call(self, inputs, states, training=False):
            output, states = super().call(inputs, states, training)
            return 2 * output, states

    layer = around(lambda: Cell(H))
    expected = results(layer)
    integration.enable()
    assert torch.equal(results(layer)[0][0], expected[0][0])
    assert calls == []


def test_a_call_under_another_default_device(calls):
    layer, x = built(keras.layers.LSTM, go_backwards=True), torch.randn(B, T, I)
    integration.enable()
    expected = layer(x)
    with torch.device("meta"):
        got = layer(x, initial_state=[torch.zeros(B, H, device="cpu")] * 2)
    assert torch.equal(got, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float64"])
def test_other_types(dtype, calls):
    layer = built(keras.layers.LSTM, dtype=dtype)
    x = torch.randn(B, T, I, dtype=torch.float64)
    expected = layer(x)
    integration.enable()
    got = layer(x)
    assert calls == ["lstm"]
    close(got, expected, "cast" if dtype == "mixed_bfloat16" else "values")


FALLING_BACK = {
    "activation=relu": (keras.layers.LSTM, {"activation": "relu"}, {}),
    "recurrent_activation=hard_sigmoid": (keras.layers.GRU, {"recurrent_activation": "hard_sigmoid"}, {}),
    "activation=linear": (keras.layers.SimpleRNN, {"activation": None}, {}),
    "recurrent_dropout=0.5": (keras.layers.LSTM, {"recurrent_dropout": 0.5}, {"training": True}),
    "mask with a value for each unit": (keras.layers.LSTM, {}, {"mask": GAPS[..., None].repeat(1, 1, H)}),
}


@pytest.mark.parametrize("option", FALLING_BACK)
def test_an_option_that_fastlstm_lacks(option, calls):
    cls, options, arguments = FALLING_BACK[option]
    expected = results(built(cls, **options), **arguments)
    integration.enable()
    text = f"^fastlstm lacks Keras's {option}, so that a keras.layers.{cls.__name__} runs Keras's"
    with pytest.warns(UserWarning, match=text):
        got = results(built(cls, **options), **arguments)
    assert calls == []
    close(got, expected, "values")  # Keras's products are not the same in each run
    results(built(cls, **options), **arguments)  # without a second warning, which would be an error here


def test_dropout_with_a_mask_for_each_gate(calls):
    """Keras's LSTM raises for it, with its own code too; its cell does not."""
    layer = around(lambda: keras.layers.LSTMCell(H, dropout=0.5, implementation=1))
    integration.enable()
    with pytest.warns(UserWarning, match="fastlstm lacks Keras's implementation=1"):
        results(layer, training=True)
    assert calls == []


def model():
    keras.utils.set_random_seed(4)
    layers = keras.layers
    model = keras.Sequential([
        layers.Embedding(20, I, mask_zero=True),
        layers.Bidirectional(layers.GRU(H, return_sequences=True, dropout=0.1)),
        layers.LSTM(H, return_sequences=True),
        layers.SimpleRNN(H),
        layers.Dense(2, activation="softmax"),
    ])  # fmt: skip
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def test_fit_predict_save_and_load(calls, tmp_path):
    rng = np.random.default_rng(0)
    words = rng.integers(1, 20, (40, T)) * (np.arange(T) >= rng.integers(0, T, (40, 1)))  # padded in front with zeros
    classes = rng.integers(0, 2, 40)
    plain, ours = model(), model()
    keras.utils.set_random_seed(5)
    expected = plain.fit(words, classes, batch_size=8, epochs=2, verbose=0).history["loss"]
    assert calls == []
    integration.enable()
    keras.utils.set_random_seed(5)
    got = ours.fit(words, classes, batch_size=8, epochs=2, verbose=0).history["loss"]
    assert got == pytest.approx(expected, abs=1e-5)
    assert set(calls) == {"gru", "lstm", "elman_tanh"}
    close([torch.tensor(a) for a in ours.get_weights()], [torch.tensor(a) for a in plain.get_weights()], "models")
    predictions = ours.predict(words, verbose=0)
    ours.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict(words, verbose=0), predictions)
    integration.disable()
    close(torch.tensor(loaded.predict(words, verbose=0)), torch.tensor(predictions), "values")


def test_enabled_and_disabled_as_often_as_one_likes():
    own = keras.layers.LSTM.inner_loop
    integration.disable()
    integration.enable()
    integration.enable()
    assert keras.layers.LSTM.inner_loop is not own
    integration.disable()
    integration.disable()
    assert keras.layers.LSTM.inner_loop is own


def test_another_backend_of_keras_raises(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"^Keras's backend must be torch, got jax: set KERAS_BACKEND=torch .*$"):
        integration.enable()


def test_a_keras_with_other_layers_raises(monkeypatch):
    own = keras.layers.LSTM.inner_loop
    message = r"^keras\.layers\.GRU must have inner_loop\(self, sequences, .*, which keras .* lacks$"
    with monkeypatch.context() as patched:
        patched.setattr(keras.layers.GRU, "inner_loop", lambda self, sequences, state: None)
        with pytest.raises(RuntimeError, match=message):
            integration.enable()
    assert keras.layers.LSTM.inner_loop is own


def test_a_compiled_layer_is_keras_matter(calls):
    layer = built(keras.layers.LSTM)
    x = torch.randn(B, T, I)
    expected = layer(x)
    integration.enable()
    close(torch.compile(layer, backend="eager")(x), expected, "values")
    assert calls == []


@pytest.mark.slow
def test_keras_own_tests_pass(tmp_path):
    """The tests that Keras's package ships of its recurrent layers, with fastlstm enabled."""
    folder = Path(importlib.util.find_spec("keras").origin).parent / "src/layers/rnn"
    names = "lstm", "gru", "simple_rnn", "bidirectional", "rnn", "stacked_rnn_cells"
    files = [folder / f"{name}_test.py" for name in names]
    if not all(path.exists() for path in files):
        pytest.skip("this release of keras ships no tests")
    (tmp_path / "enables_fastlstm.py").write_text("from fastlstm.integrations import keras\n\nkeras.enable()\n")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "enables_fastlstm",
        "-p",
        "no:cacheprovider",
        *map(str, files),
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
