"""The row-LSTM: the rows of an image are the time steps, the last state gives the class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.layers.lstm import LSTM


class RowLSTM(nn.Module):
    """Images (B, rows, columns) to logits (B, classes): an LSTM over the pixels in order, then `nn.Linear` on h_n.

    Args:
        input_size: pixels in a time step: the columns of an image to read it by row, 1 to read it by pixel.
        hidden_size, num_layers, bidirectional: of the LSTM.
        num_classes: classes to tell apart.
        dropout: probability of dropout on the output of each layer, the last state included.
        lstm_class: `fastlstm.LSTM`, `torch.nn.LSTM`, or a `functools.partial` of one.
        generator: source of the initial weights, on the CPU; torch's own when None.
    """

    def __init__(
        self,
        input_size: int = 28,
        hidden_size: int = 128,
        num_classes: int = 10,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        lstm_class: Callable[..., nn.RNNBase] = LSTM,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {"num_layers": num_layers, "bidirectional": bidirectional, "dropout": dropout}
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_classes": num_classes}
        self.config = {**sizes, **options}  # the arguments that build a model with this one's state_dict
        if num_layers == 1:
            options["dropout"] = 0.0  # torch warns where there is nothing between layers
        self.lstm = lstm_class(input_size, hidden_size, **options)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear((2 if bidirectional else 1) * hidden_size, num_classes)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the tutorial's initial weights: those of TensorFlow's BasicLSTMCell, and a standard normal output layer.

        TensorFlow holds both weights as one kernel of shape (I + H, 4H), which sets the limit of its Glorot-uniform
        (Glorot and Bengio, 2010), and adds the forget bias of 1 (Jozefowicz et al., 2015) at run time. Later
        layers and reverse directions get theirs in the same way.
        """
        H = self.lstm.hidden_size
        for weight_ih, weight_hh, bias_ih, bias_hh in self.lstm.all_weights:
            limit = (6 / (weight_ih.shape[1] + H + 4 * H)) ** 0.5
            for weight in (weight_ih, weight_hh):
                nn.init.uniform_(weight, -limit, limit, generator=generator)
            nn.init.zeros_(bias_hh)
            nn.init.zeros_(bias_ih)[H : 2 * H] = 1  # the block of f
        for parameter in (self.linear.weight, self.linear.bias):
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(self._sequence(images))
        h = torch.cat((h_n[-2], h_n[-1]), 1) if self.lstm.bidirectional else h_n[-1]
        return self.linear(self.dropout(h))

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's state after each step (B, T, D*H), and the probability of each class were the reading
        to end there (B, T, classes).
        """
        output, _ = self.lstm(self._sequence(images))
        output = output.transpose(0, 1)
        return output, self.linear(output).softmax(-1)

    def _sequence(self, images: Tensor) -> Tensor:
        """Return images (B, rows, columns) as time steps (T, B, I)."""
        return images.reshape(len(images), -1, self.lstm.input_size).transpose(0, 1)
