"""A cell from a paper in six lines: JANET learns to add as an LSTM does, with half of its weights.

python examples/cell_from_a_paper.py

JANET is an LSTM that has no gate but the forget gate. fastlstm lacks it. It is declared here in six lines, and the
kernels and the gradients follow from them. The task is the adding problem of Hochreiter and Schmidhuber, 1997: two of
150 random numbers are marked, and their sum is asked for at the end. In both networks the forget gates begin with
biases for memories of 1 to 150 steps (Tallec and Ollivier, Can recurrent neural networks warp time?, 2018,
arXiv:1804.11188). The script prints the squared errors of both in each fifth of the training. To answer 1 each time is
an error of 0.167.
"""

import time

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.cells import cell, sigmoid, tanh


@cell(gates={"f": "xh", "n": "xh"}, states=("h",))
def janet(f, n, h):
    """Van der Westhuizen and Lasenby, The unreasonable effectiveness of the forget gate, 2018, arXiv:1804.04849."""
    keep = sigmoid(f)
    write = 1 - sigmoid(f - 1)
    return keep * h + write * tanh(n)


def adding(T: int, B: int) -> tuple[Tensor, Tensor]:
    """Return numbers and marks (T, B, 2), with one mark in each half of the steps, and the sums (B,)."""
    x, rows = torch.stack([torch.rand(T, B), torch.zeros(T, B)], 2), torch.arange(B)
    x[torch.randint(T // 2, (B,)), rows, 1] = 1
    x[torch.randint(T // 2, T, (B,)), rows, 1] = 1
    return x, x.prod(2).sum(0)


def remember(rnn: fastlstm.RNN, T: int) -> None:
    """Set the biases so that the units begin with memories of 1 to T steps."""
    log = torch.empty(rnn.hidden_size).uniform_(1, T - 1).log()
    with torch.no_grad():
        rnn.bias_ih_l0.copy_(torch.cat([{"f": log, "i": -log}.get(gate, 0 * log) for gate in rnn.cell.gates]))
        rnn.bias_hh_l0.zero_()


def main(updates: int = 500, T: int = 150, H: int = 64) -> dict[str, list[float]]:
    """Return the mean errors of each network in each fifth of the updates, a multiple of 5."""
    results = {}
    for network in (janet, fastlstm.cells.lstm):
        torch.manual_seed(0)
        rnn, head = fastlstm.RNN(network, 2, H), nn.Linear(H, 1)
        remember(rnn, T)
        parameters = [*rnn.parameters(), *head.parameters()]
        optimizer, errors, start = torch.optim.Adam(parameters, lr=1e-2), [], time.perf_counter()
        for _ in range(updates):
            x, sums = adding(T, 64)
            output, _ = rnn(x)
            error = (head(output[-1]).squeeze(-1) - sums).pow(2).mean()
            optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            errors.append(error.detach())
        results[network.name] = torch.stack(errors).view(5, -1).mean(1).tolist()
        weights, seconds = sum(p.numel() for p in parameters), time.perf_counter() - start
        print(f"{network.name}, {weights} weights, {seconds:.1f} s:", *(f"{e:.4f}" for e in results[network.name]))
    return results


if __name__ == "__main__":
    main()
