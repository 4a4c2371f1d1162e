"""The row-LSTM: the rows of an image are the time steps, the last state gives the class."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.layers.lstm import LSTM


class RowLSTM(nn.Module):
    """Images (B, rows, columns) to logits (B, classes): an LSTM over the pixels in order, then `nn.Linear` on h_n.

    Args:
        input_size: pixels in a time step: the columns of an image to read it by row, 1 to read it by pixel.
        hidden_size: units of the LSTM.
        num_classes: classes to tell apart.
        num_layers, bidirectional, proj_size: of the LSTM.
        dropout: probability of dropout on the output of each layer, the last state included.
        permuted: the number of pixels of an image, to read them in one random order, the same in every model;
            0 for their own.
        lstm_class: called as `lstm_class(input_size, hidden_size)`, with those of num_layers, bidirectional, proj_size
            and dropout that are not torch's defaults: `fastlstm.LSTM`, `torch.nn.LSTM`, or one's partial.
        generator: source of the initial weights, on the CPU; torch's own when None.
    """

    order: Tensor | None

    def __init__(
        self,
        input_size: int = 28,
        hidden_size: int = 128,
        num_classes: int = 10,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        proj_size: int = 0,
        dropout: float = 0.0,
        permuted: int = 0,
        lstm_class: Callable[..., nn.RNNBase] = LSTM,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "proj_size": proj_size,
            "dropout": dropout if num_layers > 1 else 0.0,  # torch warns where there is nothing between layers
        }
        changed = {name: value for name, value in options.items() if value != _TORCH_DEFAULTS[name]}
        self.lstm = lstm_class(input_size, hidden_size, **changed)
        self.dropout = dropout
        self.linear = nn.Linear((1 + bidirectional) * (proj_size or hidden_size), num_classes)
        order = torch.randperm(permuted, generator=torch.Generator().manual_seed(0)) if permuted else None
        self.register_buffer("order", order)
        self.reset_parameters(generator)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build a model with this one's state_dict."""
        lstm = self.lstm
        return {
            "input_size": lstm.input_size,
            "hidden_size": lstm.hidden_size,
            "num_classes": self.linear.out_features,
            "num_layers": lstm.num_layers,
            "bidirectional": lstm.bidirectional,
            "proj_size": lstm.proj_size,
            "dropout": self.dropout,
            "permuted": 0 if self.order is None else len(self.order),
        }

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the tutorial's initial weights: those of TensorFlow's BasicLSTMCell, and a standard normal output layer.

        TensorFlow holds both weights as one kernel of shape (I + H, 4H), which sets the limit of its Glorot-uniform
        (Glorot and Bengio, 2010), and adds the forget bias of 1 (Jozefowicz et al., 2015) at run time. Later
        layers, reverse directions and projections get theirs in the same way.
        """
        H = self.lstm.hidden_size
        for weight_ih, weight_hh, bias_ih, bias_hh, *projection in self.lstm.all_weights:
            limit = (6 / (weight_ih.shape[1] + weight_hh.shape[1] + 4 * H)) ** 0.5
            for weight in (weight_ih, weight_hh):
                nn.init.uniform_(weight, -limit, limit, generator=generator)
            nn.init.zeros_(bias_hh)
            nn.init.zeros_(bias_ih)[H : 2 * H] = 1  # the block of f
            for weight_hr in projection:
                nn.init.xavier_uniform_(weight_hr, generator=generator)
        for parameter in (self.linear.weight, self.linear.bias):
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(self._sequence(images))
        h = torch.cat((h_n[-2], h_n[-1]), 1) if self.lstm.bidirectional else h_n[-1]
        if self.dropout:
            h = nn.functional.dropout(h, self.dropout, self.training)
        return self.linear(h)

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Read images step by step, and return what the model holds after each step.

        Returns:
            The last layer's state (B, T, D*H_out), and the probability of each class were the reading to end there
            (B, T, classes).
        """
        output, _ = self.lstm(self._sequence(images))
        output = output.transpose(0, 1)
        return output, self.linear(output).softmax(-1)

    def _sequence(self, images: Tensor) -> Tensor:
        """Return images (B, rows, columns) as time steps (T, B, I), their pixels in `self.order` if there is one."""
        if self.order is not None:
            images = images.flatten(1)[:, self.order]
        return images.reshape(len(images), -1, self.lstm.input_size).transpose(0, 1)


class TorchLSTM(nn.LSTM):
    """`torch.nn.LSTM`, which raises under bf16 autocast where oneDNN has no bf16: there torch's own loop runs.

    The setting that makes it run is the whole process's: for one Python thread at a time.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") and lacks_bf16()):
            return super().forward(*args, **kwargs)
        with torch.backends.mkldnn.flags(False, None, None, None):  # only `enabled` changes
            return super().forward(*args, **kwargs)


@cache
def lacks_bf16() -> bool:
    """Return whether this processor lacks what oneDNN asks for to compute in bf16 (AVX-512, on x86)."""
    with torch.random.fork_rng(devices=[]):
        lstm = nn.LSTM(1, 1)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            lstm(torch.zeros(1, 1, 1))
    except RuntimeError:
        return True
    return False


_TORCH_DEFAULTS = {"num_layers": 1, "bidirectional": False, "proj_size": 0, "dropout": 0.0}
