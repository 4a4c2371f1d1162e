"""Series of different lengths in one batch with `lengths=`, without packing: forecasts of monthly sales.

python examples/forecasting.py

Each row is a series of 36 to 120 months with a trend, seasons and noise. The last 12 months of each are held back. An
LSTM learns to forecast the next 12 months at every month of the others. The script first runs the batch through
torch.nn.LSTM as a packed sequence too, and prints how far outputs, states and gradients differ, and both times. At the
end it prints the error of the forecasts for the months held back, beside those of two naive forecasts.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm

MONTHS, AHEAD = 120, 12


def sales(B: int) -> tuple[Tensor, Tensor]:
    """Return series (MONTHS, B), near 1 at first, and how many months of each there are (B,)."""
    t, drawn = torch.arange(MONTHS)[:, None], torch.rand(6, B)
    trend = 1 + (drawn[0] - 0.4) * t / 60
    year = 0.4 * drawn[1] * torch.sin(2 * torch.pi * (t / 12 + drawn[2]))
    half = 0.2 * drawn[3] * torch.sin(2 * torch.pi * (t / 6 + drawn[4]))
    return trend * (1 + year + half) + 0.05 * torch.randn(MONTHS, B), (36 + drawn[5] * (MONTHS - 35)).long()


def packed(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `fastlstm.LSTM` computes with `lengths=`."""
    output, states = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output, total_length=len(x))[0], states


def compare(lstm: fastlstm.LSTM, x: Tensor, lengths: Tensor) -> float:
    """Return the largest difference of an output, a state or a gradient, in proportion to the largest of its tensor."""
    theirs = lstm.to_torch()  # torch.nn.LSTM with the same parameters
    ways = {"lengths": lambda: lstm(x, lengths=lengths), "packed": lambda: packed(theirs, x, lengths)}
    results, times = {}, {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            start = time.perf_counter()
            output, states = way()
            gradients = torch.autograd.grad(output.sum() + sum(s.sum() for s in states), list(lstm.parameters()))
            times[name].append(time.perf_counter() - start)
            results[name] = output, *states, *gradients
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results["lengths"], results["packed"]))
    print(f"outputs, states and gradients with lengths= and of a packed sequence differ by {error:.1e} of the largest")
    print(*(f"{name}: {1000 * statistics.median(each):.1f} ms" for name, each in times.items()), sep=", ")
    return error


def main(updates: int = 200, B: int = 256) -> tuple[float, dict[str, float]]:
    """Return what `compare` does, and the mean absolute error of each kind of forecast."""
    torch.manual_seed(0)
    series, lengths = sales(B)
    x, known = series[..., None], lengths - AHEAD  # (MONTHS, B, 1), and the months that training may see (B,)
    lstm, head = fastlstm.LSTM(1, 64), nn.Linear(64, AHEAD)
    difference = compare(lstm, x, known)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-2)
    targets = series.unfold(0, AHEAD, 1)[1:]  # (MONTHS - AHEAD, B, AHEAD): the months after each month
    seen = torch.arange(MONTHS - AHEAD)[:, None] + AHEAD < known  # whether training may see all of these
    for update in range(updates):
        output, _ = lstm(x, lengths=known)
        errors = (x + head(output))[:-AHEAD] - targets
        loss = errors[seen].abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (update + 1) % 50 == 0:
            print(f"update {update + 1}: mean absolute error {loss:.3f} on the months to learn from")
    with torch.no_grad():
        _, (h, _) = lstm(x, lengths=known)  # h (1, B, 64) is the state after the last month of each row
    last, months = known - 1, torch.arange(AHEAD)[:, None]
    forecasts = {
        "forecast by the LSTM": series.gather(0, last[None]) + head(h[0]).T.detach(),
        "as the last month": series.gather(0, last[None]),
        "as a year before": series.gather(0, known - AHEAD + months),
    }
    truth = series.gather(0, known + months)
    errors = {name: (forecast - truth).abs().mean().item() for name, forecast in forecasts.items()}
    for name, error in errors.items():
        print(f"mean absolute error on the months held back, {name}: {error:.3f}")
    return difference, errors


if __name__ == "__main__":
    main()
