"""The gradients of weights, summed over the single steps of a loop while its backward pass runs.

Each step of a loop over a cell has a gradient of every weight, which autograd would write anew and add to the last. So
the weights go through one node, `Sums`, and steps take its result in their place: a *token*, a tensor without numbers
of its own. The backward pass of the first step that runs leaves its gradients of weights with the node, and the others
add theirs to these in place. Autograd runs a node when all that follows from it has run, so the last node to run is
`Sums`, which returns what was left. Gradients that will be differentiated are never left: they are the gradient of the
token, which autograd adds, so that no graph is held by what a failed pass leaves.

`Sums` saves no tensor, and so it serves any number of backward passes. What is left is kept by the number of the pass:
passes of other threads, inside this one or after a failure do not mix. Only the graphs of the steps hold a token, so
that the weights lose its node with them: `torch.nn.Module.to` may replace a Parameter that no graph holds. Once a pass
has begun, the next steps get a token of their own. `torch.distributed` acts on a module's gradients when those of its
inputs are there, so the node runs as early as it can: before the nodes of what came before the loop's first step.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm.torch_private import current_pass, plain_apply, set_rank, when_compiling, will_run


class Token:
    """What steps take in place of weights.

    Attributes:
        weights: the tensors that it stands for.
        needs: which of them require gradients.
        tensor: the result of the node, with an element for each of the weights', and memory for one.
        left: the gradients of the weights in each backward pass that is under way. Kernels may add to those in a list.
    """

    __slots__ = "__weakref__", "left", "needs", "tensor", "weights"

    def __init__(self, weights: tuple[Any, ...]) -> None:
        self.weights, self.left = weights, dict[int, Sequence[Any]]()
        self.needs = tuple([a is not None and a.requires_grad for a in weights])
        self.tensor: Tensor = _sums(self.left, *weights)
        set_rank(self.tensor.grad_fn, 2**64 - 1)  # it runs before all that are ready

    def sums(self, ctx: Any) -> Sequence[Any] | None:
        """Return what other steps have left in this backward pass, none if this is the first, or None if the pass wants
        no gradients of the weights. `ctx`: of the step.
        """
        left = self.left.get(current_pass())
        if left is not None:
            return left
        # in a distributed pass torch knows of no node that will run, not even of this one
        return () if will_run(ctx.next_functions[0][0]) or not will_run(ctx) else None

    def leave(self, gradients: tuple[Any, ...], is_eager: bool) -> tuple[Any, ...]:
        """Return the gradients of a step with None for those of the weights, after that of the token. It is None where
        those of the weights are left to the node, and else they are joined in it. `is_eager`: whether nothing that
        follows reads the gradients' graph.
        """
        number, last = current_pass(), 1 + len(self.needs)
        own, others = gradients[1:last], (*[None] * len(self.needs), *gradients[last:])
        if not is_eager:
            pairs = [(a, g) for a, g, need in zip(self.weights, own, self.needs) if need]
            joined = torch.cat([(torch.zeros_like(a) if g is None else g).reshape(a.numel()) for a, g in pairs])
            return joined, gradients[0], *others
        if (left := self.left.get(number)) is None:
            self.left[number] = [*own]  # to which kernels of other steps may add
        else:
            self.left[number] = tuple([a if b is None else b if a is None else a + b for a, b in zip(left, own)])
        return None, gradients[0], *others


class Loop:
    """The steps of one layer. A token costs more than it saves where each backward pass has a single step.

    Attributes:
        steps: how many have run since the last backward pass.
        repeats: whether there were several before that pass.
        token: returns the latest, or None once no graph holds it. None if there was none since the last backward pass.
    """

    __slots__ = "repeats", "steps", "token"

    def __init__(self) -> None:
        self.steps, self.repeats = 0, False
        self.token: Callable[[], Token | None] | None = None

    def end(self) -> None:
        """Begin to count anew, since a backward pass has begun."""
        self.repeats, self.steps, self.token = self.steps > 1, 0, None

    def enter(self, weights: tuple[Any, ...]) -> Token | None:
        """Return the token for the next step, or None if it should take the weights themselves."""
        self.steps += 1
        if self.steps == 1 and not self.repeats:
            return None
        token = None if self.token is None else self.token()
        if token is None and self.token is not None:  # graphs go without a pass, such as those of a policy that acts
            return None
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
        ctx.set_materialize_grads(False)
        ctx.shapes = [a.shape if need else None for a, need in zip(weights, ctx.needs_input_grad[1:])]
        of = next(a for a, shape in zip(weights, ctx.shapes) if shape is not None)
        return of.new_empty(1).expand(sum(0 if shape is None else shape.numel() for shape in ctx.shapes))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        results, begin = [*ctx.left.pop(current_pass(), [None] * len(ctx.shapes))], 0
        if grads[0] is not None:
            for k, shape in enumerate(ctx.shapes):
                if shape is not None:
                    joined = grads[0][begin : begin + shape.numel()].view(shape)
                    begin += shape.numel()
                    results[k] = joined if results[k] is None else results[k] + joined
        return None, *results


def _leave_frame() -> None:
    """Keep compiled autograd from tracing what steps have left."""
    Sums.backward = staticmethod(torch.compiler.disable(Sums.backward))  # type: ignore[method-assign]


when_compiling(_leave_frame)
_sums = plain_apply(Sums)
