"""Single steps as models call them: a cell between other layers, in a loop that is trained with Adam or only run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import called, inference, of_model
from benchmarks.shared.case import OURS, Case, Runs
from benchmarks.shared.shapes import MODES

STEPS = 20
BETWEEN = ((1, 256), (8, 128), (8, 300), (32, 256), (128, 512), (1600, 200))  # B, H of cells between other layers
ALONE = ((1, 128, 128), (1, 128, 512), (16, 64, 64), (32, 128, 256), (128, 128, 256), (8, 512, 512), (128, 512, 512))
CELLS = {"LSTM": (nn.LSTMCell, fastlstm.LSTMCell), "GRU": (nn.GRUCell, fastlstm.GRUCell)}
CELLS["Elman"] = nn.RNNCell, fastlstm.ElmanCell
LAYERS = {"LSTM": (nn.LSTM, fastlstm.LSTM), "GRU": (nn.GRU, fastlstm.GRU), "Elman": (nn.RNN, fastlstm.Elman)}


def output_of(result: Any) -> Tensor:
    """Return h of what a cell returns."""
    return result[0] if isinstance(result, tuple) else result


class Between(nn.Module):
    """Linear, relu, cell, Linear, tanh, again and again."""

    def __init__(self, kind: str, H: int) -> None:
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(H, H), CELLS[kind][0](H, H), nn.Linear(H, H)

    def forward(self, x: Tensor, count: int) -> Tensor:
        state: Any = None
        for _ in range(count):
            state = self.cell(torch.relu(self.before(x)), state)
            x = x + torch.tanh(self.after(output_of(state)))
        return x


class BetweenSteps(Between):
    """The same with a layer's module, of which each call is one step."""

    def __init__(self, kind: str, H: int) -> None:
        super().__init__(kind, H)
        self.cell = LAYERS[kind][0](H, H)

    def forward(self, x: Tensor, count: int) -> Tensor:
        state: Any = None
        for _ in range(count):
            output, state = self.cell(torch.relu(self.before(x)).unsqueeze(0), state)
            x = x + torch.tanh(self.after(output[0]))
        return x


class Molecules(nn.Module):
    """Like AttentiveFP: messages along the bonds of a batch of molecules, and a GRUCell that takes them up."""

    def __init__(self, H: int, rounds: int = 3) -> None:
        super().__init__()
        self.embedding, self.output = nn.Linear(39, H), nn.Linear(H, 1)
        self.score, self.message = nn.Linear(2 * H, 1), nn.Linear(H, H)
        self.cells = nn.ModuleList([nn.GRUCell(H, H) for _ in range(rounds)])

    def forward(self, atoms: Tensor, bonds: Tensor) -> Tensor:
        h, (begin, end) = nn.functional.leaky_relu(self.embedding(atoms)), bonds
        for cell in self.cells:
            weight = torch.sigmoid(self.score(torch.cat([h[begin], h[end]], 1)))
            message = torch.zeros_like(h).index_add(0, end, weight * self.message(h)[begin])
            h = torch.relu(cell(nn.functional.elu(message), h))
        return self.output(h)


class Decoder(nn.Module):
    """A decoder of letters, whose LSTMCell attends to what an encoder has given."""

    def __init__(self, H: int, letters: int = 100) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(letters, H), nn.LSTMCell(2 * H, H)
        self.query, self.join, self.output = nn.Linear(H, H), nn.Linear(2 * H, H), nn.Linear(H, letters)

    def forward(self, memory: Tensor, letters: Tensor) -> Tensor:
        context, state, outputs = memory.new_zeros(memory.shape[0], memory.shape[2]), None, []
        for x in self.embedding(letters).unbind(1):
            state = self.cell(torch.cat([x, context], 1), state)
            weights = torch.softmax(torch.bmm(memory, self.query(state[0]).unsqueeze(2)), 1)
            context = (weights * memory).sum(1)
            outputs.append(self.output(torch.tanh(self.join(torch.cat([state[0], context], 1)))))
        return torch.stack(outputs, 1)


class Agent(nn.Module):
    """An agent with a memory: layers that see, an LSTMCell, a policy and a value."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Linear(64, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU())
        self.cell, self.policy, self.value = nn.LSTMCell(H, H), nn.Linear(H, 6), nn.Linear(H, 1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        state, policies, values = None, [], []
        for observation in observations:
            state = self.cell(self.see(observation), state)
            policies.append(self.policy(state[0]))
            values.append(self.value(state[0]))
        return torch.stack(policies), torch.stack(values)


def before_and_after(build: Callable[[], nn.Module], call: Callable[[nn.Module], Any], mode: str) -> Runs:
    """Return a model as it is, and after `fastlstm.replace`."""
    theirs, ours = build(), build()
    ours.load_state_dict(theirs.state_dict())
    return {OURS: of_model(mode, fastlstm.replace(ours), call), "torch": of_model(mode, theirs, call)}


def between(model: type[Between], kind: str, B: int, H: int, mode: str) -> Runs:
    x, count = torch.randn(B, H), steps_of(B)
    return before_and_after(lambda: model(kind, H), lambda net: net(x, count), mode)


def steps_of(B: int) -> int:
    return 4 if B > 1000 else STEPS


def alone(kind: str, B: int, I: int, H: int, steps: int, mode: str) -> Runs:
    """Return a cell in a loop of its own, whose caches stay warm, or one call without gradients."""
    (theirs, ours), xs = (cls(I, H) for cls in CELLS[kind]), torch.randn(STEPS, B, I)
    ours.load_state_dict(theirs.state_dict())
    states = tuple(torch.rand(2 if kind == "LSTM" else 1, B, H))  # a state of zeros costs less

    def loop(cell: nn.Module) -> Tensor:
        state: Any = states if kind == "LSTM" else states[0]
        for x in xs[:steps]:
            state = cell(x, state)
        return output_of(state)

    cells = {OURS: ours, "torch": theirs}
    return {name: called(mode, partial(loop, cell), cell.parameters()) for name, cell in cells.items()}


def one_step(kind: str, B: int, I: int, H: int, mode: str) -> Runs:
    """Return a single step of a layer's module, from a state that is not zero."""
    (theirs, ours), x = (cls(I, H) for cls in LAYERS[kind]), torch.randn(1, B, I)
    ours.load_state_dict(theirs.state_dict())
    states = tuple(torch.rand(2 if kind == "LSTM" else 1, 1, B, H))
    state: Any = states if kind == "LSTM" else states[0]
    return {name: inference(lambda m=module: m(x, state)[0]) for name, module in ((OURS, ours), ("torch", theirs))}


def molecules(mode: str) -> Runs:
    atoms, bonds = torch.randn(1600, 39), torch.randint(1600, (2, 3400))
    return before_and_after(lambda: Molecules(200), lambda model: model(atoms, bonds), mode)


def decoder(B: int, H: int, mode: str) -> Runs:
    memory, letters = torch.randn(B, 40, H), torch.randint(100, (B, STEPS))
    return before_and_after(lambda: Decoder(H), lambda model: model(memory, letters), mode)


def agent(B: int, H: int, mode: str) -> Runs:
    observations = torch.randn(STEPS, B, 64)
    return before_and_after(lambda: Agent(H), lambda model: model(observations), mode)


def cases(name: str, build: Callable[[str], Runs], modes: tuple[str, ...] = MODES, **more: Any) -> list[Case]:
    """Return a case for one thread, and one for two."""
    words = {1: "one thread", 2: "two threads"}
    return [Case("steps", f"{name}, {words[n]}", build, modes, threads=n, **more) for n in words]


BETWEEN_CASES = [
    case
    for kind in CELLS
    for B, H in BETWEEN
    for case in cases(
        f"{kind}Cell between layers, B {B}, H {H}", partial(between, Between, kind, B, H), steps=steps_of(B)
    )
]
MODEL_CASES = [
    *cases("molecules, 1600 atoms, H 200", molecules),
    *(case for H in (256, 512) for case in cases(f"decoder with attention, B 32, H {H}", partial(decoder, 32, H))),
    *(case for B, H in ((1, 256), (8, 128)) for case in cases(f"agent, B {B}, H {H}", partial(agent, B, H))),
]
CASES = [
    *BETWEEN_CASES,
    *MODEL_CASES,
    *(
        case
        for kind, B, H in (("LSTM", 1, 256), ("GRU", 8, 128))
        for case in cases(f"steps of {kind} between layers, B {B}, H {H}", partial(between, BetweenSteps, kind, B, H),
                          steps=STEPS)
    ),
    *cases("a step of LSTM, B 1, I 1000, H 1000", partial(one_step, "LSTM", 1, 1000, 1000), ("inference",)),
    *cases("LSTMCell alone, 4 MB written before each call, B 1, I 128, H 128", partial(alone, "LSTM", 1, 128, 128, 1),
           is_cold=True),
    *(
        Case("steps", f"LSTMCell alone, B {B}, I {I}, H {H}", partial(alone, "LSTM", B, I, H, STEPS), steps=STEPS,
             is_brief=(B, H) in ((1, 512), (32, 256)))
        for B, I, H in ALONE
    ),
]  # fmt: skip
