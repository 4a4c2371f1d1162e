"""The row-LSTM: the rows of an image are the time steps, the last state gives the class."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlstm.module import LSTM


class RowLSTM(nn.Module):
    """Images (B, rows, columns) to logits (B, classes): an LSTM over the rows, then `nn.Linear` on h_n.

    Args:
        input_size: columns of an image, the width of a time step.
        hidden_size: units of the LSTM.
        num_classes: classes to tell apart.
        lstm_class: called as `lstm_class(input_size, hidden_size)`: `fastlstm.LSTM`, `torch.nn.LSTM`, or one's partial.
        generator: source of the initial weights, on the CPU; torch's own when None.
    """

    def __init__(
        self,
        input_size: int = 28,
        hidden_size: int = 128,
        num_classes: int = 10,
        *,
        lstm_class: Callable[[int, int], nn.RNNBase] = LSTM,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.lstm = lstm_class(input_size, hidden_size)
        self.linear = nn.Linear(hidden_size, num_classes)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The tutorial's initial weights: those of TensorFlow's BasicLSTMCell, and a standard normal output layer.

        TensorFlow holds both weights as one kernel of shape (I + H, 4H), which sets the limit of its Glorot-uniform
        (Glorot and Bengio, 2010), and adds the forget bias of 1 (Jozefowicz et al., 2015) at run time.
        """
        H = self.lstm.hidden_size
        limit = (6 / (self.lstm.input_size + H + 4 * H)) ** 0.5
        weight_ih, weight_hh, bias_ih, bias_hh = self.lstm.all_weights[0]
        for weight in (weight_ih, weight_hh):
            nn.init.uniform_(weight, -limit, limit, generator=generator)
        nn.init.zeros_(bias_hh)
        nn.init.zeros_(bias_ih)[H : 2 * H] = 1  # the block of f
        for parameter in (self.linear.weight, self.linear.bias):
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(images.transpose(0, 1))  # (T, B, I)
        return self.linear(h_n[-1])
