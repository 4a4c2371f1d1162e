"""What a recipe adds to plain Adam, the sizes beyond one layer, and the other ways to read an image."""

import math
import sys

import pytest
import torch
from torch import nn

import fastlstm.train
from fastlstm.mnist import augment
from fastlstm.mnist import model as model_module
from fastlstm.mnist.data import load
from fastlstm.mnist.history import History
from fastlstm.mnist.model import RowLSTM, TorchLSTM
from fastlstm.mnist.recipe import AVERAGE_DECAY, PARTS, Recipe, iterations
from fastlstm.mnist.state import State
from fastlstm.mnist.training import train
from tests.helpers.demo import SMALL, metrics

PROJECTIONS = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's
pytestmark = pytest.mark.usefixtures("no_pictures")


def run(tiny, out, *more):
    arguments = ("--data", tiny, "--out", out, *SMALL, "--backend", "auto", *more)
    assert fastlstm.train.main([*map(str, arguments)]) == 0
    return metrics(out)


def test_the_default_recipe_is_the_tutorials(tiny, tmp_path, monkeypatch):
    recipes = []

    def run(classes, data, recipe, **more):
        recipes.append(recipe)
        raise KeyboardInterrupt  # 800 iterations take too long

    monkeypatch.setattr(fastlstm.train, "run", run)
    assert fastlstm.train.main(["--data", str(tiny), "--batch-size", "32", "--out", str(tmp_path)]) == 130
    assert recipes == [Recipe(iterations=800, batch_size=32, hidden_size=128, lr=1e-3, seed=0, parts=())]


def test_the_best_recipe_lasts_its_epochs_and_has_its_parts(tiny, tmp_path):
    metrics = run(tiny, tmp_path, "--recipe", "best", "--epochs", 2)
    assert metrics["iterations"] == iterations(2, 90, 32) == 6
    assert metrics["parts"] == ["augmentation", "average"]
    assert [entry["iterations"] for entry in metrics["validation"]] == [3, 6]
    assert metrics["validation"][-1]["accuracy"] == pytest.approx(metrics["validation_accuracy"])


def test_parts_take_the_place_of_the_recipes(tiny, tmp_path):
    none = run(tiny, tmp_path / "none", "--recipe", "best", "--iterations", 2, "--parts")
    two = run(tiny, tmp_path / "two", "--iterations", 2, "--parts", "schedule", "augmentation")
    assert (none["parts"], none["lr"]) == ([], 4e-3)
    assert (two["parts"], two["lr"]) == (["augmentation", "schedule"], 1e-3)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 100])
def test_the_schedule_rises_for_a_tenth_and_falls_to_zero(count):
    recipe = Recipe(iterations=count, lr=0.5, parts=("schedule",))
    optimizer = recipe.optimizer([nn.Parameter(torch.zeros(1))])
    schedule = recipe.schedule(optimizer)
    factors = []
    for _ in range(count):
        factors.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        schedule.step()
    rise = max(1, count // 10)
    assert factors[:rise] == pytest.approx([(k + 1) / rise for k in range(rise)])
    fall = [math.cos(math.pi / 2 * k / (count - rise)) ** 2 for k in range(count - rise)]
    assert factors[rise:] == pytest.approx(fall)


def test_the_average_follows_the_weights_and_is_what_is_tested():
    model = RowLSTM(3, 7)
    state = State(model, Recipe(parts=("average",)), 200, torch.device("cpu"))
    expected = 0.0
    for step in range(60):
        with torch.no_grad():
            model.linear.bias.copy_(torch.randn(10))
        state.step()  # without gradients the optimiser leaves the weights alone
        decay = min(AVERAGE_DECAY, (1 + step) / (10 + step)) if step else 0  # the first weights are taken as they are
        expected = decay * expected + (1 - decay) * model.linear.bias.detach()
    torch.testing.assert_close(state.tested.linear.bias.detach(), expected, rtol=1e-5, atol=1e-6)  # float32, 60 steps


def test_the_average_is_what_is_kept(tiny):
    models = [RowLSTM(3, 7, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    for model, parts in zip(models, ((), ("average",))):
        train(model, load(tiny).train, Recipe(iterations=20, batch_size=32, lr=0.05, parts=parts))
    raw, averaged = (model.linear.weight.detach() for model in models)
    first = RowLSTM(3, 7, generator=torch.Generator().manual_seed(1)).linear.weight.detach()
    assert 0 < (averaged - raw).abs().max() < (raw - first).abs().max()  # behind the last weights, far from the first


def test_a_map_moves_an_image():
    images = torch.rand(4, 28, 28)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3)
    # float32: bilinear weights off by a rounding of the coordinates
    torch.testing.assert_close(augment.move(images, identity), images, rtol=0, atol=1e-4)
    right = identity + torch.tensor([[0, 0, 2 * 3 / 28], [0, 0, 0]])
    moved = augment.move(images, right)
    torch.testing.assert_close(moved[:, :, :-3], images[:, :, 3:], rtol=0, atol=1e-4)
    assert moved[:, :, -3:].abs().max() < 1e-4


def test_movements_are_small_and_follow_the_generator():
    first, same, other = (augment.draw(500, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    linear, shift = first[:, :, :2], first[:, :, 2] * 14  # in pixels
    bound = (1 + augment.SCALE) * math.cos(augment.TURN / 2)
    assert shift.abs().max() <= augment.SHIFT
    assert shift.abs().max() > 0.9 * augment.SHIFT
    assert linear.diagonal(dim1=1, dim2=2).max() <= 1 + augment.SCALE
    assert linear.diagonal(dim1=1, dim2=2).max() > bound - 0.05
    assert linear[:, 0, 1].abs().max() <= (1 + augment.SCALE) * math.sin(augment.TURN)


@PROJECTIONS
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 2},
        {"bidirectional": True},
        {"proj_size": 3},
        {"layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.5},
        {"dropout": 0.5},
        {"steps": 12},
        {"steps": 2, "permuted": True},
        {"precision": "bf16"},
    ],
)
def test_every_size_trains_and_is_compared(tiny, tmp_path, options):
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    metrics = run(tiny, tmp_path, "--iterations", 6, "--compare", *arguments)
    assert metrics.items() >= options.items()
    # six steps of Adam from the same weights, on the same batches, with the same zeros; bf16 has 8 bits
    tolerance = 0.05 if "precision" in options else 1e-4
    assert metrics["compare"]["loss"] == pytest.approx(metrics["loss"], rel=tolerance)
    config = torch.load(tmp_path / "model.pt", weights_only=True)["config"]
    told = {
        "input_size": 12 // options.get("steps", 4),
        "num_layers": options.get("layers", 1),
        "bidirectional": options.get("bidirectional", False),
        "proj_size": options.get("proj_size", 0),
        "dropout": options.get("dropout", 0),
        "permuted": 12 * options.get("permuted", 0),
    }
    assert config.items() >= told.items()


def test_torchs_lstm_runs_in_bf16_on_every_processor(tiny, tmp_path, monkeypatch, capsys):
    for module in (model_module, fastlstm.train):
        monkeypatch.setattr(module, "lacks_bf16", lambda: True)
    lstm, x, enabled = TorchLSTM(3, 7), torch.randn(4, 5, 3), torch.backends.mkldnn.enabled
    want, without, forward = lstm(x)[0], [], nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda *a: without.append(not torch.backends.mkldnn.enabled) or forward(*a))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = lstm(x)
        with pytest.raises(RuntimeError, match="input"):
            lstm(x[..., :2])
    assert without == [True, True]
    assert torch.backends.mkldnn.enabled is enabled
    torch.testing.assert_close(output.float(), want, rtol=0, atol=0.02)  # bf16 has 8 bits
    monkeypatch.setattr(nn.LSTM, "forward", forward)
    run(tiny, tmp_path, "--iterations", 1, "--compare", "--precision", "bf16")
    assert "torch.nn.LSTM runs without oneDNN" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_model_trains_alike(tiny, tmp_path):
    plain = run(tiny, tmp_path / "plain", "--iterations", 6)
    compiled = run(tiny, tmp_path / "compiled", "--iterations", 6, "--compile")
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)  # float32, six steps of Adam


def test_pixels_are_read_one_by_one_in_one_order():
    images = torch.rand(5, 4, 3)
    plain, permuted, same = RowLSTM(1, 7), RowLSTM(1, 7, permuted=12), RowLSTM(1, 7, permuted=12)
    assert permuted.order.tolist() != list(range(12))
    assert sorted(permuted.order.tolist()) == list(range(12))
    assert torch.equal(permuted.order, same.order)
    weights = {name: value for name, value in permuted.state_dict().items() if name != "order"}
    plain.load_state_dict(weights)
    assert torch.equal(permuted(images), plain(images.flatten(1)[:, permuted.order].view(5, 4, 3)))
    _, (h_n, _) = plain.lstm(images.flatten(1).T.unsqueeze(2))
    assert torch.equal(plain(images), plain.linear(h_n[0]))


def test_both_ends_of_a_bidirectional_reading_give_the_class():
    images = torch.rand(5, 4, 3)
    model = RowLSTM(3, 7, bidirectional=True)
    output, _ = model.lstm(images.transpose(0, 1))
    both = torch.cat((output[-1, :, :7], output[0, :, 7:]), 1)
    assert torch.equal(model(images), model.linear(both))


@PROJECTIONS
def test_every_layers_initial_weights_are_the_tutorials():
    model = RowLSTM(28, 64, num_layers=2, bidirectional=True, proj_size=20)
    for weight_ih, weight_hh, bias_ih, bias_hh, weight_hr in model.lstm.all_weights:
        limit = math.sqrt(6 / (weight_ih.shape[1] + 20 + 4 * 64))
        assert 0.95 * limit < max(weight_ih.abs().max(), weight_hh.abs().max()) <= limit
        assert (bias_ih[64:128] == 1).all()
        assert bias_ih.sum() == 64
        assert (bias_hh == 0).all()
        assert 0.95 * math.sqrt(6 / 84) < weight_hr.abs().max() <= math.sqrt(6 / 84)


def test_the_time_to_an_accuracy_is_training_time():
    history = History(1, seconds=[1.0, 2.0, 3.0, 4.0], validation=[(2, 0.98), (3, 0.995), (4, 0.99)])
    assert history.reached(0.99) == {"iterations": 3, "seconds": 6.0}
    assert history.reached(0.999) is None


@pytest.mark.slow
def test_tensorboard_is_told(tiny, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.undo()  # with its pictures
    metrics = run(tiny, tmp_path / "run", "--iterations", 6, "--tensorboard", tmp_path / "board")
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    losses = events.Scalars("training/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx(metrics["loss"], rel=1e-6)  # float32
    assert [event.step for event in events.Scalars("validation/accuracy")] == [3, 6]
    assert set(events.Tags()["images"]) == {"training", "mistakes", "reading"}


def test_tensorboards_absence_is_one_line(tiny, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert refused(fastlstm.train.main, "--data", tiny, "--batch-size", "32", "--tensorboard", tmp_path) == (
        "python -m fastlstm.train: error: argument --tensorboard: needs the package tensorboard; "
        "pip install 'fastlstm[tensorboard]'\n"
    )


def test_a_states_parts_are_all_kept():
    state = State(RowLSTM(3, 7), Recipe(parts=tuple(PARTS)), 200, torch.device("cpu"))
    assert set(state.state_dict()) == {"model", "optimizer", "schedule", "average", "batches", "history", "chances"}
