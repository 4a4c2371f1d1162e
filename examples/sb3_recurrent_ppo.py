"""RecurrentPPO of sb3-contrib before and after one line: the same rewards for the same seed, in less time.

python examples/sb3_recurrent_ppo.py    # needs `pip install sb3-contrib`

The poles of CartPole are to be balanced without the velocities, so that the policy needs memory. Two models learn
from the same seed, and one of them is accelerated before. The script prints how long their episodes are, and the
steps that all environments make in a second of `learn`, acting and learning together.
"""

import time
from importlib.util import find_spec

import fastlstm.integrations.sb3


def learn(steps: int, accelerated: bool) -> tuple[list[float], float]:
    """Return the lengths of the episodes, and the seconds that a model learns."""
    import gymnasium
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    class WithoutVelocities(gymnasium.ObservationWrapper):
        def observation(self, observation):
            return observation * [1, 0, 1, 0]

    environments = make_vec_env("CartPole-v1", n_envs=8, seed=0, wrapper_class=WithoutVelocities)
    options = {"batch_size": 256, "learning_rate": 1e-3, "seed": 0, "device": "cpu", "stats_window_size": 10**6}
    model = RecurrentPPO("MlpLstmPolicy", environments, policy_kwargs={"lstm_hidden_size": 64}, **options)
    if accelerated:
        fastlstm.integrations.sb3.accelerate(model)
    start = time.perf_counter()
    model.learn(steps)
    return [info["l"] for info in model.ep_info_buffer], time.perf_counter() - start


def main(steps: int = 8192) -> tuple[list[float], list[float]]:
    """Return the lengths of the episodes of both models."""
    if find_spec("sb3_contrib") is None:
        raise SystemExit("this example needs sb3-contrib: pip install sb3-contrib")
    learn(1024, True)  # compiles kernels
    results = {name: learn(steps, name == "fastlstm") for name in ("sb3-contrib", "fastlstm")}
    for name, (lengths, seconds) in results.items():
        tenth = max(1, len(lengths) // 10)
        first, last = (sum(part) / tenth for part in (lengths[:tenth], lengths[-tenth:]))
        speed = f"{steps / seconds:.0f} steps a second"
        print(f"{name}: episodes of {first:.0f} steps at first and {last:.0f} at last, {speed}")
    (theirs, _), (ours, _) = results.values()
    same = next((n for n, (a, b) in enumerate(zip(theirs, ours)) if a != b), len(theirs))
    print(f"the first {same} of {len(theirs)} episodes are equally long")
    return theirs, ours


if __name__ == "__main__":
    main()
