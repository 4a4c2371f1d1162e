"""Dropout of recurrent weights."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.layers import checks


class WeightDrop(nn.Module):
    """A parametrization that drops single weights, with one mask for all steps of a call:

        lstm = fastlstm.LSTM(3, 5)
        parametrize.register_parametrization(lstm, "weight_hh_l0", fastlstm.WeightDrop(0.5))

    In training mode each call of the module draws a new mask: a weight is zero with probability p, and otherwise
    divided by 1 - p. In eval mode the weight is as it is. It serves every module of fastlstm and of torch, and every
    weight; a module with several layers needs one for each ``weight_hh_l{k}``. The weight itself is then
    ``lstm.parametrizations.weight_hh_l0.original``, which is what is trained and saved.

    Args:
        p: the probability, from 0 to 1.

    Raises:
        TypeError, ValueError: for what is no number, and for a number that is no probability.

    Source: Merity, Keskar and Socher, Regularizing and optimizing LSTM language models, 2018, after the DropConnect of
    Wan et al., 2013. Equivalent to `torch.nn.functional.dropout` of the weight before each call.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        checks.check_probability("p", p)
        self.p = p

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight`, of any shape, with its mask."""
        return F.dropout(weight, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
