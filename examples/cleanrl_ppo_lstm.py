"""PPO with an LSTM in one file, as CleanRL writes it: `reset=` in place of its loop over time.

python examples/cleanrl_ppo_lstm.py    # needs `pip install gymnasium`

CleanRL's `get_states` runs `nn.LSTM` one step at a time, and zeroes the states where `done` says that an episode
begins. With `reset=done` one call of `fastlstm.LSTM` runs all steps. Here an agent learns to balance the poles of
CartPole without their velocities. The script prints how long it balances, and compares the last update with the loop's.
"""

import time
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import fastlstm

T, B, H = 64, 16, 64  # steps of a rollout, environments, hidden units


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.actor, self.critic = fastlstm.LSTM(2, H), nn.Linear(H, 2), nn.Linear(H, 1)

    def get_states(self, x: Tensor, state: tuple[Tensor, Tensor], done: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.lstm(x, state, reset=done)


def by_loop(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor], done: Tensor) -> Tensor:
    outputs = []
    for each, starts in zip(x, done.float()):
        output, state = lstm(each[None], tuple((1 - starts)[None, :, None] * s for s in state))
        outputs.append(output)
    return torch.cat(outputs)


def loss_of(agent: Agent, hidden: Tensor, actions: Tensor, old: Tensor, rewards: Tensor, over: Tensor) -> Tensor:
    values, policy = agent.critic(hidden)[..., 0], Categorical(logits=agent.actor(hidden))
    with torch.no_grad():  # generalized advantage estimation, which leaves the last step out
        gains, last = torch.zeros_like(rewards), torch.zeros(B)
        for t in reversed(range(T - 1)):
            last = (~over[t]) * (0.99 * 0.95 * last + 0.99 * values[t + 1]) + rewards[t] - values[t]
            gains[t] = last
        returns = gains + values
        gains = (gains - gains.mean()) / (gains.std() + 1e-8)
    ratio = (policy.log_prob(actions) - old).exp()
    gain = torch.minimum(gains * ratio, gains * ratio.clamp(0.8, 1.2)) + 0.01 * policy.entropy()
    return (0.5 * (values - returns) ** 2 - gain).mean()


def main(updates: int = 60) -> tuple[float, float]:
    """Return the mean length of an episode in the last tenth of the updates, and the largest error of a gradient."""
    if find_spec("gymnasium") is None:
        raise SystemExit("this example needs gymnasium: pip install gymnasium")
    import gymnasium

    torch.manual_seed(0)
    agent, same_step = Agent(), {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    poles = gymnasium.make_vec("CartPole-v1", B, "sync", vector_kwargs=same_step)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
    (seen, _), done, ends = poles.reset(seed=0), torch.ones(B, dtype=torch.bool), []
    state = torch.zeros(1, B, H), torch.zeros(1, B, H)
    for _ in range(updates):
        first, steps = state, []
        for _ in range(T):
            x = torch.tensor(seen[:, ::2] * [1, 10]).float()  # the positions of cart and pole
            with torch.no_grad():
                hidden, state = agent.get_states(x[None], state, done[None])
                policy = Categorical(logits=agent.actor(hidden[0]))
                action = policy.sample()
            seen, reward, fell, late, _ = poles.step(action.numpy())
            over = torch.tensor(fell | late)
            steps.append((x, done, action, policy.log_prob(action), torch.tensor(reward / 20).float(), over))
            done = over
        x, starts, *happened = map(torch.stack, zip(*steps))
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(agent, agent.get_states(x, first, starts)[0], *happened).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
        ends.append(happened[3].sum().item())
    lengths = T * B * updates / 10 / np.maximum(1, np.reshape(ends, (10, -1)).sum(1))
    print("steps of an episode:", *(f"{n:.0f}" for n in lengths))
    loop, gradients = agent.lstm.to_torch(), []  # torch.nn.LSTM with the same parameters
    for name in ("one call", "the loop"):
        start = time.perf_counter()
        hidden = agent.get_states(x, first, starts)[0] if name == "one call" else by_loop(loop, x, first, starts)
        gradients.append(torch.autograd.grad(loss_of(agent, hidden, *happened), list(agent.parameters())))
        print(f"an update by {name}: {1000 * (time.perf_counter() - start):.1f} ms")
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*gradients))
    print(f"gradients differ by {error:.1e} of the largest at most")
    return float(lengths[-1]), error


if __name__ == "__main__":
    main()
