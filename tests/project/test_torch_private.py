"""torch's private names: all in one module, few, and none without which a result would be another."""

import ast
import os
import re
from pathlib import Path

import pytest

from fastlstm import torch_private
from tests.helpers import interpreter

PACKAGE = Path(torch_private.__file__).parent
MOST = 29
# What is no attribute or import of torch's that begins with an underscore, and no more public for that
OTHERS = {
    "a tensor's": re.compile(r"\._(?:version|is_zerotensor|base|backward_hooks)\b|\b_efficientzerotensor\b"),
    "forward_ad's": re.compile(r"_current_level\b|_set_fwd_grad_enabled\b"),
    "dynamo's": re.compile(r"torch\._dynamo|_dynamo_marked_constant|_torchdynamo_\w+"),
    "Function's": re.compile(r"super\(Function|_SingleLevelFunction|_FunctionBase"),
    "an export's": re.compile(r"\breal_callable\b"),
    "Python's import": re.compile(r"\bmeta_path\b"),
}


def private_names(text: str) -> list[str]:
    """Attributes and imports of torch that begin with an underscore, and what else is known to be private."""
    found = [match[0] for pattern in OTHERS.values() for match in pattern.finditer(text)]
    for node in ast.walk(ast.parse(text)):
        parts: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = [*node.module.split("."), *(name.name for name in node.names)]
        elif isinstance(node, ast.Import):
            parts = [part for name in node.names if name.name.startswith("torch.") for part in name.name.split(".")]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            parts = ast.unparse(node).split(".")
        if parts and parts[0] == "torch" and any(re.match(r"_(?!_)", part) for part in parts):
            found.append(".".join(parts))
    return found


def test_private_names_live_in_one_module():
    files = [path for path in PACKAGE.rglob("*.py") if path != Path(torch_private.__file__)]
    assert len(files) > 40
    assert not {str(path): names for path in files if (names := private_names(path.read_text(encoding="utf-8")))}


def test_private_names_are_few():
    """Each is looked up by the one function that takes a missing one for None."""
    text = Path(torch_private.__file__).read_text(encoding="utf-8")
    assert 0 < len(torch_private.NAMES) <= MOST
    named = {part for name in torch_private.NAMES for part in name.split(".") if part.startswith("_")}
    assert {part for name in private_names(text) for part in name.split(".") if re.match(r"_(?!_)", part)} <= named


CHILD = """
import importlib.util, sys, warnings
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

class Missing:
    def __get__(self, *_):
        raise AttributeError("missing")

name, found = sys.argv[1], importlib.util.find_spec
owner, _, last = ("torch." + name).rpartition(".")
if name == "_disable_dynamo":
    import torch._dynamo  # which is full of it
inherited = name in ("Tensor._version", "autograd.function.BackwardCFunction._set_sequence_nr")
if inherited:  # from a type that cannot be changed
    setattr(eval(owner), last, Missing())
elif name == "_C._FunctionBase.apply":  # likewise: so its type is missing
    owner, last = "torch._C", "_FunctionBase"
elif name == "_dynamo":
    importlib.util.find_spec = lambda name, *_: None if name == "torch._dynamo" else found(name, *_)
elif name == "keys":
    impl = torch.library.Library.impl
    def known(self, op_name, fn, dispatch_key="", **options):
        if dispatch_key.startswith("FuncTorchDynamic"):
            raise RuntimeError("could not parse dispatch key")
        return impl(self, op_name, fn, dispatch_key, **options)
    torch.library.Library.impl = known
if name and name not in ("_dynamo", "keys") and not inherited:
    owner = eval(owner)
    kept = getattr(owner, last)
    delattr(owner, last)
import fastlstm
from fastlstm import torch_private
# torch itself cannot do without it
if name == "_dynamo":
    importlib.util.find_spec = found
elif name == "keys":
    torch.library.Library.impl = impl
elif inherited:
    delattr(eval(owner), last)  # which lets that of its base show again
elif name:
    setattr(owner, last, kept)
missing = [name for name, found in torch_private.NAMES.items() if not found]
assert missing == (list(torch_private.NAMES) if torch_private.PUBLIC else [name])

dtype = torch.float64
close = lambda got, want: torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
theirs, ours = torch.nn.LSTM(3, 5, dtype=dtype), fastlstm.LSTM(3, 5, dtype=dtype)
ours.load_state_dict(theirs.state_dict())
x, step = torch.randn(4, 2, 3, dtype=dtype), torch.randn(1, 2, 3, dtype=dtype)
for _ in range(3):  # the weights are packed, and then change as torch counts it, and as it does not
    with torch.no_grad():
        close(ours(x), theirs(x))
        close(ours(step, ours(x)[1]), theirs(step, theirs(x)[1]))
        for module in ours, theirs:
            module.weight_hh_l0.data += 0.1
            module.weight_ih_l0.mul_(0.9)
    for given in x, step, x:
        for module in ours, theirs:
            module.zero_grad()
            output, (_, c_n) = module(given)
            (output.sin().sum() + c_n.pow(2).sum()).backward()
        close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    for module in ours, theirs:
        torch.optim.SGD(module.parameters(), 0.1).step()

def loss(module, parameters, x):
    output, (_, c_n) = functional_call(module, parameters, (x,))
    return output.sin().sum() + c_n.pow(2).sum()

one = {k: v.detach() for k, v in theirs.named_parameters()}
stacked = {k: torch.stack([v, 0.5 * v]) for k, v in one.items()}
def gradients(parameters, x):
    leaves = {k: v.clone().requires_grad_() for k, v in {**parameters, "x": x}.items()}
    value = loss(theirs, {k: v for k, v in leaves.items() if k != "x"}, leaves["x"])
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))

each = [gradients({k: v[m] for k, v in stacked.items()}, x)[1] for m in (0, 1)]
for enabled in True, False:
    with torch.set_grad_enabled(enabled):
        together = vmap(grad(lambda p: loss(ours, p, x)))(stacked)
        outputs = vmap(lambda p: functional_call(ours, p, (x,))[0])(stacked)
    for m in (0, 1):
        close({k: v[m] for k, v in together.items()}, {k: each[m][k] for k in together})
        close(outputs[m], functional_call(theirs, {k: v[m] for k, v in stacked.items()}, (x,))[0].detach())
slope = (each[0]["x"] * x.cos()).sum()
for parameters in one, dict(ours.named_parameters()):
    _, tangent = jvp(lambda x: loss(ours, parameters, x), (x,), (x.cos(),))
    close(tangent.detach(), slope)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(loss(ours, parameters, forward_ad.make_dual(x, x.cos()))).tangent.detach(), slope)
# forward mode over itself, and over reverse mode
twice = jvp(lambda x: jvp(lambda x: loss(ours, one, x), (x,), (x.cos(),))[1], (x,), (x.cos(),))[1]
close(twice, jvp(lambda x: (grad(lambda x: loss(ours, one, x))(x) * x.cos()).sum(), (x,), (x.cos(),))[1])
weights = [*one.values()]
layer = x, *weights, None, None, None, None, False, False, "numba"
with forward_ad.dual_level():  # an operator alone refuses what it would leave out
    refused = False
    try:
        torch.ops.fastlstm.forward(forward_ad.make_dual(x, x), *layer[1:])
    except NotImplementedError:
        refused = True
assert refused
# a mode sees every operator
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False), torch.no_grad():
    close(ours(x), theirs(x))
with torch.inference_mode():
    close(ours(x), theirs(x))
with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the tracer is deprecated
    close(torch.jit.trace(ours, (x,))(2 * x), theirs(2 * x))
if "compile" in sys.argv:
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for given in x, torch.randn(7, 5, 3, dtype=dtype):
        close(compiled(given), theirs(given))
        got, want = (torch.autograd.grad(m(given)[0].sin().sum(), list(m.parameters())) for m in (compiled, theirs))
        close(got, want)
    stack, frozen = torch.stack((x, x.cos())), ours.requires_grad_(False)
    folded = vmap(lambda x: frozen(x)[0])
    close(torch.compile(folded, backend="aot_eager", fullgraph=True)(stack), torch.stack([theirs(a)[0] for a in stack]))
    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(ours, one, forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    close(torch.compile(tangent, backend="aot_eager", fullgraph=True)(x).detach(), each[0]["x"].sum())
"""
QUICK = ("_C._are_functorch_transforms_active", "_C._FunctionBase.apply")


def check_without(name: str, *compiled: str, **environment: str) -> None:
    interpreter.run(CHILD, name, *compiled, cwd=PACKAGE.parent, environment={**os.environ, **environment}, check=True)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in torch_private.NAMES],
)
def test_results_where_a_name_is_missing(name):
    check_without(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", torch_private.NAMES)
def test_compiled_results_where_a_name_is_missing(name):
    check_without(name, "compile")


def test_results_by_public_names_alone():
    check_without("", FASTLSTM_PUBLIC_TORCH="1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "keys"], ids=["", "nor dispatch keys"])
def test_compiled_results_by_public_names_alone(name):
    check_without(name, "compile", FASTLSTM_PUBLIC_TORCH="1")
