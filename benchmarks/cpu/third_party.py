"""Models that others wrote and published, with an LSTM in them: how each is built, without downloads, and called.

All tensors take torch's default dtype. A model is left as its package builds it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module], tuple[Tensor, ...]]  # the floating-point outputs of one call on fixed inputs


@dataclass(frozen=True)
class ThirdParty:
    package: str  # to be imported, and skipped without
    task: str
    call: str  # sizes of the call
    build: Callable[[], tuple[nn.Module, Run]]
    keep_type: bool = False  # asks isinstance(..., torch.nn.LSTM) in its forward pass
    float32: bool = False  # casts its input to float32 itself


def demucs() -> tuple[nn.Module, Run]:
    """Convolutions around a bidirectional LSTM of two layers, and smaller ones within, fed in overlapping chunks."""
    from demucs.demucs import Demucs

    mixture = torch.randn(2, 2, 44100 // 2)
    model = Demucs(["drums", "bass", "other", "vocals"], channels=16, lstm_layers=2, depth=5, dconv_lstm=3)
    return model, lambda model: (model(mixture),)


def deepar() -> tuple[nn.Module, Run]:
    """Two layers with dropout over lagged targets and time features; the loss is a likelihood."""
    from gluonts.torch.model.deepar.module import DeepARModel

    B, context, future = 32, 48, 24
    model = DeepARModel("h", context, future, num_feat_dynamic_real=4, cardinality=[10])
    inputs = {"feat_static_cat": torch.randint(10, (B, 1)), "feat_static_real": torch.randn(B, 1)}
    for name, T in (("past", model._past_length), ("future", future)):
        inputs |= {f"{name}_time_feat": torch.randn(B, T, 4), f"{name}_target": torch.rand(B, T)}
        inputs[f"{name}_observed_values"] = torch.ones(B, T)
    return model, lambda model: (model.loss(**inputs),)


def temporal_fusion_transformer() -> tuple[nn.Module, Run]:
    """Encoder and decoder are a subclass of nn.LSTM, of two bases and abstract, that takes sequences of length zero."""
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    rng = np.random.default_rng(0)
    frame = pd.DataFrame([{"series": str(s), "t": t, "y": rng.normal()} for s in range(32) for t in range(80)])
    columns = {"time_idx": "t", "time_varying_known_reals": ["t"], "time_varying_unknown_reals": ["y"]}
    lengths = {"min_encoder_length": 0, "max_encoder_length": 48, "max_prediction_length": 24}
    data = TimeSeriesDataSet(frame, target="y", group_ids=["series"], **columns, **lengths)
    model = TemporalFusionTransformer.from_dataset(data, hidden_size=32, lstm_layers=2, dropout=0.1)
    inputs, _ = next(iter(data.to_dataloader(train=True, batch_size=64, num_workers=0)))
    dtype = torch.get_default_dtype()
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype), lambda model: (model(inputs).prediction,)


def recurrent_ppo() -> tuple[nn.Module, Run]:
    """Two LSTMs, called step by step where an episode ends within the sequence."""
    from gymnasium import spaces
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    B, T = 8, 64
    model = RecurrentActorCriticPolicy(spaces.Box(-1, 1, (24,)), spaces.Discrete(4), lambda _: 3e-4)
    observations, actions = torch.randn(B * T, 24), torch.randint(4, (B * T,))
    starts = (torch.rand(B, T) < 0.02).float().flatten()
    states = RNNStates(*((torch.randn(1, B, 256), torch.randn(1, B, 256)) for _ in range(2)))
    return model, lambda model: model.evaluate_actions(observations, actions, states, starts)


def torchrl_lstm() -> tuple[nn.Module, Run]:
    """Trajectories of several episodes, split, packed and put together again."""
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    B, T = 8, 64
    model = LSTMModule(24, 128, num_layers=1, in_key="observation", out_key="embed")
    starts = torch.rand(B, T, 1) < 0.05
    starts[:, 0] = True
    observations = torch.randn(B, T, 24)
    zeros = torch.zeros(B, T, 1, 128)

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        batch = {"observation": observations, "is_init": starts}
        batch |= {"recurrent_state_h": zeros, "recurrent_state_c": zeros}
        with set_recurrent_mode(True):
            out = model(TensorDict(batch, [B, T]))
        return out["embed"], out["next", "recurrent_state_h"], out["next", "recurrent_state_c"]

    return model, run


def voice_encoder() -> tuple[nn.Module, Run]:
    """Three layers, with the trained weights that the package contains."""
    from resemblyzer import VoiceEncoder

    frames = torch.rand(16, 160, 40)
    model = VoiceEncoder("cpu", verbose=False).to(frames.dtype)
    return model, lambda model: (model(frames),)


def stanza_seq2seq() -> tuple[nn.Module, Run]:
    """A lemmatiser: packed characters into a bidirectional LSTM with dropout, LSTMCell with attention out of it."""
    from stanza.models.common.seq2seq_model import Seq2SeqModel

    B, T, vocabulary = 50, 16, 80
    sizes = {"vocab_size": vocabulary, "emb_dim": 50, "hidden_dim": 200, "num_layers": 2}
    model = Seq2SeqModel({**sizes, "dropout": 0.3, "emb_dropout": 0.2, "max_dec_len": 50, "attn_type": "soft"})
    source, target = torch.randint(4, vocabulary, (B, T)), torch.randint(4, vocabulary, (B, T))
    lengths = torch.randint(4, T + 1, (B,)).sort(descending=True).values
    lengths[0] = T
    padding = torch.arange(T) >= lengths.unsqueeze(1)
    source = source.masked_fill(padding, 0)
    return model, lambda model: (model(source, padding, target)[0],)


def doctr(name: str, rows: int) -> tuple[nn.Module, Run]:
    import doctr.models

    words = torch.rand(rows, 3, 32, 128)
    model = getattr(doctr.models, name)(pretrained=False, pretrained_backbone=False)
    labels = ["word", "recognition"] * (rows // 2)

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        out = model(words, labels, return_model_output=True)
        return out["out_map"], out["loss"]

    return model, run


def crnn() -> tuple[nn.Module, Run]:
    """Columns of convolutional features into a bidirectional LSTM of two layers, trained by CTC."""
    return doctr("crnn_vgg16_bn", 4)


def sar() -> tuple[nn.Module, Run]:
    """An LSTM of two layers, then LSTMCell with attention, letter by letter."""
    return doctr("sar_resnet31", 2)


MODELS = {
    "Demucs": ThirdParty("demucs", "music separation", "2 x 0.5 s of stereo", demucs),
    "DeepAR": ThirdParty("gluonts", "forecasting", "B 32, T 71, H 40, 2 layers", deepar),
    "TemporalFusionTransformer": ThirdParty(
        "pytorch_forecasting", "forecasting", "B 64, T 48 + 24, H 32, 2 layers", temporal_fusion_transformer
    ),
    "RecurrentPPO's policy": ThirdParty(
        "sb3_contrib", "reinforcement learning", "B 8, T 64, H 256", recurrent_ppo, float32=True
    ),
    "LSTMModule": ThirdParty("torchrl", "reinforcement learning", "B 8, T 64, H 128", torchrl_lstm, keep_type=True),
    "VoiceEncoder": ThirdParty("resemblyzer", "speaker recognition", "B 16, T 160, H 256, 3 layers", voice_encoder),
    "Seq2SeqModel": ThirdParty("stanza", "lemmatisation", "B 50, T 16, H 200", stanza_seq2seq),
    "CRNN": ThirdParty("doctr", "text recognition", "B 4, T 32, H 128, 2 layers, both directions", crnn),
    "SAR": ThirdParty("doctr", "text recognition", "B 2, H 512, 2 layers, then 33 cells", sar),
}
