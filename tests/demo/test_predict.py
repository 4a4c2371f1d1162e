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


def stroke(height=200, width=120):
    """Ink of one bar, off the middle, on a picture of another size."""
    ink = np.zeros((height, width), np.uint8)
    ink[20:160, 70:90] = 255
    return ink


def centre_of_mass(image):
    places = np.arange(len(image))
    return image.sum(1) @ places / image.sum(), image.sum(0) @ places / image.sum()


def test_light_ink_on_a_picture_of_the_images_size_is_taken_as_it_is(digits, tmp_path):
    path = tmp_path / "digit.png"
    Image.fromarray(grey(digits.images[3])).save(path)
    assert torch.equal(images.read(path, SIZE), digits.images[3:4])


@pytest.mark.parametrize("kind", ["black on white", "transparent"])
def test_other_pictures_of_the_images_size_are_brought_into_mnists_form(tmp_path, kind):
    ink = np.zeros(SIZE, np.uint8)
    ink[2:12, 1:3] = 255
    picture = 255 - ink if kind == "black on white" else np.stack((ink * 0, ink * 0, ink * 0, ink), 2)
    path = tmp_path / "digit.png"
    Image.fromarray(picture).save(path)
    (image,) = images.read(path, SIZE).numpy()
    rows, columns = np.flatnonzero(image.max(1) > 0.5), np.flatnonzero(image.max(0) > 0.5)
    assert (len(rows), len(columns)) == (20, 4)  # twice as large
    assert centre_of_mass(image) == pytest.approx((14, 14), abs=0.51)  # whole pixels


@pytest.mark.parametrize("kind", ["white on black", "black on white", "colour", "transparent", "paper"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_other_pictures_are_brought_into_mnists_form(tmp_path, kind, suffix):
    ink = stroke()
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
    assert (len(rows), len(columns)) == (20, 3)  # 140 x 20 pixels in 20 x 2.9
    assert centre_of_mass(image) == pytest.approx((14, 14), abs=0.51)  # whole pixels
    assert image.max() > 0.9
    assert image[0].max() == image[:, 0].max() == 0


def test_invert_wins_over_the_border(digits, tmp_path):
    path = tmp_path / "dark.png"
    Image.fromarray(255 - grey(digits.images[0])).save(path)
    for invert in (None, True):
        assert apart(images.read(path, SIZE, invert)[0], digits.images[0]) < 0.03
    # float32 of whole 255ths
    torch.testing.assert_close(images.read(path, SIZE, False)[0], 1 - digits.images[0], rtol=0, atol=1e-6)


def apart(moved, image):
    """The mean difference of two images, but for the place of a pixel."""
    return min((moved.roll((i, j), (0, 1)) - image).abs().mean() for i in (-1, 0, 1) for j in (-1, 0, 1))


def test_a_digit_survives_being_drawn_large(digits, tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(255 - grey(digits.images[0])).resize((560, 560), Image.Resampling.NEAREST).save(path)
    assert apart(images.read(path, SIZE)[0], digits.images[0]) < 0.03  # it was 20 pixels high and centred before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.png", None, "a picture or an IDX file, found none"),
        ("text.png", b"hello, this is no picture", "a picture or an IDX file, found another"),
        ("half.png", PNG + b"\0" * 40, "a picture or an IDX file, found another"),
        ("empty", b"", "a picture or an IDX file, found another"),
        ("small-idx3", idx_bytes(np.zeros((2, 5, 3))), r"images of 28 x 28 pixels, found 5 x 3$"),
        ("short-idx3", idx_bytes(np.zeros((2, 28, 28)))[:-1], "1584 bytes"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: expected {expected}"):
        images.read(path, SIZE)


def test_a_picture_without_ink_is_refused(tmp_path):
    path = tmp_path / "blank.png"
    Image.new("L", (90, 60), 240).save(path)
    with pytest.raises(DataError, match="expected a picture with ink on it, found an even one"):
        images.read(path, SIZE)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # aten's, by torch
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 5, "dropout": 0.5}, {"input_size": 1, "permuted": 784}],
)
def test_a_model_is_saved_with_what_builds_it(tmp_path, digits, options):
    model = RowLSTM(**{"input_size": 28, "hidden_size": 9, **options}).eval()
    saved.save(tmp_path / "model.pt", model, SIZE)
    loaded, size = saved.load(tmp_path / "model.pt")
    assert size == SIZE
    with torch.no_grad():
        assert torch.equal(loaded(digits.images[:5]), model(digits.images[:5]))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"layers": 3}, ".*unexpected keyword argument 'layers'"),
        ({"hidden_size": 3}, r"Error\(s\) in loading state_dict for RowLSTM:"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tmp_path, refused, config, reason):
    path = tmp_path / "model.pt"
    torch.save({"config": config, "image_size": SIZE, "state_dict": RowLSTM(28, 16).state_dict()}, path)
    line = refused(fastlstm.predict.main, "x.png", "--model", path)
    expected = f"{re.escape(str(path))}: expected a model that fastlstm.train wrote, found another \\({reason}\\)"
    assert re.fullmatch(f"python -m fastlstm.predict: error: argument --model: {expected}\n", line)


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
    assert drawn == {"one.png.reading.png", "two.png.reading.png"}
    assert (tmp_path / "out" / "one.png.reading.png").read_bytes().startswith(PNG)


def test_pictures_of_one_name_are_all_drawn(tmp_path, run, digits):
    names = ["a/one.png", "b/one.png", "c/ONE.png", "d/one.png-2", "e/👩.png", "e/👽.png", "e/👩", f"f/{'n' * 250}.png"]
    for name, image in zip(names, digits.images, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey(image)).save(tmp_path / name, "png")
    paths = [str(tmp_path / name) for name in names]
    assert fastlstm.predict.main([*paths, "--model", str(run), "--out", str(tmp_path / "out")]) == 0
    drawn = {path.name.casefold(): path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(drawn) == len(set(drawn.values())) == len(names)
    assert {"one.png.reading.png", "one.png-2.reading.png", "image.reading.png"} < set(drawn)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_set_is_scored_by_the_labels_beside_it(tmp_path, capsys, suffix):
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
        assert f": {right} of 12 read rightly" in last

    (directory / f"{TEST_LABELS}{suffix}").unlink()
    out = str(tmp_path / "out")
    arguments = [str(directory), "--model", str(tmp_path / "model.pt"), "--out", out, "--draw", "2"]
    assert fastlstm.predict.main(arguments) == 0
    assert "rightly" not in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_labels_of_another_number_are_refused(tmp_path, run, refused):
    write_idx(tmp_path / TEST_IMAGES, np.zeros((3, 28, 28)))
    write_idx(tmp_path / TEST_LABELS, np.zeros(4))
    line = refused(fastlstm.predict.main, tmp_path, "--model", run)
    assert f"{tmp_path / TEST_LABELS}: expected 3 labels" in line


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"input_size": 1}, {"input_size": 1, "permuted": 784}]
)
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
    assert titles[2] == f"class; in the end {answers[0].argmax()}, {100 * answers[0].max():.1f} %"
    assert {axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()} >= {"probability (%)", "h"}


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
    assert matrix.get_title().startswith("47 of 50 test images read rightly (94.00 %)")
    assert sum(int(text.get_text()) for text in matrix.texts) == 50
    first = labels[9].item()
    assert grid.texts[0].get_text() == f"{first} → {(first + 1) % 10}, 80.0 %"
