"""Streaming with `module.stream`: a detector hears a rising tone in noise, ten milliseconds at a time.

python examples/wake_tone.py

The tone to wake at rises from 600 to 1800 Hz in half a second. There are falling and steady tones as well, so that one
frame tells nothing, and the detector has to remember. An LSTM learns from the spectra of whole sounds. Then a new sound
comes frame by frame, to a stream of the LSTM and to a stream of its copy with int8 weights. The script prints how many
tones each misses, how far its outputs are from those of a call for the whole sound, and how long its steps take.
"""

import itertools
import time

import torch
from torch import Tensor, nn

import fastlstm

RATE, FRAME = 8000, 80  # samples a second, samples of a frame
EDGES = 0, 4, 6, 8, 12, 16, 24, 32, 64, float("inf")  # microseconds


def sound(B: int, seconds: int) -> tuple[Tensor, Tensor, Tensor]:
    """One tone a second: samples (B, seconds RATE), which are to wake (B, seconds), and at which frames (T, B)."""
    kind, start = torch.randint(3, (B, seconds, 1)), torch.randint(30, (B, seconds, 1))  # rising, falling, steady
    steady = torch.empty(B, seconds, 1).uniform_(600, 1500)
    first = torch.where(kind == 2, steady, 600 + 1200 * (kind == 1))  # the frequency at the begin, and at the end
    last = torch.where(kind == 2, steady, 1800 - 1200 * (kind == 1))
    along = (torch.arange(RATE) / FRAME - start) / 50  # 0 where the tone begins, and 1 where it ends
    phase = torch.cumsum(first + (last - first) * along.clamp(0, 1), 2) * (2 * torch.pi / RATE)
    tones = phase.sin() * ((along > 0) & (along < 1)) * torch.empty(B, seconds, 1).uniform_(0.1, 0.5)
    frames = torch.arange(100) - start
    wake = (kind == 0) & (frames >= 50) & (frames < 60)
    return (tones + 0.2 * torch.randn(tones.shape)).flatten(1), kind[..., 0] == 0, wake.flatten(1).T.float()


def spectra(samples: Tensor) -> Tensor:
    """The loudness (..., T, 41) of each frame of samples (..., T FRAME) at multiples of 100 Hz."""
    frames = samples.unflatten(-1, (-1, FRAME)) * torch.hann_window(FRAME)
    return (torch.fft.rfft(frames).abs() + 0.1).log()


def main(updates: int = 150, seconds: int = 120) -> dict[str, tuple[int, int, float]]:
    """Return of each kind of stream how many tones it missed, its false alarms, and its largest error of an output."""
    torch.manual_seed(0)
    lstm, head = fastlstm.LSTM(41, 128), nn.Linear(128, 1)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=3e-3)
    weight = torch.tensor(5.0)  # of the frames to wake at, which are few
    for update in range(updates):
        samples, _, wake = sound(32, 3)
        output, _ = lstm(spectra(samples).transpose(0, 1))
        loss = nn.functional.binary_cross_entropy_with_logits(head(output).squeeze(-1), wake, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (update + 1) % 50 == 0:
            print(f"update {update + 1}: loss {loss:.4f}")
    samples, wake, _ = sound(1, seconds)
    frames, results, times = spectra(samples)[0], {}, {}
    print(f"{wake.sum()} of {seconds} tones are to wake")
    with torch.no_grad():
        whole, _ = lstm(frames[:, None])
        for name, module in (("float32", lstm), ("int8", fastlstm.quantize(lstm))):
            stream, outputs, steps = module.stream(), [], []
            for x in frames.split(1):
                start = time.perf_counter()
                outputs.append(stream(x))
                steps.append(1e6 * (time.perf_counter() - start))
            output, times[name] = torch.stack(outputs), torch.tensor(steps)
            heard = (head(output) > 0).view(1, seconds, 100).any(2)
            missed, alarms = (wake & ~heard).sum().item(), (~wake & heard).sum().item()
            error = (output - whole).abs().max().item()
            print(f"{name}: {missed} missed, {alarms} false alarms, largest error of an output {error:.1e}")
            results[name] = missed, alarms, error
    print("a step takes      ", *(f"{name:>24}" for name in times))
    for low, high in itertools.pairwise(EDGES):
        shares = [((t >= low) & (t < high)).float().mean().item() for t in times.values()]
        print(f"{low:4} to {high:4} us   ", *(f"{'#' * round(18 * share):18}{share:6.1%}" for share in shares))
    for q in (50, 99):
        print(f"p{q}               ", *(f"{t.quantile(q / 100):21.1f} us" for t in times.values()))
    return results


if __name__ == "__main__":
    main()
