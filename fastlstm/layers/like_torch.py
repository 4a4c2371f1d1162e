"""The methods of the layers that have a counterpart in torch."""

from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm.layers.modules import OWN, warn_of_regularizers, with_class
from fastlstm.layers.packing import Lengths, Resets
from fastlstm.layers.recurrent import Recurrent
from fastlstm.layers.typed import Generic, States, typed_as

Own = TypeVar("Own", bound="InPlaceOf[Any]")
Theirs = TypeVar("Theirs", bound=nn.RNNBase)


class LikeTorch(Recurrent, Generic[States]):
    """A `Recurrent` that is called as torch's modules are."""

    @overload
    def forward(
        self, input: Tensor, hx: States | None = None, *, reset: Resets | None = None, lengths: Lengths | None = None
    ) -> tuple[Tensor, States]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None, *, reset: None = None, lengths: None = None
    ) -> tuple[PackedSequence, States]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: States | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Any, States]:
        """Run all layers over whole sequences.

        Args:
            input, reset, lengths: as in `fastlstm.LSTM.forward`, which says what each may be.
            hx: ``h_0`` (D*L, B, H), without B for one sequence alone; None for zeros. An LSTM takes ``(h_0, c_0)``.

        Returns:
            output (T, B, D*H) of the last layer in the form of `input`, and ``h_n`` of the size of `hx`. An LSTM
            returns ``(h_n, c_n)`` in its place.

        Raises what `fastlstm.LSTM.forward` raises. Equivalent to the `forward` of torch's module, but for the rounding
        of int8 modules.
        """
        output, last = self._forward(input, hx, reset, lengths)
        return output, last

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def step(self, x_t: Tensor, state: States | None = None) -> tuple[Tensor, States]:
        """Run one time step through all layers, for streaming. Modules of one direction only.

        Args:
            x_t: (B, I), or (I,) for one sequence alone.
            state: h (L, B, H), without B for one sequence alone; None for zeros. An LSTM takes ``(h, c)``. With a
                projection its h is (L, B, P).

        Returns:
            h_t (B, H) of the last layer, or (B, P), and the new state, in the form of `state`.

        Raises:
            ValueError: for a bidirectional module, and for the number of dimensions or dtype of `x_t`.
            TypeError: if `x_t` is no tensor, or `state` has not the form of states.
            RuntimeError: for other sizes, dtypes and devices, as in `forward`; for recurrent_dropout in training mode.

        Equivalent to `forward` with T = 1. Hooks belong to calls of the module, so that they do not run, as with
        `forward` itself. The exceptions are hooks of `torch.nn.utils` that compute weights: those of `prune`,
        `weight_norm` and `spectral_norm` run first.
        """
        return self._step(x_t, state)


class InPlaceOf(Recurrent, Generic[Theirs]):
    """A `Recurrent` that can be made of torch's module, and back."""

    _theirs: type[Theirs]

    @classmethod
    def from_torch(cls: type[Own], module: Theirs) -> Own:
        """Return a layer with the arguments, mode, hooks and the very parameters of `module`, which stays as it is.

        Raises:
            TypeError: if `module` is not of torch's plain class of the same kind: `torch.nn.LSTM`, `torch.nn.GRU`, and
                `torch.nn.RNN` for an `Elman`. `fastlstm.replace` takes subclasses and parametrized modules.
        """
        new: Own = with_class(module, cls._theirs, cls)
        vars(new).pop("_flat_weights")  # here it is a property
        return new

    def to_torch(self) -> Theirs:
        """Return torch's module with the arguments, mode, hooks and the very parameters of this one.

        Raises:
            TypeError: if this module is parametrized or of a subclass, which `fastlstm.restore` takes; for the stacked
                modules of a `fastlstm.Ensemble`.
        """
        if self._is_stacked:
            raise TypeError(
                "to_torch needs a single module, and this one has the weights of all modules of an Ensemble"
            )
        ours = next(cls for cls in type(self).__mro__ if "_theirs" in vars(cls))
        new: Theirs = with_class(self, ours, self._theirs)
        warn_of_regularizers(self, 2)
        for name in OWN:
            vars(new).pop(name, None)
        new._init_flat_weights()
        return new
