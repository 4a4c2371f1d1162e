"""Reinforcement learning with `reset=`: a recurrent policy balances poles whose velocities it does not see.

python examples/recurrent_policy.py

An observation has the positions of a cart and its pole. Velocities are left out, so that the policy needs memory. Many
environments run side by side, and an episode may end in any of them at any step. Advantage actor-critic learns from 32
steps at a time: `reset=` names the steps at which episodes begin, and one call runs them all. The script prints how
long a policy balances that forgets at every step, and how long one that remembers. Then it takes the gradients of the
last update from a loop as well, which zeroes the states of torch.nn.LSTM before each step, and compares the two.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import fastlstm

T, B, H = 32, 64, 64  # steps of an update, environments, hidden units


def push(state: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Push carts (Barto, Sutton and Anderson, 1983) left or right. Return states, falls, and whose episode is over."""
    place, angle, speed, spin, seconds = state.unbind(1)
    force = (20 * right - 10 + 0.05 * spin**2 * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - angle.cos() * force) / (2 / 3 - 0.05 * angle.cos() ** 2 / 1.1)
    change = torch.stack([speed, spin, force - 0.05 * turn * angle.cos() / 1.1, turn, torch.ones(B)], 1)
    fell = (place.abs() > 2.4) | (angle.abs() > 0.21)
    over = fell | (seconds > 4)
    return torch.where(over[:, None], torch.empty(B, 5).uniform_(-0.05, 0.05), state + 0.02 * change), fell, over


def loss_of(answers: Tensor, actions: Tensor, fell: Tensor, over: Tensor) -> Tensor:
    """The loss of actor and critic, from logits and values (T, B, 3) and what happened at each step (T, B)."""
    policy, values, returns = Categorical(logits=answers[..., :2]), answers[..., 2], answers[..., 2].detach().clone()
    for t in reversed(range(T - 1)):  # A fall costs 1. An episode that lasts four seconds costs nothing.
        returns[t] = 0.99 * returns[t + 1] * ~over[t] - fell[t].float()
    gain = policy.log_prob(actions) * (returns - values.detach()) + 0.01 * policy.entropy()
    return (0.5 * (returns - values) ** 2 - gain).mean()


def train(updates: int, forgets: bool) -> tuple[Tensor, nn.ModuleList, list[Tensor]]:
    """Return the steps of an episode in each tenth of the updates, the layers, and the tensors of the last update."""
    torch.manual_seed(0)
    lstm, head = layers = nn.ModuleList([fastlstm.LSTM(2, H), nn.Linear(H, 3)])
    optimizer, ends = torch.optim.Adam(layers.parameters(), lr=1e-2), []
    poles, over = torch.empty(B, 5).uniform_(-0.05, 0.05), torch.ones(B, dtype=torch.bool)
    last = torch.zeros(1, B, H), torch.zeros(1, B, H)
    for _ in range(updates):
        first, stream, steps = last, lstm.stream(B), []  # A stream has the weights of now, and no gradients.
        stream.state = first
        for _ in range(T):
            seen, starts = poles[:, :2] * torch.tensor([1.0, 10.0]), over | forgets
            stream.reset(starts)
            with torch.no_grad():
                action = Categorical(logits=head(stream(seen))[:, :2]).sample()
            poles, fell, over = push(poles, action)
            steps.append((seen, starts, action, fell, over))
        last, (seen, starts, *happened) = stream.state, map(torch.stack, zip(*steps))
        optimizer.zero_grad()
        loss_of(head(lstm(seen, first, reset=starts)[0]), *happened).backward()
        optimizer.step()
        ends.append(happened[2].sum())
    return T * B * updates / 10 / torch.stack(ends).view(10, -1).sum(1), layers, [seen, *first, starts, *happened]


def by_loop(lstm: nn.LSTM, seen: Tensor, h: Tensor, c: Tensor, starts: Tensor) -> Tensor:
    outputs = []
    for x, start in zip(seen, starts):
        keep = (~start).float()[:, None]
        output, (h, c) = lstm(x[None], (h * keep, c * keep))
        outputs.append(output)
    return torch.cat(outputs)


def main(updates: int = 300) -> tuple[float, float, float]:
    """Train for a multiple of 10 updates. Return both policies' last lengths, and the largest error of a gradient."""
    forgetful, *_ = train(updates, True)
    print("forgets, steps of an episode:  ", *(f"{n:.0f}" for n in forgetful))
    lengths, (lstm, head), (seen, h, c, starts, *happened) = train(updates, False)
    print("remembers, steps of an episode:", *(f"{n:.0f}" for n in lengths))
    loop, gradients, times = lstm.to_torch(), {}, {"call": [], "loop": []}  # torch.nn.LSTM with the same parameters
    for _ in range(9):
        for way, found in times.items():
            start = time.perf_counter()
            output = by_loop(loop, seen, h, c, starts) if way == "loop" else lstm(seen, (h, c), reset=starts)[0]
            gradients[way] = torch.autograd.grad(loss_of(head(output), *happened), list(lstm.parameters()))
            found.append(time.perf_counter() - start)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(gradients["call"], gradients["loop"]))
    call, loop = (1000 * statistics.median(found) for found in times.values())
    print(f"gradients by one call and by the loop differ by {error:.1e} of the largest at most")
    print(f"an update takes {call:.1f} ms by one call and {loop:.1f} ms by the loop, {loop / call:.1f} times as long")
    return forgetful[-1].item(), lengths[-1].item(), error


if __name__ == "__main__":
    main()
