"""Single steps as models call them: a cell between other layers, in a loop that is trained with Adam or only run."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import called, of_model
from benchmarks.shared.case import OURS, Case, Runs
from benchmarks.shared.shapes import MODES

STEPS = 20
BETWEEN = ((1, 256), (8, 128), (8, 300), (32, 256), (128, 512), (1600, 200))  # B, H of cells between other layers
ALONE = ((1, 128, 128), (1, 128, 512), (16, 64, 64), (32, 128, 256), (128, 128, 256), (8, 512, 512), (128, 512, 512))
CELLS = {nn.LSTMCell: "LSTMCell", nn.GRUCell: "GRUCell", nn.RNNCell: "ElmanCell"}


class Between(nn.Module):
    """Linear, relu, a cell or a step of a layer, Linear, tanh, again and again."""

    def __init__(self, kind: type[nn.Module], H: int) -> None:
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(H, H), kind(H, H), nn.Linear(H, H)
        self.is_layer = issubclass(kind, nn.RNNBase)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for _ in range(steps_of(len(x))):
            seen = torch.relu(self.before(x))
            if self.is_layer:
                (h,), state = self.cell(seen.unsqueeze(0), state)
            else:
                state = self.cell(seen, state)
                h = state[0] if isinstance(state, tuple) else state
            x = x + torch.tanh(self.after(h))
        return x


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


def before_and_after(build: Callable[[], nn.Module], inputs: Callable[[], Sequence[Tensor]], mode: str) -> Runs:
    """Return a model as it is, and after `fastlstm.replace`."""
    arguments, theirs = inputs(), build()
    models = {OURS: fastlstm.replace(deepcopy(theirs)), "torch": theirs}
    return {name: of_model(mode, model, lambda model: model(*arguments)) for name, model in models.items()}


def steps_of(B: int) -> int:
    return 4 if B > 1000 else STEPS


def between(kind: type[nn.Module], name: str, B: int, H: int) -> list[Case]:
    build = partial(before_and_after, partial(Between, kind, H), lambda: [torch.randn(B, H)])
    return cases(f"{name} between layers, B {B}, H {H}", build, steps=steps_of(B))


def decoder(H: int) -> list[Case]:
    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(32, 40, H), torch.randint(100, (32, STEPS))

    return cases(f"decoder with attention, B 32, H {H}", partial(before_and_after, partial(Decoder, H), inputs))


def agent(B: int, H: int) -> list[Case]:
    build = partial(before_and_after, partial(Agent, H), lambda: [torch.randn(STEPS, B, 64)])
    return cases(f"agent, B {B}, H {H}", build)


def alone(kind: type[nn.Module], B: int, I: int, H: int, steps: int, mode: str) -> Runs:
    """Return an LSTM or its cell in a loop of its own, whose caches stay warm, or one call."""
    theirs, xs = kind(I, H), torch.randn(steps, *[1] * (kind is nn.LSTM), B, I)
    ours = fastlstm.replace(deepcopy(theirs))
    begin = tuple(torch.rand(2, *xs.shape[1:-1], H))  # a state of zeros costs less

    def loop(cell: nn.Module) -> Tensor:
        state: Any = begin
        for x in xs:
            result = cell(x, state)
            state = result[1] if kind is nn.LSTM else result
        return state[0]

    cells = {OURS: ours, "torch": theirs}
    return {name: called(mode, partial(loop, cell), cell.parameters()) for name, cell in cells.items()}


def cases(name: str, build: Callable[[str], Runs], modes: tuple[str, ...] = MODES, **more: Any) -> list[Case]:
    """Return a case for one thread, and one for two."""
    words = ((1, "one thread"), (2, "two threads"))
    return [Case("steps", f"{name}, {word}", build, modes, threads=n, **more) for n, word in words]


BETWEEN_CASES = [case for kind in CELLS for B, H in BETWEEN for case in between(kind, CELLS[kind], B, H)]
MODEL_CASES = [*decoder(256), *decoder(512), *agent(1, 256), *agent(8, 128)]
CASES = [
    *BETWEEN_CASES,
    *MODEL_CASES,
    *between(nn.LSTM, "steps of LSTM", 1, 256),
    *between(nn.GRU, "steps of GRU", 8, 128),
    *cases("a step of LSTM, B 1, I 1000, H 1000", partial(alone, nn.LSTM, 1, 1000, 1000, 1), ("inference",)),
    *cases("LSTMCell alone, 4 MB written before each call, B 1, I 128, H 128",
           partial(alone, nn.LSTMCell, 1, 128, 128, 1), is_cold=True),
    *(
        Case("steps", f"LSTMCell alone, B {B}, I {I}, H {H}", partial(alone, nn.LSTMCell, B, I, H, STEPS), steps=STEPS,
             is_brief=(B, H) in ((1, 512), (32, 256)))
        for B, I, H in ALONE
    ),
]  # fmt: skip
