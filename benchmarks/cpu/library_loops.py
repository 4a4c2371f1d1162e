"""Layers of libraries that loop over time, before and after their integration: their speed, side by side, on the CPU.

python -m benchmarks.cpu.library_loops [--only ncps] [--rounds 15]

A step of training is forward and backward. The libraries come with `pip install .[integrations]`, and BenchMARL with
`.[benchmarl]`; those that are not installed are left out.
"""

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.shared.calls import inference
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.integrations import benchmarl, ncps, rl_games, rsl_rl, spiking, torchrecurrent, xlstm

Case = tuple[str, str, Any, Any, Any]  # what, the size, before, after, the input or a tuple of inputs


def of_ncps() -> Iterator[Case]:
    from ncps.torch import CfC
    from ncps.wirings import AutoNCP

    models = {"AutoNCP(64, 8)": CfC(16, AutoNCP(64, 8)), "64 units": CfC(16, 64, backbone_layers=0)}
    for name, model in models.items():
        yield (
            f"CfC, {name}",
            "T 100, B 32, I 16",
            model,
            ncps.accelerate(copy.deepcopy(model)),
            torch.randn(32, 100, 16),
        )


def of_torchrecurrent() -> Iterator[Case]:
    import torchrecurrent as library

    for name in ("JANET", "NAS", "STAR", "LiGRU"):
        model = getattr(library, name)(128, 128)
        ours = torchrecurrent.accelerate(copy.deepcopy(model))
        yield name, "T 100, B 32, I 128, H 128", model, ours, torch.randn(100, 32, 128)


def of_tirex2() -> Iterator[Case]:
    from tirex2.model.component import FlashRNNLayerConfig, sLSTMFlashRNNLayer

    shapes = {"recurrent_shape": "HPGD", "bias_shape": "HGD"}
    model = sLSTMFlashRNNLayer(FlashRNNLayerConfig(512, num_heads=4, backend="vanilla", **shapes), 0, 2)
    ours = xlstm.accelerate(copy.deepcopy(model))
    yield "sLSTM layer", "T 64, B 1, 4 heads of 128 units", model, ours, torch.randn(1, 64, 512)


def of_benchmarl() -> Iterator[Case]:
    from benchmarl.models.gru import MultiAgentGRU
    from benchmarl.models.lstm import MultiAgentLSTM

    rollout = torch.randn(8, 100, 4, 16), torch.rand(8, 100, 1) < 0.02
    options = {"dropout": 0.0, "bias": True, "device": "cpu", "compile": False, "n_layers": 1, "centralised": False}
    for cls in (MultiAgentLSTM, MultiAgentGRU):
        model = cls(input_size=16, hidden_size=128, n_agents=4, share_params=True, **options)
        size = "4 agents, T 100, B 8, I 16, H 128"
        yield cls.__name__, size, model, benchmarl.accelerate(copy.deepcopy(model)), rollout


def of_rl_games() -> Iterator[Case]:
    from rl_games.common.layers.recurrent import GRUWithDones, LSTMWithDones

    x, dones, h = torch.randn(64, 64, 32), (torch.rand(64, 64, 1) < 0.02).float(), torch.zeros(1, 64, 128)
    for cls, states in ((LSTMWithDones, (h, h)), (GRUWithDones, h)):
        model = cls(input_size=32, hidden_size=128)
        size = "T 64, B 64, I 32, H 128"
        yield cls.__name__, size, model, rl_games.accelerate(copy.deepcopy(model)), (x, states, dones)


def of_rsl_rl() -> Iterator[Case]:
    from rsl_rl.modules import RNN
    from rsl_rl.utils import split_and_pad_trajectories

    x, masks = split_and_pad_trajectories(torch.randn(24, 256, 48), (torch.rand(24, 256, 1) < 0.03).byte())
    h = torch.zeros(1, x.shape[1], 256)
    for kind, states in (("lstm", (h, h)), ("gru", h)):
        model = RNN(48, 256, 1, kind)
        size = f"T 24, 256 environments, {x.shape[1]} episodes, I 48, H 256"
        yield f"RNN, {kind}", size, model, rsl_rl.accelerate(copy.deepcopy(model)), (x, masks, states)


class Tutorial(nn.Module):
    """The network of snnTorch's tutorial 5: as it is published, or layer after layer by fastlstm."""

    T = 25

    def __init__(self) -> None:
        import snntorch

        super().__init__()
        self.fc1, self.fc2 = nn.Linear(784, 1000), nn.Linear(1000, 10)
        self.lif1, self.lif2 = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v1, v2, steps = x.new_zeros(len(x), 1000), x.new_zeros(len(x), 10), []
        for _ in range(self.T):
            spike, v1 = self.lif1(self.fc1(x), v1)
            spike, v2 = self.lif2(self.fc2(spike), v2)
            steps.append((spike, v2))
        spikes, membranes = zip(*steps)
        return torch.stack(spikes), torch.stack(membranes)


class ByLayers(Tutorial):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spikes, _ = spiking.over_time(self.lif1, self.fc1(x).expand(self.T, -1, -1))
        return spiking.over_time(self.lif2, self.fc2(spikes))


class LibraryByLayers(Tutorial):
    """Layer after layer, but each neuron by the library."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spikes, _ = self.over_time(self.lif1, self.fc1(x).expand(self.T, -1, -1))
        return self.over_time(self.lif2, self.fc2(spikes))

    def over_time(self, neuron: Any, currents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v, steps = torch.zeros_like(currents[0]), []
        for current in currents:
            spike, v = neuron(current, v)
            steps.append((spike, v))
        spikes, membranes = zip(*steps)
        return torch.stack(spikes), torch.stack(membranes)


def of_snntorch() -> Iterator[Case]:
    x = torch.rand(128, 784)
    for name, kind in (("its tutorial's network", Tutorial), ("the same, layer after layer", LibraryByLayers)):
        yield name, "T 25, B 128, 784 to 1000 to 10", kind(), ByLayers(), x


def of_norse() -> Iterator[Case]:
    from norse.torch import LIF

    yield "LIF", "T 100, B 32, 256 units", LIF(), spiking.accelerate(LIF()), torch.rand(100, 32, 256).requires_grad_()


class Node(nn.Module):
    """A neuron of spikingjelly, which begins anew."""

    def __init__(self) -> None:
        from spikingjelly.activation_based.neuron import LIFNode

        super().__init__()
        self.neuron = LIFNode(step_mode="m")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.neuron.reset()
        return self.neuron(x)


def of_spikingjelly() -> Iterator[Case]:
    x = torch.rand(16, 64, 1000).requires_grad_()
    yield "LIFNode", "T 16, B 64, 1000 units", Node(), spiking.accelerate(Node()), x


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "snntorch": of_snntorch,
    "norse": of_norse,
    "spikingjelly": of_spikingjelly,
    "ncps": of_ncps,
    "torchrecurrent": of_torchrecurrent,
    "tirex2": of_tirex2,
    "benchmarl": of_benchmarl,
    "rl_games": of_rl_games,
    "rsl_rl": of_rsl_rl,
}


def call_of(model: Any, x: Any, mode: str) -> Run:
    inputs = x if isinstance(x, tuple) else (x,)

    def step() -> None:
        model.zero_grad()
        results = model(*inputs)
        output = results[0] if isinstance(results, tuple) else results
        output.square().mean().backward()

    return step if mode == "training" else inference(lambda: model(*inputs))


def rows(options: Options) -> Iterator[list[str]]:
    for library in options.only:
        if find_spec(library) is None:
            continue
        torch.manual_seed(0)
        for name, size, theirs, ours, x in LIBRARIES[library]():
            for mode in MODES:
                calls = {"theirs": call_of(theirs, x, mode), "ours": call_of(ours, x, mode)}
                sides = compare(calls, options.rounds, options.threads, limit=options.seconds)
                ratio = str(sides["ours"].to(sides["theirs"]))
                yield [library, name, size, mode, sides["theirs"].ms, sides["ours"].ms, ratio]


if __name__ == "__main__":
    arguments = parser("cpu.library_loops", __doc__, rounds=15)
    arguments.add_argument("--seconds", type=float, default=30, help="after which a row begins no further round (30)")
    arguments.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    print_table(["library", "what", "size", "call", "before", "after", "ratio"], rows(arguments.parse_args()))
