"""What a recipe adds to plain Adam, the sizes beyond one layer, and the other ways to read an image."""

import math

import pytest
import torch

import fastlstm.train
from fastlstm.mnist import data
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.recipe import Recipe, iterations
from fastlstm.mnist.state import AVERAGE_DECAY, State
from tests.helpers.demo import SMALL, metrics

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
    two = run(tiny, tmp_path / "two", "--iterations", 2, "--parts", "average", "augmentation")
    assert (none["parts"], none["lr"]) == ([], 4e-3)
    assert (two["parts"], two["lr"]) == (["augmentation", "average"], 1e-3)


def test_the_average_follows_the_weights_and_is_what_is_tested():
    model = RowLSTM(3, 7)
    state = State(model, Recipe(parts=("average",)))
    expected = 0.0
    for step in range(60):
        with torch.no_grad():
            model.linear.bias.copy_(torch.randn(10))
        state.step()  # without gradients the optimiser leaves the weights alone
        decay = min(AVERAGE_DECAY, (1 + step) / (10 + step)) if step else 0  # the first weights are taken as they are
        expected = decay * expected + (1 - decay) * model.linear.bias.detach()
    torch.testing.assert_close(state.tested.linear.bias.detach(), expected, rtol=1e-5, atol=1e-6)  # float32, 60 steps


def test_a_map_moves_an_image():
    images = torch.rand(4, 28, 28)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3)
    # float32: bilinear weights off by a rounding of the coordinates
    torch.testing.assert_close(data.moved(images, identity), images, rtol=0, atol=1e-4)
    right = identity + torch.tensor([[0, 0, 2 * 3 / 28], [0, 0, 0]])
    moved = data.moved(images, right)
    torch.testing.assert_close(moved[:, :, :-3], images[:, :, 3:], rtol=0, atol=1e-4)
    assert moved[:, :, -3:].abs().max() < 1e-4


def test_movements_are_small_and_follow_the_generator():
    first, same, other = (data.draw_maps(500, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    linear, shift = first[:, :, :2], first[:, :, 2] * 14  # in pixels
    bound = (1 + data.SCALE) * math.cos(data.TURN / 2)
    assert shift.abs().max() <= data.SHIFT
    assert shift.abs().max() > 0.9 * data.SHIFT
    assert linear.diagonal(dim1=1, dim2=2).max() <= 1 + data.SCALE
    assert linear.diagonal(dim1=1, dim2=2).max() > bound - 0.05
    assert linear[:, 0, 1].abs().max() <= (1 + data.SCALE) * math.sin(data.TURN)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 2},
        {"bidirectional": True},
        {"layers": 2, "bidirectional": True, "dropout": 0.5},
        {"dropout": 0.5},
        {"steps": 12},
        {"steps": 2},
        {"precision": "bf16"},
    ],
)
def test_every_size_trains_and_is_compared(tiny, tmp_path, options):
    if "precision" in options and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch.nn.LSTM has no bf16 on this processor")
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}"] + ([] if value is True else [value])
    metrics = run(tiny, tmp_path, "--iterations", 6, "--compare", *arguments)
    assert metrics.items() >= options.items()
    # six steps of Adam from the same weights, on the same batches, with the same zeros; bf16 has 8 bits
    tolerance = 0.05 if "precision" in options else 1e-4
    assert metrics["compare"]["loss"] == pytest.approx(metrics["loss"], rel=tolerance)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["config"] == {
        "input_size": 12 // options.get("steps", 4),
        "hidden_size": 7,
        "num_classes": 10,
        "num_layers": options.get("layers", 1),
        "bidirectional": options.get("bidirectional", False),
        "dropout": options.get("dropout", 0),
    }


@pytest.mark.slow
def test_a_compiled_model_trains_alike(tiny, tmp_path):
    plain = run(tiny, tmp_path / "plain", "--iterations", 6)
    compiled = run(tiny, tmp_path / "compiled", "--iterations", 6, "--compile")
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)  # float32, six steps of Adam


def test_both_ends_of_a_bidirectional_reading_give_the_class():
    images = torch.rand(5, 4, 3)
    model = RowLSTM(3, 7, bidirectional=True)
    output, _ = model.lstm(images.transpose(0, 1))
    both = torch.cat((output[-1, :, :7], output[0, :, 7:]), 1)
    assert torch.equal(model(images), model.linear(both))


def test_pixels_are_read_one_by_one_in_order():
    images, model = torch.rand(5, 4, 3), RowLSTM(1, 7)
    _, (h_n, _) = model.lstm(images.flatten(1).T.unsqueeze(2))
    assert torch.equal(model(images), model.linear(h_n[0]))
