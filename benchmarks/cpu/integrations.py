"""Layers and learners of other libraries, before and after their integration. Those not installed are left out."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import of_model
from benchmarks.shared.case import OURS, Case, Runs
from benchmarks.shared.shapes import MODES
from fastlstm import cells
from fastlstm.cells import sigmoid, tanh
from fastlstm.integrations import benchmarl, ncps, rl_games, rsl_rl, spiking, torchrecurrent, xlstm

Models = tuple[nn.Module, nn.Module, Callable[[Any], Any]]  # before, after, and a call of either
OverTime = Callable[[Any, Tensor], tuple[Tensor, ...]]  # a neuron and its currents (T, B, H) to spikes and membranes
BATCHES = 20  # of a call of Keras
PARTS = "f_1", "f_2", "time_a", "time_b"
TIREX = {"heads": 4, "units": 512, "patch": 32, "blocks": 12, "T": 64}  # of the published model


def pair(build: Callable[[], Models], mode: str) -> Runs:
    theirs, ours, call = build()
    return {name: of_model(mode, model, call, with_adam=False) for name, model in ((OURS, ours), ("before", theirs))}


def accelerated(integration: Any, model: Any, call: Callable[[Any], Any]) -> Models:
    return model, integration.accelerate(copy.deepcopy(model)), call


def of_ncps(wiring: bool) -> Models:
    from ncps.torch import CfC
    from ncps.wirings import AutoNCP

    x, model = torch.randn(32, 100, 16), CfC(16, AutoNCP(64, 8)) if wiring else CfC(16, 64, backbone_layers=0)
    return accelerated(ncps, model, lambda model: model(x)[0])


@cells.cell(gates={"v": "xh"}, states=("h",), products=PARTS, params=[f"bias_{name}" for name in PARTS])
def cfc_with_backbone(
    v: Any, f_1: Any, f_2: Any, time_a: Any, time_b: Any, bias_f_1: Any, bias_f_2: Any, bias_time_a: Any,
    bias_time_b: Any,
) -> Any:  # fmt: skip
    """`ncps.torch.CfC` with H units in its backbone, and one unit of time between two steps."""
    v = 1.7159 * tanh(0.666 * v)
    share = sigmoid(time_a(v) + bias_time_a + time_b(v) + bias_time_b)
    return tanh(f_1(v) + bias_f_1) * (1 - share) + share * tanh(f_2(v) + bias_f_2)


def of_backbone() -> Models:
    """A CfC with its backbone, which no integration takes, as a cell of one's own with the same weights."""
    T, B, I, H = 50, 32, 28, 128
    model = resolve_name("ncps.torch:CfC")(I, H, batch_first=False, backbone_units=H)
    ours, x = fastlstm.RNN(cfc_with_backbone, I, H), torch.randn(T, B, I)
    own = model.rnn_cell
    weight, bias = own.backbone[0].weight, own.backbone[0].bias
    named = {"weight_ih": weight[:, :I], "weight_hh": weight[:, I:], "bias_ih": bias, "bias_hh": torch.zeros_like(bias)}
    for name, linear in zip(PARTS, (own.ff1, own.ff2, own.time_a, own.time_b)):
        named |= {f"weight_{name}": linear.weight, f"bias_{name}": linear.bias}
    ours.load_state_dict({f"{name}_l0": a.detach() for name, a in named.items()})
    return model, ours, lambda model: model(x)[0]


def of_torchrecurrent(name: str) -> Models:
    x, model = torch.randn(100, 32, 128), resolve_name(f"torchrecurrent:{name}")(128, 128)
    return accelerated(torchrecurrent, model, lambda model: model(x)[0])


def of_tirex2() -> Models:
    from tirex2.model.component import FlashRNNLayerConfig, sLSTMFlashRNNLayer

    shapes, x = {"recurrent_shape": "HPGD", "bias_shape": "HGD"}, torch.randn(1, 64, 512)
    model = sLSTMFlashRNNLayer(FlashRNNLayerConfig(512, num_heads=4, backend="vanilla", **shapes), 0, 2)
    return accelerated(xlstm, model, lambda model: first(model(x)))


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def of_benchmarl(name: str) -> Models:
    cls = resolve_name(f"benchmarl.models.{name.removeprefix('MultiAgent').lower()}:{name}")
    rollout = torch.randn(8, 100, 4, 16), torch.rand(8, 100, 1) < 0.02
    options = {"dropout": 0.0, "bias": True, "device": "cpu", "compile": False, "n_layers": 1, "centralised": False}
    model = cls(input_size=16, hidden_size=128, n_agents=4, share_params=True, **options)
    return accelerated(benchmarl, model, lambda model: first(model(*rollout)))


def of_rl_games(name: str) -> Models:
    model = resolve_name(f"rl_games.common.layers.recurrent:{name}")(input_size=32, hidden_size=128)
    x, dones, h = torch.randn(64, 64, 32), (torch.rand(64, 64, 1) < 0.02).float(), torch.zeros(1, 64, 128)
    states = (h, h) if name.startswith("LSTM") else h
    return accelerated(rl_games, model, lambda model: first(model(x, states, dones)))


def of_rsl_rl(kind: str) -> Models:
    from rsl_rl.modules import RNN
    from rsl_rl.utils import split_and_pad_trajectories

    x, masks = split_and_pad_trajectories(torch.randn(24, 256, 48), (torch.rand(24, 256, 1) < 0.03).byte())
    h = torch.zeros(1, x.shape[1], 256)
    states = (h, h) if kind == "lstm" else h
    return accelerated(rsl_rl, RNN(48, 256, 1, kind), lambda model: first(model(x, masks, states)))


class Tutorial(nn.Module):
    """The network of snnTorch's tutorial 5: 784 inputs, 1000 and 10 neurons, each step in turn as it is published. With
    `over_time` it runs layer after layer, and multiplies an input that is the same at each step once.
    """

    def __init__(self, over_time: OverTime | None = None) -> None:
        import snntorch

        super().__init__()
        self.fc1, self.fc2, self.over_time = nn.Linear(784, 1000), nn.Linear(1000, 10), over_time
        self.lif1, self.lif2 = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.over_time is not None:
            from_x = self.fc1(x[0]).expand(x.shape[0], -1, -1) if x.stride(0) == 0 else self.fc1(x)
            spikes, _ = self.over_time(self.lif1, from_x)
            return self.over_time(self.lif2, self.fc2(spikes))
        v1, v2, steps = x.new_zeros(x.shape[1], 1000), x.new_zeros(x.shape[1], 10), []
        for x_t in x:
            spike, v1 = self.lif1(self.fc1(x_t), v1)
            spike, v2 = self.lif2(self.fc2(spike), v2)
            steps.append((spike, v2))
        return tuple(map(torch.stack, zip(*steps)))


def by_library(neuron: Any, currents: Tensor) -> tuple[Tensor, ...]:
    """What `spiking.over_time` does, by the library's own neuron."""
    v, steps = torch.zeros_like(currents[0]), []
    for current in currents:
        spike, v = neuron(current, v)
        steps.append((spike, v))
    return tuple(map(torch.stack, zip(*steps)))


def of_snntorch(before: OverTime | None, changes: bool) -> Models:
    x = torch.rand(25, 128, 784) if changes else torch.rand(128, 784).expand(25, -1, -1)
    theirs, ours = Tutorial(before), Tutorial(spiking.over_time)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, lambda model: model(x)


class Node(nn.Module):
    """A neuron of spikingjelly, which begins anew."""

    def __init__(self) -> None:
        super().__init__()
        neuron = resolve_name("spikingjelly.activation_based.neuron:LIFNode")(step_mode="m")
        self.neuron, self.unused = neuron, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.neuron.reset()
        return self.neuron(x)


def of_norse() -> Models:
    from norse.torch import LIF

    x = torch.rand(100, 32, 256).requires_grad_()
    return LIF(), spiking.accelerate(LIF()), lambda model: model(x)[0]


def of_spikingjelly() -> Models:
    x = torch.rand(16, 64, 1000).requires_grad_()
    return Node(), spiking.accelerate(Node()), lambda model: model(x)


def drawn(module: nn.Module) -> nn.Module:
    """Return a module with random weights."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module


def of_slstm(library: str, B: int) -> Models:
    """The sLSTM cell of TiRex, which computes in bfloat16, or of xLSTM."""
    if library == "tirex":
        from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell

        model = sLSTMCell(sLSTMBlockConfig(embedding_dim=TIREX["units"], num_heads=TIREX["heads"]), "torch")
    else:
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        sizes = {"hidden_size": TIREX["units"], "num_heads": TIREX["heads"]}
        model = sLSTMCell(sLSTMCellConfig(backend="vanilla", **sizes))
    x = torch.randn(B, TIREX["T"], 4 * TIREX["units"], requires_grad=True)
    return accelerated(xlstm, drawn(model), lambda model: model(x, state=None)[0])


def forecast(B: int, mode: str) -> Runs:
    """Return TiRex's forecast of one patch, with random weights."""
    from tirex.models.tirex import TiRexZero

    block = {"num_blocks": TIREX["blocks"], "embedding_dim": TIREX["units"], "num_heads": TIREX["heads"]}
    sizes = {"input_patch_size": TIREX["patch"], "output_patch_size": TIREX["patch"], "input_ff_dim": 2048}
    options = {**sizes, "block_kwargs": block, "quantiles": [k / 10 for k in range(1, 10)]}
    model = drawn(TiRexZero("torch", options, train_ctx_len=TIREX["T"] * TIREX["patch"]))
    context = torch.randn(B, TIREX["T"] * TIREX["patch"])
    models = {OURS: xlstm.accelerate(copy.deepcopy(model)), "before": model}
    return {name: lambda m=m: m.forecast(context, prediction_length=TIREX["patch"]) for name, m in models.items()}


def ppo(H: int, mode: str) -> Runs:
    """Return environment steps of RecurrentPPO, acting and learning together."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    from fastlstm.integrations import sb3

    def learner(change: Callable[[Any], object]) -> Callable[[], object]:
        environments, options = make_vec_env("CartPole-v1", n_envs=8, seed=0), {"lstm_hidden_size": H}
        model = RecurrentPPO("MlpLstmPolicy", environments, seed=0, device="cpu", policy_kwargs=options)
        change(model)
        return lambda: model.learn(8 * 128, reset_num_timesteps=False)

    return {OURS: learner(sb3.accelerate), "before": learner(id)}


def of_keras(name: str, options: dict[str, Any], mode: str) -> Runs:
    """Return batches of a Keras model of one layer and a linear one: `fit` in training, `predict` in inference."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    import numpy as np

    from fastlstm.integrations import keras as integration

    T, B, I, H, batches, rng = 28, 128, 28, 128, BATCHES, np.random.default_rng(0)
    x, y = rng.normal(size=(batches * B, T, I)).astype("float32"), rng.integers(0, 10, batches * B)
    model = keras.Sequential([keras.Input((T, I)), getattr(keras.layers, name)(H, **options), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def call() -> Any:
        if mode == "inference":
            return model.predict(x, batch_size=B, verbose=0)
        model.fit(x, y, batch_size=B, verbose=0)
        return None

    @contextmanager
    def enabled() -> Iterator[None]:
        integration.enable()
        yield
        integration.disable()

    def ours() -> Any:
        return call()

    ours.within = enabled  # type: ignore[attr-defined]  # which the clock enters
    return {OURS: ours, "before": call}


def of_torchrl(name: str, mode: str) -> Runs:
    """Return forward and backward passes of rollouts in which episodes begin."""
    from tensordict import TensorDict
    from torchrl import modules

    from fastlstm.integrations import torchrl

    T, B, I, H = 128, 8, 16, 128
    data = TensorDict({"x": torch.randn(B, T, I), "is_init": torch.rand(B, T, 1) < 0.05}, (B, T))
    first_module = getattr(modules, name)(input_size=I, hidden_size=H, in_key="x", out_key="y")

    def gradients(change: Callable[[Any], object]) -> Callable[[], object]:
        module = getattr(modules, name)(input_size=I, hidden_size=H, in_key="x", out_key="y")
        module.load_state_dict(first_module.state_dict())
        change(module)

        def call() -> Any:
            with modules.set_recurrent_mode(True):
                output = module(data.clone())["y"]
            return torch.autograd.grad(output.square().mean(), list(module.parameters()))

        return call

    return {OURS: gradients(torchrl.accelerate), "before": gradients(id)}


RNN, SLSTM = "T 100, B 32, I 128, H 128", "sLSTM cell, T 64, 4 heads of 128 units"
TUTORIAL = "tutorial 5, T 25, B 128, 784 to 1000 to 10"
NEURONS = "snntorch", "norse", "spikingjelly"  # a rounding may move a spike, and all later ones of the unit
TORCHRECURRENT = "JANET", "NAS", "STAR", "LiGRU", "MultiplicativeLSTM"
LAYERS: list[tuple[str, str, Callable[[], Models]]] = [  # the library, what runs, and what builds it
    *(("tirex", f"{SLSTM}, B {B}", partial(of_slstm, "tirex", B)) for B in (1, 16, 64)),
    *(("xlstm", f"{SLSTM}, B {B}", partial(of_slstm, "xlstm", B)) for B in (1, 16, 64)),
    ("tirex2", "sLSTM layer, T 64, B 1, 4 heads of 128 units", of_tirex2),
    ("ncps", "CfC, AutoNCP(64, 8), T 100, B 32, I 16", partial(of_ncps, True)),
    ("ncps", "CfC, 64 units, T 100, B 32, I 16", partial(of_ncps, False)),
    ("ncps", "CfC with its backbone as a cell, T 50, B 32, I 28, H 128", of_backbone),
    *(("torchrecurrent", f"{name}, {RNN}", partial(of_torchrecurrent, name)) for name in TORCHRECURRENT),
    ("benchmarl", "MultiAgentLSTM, 4 agents, T 100, B 8, I 16, H 128", partial(of_benchmarl, "MultiAgentLSTM")),
    ("benchmarl", "MultiAgentGRU, 4 agents, T 100, B 8, I 16, H 128", partial(of_benchmarl, "MultiAgentGRU")),
    ("rl_games", "LSTMWithDones, T 64, B 64, I 32, H 128", partial(of_rl_games, "LSTMWithDones")),
    ("rl_games", "GRUWithDones, T 64, B 64, I 32, H 128", partial(of_rl_games, "GRUWithDones")),
    ("rsl_rl", "RNN, lstm, T 24, 256 environments, I 48, H 256", partial(of_rsl_rl, "lstm")),
    ("rsl_rl", "RNN, gru, T 24, 256 environments, I 48, H 256", partial(of_rsl_rl, "gru")),
    ("snntorch", f"{TUTORIAL}, one input for all steps", partial(of_snntorch, None, False)),
    ("snntorch", f"{TUTORIAL}, layer after layer before, too", partial(of_snntorch, by_library, False)),
    ("snntorch", f"{TUTORIAL}, an input for each step", partial(of_snntorch, None, True)),
    ("norse", "LIF, T 100, B 32, 256 units", of_norse),
    ("spikingjelly", "LIFNode, T 16, B 64, 1000 units", of_spikingjelly),
]
# TiRex's cells compute in bfloat16, and ours in float32.
UNCOMPARED = *NEURONS, "tirex", "sb3_contrib"
KERAS = (("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False}))
LEARNERS: list[tuple[str, str, Callable[[str], Runs], tuple[str, ...], int]] = [  # and modes, and steps of a call
    *(
        ("sb3_contrib", f"RecurrentPPO, CartPole, 8 environments, H {H}", partial(ppo, H), ("training",), 8 * 128)
        for H in (64, 256)
    ),
    *(
        ("keras", f"{name}{' with reset_after=False' * bool(options)}, T 28, B 128, I 28, H 128",
         partial(of_keras, name, options), MODES, BATCHES)
        for name, options in KERAS
    ),
    *(
        ("torchrl", f"{name}, T 128, B 8, I 16, H 128", partial(of_torchrl, name), ("training",), 1)
        for name in ("LSTMModule", "GRUModule")
    ),
    *(("tirex", f"a forecast from 2048 numbers, B {B}", partial(forecast, B), ("inference",), 1) for B in (1, 64)),
]  # fmt: skip
CASES = [
    Case(
        "integrations", f"{library}: {name}", build, modes, (library,), steps=steps,
        tolerance=None if library in UNCOMPARED else 1e-3,
    )
    for library, name, build, modes, steps in (
        *LEARNERS,
        *((library, name, partial(pair, build), MODES, 1) for library, name, build in LAYERS),
    )
]  # fmt: skip
