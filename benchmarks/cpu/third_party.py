"""Models that others wrote, with recurrent layers in them: how each is built, without downloads, and called.

All tensors take torch's default dtype. A model is left as its package builds it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module], tuple[Tensor, ...]]  # the floating-point outputs of one call on fixed inputs


@dataclass(frozen=True)
class ThirdParty:
    package: str  # to be imported, and skipped without
    call: str  # sizes of the call
    build: Callable[[], tuple[nn.Module, Run]]
    keep_type: bool = False  # asks isinstance(..., torch.nn.LSTM) in its forward pass
    float32: bool = False  # casts its input to float32 itself


def of_class(path: str, inputs: Callable[[], Sequence[Any]], *sizes: Any, **options: Any) -> tuple[nn.Module, Run]:
    """Return a model of a class, and its call, of which the first output counts.

    Args:
        path: of the class, "module:name".
        inputs: returns the arguments of the call.
        sizes: with which the model is constructed, as with the options.
    """
    arguments, model = inputs(), resolve_name(path)(*sizes, **options).to(torch.get_default_dtype())

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        output = model(*arguments)
        return output[:1] if isinstance(output, tuple) else (output,)

    return model, run


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
    """Convolutions, then a bidirectional LSTM trained by CTC (CRNN), or LSTMCell with attention after an LSTM (SAR)."""
    import doctr.models

    words, labels = torch.rand(rows, 3, 32, 128), ["word", "recognition"] * (rows // 2)
    model = getattr(doctr.models, name)(pretrained=False, pretrained_backbone=False)
    return model, lambda model: itemgetter("out_map", "loss")(model(words, labels, return_model_output=True))


def darts(name: str) -> tuple[nn.Module, Run]:
    """One of torch's classes by its name, in a module that `RNNModel.fit` constructs; it predicts from a state, too."""
    from darts.models.forecasting.rnn_model import _RNNModule
    from darts.utils.data.torch_datasets.utils import ModuleStage, PLModuleInput

    B, T = 32, 48
    sizes = {"input_chunk_length": T, "output_chunk_length": 1, "train_sample_shape": None}
    model = _RNNModule(
        name, input_size=1, hidden_dim=25, num_layers=2, dropout=0.1, target_size=1, nr_params=1, **sizes
    )
    series, last = torch.randn(B, T, 1), torch.randn(B, 1, 1)

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        learned = model(PLModuleInput(past_target=series, stage=ModuleStage.TRAIN))
        after = model(PLModuleInput(past_target=last, state=learned.state, stage=ModuleStage.PREDICT))
        return learned.prediction, after.prediction

    return model, run


def of_dataset(name: str, **options: Any) -> tuple[nn.Module, Run]:
    """A model of pytorch-forecasting, as its dataset describes it.

    TemporalFusionTransformer has a subclass of nn.LSTM, of two bases and abstract, that takes sequences of length zero.
    In RecurrentNetwork the encoder's state is the start of a decoder of the same weights, by packed sequences.
    """
    import numpy as np
    import pandas as pd
    import pytorch_forecasting

    rng = np.random.default_rng(0)
    frame = pd.DataFrame([{"series": str(s), "t": t, "y": rng.normal()} for s in range(32) for t in range(80)])
    reals = [] if name == "RecurrentNetwork" else ["t"]
    columns = {"time_idx": "t", "time_varying_known_reals": reals, "time_varying_unknown_reals": ["y"]}
    lengths = {"min_encoder_length": 1 if name == "RecurrentNetwork" else 0, "max_encoder_length": 48}
    data = pytorch_forecasting.TimeSeriesDataSet(
        frame, target="y", group_ids=["series"], max_prediction_length=24, **columns, **lengths
    )
    model = getattr(pytorch_forecasting, name).from_dataset(data, hidden_size=32, dropout=0.1, **options)
    inputs, _ = next(iter(data.to_dataloader(train=True, batch_size=64, num_workers=0)))
    dtype = torch.get_default_dtype()
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype), lambda model: (model(inputs).prediction,)


def cuda_lstm() -> tuple[nn.Module, Run]:
    """A year of meteorology and the properties of basins; a forget bias is written through `.data`."""
    from neuralhydrology.modelzoo.cudalstm import CudaLSTM
    from neuralhydrology.utils.config import Config

    B, T, names = 8, 365, [f"x{k}" for k in range(5)]
    model = CudaLSTM(Config({
        "model": "cudalstm", "head": "regression", "output_activation": "linear", "hidden_size": 64,
        "initial_forget_bias": 3, "output_dropout": 0.4, "dynamic_inputs": names, "target_variables": ["q"],
        "static_attributes": ["area", "slope"], "seq_length": T, "predict_last_n": 1,
    }))  # fmt: skip
    data = {"x_d": {name: torch.randn(B, T, 1) for name in names}, "x_s": torch.randn(B, 2)}
    return model, lambda model: itemgetter("y_hat", "h_n", "c_n")(model(data))


def pyannet() -> tuple[nn.Module, Run]:
    """Who speaks when: four bidirectional layers over filters of the waveform."""
    from pyannote.audio.core.task import Problem, Resolution, Specifications
    from pyannote.audio.models.segmentation import PyanNet

    model = PyanNet(lstm={"num_layers": 4, "dropout": 0.1})
    classes = {"problem": Problem.MULTI_LABEL_CLASSIFICATION, "classes": ["a", "b", "c"]}
    model.specifications = Specifications(resolution=Resolution.FRAME, duration=2.0, **classes)
    model.build()
    waveforms = torch.randn(4, 1, 2 * 16000)
    return model.to(waveforms.dtype), lambda model: (model(waveforms),)


def crdnn(name: str) -> tuple[nn.Module, Run]:
    """Convolutions, then bidirectional layers, of which one packs its input, and a decoder of cells with attention."""
    import speechbrain.nnet.RNN
    from speechbrain.lobes.models.CRDNN import CRDNN

    B, T = 8, 60
    model = nn.ModuleDict({
        "encoder": CRDNN(
            input_shape=(B, T, 40), cnn_channels=(16, 16), rnn_class=getattr(speechbrain.nnet.RNN, name),
            rnn_layers=2, rnn_neurons=64, rnn_bidirectional=True, dnn_neurons=64,
        ),
        "layer": getattr(speechbrain.nnet.RNN, name)(64, input_size=64, bidirectional=True),
        "decoder": speechbrain.nnet.RNN.AttentionalRNNDecoder(
            rnn_type=name.lower(), attn_type="content", hidden_size=64, attn_dim=32, num_layers=2, enc_dim=128,
            input_size=16, dropout=0.1,
        ),
    })  # fmt: skip
    features, lengths, letters = torch.randn(B, T, 40), torch.linspace(0.4, 1, B), torch.randn(B, 6, 16)

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        encoded = model["encoder"](features)
        packed, _ = model["layer"](encoded, lengths=lengths)
        decoded, attention = model["decoder"](letters, packed, lengths)
        return encoded, packed, decoded, attention

    return model, run


def kraken() -> tuple[nn.Module, Run]:
    """Lines of text of different lengths: packed bidirectional layers, and one down the columns that is summarized."""
    from kraken.lib.vgsl import TorchVGSLModel

    B, W = 4, 200
    model = TorchVGSLModel(vgsl="[1,48,0,1 Cr3,3,16 Mp2,2 Cr3,3,16 Mp2,2 Lfys32 Lbx64 Do0.1,1 Lbx64 O1c59]").nn
    lines, lengths = torch.randn(B, 1, 48, W), torch.tensor([200, 180, 120, 60])
    return model, lambda model: (model(lines, lengths)[0],)


def transducer() -> tuple[nn.Module, Run]:
    """The prediction network of a speech transducer, of which a decoder calls one step at a time."""
    layers = {"embedding": nn.Embedding(1025, 640), "lstm": nn.LSTM(640, 640, batch_first=True)}
    label, state = torch.tensor([[5]]), (torch.randn(1, 1, 640), torch.randn(1, 1, 640))

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        h, states = model["lstm"](model["embedding"](label), state)
        return model["output"](h), *states

    return nn.ModuleDict({**layers, "output": nn.Linear(640, 640)}), run


def encodec() -> tuple[nn.Module, Run]:
    """The encoder of a codec: two LSTM layers after convolutions. transformers chooses weights by class."""
    from transformers import EncodecConfig, EncodecModel

    sound = torch.randn(2, 1, 12000)
    return EncodecModel(EncodecConfig()).encoder, lambda model: (model(sound),)


def gru4rec() -> tuple[nn.Module, Run]:
    """Items of a session into a GRU, whose output after the last one counts. RecBole chooses weights by class."""
    from recbole.model.sequential_recommender.gru4rec import GRU4Rec

    B, T, items = 64, 50, 1000
    fields = {"USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "ITEM_LIST_LENGTH_FIELD": "length"}
    fields |= {"LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": T, "device": "cpu"}
    sizes = {"embedding_size": 64, "hidden_size": 128, "num_layers": 1, "dropout_prob": 0.3, "loss_type": "CE"}
    model = GRU4Rec({**fields, **sizes}, mock.Mock(num=lambda field: items))
    sessions, lengths = torch.randint(1, items, (B, T)), torch.randint(1, T + 1, (B,))
    return model, lambda model: (model(sessions, lengths),)


def robomimic(B: int, T: int) -> tuple[nn.Module, Run]:
    """The network of a robot's policy, which learns from sequences and acts in steps of one row."""
    from robomimic.models.base_nets import RNN_Base

    x = torch.randn(B, T, 20)
    model = RNN_Base(20, 400, 2)
    state = model.get_rnn_init_state(B, "cpu")
    return model, lambda model: model(x, state, return_state=True)[:1]


def _deep_filter_net() -> tuple[Any, Any]:
    """Return the package's modules of models and of layers. It reads files by names that torchaudio has no longer."""
    names = ("torchaudio", "torchaudio.backend", "torchaudio.compliance")
    absent = {name: mock.MagicMock() for name in (*names, f"{names[1]}.common", f"{names[2]}.kaldi")}
    if "df" not in sys.modules:
        there = {name: sys.modules.pop(name) for name in absent if name in sys.modules}
        sys.modules.update(absent)
        import df.enhance  # noqa: F401

        for name in absent:
            del sys.modules[name]
        sys.modules.update(there)
    from df import model, modules
    from df.config import config

    config.use_defaults(allow_reload=True)
    return model, modules


def deep_filter_net() -> tuple[nn.Module, Run]:
    """Grouped GRUs between convolutions: two seconds of noisy speech, as features and spectra of 200 frames."""
    features = torch.randn(1, 1, 200, 481, 2), torch.randn(1, 1, 200, 32), torch.randn(1, 1, 200, 96, 2)
    return _deep_filter_net()[0].init_model(), lambda model: model(*features)[:1]


def grouped_gru() -> tuple[nn.Module, Run]:
    """Three layers of eight GRUs each, of which every one sees a part of the features."""
    x = torch.randn(1, 200, 512)
    return _deep_filter_net()[1].GroupedGRU(512, 512, 3, 8, batch_first=True, shuffle=True), lambda model: model(x)


def windows() -> list[dict[str, Any]]:
    return [{"insample_y": torch.randn(128, 48, 1), "futr_exog": None, "hist_exog": None, "stat_exog": None}]


def molecules() -> tuple[Tensor, ...]:
    """Atoms, edges and bonds of graphs, and the molecule of each atom."""
    return torch.randn(1600, 39), torch.randint(1600, (2, 3400)), torch.randn(3400, 10), torch.arange(1600) // 25


SERIES = "B 64, T 48 + 24, H 32, 2 layers"
MODELS = {
    # Convolutions around a bidirectional LSTM of two layers, and smaller ones within, fed in overlapping chunks
    "Demucs": ThirdParty(
        "demucs", "2 x 0.5 s of stereo",
        partial(of_class, "demucs.demucs:Demucs", lambda: [torch.randn(2, 2, 44100 // 2)],
                ["drums", "bass", "other", "vocals"], channels=16, lstm_layers=2, depth=5, dconv_lstm=3),
    ),
    "DeepAR": ThirdParty("gluonts", "B 32, T 71, H 40, 2 layers", deepar),
    "TemporalFusionTransformer": ThirdParty(
        "pytorch_forecasting", SERIES, partial(of_dataset, "TemporalFusionTransformer", lstm_layers=2)
    ),
    "RecurrentPPO's policy": ThirdParty("sb3_contrib", "B 8, T 64, H 256", recurrent_ppo, float32=True),
    "LSTMModule": ThirdParty("torchrl", "B 8, T 64, H 128", torchrl_lstm, keep_type=True),
    # With the trained weights that the package contains
    "VoiceEncoder": ThirdParty(
        "resemblyzer", "B 16, T 160, H 256, 3 layers",
        partial(of_class, "resemblyzer:VoiceEncoder", lambda: [torch.rand(16, 160, 40)], "cpu", verbose=False),
    ),
    "Seq2SeqModel": ThirdParty("stanza", "B 50, T 16, H 200", stanza_seq2seq),
    "CRNN": ThirdParty("doctr", "B 4, T 32, H 128, 2 layers, both directions", partial(doctr, "crnn_vgg16_bn", 4)),
    "SAR": ThirdParty("doctr", "B 2, H 512, 2 layers, then 33 cells", partial(doctr, "sar_resnet31", 2)),
    **{
        f"neuralforecast's {cell}": ThirdParty(  # an encoder of two layers, and a decoder of its last states
            "neuralforecast", "B 128, T 48, H 64, 2 layers",
            partial(of_class, f"neuralforecast.models:{cell}", windows, h=12, input_size=48, encoder_hidden_size=64,
                    encoder_dropout=0.1),
        )
        for cell in ("LSTM", "GRU")
    },
    **{
        f"RNNModel, {cell}": ThirdParty("darts", "B 32, T 48, H 25, 2 layers", partial(darts, cell))
        for cell in ("LSTM", "GRU", "RNN")
    },
    **{
        f"RecurrentNetwork, {cell}": ThirdParty(
            "pytorch_forecasting", SERIES, partial(of_dataset, "RecurrentNetwork", cell_type=cell, rnn_layers=2)
        )
        for cell in ("LSTM", "GRU")
    },
    "CudaLSTM": ThirdParty("neuralhydrology", "B 8, T 365, H 64", cuda_lstm),
    "PyanNet": ThirdParty("pyannote", "B 4, 2 s, H 128, 4 layers", pyannet),
    **{
        f"CRDNN, {cell}": ThirdParty("speechbrain", "B 8, T 60, H 64, 3 layers, then 6 cells", partial(crdnn, cell))
        for cell in ("LSTM", "GRU")
    },
    # Two voices apart: bidirectional layers along short pieces of the waveform, and across the pieces
    "DPRNNTasNet": ThirdParty(
        "asteroid", "B 2, 0.5 s, H 64",
        partial(of_class, "asteroid.models:DPRNNTasNet", lambda: [torch.randn(2, 4000)],
                2, n_filters=32, bn_chan=32, hid_size=64, n_repeats=2, chunk_size=60),
    ),
    "kraken's layers": ThirdParty("kraken", "B 4, W 200, H 64, 3 layers", kraken),
    "DeepFilterNet3": ThirdParty("libdf", "B 1, 2 s, H 256, 5 layers", deep_filter_net),
    "GroupedGRU": ThirdParty("libdf", "B 1, T 200, H 512, 3 layers of 8 groups", grouped_gru),
    "prediction network": ThirdParty("torch", "one step of one label, H 640", transducer),
    "EncodecModel": ThirdParty("transformers", "B 2, 0.5 s, H 512, 2 layers", encodec),
    "GRU4Rec": ThirdParty("recbole", "B 64, T 50, H 128", gru4rec),
    # Convolutions around two LSTM layers that see the past alone, so that speech can be cleaned as it comes
    "denoiser": ThirdParty(
        "denoiser", "B 1, 1 s, H 768, 2 layers",
        partial(of_class, "denoiser.demucs:Demucs", lambda: [torch.randn(1, 1, 16000)], hidden=48),
    ),
    # An encoder of packed bidirectional layers of speech recognition
    "RNNEncoder": ThirdParty(
        "espnet2", "B 4, T 100, H 128, 3 layers, both directions",
        partial(of_class, "espnet2.asr.encoder.rnn_encoder:RNNEncoder",
                lambda: [torch.randn(4, 100, 80), torch.tensor([100, 90, 60, 30])],
                80, num_layers=3, hidden_size=128, output_size=128, subsample=None),
    ),
    "RNN_Base": ThirdParty("robomimic", "B 16, T 10, H 400, 2 layers", partial(robomimic, 16, 10)),
    "RNN_Base, a step": ThirdParty("robomimic", "B 1, H 400, 2 layers", partial(robomimic, 1, 1)),
    # Molecules as graphs, with GRU cells between attention over neighbours
    "AttentiveFP": ThirdParty(
        "torch_geometric", "1600 atoms, H 200, 4 cells",
        partial(of_class, "torch_geometric.nn.models:AttentiveFP", molecules, 39, 200, 1, 10, 3, 2),
    ),
    # Three bidirectional layers over spectrograms, time first
    "OpenUnmix": ThirdParty(
        "openunmix", "B 4, T 100, H 64, 3 layers",
        partial(of_class, "openunmix.model:OpenUnmix", lambda: [torch.rand(4, 2, 257, 100)],
                nb_bins=257, nb_channels=2, hidden_size=128, nb_layers=3),
    ),
}  # fmt: skip
