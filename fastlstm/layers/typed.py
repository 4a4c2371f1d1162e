"""What type checkers have to know of modules."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

X = TypeVar("X", Tensor, PackedSequence)  # the output has the form of the input
States = TypeVar("States", Tensor, tuple[Tensor, Tensor])  # a GRU or an Elman network has one, an LSTM two
Method = TypeVar("Method", bound=Callable[..., Any])


def typed_as(method: Method) -> Callable[[Any], Method]:
    """Give a method that torch leaves untyped the type of another one."""
    return lambda _: method


if TYPE_CHECKING:
    from typing import Generic
else:

    class Generic:
        """Takes parameters as typing's own, which would keep `replace` from users' generic subclasses of modules."""

        def __class_getitem__(cls, parameters):
            return cls if cls.__module__.startswith("fastlstm.") else super().__class_getitem__(parameters)
