"""The demonstration: initial weights, the training loop, what a run reports and writes, exit codes."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm.predict
import fastlstm.train
from fastlstm.mnist import pictures, training
from fastlstm.mnist.data import load, shuffled_batches
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.recipe import Recipe
from fastlstm.mnist.state import History, State
from fastlstm.mnist.training import evaluate, train
from tests.helpers.demo import PNG, SMALL
from tests.helpers.demo import metrics as metrics_of
from tests.helpers.transforms import needs_triton


def command(tiny, *more, iterations=5):
    return fastlstm.train.main(["--data", str(tiny), "--iterations", str(iterations), *SMALL, *map(str, more)])


@pytest.mark.parametrize(("I", "H"), [(28, 128), (1, 100), (7, 650)])
def test_initial_weights_are_the_tutorials(I, H):
    """Those of every layer and direction."""
    model = RowLSTM(I, H, 10, num_layers=2, bidirectional=True, generator=torch.Generator().manual_seed(5))
    for weight_ih, weight_hh, bias_ih, bias_hh in model.lstm.all_weights:
        limit = math.sqrt(6 / (weight_ih.shape[1] + H + 4 * H))
        for weight in (weight_ih, weight_hh):
            # of 400 values or more: the largest is within 5 % of the limit, the deviation within 10 % of a uniform's
            assert 0.95 * limit < weight.abs().max() <= limit
            assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert (bias_ih[H : 2 * H] == 1).all()
        assert bias_ih.sum() == H
        assert (bias_hh == 0).all()
    assert model.linear.weight.std().item() == pytest.approx(1, rel=0.1)
    assert model.linear.bias.std().item() == pytest.approx(1, rel=0.6)  # ten values


def test_initial_weights_follow_the_generator_alone():
    first, same, other = (
        RowLSTM(3, 7, lstm_class=lstm_class, generator=torch.Generator().manual_seed(seed)).state_dict()
        for lstm_class, seed in ((fastlstm.LSTM, 1), (nn.LSTM, 1), (fastlstm.LSTM, 2))
    )
    assert list(first) == list(same)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lstm.weight_hh_l0"], other["lstm.weight_hh_l0"])
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_rows_are_time_steps_and_the_last_state_gives_the_class():
    model = RowLSTM(5, 7, lstm_class=nn.LSTM).double()
    images = torch.rand(6, 9, 5, dtype=torch.float64)
    h = c = torch.zeros(6, 7, dtype=torch.float64)
    weights = model.lstm.all_weights[0]
    for t in range(9):
        h, c = torch.lstm_cell(images[:, t], (h, c), *weights)
    expected = h @ model.linear.weight.T + model.linear.bias
    # float64 sums of at most 9 * 12 terms near 1
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def seeded(lstm_class=nn.LSTM, seed=0):
    return RowLSTM(3, 7, lstm_class=lstm_class, generator=torch.Generator().manual_seed(seed))


def test_the_loop_is_adam_on_the_batches(tiny):
    split, state = load(tiny).train, State(seeded(), Recipe(iterations=12, batch_size=32, lr=0.01, seed=4))
    train(state, split)
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    stream = shuffled_batches(len(split.labels), 32, torch.Generator().manual_seed(4))
    for step in range(12):
        indices = next(stream)
        logits = model(split.images[indices])
        loss = nn.functional.cross_entropy(logits, split.labels[indices])
        assert state.history.loss[step] == pytest.approx(loss.item(), rel=1e-4)  # float32, drifting over 12 steps
        right = (logits.argmax(1) == split.labels[indices]).sum().item()
        assert state.history.accuracy[step] == pytest.approx(right / 32, abs=0.5 / 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(state.history.loss) == len(state.history.accuracy) == state.done == 12
    assert state.history.seconds > 0
    assert not state.history.interrupted


def test_scores_count_the_images_read_rightly(tiny):
    data = load(tiny)
    model = seeded()
    scores = evaluate(model, data)
    with torch.no_grad():
        read = [model(split.images).argmax(1) for split in (data.test, data.validation)]
    assert torch.equal(scores.predictions, read[0])
    right = read[0] == data.test.labels
    assert scores.test_accuracy == pytest.approx(right.sum().item() / 130)
    assert scores.test_accuracy_first_128 == pytest.approx(right[:128].sum().item() / 128)
    assert scores.validation_accuracy == pytest.approx((read[1] == data.validation.labels).sum().item() / 5000)


def test_a_run_reports_and_writes(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    assert command(tiny, "--out", out, "--seed", 3) == 0
    written = {"metrics.json", "model.pt", "checkpoint.pt", "training.png", "mistakes.png", "reading.png"}
    assert {path.name for path in out.iterdir()} == written  # no temporary names

    metrics = metrics_of(out)
    assert len(metrics["loss"]) == len(metrics["accuracy"]) == metrics["iterations"] == 5
    assert metrics["ms_per_iteration"] == pytest.approx(1000 * metrics["seconds"] / 5)
    told = {"device": "cpu", "backend": "aten", "seed": 3, "batch_size": 32, "hidden_size": 7, "lr": 1e-3, "threads": 1}
    assert metrics.items() >= told.items()
    assert metrics["interrupted"] is False
    assert "compare" not in metrics

    data = load(tiny)
    saved = torch.load(out / "model.pt", weights_only=True)
    model = RowLSTM(**saved["config"])
    model.load_state_dict(saved["state_dict"])
    scores = evaluate(model, data)
    # another backend may read a doubtful image otherwise
    assert metrics["test_accuracy"] == pytest.approx(scores.test_accuracy, abs=1.5 / 130)
    assert metrics["validation_accuracy"] == pytest.approx(scores.validation_accuracy, abs=5 / 5000)
    assert (out / "training.png").read_bytes().startswith(PNG)

    text, bar = capsys.readouterr()
    assert "fastlstm.LSTM: 100%" in bar
    assert f"loss {metrics['loss'][-1]:.4f}, accuracy {metrics['accuracy'][-1]:.3f}" in bar
    assert f"{round(128 * metrics['test_accuracy_first_128'])}/128" in text
    assert f"{metrics['test_accuracy']:.2%}" in text
    assert f"{metrics['ms_per_iteration']:.2f}" in text
    assert str(out) in text


def test_without_out_a_run_is_written_where_predict_looks(tiny, tmp_path, monkeypatch, no_pictures, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(tiny, "--compare") == 0
    assert str(Path("runs/row-lstm")) in capsys.readouterr().out
    assert fastlstm.predict.main([str(tiny)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 131
    assert command(tiny, "--seed", 1) == 0
    assert metrics_of(tmp_path / "runs/row-lstm")["seed"] == 1


def test_a_seed_repeats_a_run(tiny):
    data = load(tiny)
    recipe = Recipe(iterations=5, batch_size=32, hidden_size=7, layers=2, dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global generator moves on
        runs = training.run({"small": fastlstm.LSTM}, data, replace(recipe, seed=seed))
        losses.append(runs["small"].history.loss)
    assert losses[0] == losses[1] != losses[2]


def test_compare_trains_torchs_lstm_on_the_same_batches(tiny, tmp_path, capsys):
    assert command(tiny, "--compare", "--out", tmp_path, "--backend", "auto", iterations=10) == 0
    metrics = metrics_of(tmp_path)
    theirs = metrics["compare"]
    assert (metrics["lstm"], theirs["lstm"]) == ("fastlstm.LSTM", "torch.nn.LSTM")
    assert metrics["backend"] != "auto"  # what ran
    # float32: one loss differs by rounding, ten steps of Adam carry it on
    assert theirs["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    differences = [abs(a - b) for a, b in zip(metrics["loss"], theirs["loss"], strict=True)]
    assert theirs["loss_difference"] == max(differences)
    assert theirs["time_ratio"] == pytest.approx(theirs["ms_per_iteration"] / metrics["ms_per_iteration"])
    for key in ("test_accuracy", "test_accuracy_first_128", "validation_accuracy", "iterations", "seconds"):
        assert key in theirs
    assert f"{theirs['time_ratio']:.2f}" in capsys.readouterr().out


def interrupting(ctrl_c, after):
    """An LSTM that sends Ctrl-C's signal in training call number `after`, the three of the warm-up not counted."""

    class InterruptingLSTM(nn.LSTM):
        calls = 0

        def __init__(self, *sizes, backend=None, **options):
            super().__init__(*sizes, **options)

        def forward(self, *inputs):
            self.calls += self.training
            if self.training and self.calls == after + 3:
                ctrl_c()
            return super().forward(*inputs)

    return InterruptingLSTM


@pytest.mark.parametrize("done", [0, 4])
def test_ctrl_c_ends_the_run_and_what_there_is_is_written(tiny, tmp_path, monkeypatch, capsys, ctrl_c, done):
    monkeypatch.setattr(fastlstm.train, "LSTM", interrupting(ctrl_c, done + 1))
    assert command(tiny, "--compare", "--out", tmp_path, iterations=1000) == 130
    metrics = metrics_of(tmp_path)
    assert metrics["interrupted"] is True
    assert metrics["iterations"] == len(metrics["loss"]) == done
    assert (metrics["ms_per_iteration"] is None) == (done == 0)
    assert "compare" not in metrics
    assert torch.load(tmp_path / "model.pt", weights_only=True)["config"]["hidden_size"] == 7
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
    assert f"{done} (interrupted)" in capsys.readouterr().out


@pytest.mark.parametrize("done", [0, 3])
def test_ctrl_c_in_the_comparison_compares_what_both_did(tiny, tmp_path, monkeypatch, ctrl_c, done):
    monkeypatch.setattr(fastlstm.train.nn, "LSTM", interrupting(ctrl_c, done + 1))
    assert command(tiny, "--compare", "--out", tmp_path, iterations=10) == 130
    metrics = metrics_of(tmp_path)
    assert (metrics["iterations"], metrics["interrupted"]) == (10, False)
    assert (metrics["compare"]["iterations"], metrics["compare"]["interrupted"]) == (done, True)
    difference = metrics["compare"]["loss_difference"]
    assert difference < 1e-4 if done else difference is None  # rounding, over the three both did


def test_ctrl_c_before_training_is_one_line(tiny, tmp_path, monkeypatch, capsys, ctrl_c):
    monkeypatch.setattr(fastlstm.train, "LSTM", interrupting(ctrl_c, 0))
    assert command(tiny, "--out", tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(tiny, tmp_path):
    assert command(tiny, "--lr", "1e38", "--out", tmp_path, "--compare", iterations=4) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["loss"][0] > 0
    assert None in metrics["loss"]
    assert metrics["compare"]["loss_difference"] is None
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)


def test_runs_that_are_compared_are_drawn_together():
    """A mean over 18 batches lies at the last one's place."""
    history = History(loss=[1.0] * 900, accuracy=[0.5] * 900, validation={450: 0.25, 900: 0.75})
    run = training.Run(seeded(), history, training.Scores(0.1, 0.2, 0.3, torch.eye(3)))
    figure = pictures.training({"one": run, "other": run})
    _, accuracy = figure.axes
    for mean, validation in zip(accuracy.get_lines()[::2], accuracy.get_lines()[1::2], strict=True):
        assert mean.get_xdata()[[0, -1]].tolist() == [18, 900]
        assert mean.get_ydata() == pytest.approx(np.full(883, 0.5))
        assert validation.get_xydata().tolist() == [[450, 0.25], [900, 0.75]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.partition(",")[0] for label in labels] == ["one", "one", "other", "other"]
    assert figure.get_facecolor()[3] == 0  # the page is to be seen behind it


@pytest.mark.parametrize(
    "arguments",
    [
        ("--iterations", "0"),
        ("--batch-size", "-3"),
        ("--batch-size", "91"),
        ("--hidden-size", "1.5"),
        ("--threads", "many"),
        ("--seed", "-1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "fast"),
        ("--device", "tpu"),
        ("--device", "cuda"),
        ("--backend", "nothing"),
        ("--data", "nowhere"),
        ("--out", __file__),
        ("--steps", "5"),
        ("--dropout", "1"),
        ("--parts", "luck"),
        ("--recipe", "worst"),
        ("--epochs", "0"),
        ("--iterations", "1", "--epochs", "1"),
        ("--frobnicate",),
    ],
)
def test_a_bad_argument_is_one_line_that_names_it(tiny, monkeypatch, refused, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(fastlstm.train.main, "--data", tiny, *SMALL, *arguments)
    assert arguments[0] in line


def test_a_backend_that_cannot_run_here_says_why(tiny, monkeypatch, refused):
    def choose(*arguments, **options):
        raise RuntimeError("the loom backend needs wool")

    monkeypatch.setattr(fastlstm.train.dispatch, "choose", choose)
    line = refused(fastlstm.train.main, "--data", tiny, *SMALL)
    assert "--backend: the loom backend needs wool" in line


@needs_triton
def test_the_backend_that_ran_is_named(tiny, tmp_path, monkeypatch):
    """On a GPU, where the first call of the kernels finds that they are wrong."""
    from fastlstm.backends.triton import device, first_call, launch

    monkeypatch.setattr(device, "is_gpu", lambda place: place.type == "cpu")
    monkeypatch.setattr(first_call, "compares", lambda place: True)
    monkeypatch.setattr(first_call, "failures", {})
    original = launch.Forward.run
    monkeypatch.setattr(launch.Forward, "run", lambda *given: (run := original(*given))._replace(h=2 * run.h))
    with pytest.warns(RuntimeWarning, match="auto runs a layer of lstm in torch's own layer"):
        assert command(tiny, "--out", tmp_path, "--backend", "auto", iterations=2) == 0
    assert metrics_of(tmp_path)["backend"] == "aten"
