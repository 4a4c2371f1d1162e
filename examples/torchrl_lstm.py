"""TorchRL's LSTMModule before and after one line: the same gradients of a rollout, in less time.

python examples/torchrl_lstm.py    # needs `pip install torchrl gymnasium`

A recurrent policy balances the pole of CartPole, and in its rollouts many episodes end and begin. The script takes the
policy gradient with TorchRL's own code, which cuts the rollouts into episodes and pads them, and again after
`accelerate`, with which they run as they are.
"""

import statistics
import time
from importlib.util import find_spec

import torch

import fastlstm.integrations.torchrl


def main(T: int = 128, B: int = 8, H: int = 128, rounds: int = 7) -> float:
    """Return by how much the gradients differ at most, relative to the largest of their tensor."""
    if find_spec("torchrl") is None or find_spec("gymnasium") is None:
        raise SystemExit("this example needs torchrl and gymnasium: pip install torchrl gymnasium")
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.envs import Compose, GymEnv, InitTracker, TransformedEnv
    from torchrl.modules import LSTMModule, ProbabilisticActor, set_recurrent_mode

    torch.manual_seed(0)
    lstm = LSTMModule(input_size=4, hidden_size=H, in_key="observation", out_key="hidden")
    head = TensorDictModule(torch.nn.Linear(H, 2), in_keys=["hidden"], out_keys=["logits"])
    network = TensorDictSequential(lstm, head)
    policy = ProbabilisticActor(network, in_keys=["logits"], distribution_class=torch.distributions.Categorical)
    poles = GymEnv("CartPole-v1", categorical_action_encoding=True)
    env = TransformedEnv(poles, Compose(InitTracker(), lstm.make_tensordict_primer()))
    env.set_seed(0)
    with torch.no_grad():  # an episode may end and another begin at any step
        data = torch.stack([env.rollout(T, policy, break_when_any_done=False) for _ in range(B)])
    returns, later = data["next", "reward"][..., 0].clone(), ~data["next", "done"][..., 0]
    for t in reversed(range(T - 1)):
        returns[:, t] += 0.99 * later[:, t] * returns[:, t + 1]
    print(f"{B} rollouts of {T} steps with {int(data['is_init'].sum())} episodes")

    def gradients() -> tuple[torch.Tensor, ...]:
        with set_recurrent_mode(True):
            logits = network(data.clone())["logits"]
        chosen = torch.distributions.Categorical(logits=logits).log_prob(data["action"])
        return torch.autograd.grad(-(chosen * returns).mean(), list(network.parameters()))

    results, times = {}, {"TorchRL": [], "fastlstm": []}
    for _ in range(rounds):
        for name, seconds in times.items():
            if name == "fastlstm":
                fastlstm.integrations.torchrl.accelerate(lstm)
            else:
                fastlstm.integrations.torchrl.restore(lstm)
            gradients()
            start = time.perf_counter()
            results[name] = gradients()
            seconds.append(time.perf_counter() - start)
    for name, seconds in times.items():
        print(f"{name}: {1000 * statistics.median(seconds):.1f} ms")
    pairs = zip(results["fastlstm"], results["TorchRL"])
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    print(f"gradients differ by {error:.1e} of the largest at most")
    return error


if __name__ == "__main__":
    main()
