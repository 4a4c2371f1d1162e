"""rl_games's recurrent networks learn the same with fastlstm."""

import copy

import numpy as np
import pytest
import torch

from fastlstm.integrations import rl_games as integration
from tests.helpers.libraries import check, gradients
from tests.helpers.tolerances import close

pytest.importorskip("rl_games", reason="needs the package rl_games: pip install .[rl-games]")
from rl_games.common import env_configurations, vecenv
from rl_games.common.gym_compat import gym
from rl_games.common.ivecenv import IVecEnv
from rl_games.common.layers.recurrent import GRUWithDones, LSTMWithDones
from rl_games.torch_runner import Runner

T, B, I, H = 9, 4, 5, 7
KINDS = {"LSTM": (LSTMWithDones, 2), "GRU": (GRUWithDones, 1)}
kinds = pytest.mark.parametrize("kind", KINDS)


def module(kind, layers=1):
    torch.manual_seed(0)
    return KINDS[kind][0](input_size=I, hidden_size=H, num_layers=layers)


def check_sequences(kind, layers=1, steps=T, rows=B, dones=True, refused=()):
    """The output, the last states, and the gradients of the input, the states and the parameters."""
    torch.manual_seed(1)
    x = torch.randn(steps, rows, I, requires_grad=True)
    states = [torch.randn(layers, rows, H, requires_grad=True) for _ in range(KINDS[kind][1])]
    masks = (torch.rand(steps, rows, 1) < 0.2).float() if dones else None

    def results(module):
        output, last = module(x, tuple(states) if len(states) == 2 else states[0], masks)
        values = [output, *last] if len(states) == 2 else [output, last]
        return values, gradients(values, [x, *states, *module.parameters()])

    check(integration, module(kind, layers), results, refused=refused)


@pytest.mark.parametrize("layers", [1, 2])
@kinds
def test_sequences_and_gradients_are_the_same(kind, layers):
    check_sequences(kind, layers, refused=[KINDS[kind][0]])


@pytest.mark.parametrize("options", [{"steps": 1}, {"rows": 1}, {"dones": False}], ids=str)
@kinds
def test_sequences_with_few_steps_or_rows(kind, options):
    check_sequences(kind, 2, **options)


@pytest.mark.parametrize("change", ["two directions", "a layer of torch"])
@kinds
def test_other_layers(kind, change):
    cls, count = KINDS[kind]
    theirs, other = cls(I, H, bidirectional=change == "two directions"), getattr(torch.nn, kind)(I, H)
    ours = integration.accelerate(copy.deepcopy(theirs))
    if change == "a layer of torch":
        theirs.rnn = ours.rnn = other
    states = [torch.randn(1 + theirs.rnn.bidirectional, B, H) for _ in range(count)]
    arguments = torch.randn(T, B, I), tuple(states) if count == 2 else states[0], (torch.rand(T, B, 1) < 0.2).float()
    close(ours(*arguments)[0], theirs(*arguments)[0], "values")


class Target(IVecEnv):
    """Environments in which an agent finds out whether to go left or right. Episodes last for 3 to 7 steps."""

    def __init__(self, name, count, **options):
        self.rng, self.count = np.random.default_rng(0), count
        self.reset()

    def reset(self):
        self.steps, self.goals = self.rng.integers(3, 8, self.count), self.rng.integers(0, 2, self.count)
        return self._observations(self.goals)

    def _observations(self, seen):
        return np.stack([seen, self.steps], 1).astype(np.float32)

    def get_env_info(self):
        return {"observation_space": gym.spaces.Box(-9, 9, (2,)), "action_space": gym.spaces.Discrete(2)}

    def step(self, actions):
        rewards, self.steps = (np.asarray(actions) == self.goals).astype(np.float32), self.steps - 1
        dones = self.steps == 0
        self.steps[dones] = self.rng.integers(3, 8, dones.sum())
        self.goals[dones] = self.rng.integers(0, 2, dones.sum())
        return self._observations(np.where(dones, self.goals, -1)), rewards, dones, {}


def trained(folder, change):
    """The parameters of an agent after an epoch."""
    vecenv.register("TARGET", Target)
    env_configurations.register("target", {"env_creator": lambda **options: None, "vecenv_type": "TARGET"})
    recurrent = {"name": "lstm", "units": 8, "layers": 1, "before_mlp": False, "concat_input": True}
    initializers = {"initializer": {"name": "default"}, "regularizer": {"name": "None"}}
    mlp = {"units": [8], "activation": "relu", **initializers}
    network = {"name": "actor_critic", "separate": True, "space": {"discrete": None}, "mlp": mlp, "rnn": recurrent}
    sizes = {"num_actors": 4, "horizon_length": 16, "minibatch_size": 32, "mini_epochs": 2, "seq_length": 8}
    losses = {"gamma": 0.99, "tau": 0.9, "learning_rate": 1e-2, "lr_schedule": None, "critic_coef": 1, "e_clip": 0.2}
    ways = {"entropy_coef": 0.01, "grad_norm": 0.5, "truncate_grads": True, "clip_value": True, "bounds_loss_coef": 0}
    names = {"name": "run", "env_name": "target", "train_dir": str(folder), "device": "cpu", "device_name": "cpu"}
    rest = {"reward_shaper": {"scale_value": 1}, "normalize_input": False, "normalize_advantage": True, "ppo": True}
    ends = {"max_epochs": 2, "score_to_win": 1e9, "print_stats": False, "save_best_after": 10**9, "kl_threshold": 0.008}
    config = {**sizes, **losses, **ways, **names, **rest, **ends}
    algorithms = {"algo": {"name": "a2c_discrete"}, "model": {"name": "discrete_a2c"}, "load_checkpoint": False}
    runner = Runner()
    runner.load({"params": {"seed": 1, **algorithms, "network": network, "config": config}})
    agent = runner.algo_factory.create(runner.algo_name, base_name="run", params=runner.params)
    change(agent.model)
    agent.train()
    return list(agent.model.parameters())


@pytest.mark.slow
def test_two_epochs_are_the_same(tmp_path):
    expected = trained(tmp_path, lambda model: model)
    close(trained(tmp_path, integration.accelerate), expected, "models")
