"""Voice activity detection with silero-vad, whose LSTM is replaced by streams in float32 and in int8.

python examples/voice_activity.py    # needs `pip install silero-vad`, which brings its weights

The model hears 32 ms of audio at a time: convolutions, one step of an LSTM with 128 units, and a linear layer. The
script prints how far the probabilities differ from the model's own, how many decisions change, and what a step of the
LSTM takes.
"""

import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import fastlstm

RATE, CHUNK, CONTEXT = 16000, 512, 64  # samples a second, new samples of a call, samples of the call before


def audio(seconds: int) -> Tensor:
    """Something like speech, with pauses: vowels of a voice with a moving pitch, five a second, in a little noise."""
    t = torch.arange(seconds * RATE) / RATE
    pitch = 115 + 25 * torch.sin(torch.pi * t) + 12 * torch.sin(4.6 * torch.pi * t)
    phase = 2 * torch.pi * torch.cumsum(pitch, 0) / RATE
    vowels = torch.tensor(
        [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [660, 1720, 2410]]
    )
    drawn, place = torch.randint(len(vowels), (5 * seconds + 2,)), (5 * t).long()
    turn = ((5 * t - place - 0.7) / 0.3).clamp(0, 1)[:, None]
    formants = vowels[drawn[place]] * (1 - turn) + vowels[drawn[place + 1]] * turn
    voice = torch.zeros_like(t)
    for n in range(1, 40):
        near = [gain / (1 + ((n * pitch - f) / 60) ** 2) for gain, f in zip((1, 0.6, 0.35), formants.unbind(1))]
        voice += torch.stack(near).sum(0) * torch.cos(n * phase)
    syllables, talks = 0.55 - 0.45 * torch.cos(10 * torch.pi * t), torch.sin(torch.pi * t / 3) > -0.1
    return (0.6 * voice / voice.abs().max() * syllables * talks + 0.002 * torch.randn_like(t)).clamp(-1, 1)


def chunks(samples: Tensor) -> Tensor:
    """All inputs of the model (N, CONTEXT + CHUNK)."""
    padded = torch.cat([torch.zeros(CONTEXT), samples[: len(samples) // CHUNK * CHUNK]])
    return padded.unfold(0, CONTEXT + CHUNK, CHUNK)


def main(seconds: int = 60) -> dict[str, tuple[float, int]]:
    """Return the largest error of a probability, and the number of changed decisions, of each kind of stream."""
    package = find_spec("silero_vad")
    if package is None or package.origin is None:
        raise SystemExit("this example needs silero-vad: pip install silero-vad")
    model = torch.jit.load(Path(package.origin).parent / "data" / "silero_vad.jit")._model
    torch.manual_seed(0)
    with torch.no_grad():
        features = model.encoder(model.run_extractors(chunks(audio(seconds)))).squeeze(-1)  # (N, 128)
        cell = fastlstm.LSTMCell(128, 128)
        cell.load_state_dict({name: getattr(model.decoder.rnn, name) for name in cell.state_dict()})

        def probabilities(step: object) -> tuple[Tensor, float]:
            found, times = [], []
            for x in features:
                start = time.perf_counter()
                h = step(x[None])  # type: ignore[operator]
                times.append(time.perf_counter() - start)
                found.append(model.decoder.decoder(h.unsqueeze(-1)).flatten())
            return torch.cat(found), statistics.median(times) * 1e6

        state: Tensor = torch.zeros(0)

        def own(x: Tensor) -> Tensor:
            nonlocal state
            h, c = model.decoder.rnn(x, (state[0], state[1]) if len(state) else None)
            state = torch.stack([h, c])
            return h

        truth, us = probabilities(own)
        print(
            f"silero-vad's own LSTMCell: {us:.1f} us a step, speech in {(truth > 0.5).float().mean():.0%} of the chunks"
        )
        results = {}
        int8, int16 = (fastlstm.quantize(cell, activations=kind) for kind in ("int8", "int16"))
        for name, module in (("float32", cell), ("int8", int8), ("int16", int16)):
            got, us = probabilities(module.stream())
            error, changed = (got - truth).abs().max().item(), int(((got > 0.5) != (truth > 0.5)).sum())
            print(f"fastlstm, {name}: {us:.1f} us a step, largest error {error:.1e}, {changed} decisions changed")
            results[name] = error, changed
    return results


if __name__ == "__main__":
    main()
