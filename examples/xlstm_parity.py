"""An xLSTM of the package xlstm before and after one line: the same losses for the same seed, in less time.

python examples/xlstm_parity.py    # needs `pip install xlstm`

At every step the model is to say whether the number of ones so far is odd, which a recurrent product with h can learn
and attention cannot. Two models learn from the same seed, and one of them is accelerated before.
"""

import time
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastlstm.integrations.xlstm


class Parity(nn.Module):
    def __init__(self, T: int, width: int) -> None:
        from xlstm import FeedForwardConfig, sLSTMBlockConfig, sLSTMLayerConfig, xLSTMBlockStack, xLSTMBlockStackConfig

        super().__init__()
        layer = sLSTMLayerConfig(backend="vanilla", num_heads=4, recurrent_weight_init="standard")
        block = sLSTMBlockConfig(slstm=layer, feedforward=FeedForwardConfig(proj_factor=1.3))
        sizes = {"context_length": T, "num_blocks": 1, "embedding_dim": width, "slstm_at": "all"}
        self.embedding, self.head = nn.Embedding(2, width), nn.Linear(width, 2)
        self.stack = xLSTMBlockStack(xLSTMBlockStackConfig(slstm_block=block, **sizes))

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.stack(self.embedding(bits)))


def learn(steps: int, T: int, accelerated: bool) -> tuple[list[float], float, float]:
    """Return the losses, the share of right answers in the last steps, and the seconds that a step took."""
    torch.manual_seed(0)
    model, losses, right = Parity(T, 64), [], []
    if accelerated:
        fastlstm.integrations.xlstm.accelerate(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = time.perf_counter()
    for _ in range(steps):
        bits = torch.randint(2, (32, T))
        answer, odd = model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten()
        loss = cross_entropy(answer, odd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        right.append((answer.argmax(1) == odd).float().mean().item())
    last = right[-10:]
    return losses, sum(last) / len(last), (time.perf_counter() - start) / steps


def main(steps: int = 300, T: int = 24) -> tuple[list[float], list[float]]:
    """Return the losses of both models."""
    if find_spec("xlstm") is None:
        raise SystemExit("this example needs xlstm: pip install xlstm")
    learn(1, T, True)  # compiles kernels
    results = {name: learn(steps, T, name == "fastlstm") for name in ("xlstm", "fastlstm")}
    for name, (_, right, seconds) in results.items():
        print(f"{name}: {right:.0%} are right at last, a step takes {1000 * seconds:.1f} ms")
    (theirs, *_), (ours, *_) = results.values()
    print(f"the first 20 losses differ by {max(abs(a - b) for a, b in zip(theirs[:20], ours)):.1e} at most")
    return theirs, ours


if __name__ == "__main__":
    main()
