"""Libraries before and after their integration: their speed, side by side, on the CPU.

python -m benchmarks.cpu.integrations [--only ppo keras torchrl] [--rounds 9] [--threads 2]

Every round runs each contender once, every second round in the opposite order. A line has the medians, the ratio of the
library's median time to that of each other contender, and the least and the largest ratio within a round. The libraries
come with `pip install .[integrations]`; those that are not installed are left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec

import torch

import fastlstm
import fastlstm.integrations.keras
import fastlstm.integrations.sb3
import fastlstm.integrations.torchrl

Contenders = dict[str, Callable[[], object]]  # the library alone comes first, and fastlstm last
SETTLE = 0.02  # seconds before each sample: idle threads of the contender before spin on for a while


def ppo() -> Iterator[tuple[str, Contenders, float]]:
    """Environment steps of RecurrentPPO, acting and learning together."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    steps = 8 * 128

    for H in (64, 256):

        def learner(change: Callable[[object], object], H: int = H) -> Callable[[], object]:
            environments = make_vec_env("CartPole-v1", n_envs=8, seed=0)
            options = {"lstm_hidden_size": H}
            model = RecurrentPPO("MlpLstmPolicy", environments, seed=0, device="cpu", policy_kwargs=options)
            change(model)
            return lambda: model.learn(steps, reset_num_timesteps=False)

        yield (
            f"RecurrentPPO, CartPole, 8 environments, H {H}, steps a second",
            {
                "sb3-contrib": learner(lambda model: None),
                "replace alone": learner(lambda model: fastlstm.replace(model.policy)),
                "fastlstm": learner(fastlstm.integrations.sb3.accelerate),
            },
            steps,
        )


def keras() -> Iterator[tuple[str, Contenders, float]]:
    """Batches of a model of one layer and a linear one."""
    import keras
    import numpy as np

    T, B, I, H, batches = 28, 128, 28, 128, 50
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batches * B, T, I)).astype("float32"), rng.integers(0, 10, batches * B)
    for cls in (keras.layers.LSTM, keras.layers.GRU):
        model = keras.Sequential([keras.Input((T, I)), cls(H), keras.layers.Dense(10)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        calls = {
            "fit": lambda model=model: model.fit(x, y, batch_size=B, verbose=0),
            "predict": lambda model=model: model.predict(x, batch_size=B, verbose=0),
        }
        for name, call in calls.items():

            def enabled(call: Callable[[], object] = call) -> None:
                fastlstm.integrations.keras.enable()
                call()
                fastlstm.integrations.keras.disable()

            text = f"keras.layers.{cls.__name__}, T {T}, B {B}, I {I}, H {H}, {name}, batches a second"
            yield text, {"keras": call, "fastlstm": enabled}, batches


def torchrl() -> Iterator[tuple[str, Contenders, float]]:
    """Forward and backward passes of rollouts in which episodes begin."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    T, B, I, H = 128, 8, 16, 128
    data = TensorDict({"x": torch.randn(B, T, I), "is_init": torch.rand(B, T, 1) < 0.05}, (B, T))
    for cls in (LSTMModule, GRUModule):

        def gradients(change: Callable[[object], object], cls: type = cls, **options: str) -> Callable[[], object]:
            module = cls(input_size=I, hidden_size=H, in_key="x", out_key="y", **options)
            change(module)

            def call() -> None:
                with set_recurrent_mode(True):
                    output = module(data.clone())["y"]
                torch.autograd.grad(output.square().mean(), list(module.parameters()))

            return call

        contenders = {"torchrl (pad)": gradients(lambda module: None)}
        if find_spec("hoptorch") is not None:
            contenders["torchrl (scan)"] = gradients(lambda module: None, recurrent_backend="scan")
        contenders["fastlstm"] = gradients(fastlstm.integrations.torchrl.accelerate)
        yield f"{cls.__name__}, T {T}, B {B}, I {I}, H {H}, forward and backward passes a second", contenders, 1


LIBRARIES = {  # what is imported, what pip installs, and the cases
    "ppo": ("sb3_contrib", "sb3-contrib", ppo),
    "keras": ("keras", "keras", keras),
    "torchrl": ("torchrl", "torchrl", torchrl),
}


def seconds_of(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():  # compiles, and fills caches
        call()
    for n in range(rounds):
        for name in list(contenders)[:: 1 if n % 2 == 0 else -1]:
            time.sleep(SETTLE)
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.integrations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="as torch chooses")
    options = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"fastlstm {fastlstm.__version__}, torch {torch.__version__}, {options.threads} threads")
    for name in options.only:
        module, package, cases = LIBRARIES[name]
        if find_spec(module) is None:
            print(f"{name}: left out, since {package} is not installed")
            continue
        print(f"{package} {metadata.version(package)}")
        for text, contenders, amount in cases():
            times = seconds_of(contenders, options.rounds)
            alone = times[next(iter(times))]
            parts = []
            for contender, seconds in times.items():
                part = f"{contender} {amount / statistics.median(seconds):.0f}"
                if seconds is not alone:
                    ratios = [a / b for a, b in zip(alone, seconds)]
                    ratio = statistics.median(alone) / statistics.median(seconds)
                    part += f" ({ratio:.2f} times, {min(ratios):.2f} to {max(ratios):.2f})"
                parts.append(part)
            print(f"  {text}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
