"""BenchMARL's Lstm and Gru learn the same with fastlstm."""

import copy

import pytest
import torch
from torch import nn

from fastlstm.integrations import benchmarl as integration
from tests.helpers.libraries import check, gradients, library
from tests.helpers.tolerances import close

pytest.importorskip("benchmarl", reason="needs the package benchmarl: pip install .[benchmarl]")
from benchmarl.models.gru import MultiAgentGRU
from benchmarl.models.lstm import MultiAgentLSTM

B, T, AGENTS, I, H = 3, 9, 2, 5, 7
KINDS = {"LSTM": (MultiAgentLSTM, "_empty_lstm", 2), "GRU": (MultiAgentGRU, "_empty_gru", 1)}
kinds = pytest.mark.parametrize("kind", KINDS)


def model(kind, **options):
    torch.manual_seed(0)
    sizes = {"input_size": I, "hidden_size": H, "n_agents": AGENTS, "n_layers": 1}
    ways = {"centralised": False, "share_params": True, "dropout": 0.0, "bias": True, "compile": False}
    return KINDS[kind][0](device="cpu", **{**sizes, **ways, **options})


def stack(model, kind):
    return getattr(model, KINDS[kind][1])


def rollout():
    torch.manual_seed(1)
    return torch.randn(B, T, AGENTS, I), torch.rand(B, T, 1) < 0.3


def check_rollout(model, refused):
    """The output and the last states of a rollout, and the gradients of the parameters."""

    def results(model):
        values = model(*rollout())
        return values, gradients(values, list(model.parameters()))

    check(integration, model, results, refused=refused)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_params": False},
        {"centralised": True},
        {"centralised": True, "share_params": False},
        {"n_layers": 2, "bias": False},
    ],
    ids=["shared", "apart", "central", "central and apart", "two layers without biases"],
)
@kinds
def test_rollouts_with_resets(kind, options):
    theirs = model(kind, **options)
    check_rollout(theirs, [type(stack(theirs, kind))])


@kinds
def test_a_stack_without_rows(kind):
    sizes = {"input_size": I, "hidden_size": H, "n_layers": 1, "dropout": 0.0, "bias": True}
    alone, (x, is_init) = type(stack(model(kind), kind))(device="cpu", **sizes), rollout()
    arguments = x[0, :, 0], is_init[0], *(torch.randn(1, H) for _ in range(KINDS[kind][2]))
    expected = alone(*arguments)
    assert all(map(torch.equal, integration.accelerate(alone)(*arguments), expected))


@kinds
def test_single_steps_and_dropout_are_the_librarys_matter(kind):
    theirs = model(kind, n_layers=2)
    ours, (x, is_init) = integration.accelerate(copy.deepcopy(theirs)), rollout()
    states = [torch.randn(B, AGENTS, 2, H) for _ in range(KINDS[kind][2])]
    step = x[:, 0], is_init[:, 0], *states
    assert all(map(torch.equal, ours(*step), theirs(*step)))
    central = model(kind, n_layers=2, dropout=0.5, centralised=True)  # the others refuse dropout under vmap
    torch.manual_seed(3)
    expected = central(x, is_init)
    integration.accelerate(central)
    torch.manual_seed(3)
    assert all(map(torch.equal, central(x, is_init), expected))


def experiment(config, folder):
    """An experiment with few small rollouts, of which some episodes end inside."""
    from benchmarl.algorithms import MappoConfig
    from benchmarl.environments import VmasTask
    from benchmarl.experiment import Experiment, ExperimentConfig

    settings = ExperimentConfig.get_from_yaml()
    settings.max_n_iters, settings.loggers, settings.create_json, settings.save_folder = 1, [], False, str(folder)
    settings.evaluation, settings.render, settings.checkpoint_at_end = False, False, False
    settings.on_policy_collected_frames_per_batch, settings.on_policy_n_envs_per_worker = 80, 4
    settings.on_policy_n_minibatch_iters, settings.on_policy_minibatch_size = 2, 40
    task = VmasTask.BALANCE.get_from_yaml()
    task.config["max_steps"] = 8
    sizes = {"hidden_size": 8, "n_layers": 1, "mlp_num_cells": [8]}
    classes = {"mlp_layer_class": nn.Linear, "mlp_activation_class": nn.Tanh}
    network = config(bias=True, dropout=0.0, compile=False, **sizes, **classes)
    options = {"algorithm_config": MappoConfig.get_from_yaml(), "model_config": network}
    return Experiment(task=task, critic_model_config=network, seed=0, config=settings, **options)


@pytest.mark.slow
@kinds
def test_an_iteration_of_mappo_is_the_same(kind, tmp_path):
    library("vmas", extra="benchmarl")
    from benchmarl.models import GruConfig, LstmConfig

    config = {"LSTM": LstmConfig, "GRU": GruConfig}[kind]
    theirs = experiment(config, tmp_path)
    theirs.run()
    ours = integration.accelerate(experiment(config, tmp_path))
    ours.run()
    assert ours.mean_return == theirs.mean_return
    close(ours.losses["agents"].parameters(), theirs.losses["agents"].parameters(), "models")
