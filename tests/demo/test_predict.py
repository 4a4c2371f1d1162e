"""Reading pictures and IDX files with a trained model: `python -m fastlstm.predict`."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import fastlstm.predict
from fastlstm.mnist import images, pictures, saved
from fastlstm.mnist.data import DataError, load
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.training import Scores
from tests.helpers.demo import PNG
from tests.helpers.idx import TEST_IMAGES, TEST_LABELS, idx_bytes, tiny_arrays, write_idx, write_set

SIZE = (28, 28)


@pytest.fixture(scope="module")
def digits():
    return load().test


def grey(image):
    return (image.numpy() * 255).round().astype(np.uint8)


def centre_of_mass(image):
    places = np.arange(len(image))
    return image.sum(1) @ places / image.sum(), image.sum(0) @ places / image.sum()


def test_light_ink_on_a_picture_of_the_images_size_is_taken_as_it_is(digits, tmp_path):
    path = tmp_path / "digit.png"
    Image.fromarray(grey(digits.images[3])).save(path)
    assert torch.equal(images.read(path, SIZE), digits.images[3:4])


LARGE, SMALL = np.zeros((200, 120), np.uint8), np.zeros(SIZE, np.uint8)  # a bar, off the middle
LARGE[20:160, 70:90] = SMALL[2:12, 1:3] = 255


KINDS = ["white on black", "black on white", "colour", "transparent", "paper"]


@pytest.mark.parametrize(
    ("kind", "ink", "width", "suffix"),
    [(kind, LARGE, 3, suffix) for kind in KINDS for suffix in ("png", "jpg")]  # 140 x 20 pixels in 20 x 2.9
    + [(kind, SMALL, 4, "png") for kind in KINDS[1:]],  # 10 x 2 in 20 x 4
)
def test_other_pictures_are_brought_into_mnists_form(tmp_path, kind, ink, width, suffix):
    picture = {
        "white on black": Image.fromarray(ink),
        "black on white": Image.fromarray(255 - ink),
        "colour": Image.fromarray(np.stack((255 - ink, 255 - ink, 255 - ink // 4), 2)),
        "transparent": Image.fromarray(np.stack((ink * 0, ink * 0, ink * 0, ink), 2)),
        "paper": Image.fromarray((200 - ink * 0.6).astype(np.uint8)),
    }[kind]
    path = tmp_path / f"picture.{suffix}"
    if kind == "transparent" and suffix == "jpg":  # which knows no transparency
        path = path.with_suffix(".webp")
    picture.save(path)
    (image,) = images.read(path, SIZE).numpy()
    rows, columns = np.flatnonzero(image.max(1) > 0.5), np.flatnonzero(image.max(0) > 0.5)
    assert (len(rows), len(columns)) == (20, width)
    assert centre_of_mass(image) == pytest.approx((14, 14), abs=0.51)  # whole pixels
    assert image.max() > 0.9
    assert image[0].max() == image[:, 0].max() == 0


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"hello, this is no picture",
        PNG + b"\0" * 40,
        idx_bytes(np.zeros((2, 5, 3))),
        idx_bytes(np.zeros((2, 28, 28)))[:-1],
        Image.new("L", (90, 60), 240),
    ],
    ids=["missing", "empty", "text", "half", "small", "short", "blank"],
)
def test_what_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "image"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content.save(path, "png")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: "):
        images.read(path, SIZE)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}, {"input_size": 1}])
def test_a_model_is_saved_with_what_builds_it(tmp_path, digits, options):
    model = RowLSTM(**{"input_size": 28, "hidden_size": 9, **options}).eval()
    saved.save(tmp_path / "model.pt", model, SIZE)
    loaded, size = saved.load(tmp_path / "model.pt")
    assert size == SIZE
    with torch.no_grad():
        assert torch.equal(loaded(digits.images[:5]), model(digits.images[:5]))


@pytest.mark.parametrize(
    "damage",
    [
        *({"image_size": size} for size in ("ab", "28", [-1, 2], [0, 28], [28, 27.0], [28], [5, 5], 28)),
        *({"config": each} for each in ({}, {"dropout": "x"}, {"bidirectional": 2}, {"input_size": 14}, {"more": 1})),
        {"state_dict": {"linear.weight": torch.ones(10, 9)}},
        {"state_dict": []},
    ],
)
def test_a_model_that_cannot_be_one_is_refused_by_name(tmp_path, damage):
    path, model = tmp_path / "model.pt", RowLSTM(28, 9)
    content = {"config": model.config, "image_size": [28, 28], "state_dict": model.state_dict()}
    if damage.get("config"):
        damage = {"config": model.config | damage["config"]}
    saved.write(path, content | damage)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: expected a model that "):
        saved.load(path)


def test_pictures_are_told_and_drawn(tmp_path, run, digits, capsys):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, image in zip(paths, digits.images, strict=False):
        Image.fromarray(grey(image)).save(path)
    assert fastlstm.predict.main([*map(str, paths), "--model", str(run), "--out", str(tmp_path / "out")]) == 0
    model, _ = saved.load(run / "model.pt")
    chances = model(digits.images[:2]).softmax(1).sort(descending=True)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"{path}: {classes[0]} ({100 * values[0]:.1f} %), else {classes[1]} ({100 * values[1]:.1f} %)"
        for path, values, classes in zip(paths, *chances)
    ]
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {"1-one.png.reading.png", "2-two.png.reading.png"}
    assert (tmp_path / "out" / "1-one.png.reading.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_set_is_scored_by_the_labels_beside_it(tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.setattr(fastlstm.predict, "DRAWN", 2)
    directory = write_set(tmp_path / "set", tiny_arrays(test=12), suffix)
    model = RowLSTM(3, 7)
    saved.save(tmp_path / "model.pt", model, (4, 3))
    test = load(directory).test
    right = (model(test.images).argmax(1) == test.labels).sum().item()
    for argument in (directory, directory / f"{TEST_IMAGES}{suffix}"):
        assert fastlstm.predict.main([str(argument), "--model", str(tmp_path / "model.pt")]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert len(lines) == 12
        assert lines[11].startswith(f"{directory / TEST_IMAGES}{suffix}[11]: ")
        assert f": {right} of 12 " in last

    (directory / f"{TEST_LABELS}{suffix}").unlink()
    out = str(tmp_path / "out")
    assert fastlstm.predict.main([str(directory), "--model", str(tmp_path / "model.pt"), "--out", out]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_labels_of_another_number_are_refused(tmp_path, run, refused):
    write_idx(tmp_path / TEST_IMAGES, np.zeros((3, 28, 28)))
    write_idx(tmp_path / TEST_LABELS, np.zeros(4))
    assert f"{tmp_path / TEST_LABELS}: " in refused(fastlstm.predict.main, tmp_path, "--model", run)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"input_size": 1}])
def test_a_reading_ends_with_the_answer(digits, options):
    model = RowLSTM(**{"input_size": 28, "hidden_size": 9, **options}).eval()
    states, probabilities = model.read(digits.images[:3])
    steps = 784 // model.lstm.input_size
    assert states.shape == (3, steps, 18 if options.get("bidirectional") else 9)
    assert probabilities.shape == (3, steps, 10)
    answers = model(digits.images[:3]).softmax(1)
    if not model.lstm.bidirectional:
        # float32: the same sums, the linear layer over more rows
        torch.testing.assert_close(probabilities[:, -1], answers, rtol=1e-5, atol=1e-6)
    figure = pictures.reading(model, digits.images[:2], ["a", "b"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "a"
    assert titles[2].endswith(f"{answers[0].argmax()}, {100 * answers[0].max():.1f} %")


def test_mistakes_are_counted_and_the_surest_comes_first(digits):
    labels = digits.labels[:50]
    chances = torch.nn.functional.one_hot(labels, 10) * 0.9 + 0.01
    for index, sure in ((4, 0.5), (9, 0.8), (30, 0.6)):
        chances[index] = (1 - sure) / 9
        chances[index, (labels[index] + 1) % 10] = sure
    test = type(digits)(digits.images[:50], labels)
    scores = Scores(0.0, 0.0, 0.0, chances)
    assert pictures.confident_mistakes(scores, test) == [9, 30, 4]
    matrix, grid = pictures.mistakes(scores, test).axes
    assert matrix.get_title().startswith("47 of 50 ")
    assert sum(int(text.get_text()) for text in matrix.texts) == 50
    first = labels[9].item()
    assert grid.texts[0].get_text() == f"{first} → {(first + 1) % 10}, 80.0 %"
