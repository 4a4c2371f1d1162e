"""The gradients of weights, summed over the single steps of a loop while its backward pass runs.

Each step of a loop over a cell has a gradient of every weight, which autograd would write anew and add to the last. So
the weights go through one node, `Sums`, and steps take its result in their place: a *token*, a tensor of no elements.
The backward pass of the first step that runs leaves its gradients of weights with the node, and the others add theirs
to these in place. Autograd runs a node when all that follows from it has run, so the last node to run is `Sums`, which
returns what was left.

`Sums` saves no tensor, and so it serves any number of graphs and backward passes. What is left is kept by the number of
the pass: passes of other threads, inside this one or after a failure do not mix. Only the graphs of the steps hold a
token, so that the weights lose its node with them: `torch.nn.Module.to` may replace a Parameter that no graph holds.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm.torch_private import current_pass, plain_apply, when_compiling, will_run

of_token: Any = None  # the gradient of a token, which nobody reads


class Token:
    """What steps take in place of weights.

    Attributes:
        weights: the tensors that it stands for.
        needs: which of them require gradients.
        tensor: the result of the node.
        left: the gradients of the weights in each backward pass that is under way. Kernels may add to those in a list.
    """

    __slots__ = "__weakref__", "left", "needs", "tensor", "weights"

    def __init__(self, weights: tuple[Any, ...]) -> None:
        self.weights, self.left = weights, dict[int, Sequence[Any]]()
        self.needs = tuple([a is not None and a.requires_grad for a in weights])
        self.tensor: Tensor = _sums(self.left, *weights)

    def sums(self, ctx: Any) -> Sequence[Any] | None:
        """Return what other steps have left in this backward pass, none if this is the first, or None if the pass wants
        no gradients of the weights. `ctx`: of the step.
        """
        left = self.left.get(current_pass())
        return left if left is not None else () if will_run(ctx.next_functions[0][0]) else None

    def leave(self, gradients: tuple[Any, ...], is_written: bool) -> tuple[Any, ...]:
        """Leave the gradients of a step's weights to the node. Return the others, with None in their place.
        `is_written`: whether a kernel has written them, so that those of other steps can be added in place.
        """
        number, last = current_pass(), 1 + len(self.needs)
        own, left = gradients[1:last], self.left.get(number)
        if left is not None:
            own = tuple([a if b is None else b if a is None else a + b for a, b in zip(left, own)])
        self.left[number] = [*own] if is_written and left is None else own
        return gradients[0], *[None] * len(self.needs), *gradients[last:]


class Loop:
    """The steps of one layer. A token costs more than it saves where each backward pass has a single step.

    Attributes:
        steps: how many have run since the last backward pass.
        repeats: whether there were several before that pass.
        token: returns the latest, or None once no graph holds it.
    """

    __slots__ = "repeats", "steps", "token"

    def __init__(self) -> None:
        self.steps, self.repeats = 0, False
        self.token: Callable[[], Token | None] = lambda: None

    def end(self) -> None:
        """Begin to count anew, since a backward pass has begun."""
        self.repeats, self.steps = self.steps > 1, 0

    def enter(self, weights: tuple[Any, ...]) -> Token | None:
        """Return the token for the next step, or None if it should take the weights themselves."""
        self.steps += 1
        if self.steps == 1 and not self.repeats:
            return None
        token = self.token()
        is_new = token is None
        for a, b in zip(weights, weights if token is None else token.weights):
            if a is not None and a.grad_fn is not None:  # recorded operations have written to a Parameter
                return None
            is_new = is_new or a is not b
        if is_new:
            token = Token(weights)
            self.token = ref(token)
        return token


class Sums(Function):
    """The node of the weights. `args`: `Token.left`, and the weights."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.left, *weights = args
        ctx.count = len(weights)
        ctx.set_materialize_grads(False)
        return torch.empty(0, device="cpu")

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        return None, *ctx.left.pop(current_pass(), (None,) * ctx.count)


def _leave_frame() -> None:
    """Keep compiled autograd from tracing what steps have left. It adds the gradients of tokens, and fails at None."""
    global of_token
    of_token = torch.empty(0, device="cpu")
    Sums.backward = staticmethod(torch.compiler.disable(Sums.backward))  # type: ignore[method-assign]


when_compiling(_leave_frame)
_sums = plain_apply(Sums)
