"""torch's own inputs for its recurrent modules (module_db), and batched and packed ones beside them, run on ours.

The checks are of results, derivatives, strides and errors. Empty batches, copies, devices and types have tests of
their own beside this file.
"""

from copy import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import make_tensor
from torch.testing._internal.common_modules import FunctionInput, ModuleErrorEnum, ModuleInput, module_db

from tests.helpers.modules import OURS, flat
from tests.helpers.tolerances import close

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),  # torch's own use, in forward mode
]


def clone(info):
    info = copy(info)
    info.theirs, info.module_cls = info.module_cls, OURS[info.module_cls]
    return info


INFOS = [clone(info) for info in module_db if info.module_cls in OURS]


def is_layer(info):
    return issubclass(info.theirs, nn.RNNBase)


def batched_samples(of, dtype, requires_grad):
    """Batched and packed inputs, which module_db lacks."""
    tensor = partial(make_tensor, device="cpu", dtype=dtype)
    leaf = partial(tensor, requires_grad=requires_grad)
    packed = pack_padded_sequence(tensor((3, 3, 2)), torch.tensor([2, 3, 1]), enforce_sorted=False)
    packed.data.requires_grad_(requires_grad)
    equal = pack_padded_sequence(tensor((3, 2, 2)), torch.tensor([3, 3]))
    projection = {"proj_size": 2} if of is nn.LSTM else {}

    def states(*size):
        return (leaf(size), leaf(size)) if of is nn.LSTM else leaf(size)

    calls = [
        (FunctionInput(2, 3), FunctionInput(leaf((4, 3, 2)))),
        (FunctionInput(2, 3, 2, batch_first=True), FunctionInput(leaf((3, 4, 2)), states(2, 3, 3))),
        (FunctionInput(2, 3, bidirectional=True, bias=False), FunctionInput(leaf((4, 1, 2)))),
        (FunctionInput(2, 3, 2, bidirectional=True, **projection), FunctionInput(leaf((2, 3, 2)))),
        (FunctionInput(2, 3, 2, bidirectional=True), FunctionInput(packed, states(4, 3, 3))),
        (FunctionInput(2, 3), FunctionInput(equal)),
    ]
    return [ModuleInput(*call) for call in calls]


def samples(info, dtype=torch.float64, requires_grad=False, training=True):
    arguments = {"device": "cpu", "dtype": dtype, "requires_grad": requires_grad, "training": training}
    theirs = list(info.module_inputs_func(info, **arguments))
    return theirs + (batched_samples(info.theirs, dtype, requires_grad) if is_layer(info) else [])


def sample(info, k, dtype=torch.float64, requires_grad=False):
    torch.manual_seed(k)
    return samples(info, dtype, requires_grad)[k]


def over(wanted=lambda info, arguments, x: True):
    """The samples of which `wanted` is true, by their module, constructor's keywords and first input."""
    cases = []
    for info in INFOS:
        found = [(s.constructor_input.kwargs, s.forward_input.args[0]) for s in samples(info)]
        of_all = [k for k, (arguments, x) in enumerate(found) if wanted(info, arguments, x)]
        cases += [pytest.param(info, k, id=f"{info.name}-{k}") for k in of_all]
    return pytest.mark.parametrize(("info", "k"), cases)


def differs(info, arguments, x):
    """False where batch_first is all that differs: it means nothing to unbatched input."""
    return not (isinstance(x, torch.Tensor) and x.dim() == 2 and arguments.get("batch_first"))


case = over()
grad_case = over(differs)
# without biases it is a part of the same derivative; one of the batched ones has none
gradgrad_case = over(
    lambda info, arguments, x: differs(info, arguments, x) and (arguments.get("bias", True) or x.dim() == 3)
)
each = pytest.mark.parametrize("info", INFOS, ids=[info.name for info in INFOS])


def build(cls, constructor, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return cls(*constructor.args, **{"dtype": dtype, "device": device, **constructor.kwargs})


def replaced(tree, values):
    """The same structure with its tensors taken from the iterator `values`."""
    if isinstance(tree, torch.Tensor):
        return next(values)
    if isinstance(tree, PackedSequence):
        return tree._replace(data=next(values))
    return type(tree)(replaced(branch, values) for branch in tree)


def call(module, inputs, *values):
    args = replaced(inputs.args, iter(values)) if values else inputs.args
    return module(*args, **inputs.kwargs)


@pytest.mark.sampled(11)
@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_forward(info, k, dtype, training):
    inputs = sample(info, k, dtype)
    theirs, ours = (build(cls, inputs.constructor_input, dtype) for cls in (info.theirs, info.module_cls))
    theirs.train(training)
    ours.train(training)
    results = flat(call(ours, inputs.forward_input))
    references = [call(theirs, inputs.forward_input)]
    if inputs.reference_fn is not None:
        references.append(inputs.reference_fn(ours, *inputs.forward_input.args, **inputs.forward_input.kwargs))
    for reference in references:
        close(results, flat(reference), "sums")


def differentiable(info, k):
    """A sample as a function of its floating-point inputs and the module's parameters, and their values."""
    inputs = sample(info, k, requires_grad=True)
    module = build(info.module_cls, inputs.constructor_input)
    leaves = [a for a in flat(inputs.forward_input.args) if a.requires_grad]
    parameters = dict(module.named_parameters())

    def function(*values):
        args = replaced(inputs.forward_input.args, iter(values)) if leaves else inputs.forward_input.args
        weights = dict(zip(parameters, values[len(leaves) :], strict=True))
        return tuple(flat(torch.func.functional_call(module, weights, args)))

    return function, [*leaves, *parameters.values()]


@pytest.mark.sampled(4)
@grad_case
def test_grad(info, k):
    """Reverse and forward mode, also batched by vmap."""
    function, values = differentiable(info, k)
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.sampled(9)
@gradgrad_case
def test_gradgrad(info, k):
    """Reverse over reverse and forward over reverse; undefined gradients are test_grad's matter."""
    function, values = differentiable(info, k)
    assert gradgradcheck(function, values, check_fwd_over_rev=True, check_undefined_grad=False, fast_mode=True)


@pytest.mark.sampled(4)
@case
def test_non_contiguous_tensors(info, k):
    inputs = sample(info, k, requires_grad=True)
    module = build(info.module_cls, inputs.constructor_input)
    results = []
    values = [a.detach().requires_grad_() for a in flat(inputs.forward_input.args)]
    for strided in (False, True):
        used = [torch.stack([a, torch.full_like(a, torch.nan)], -1)[..., 0] if strided else a for a in values]
        assert not strided or not any(a.is_contiguous() for a in used)
        outputs = flat(call(module, inputs.forward_input, *used))
        cotangents = [torch.cos(torch.arange(a.numel(), dtype=a.dtype)).view(a.shape) for a in outputs]
        if strided:
            cotangents = [torch.stack([a, torch.full_like(a, torch.nan)], -1)[..., 0] for a in cotangents]
        results.append([*outputs, *torch.autograd.grad(outputs, [*values, *module.parameters()], cotangents)])
    close(*results, "values")


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_errors(info, dtype, training):
    errors = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    assert errors
    for error in errors:
        inputs = error.module_error_input
        constructor = inputs.constructor_input
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.module_cls(*constructor.args, **constructor.kwargs)
        else:
            arguments = {"dtype": dtype, **constructor.kwargs}
            module = info.module_cls(*constructor.args, **arguments).train(training)
            with pytest.raises(error.error_type, match=error.error_regex):
                call(module, inputs.forward_input)
