"""What type checkers have to know of modules."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

X = TypeVar("X", Tensor, PackedSequence)  # the output has the form of the input
if TYPE_CHECKING:
    Method = TypeVar("Method", bound=Callable[..., Any])

    def typed_as(method: Method) -> Callable[[Any], Method]: ...
