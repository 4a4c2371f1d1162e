"""A trained model keeps what it has learnt."""

from copy import deepcopy

import pytest
import torch

import fastlstm
from fastlstm.mnist import data, training
from fastlstm.mnist.recipe import Recipe


@pytest.fixture(scope="module")
def trained():
    """The demonstration's model after 150 iterations, and its test images."""
    images = data.load()
    run = training.run({"ours": fastlstm.LSTM}, images, Recipe(iterations=150))["ours"]
    return run.model.eval(), images.test


@torch.no_grad()
@pytest.mark.parametrize(("activations", "most"), [("int8", 40), pytest.param("int16", 20, marks=pytest.mark.slow)])
def test_the_row_lstm_reads_as_before(trained, activations, most):
    """So early in training many images are near the edge between two classes: of 10 000, a few dozen may change."""
    model, test = trained
    made = fastlstm.quantize(deepcopy(model), activations)
    before, after = (torch.cat([each(x) for x in test.images.split(1000)]).argmax(1) for each in (model, made))
    assert (before == test.labels).float().mean() > 0.85
    assert (before != after).sum() <= most
    right = [(found == test.labels).float().mean().item() for found in (before, after)]
    assert abs(right[0] - right[1]) < 0.002
