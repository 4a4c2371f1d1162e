"""Layers of any cell as hypothesis draws them, what they are called with, and the truth in float64."""

import copy
import math
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st

import fastlstm
from fastlstm import cells
from tests.cells.layers import gru_decay, of_both
from tests.helpers.modules import flat
from tests.helpers.rnn import gadget, no_product, of_heads, of_heads_and_rows, of_products, without_x
from tests.helpers.tolerances import F32, F64


@cells.cell(gates={f"g{k}": of for k, of in enumerate(["x", "xh", "h", "xh", "xh", "h", "xh"])}, states=("h", "c"))
def of_seven_sums(g0, g1, g2, g3, g4, g5, g6, c):
    """More vectors than one product has, in ranges that overlap, and a backward pass that reads the new states."""
    c = cells.tanh(g0 + g2 * g1) + cells.sigmoid(g3) * c
    h = cells.tanh(c * cells.sigmoid(g4) + g5)
    return cells.exp(-cells.relu(h)) + cells.sigmoid(g6) * h, c


@cells.cell(gates={"a": "x"}, states=("h",))
def that_saves_means_alone(a, h):
    m = cells.mean(a)
    return 0.5 * h + cells.tanh(m * m)


@cells.cell(gates={"a": "xh"}, states=("h",), inputs=("gap",))
def of_a_detached_mean(a, h, gap):
    return cells.tanh(a + cells.stop_gradient(cells.mean(h * gap)))


@cells.cell(gates={"a": "xh", "b": "x"}, states=("h", "c"), params=("w",), products=("p", "q", "r", "of_w"))
def of_detached_products(a, b, h, c, w, p, q, r, of_w):
    """Products of one value, of which one alone has a gradient, and a product of a param."""
    v = cells.tanh(a) * h
    detached = cells.stop_gradient(p(v))
    return cells.tanh(b + q(v) * detached), cells.where(r(v) > 0.1, b, c) + of_w(w)


@cells.cell(gates={}, states=("h",), params=("o",), inputs=("x",))
def diagonal(h, o, x):
    """No product at all. The param's gradient is called do, as a keyword of C++ is."""
    return cells.tanh(x + o * h)


@cells.cell(gates={}, states=("h",), inputs=("u",), products=("u_h",))
def product_alone(h, u, u_h):
    return cells.tanh(u + u_h(h))


OWN = (
    diagonal,
    product_alone,
    gadget,
    no_product,
    of_heads,
    of_heads_and_rows,
    of_products,
    without_x,
    gru_decay,
    of_both,
)
OWN = (*OWN, of_seven_sums, that_saves_means_alone, of_a_detached_mean, of_detached_products)
CELLS = {cell.name: cell for cell in (*cells.CELLS, cells.rhn(3), *OWN)}
CELL_MODULES = {"lstm": fastlstm.LSTMCell, "gru": fastlstm.GRUCell, "elman_tanh": fastlstm.ElmanCell}
LIKE_TORCH = {"lstm": fastlstm.LSTM, "gru": fastlstm.GRU, "elman_tanh": fastlstm.Elman}
PROJECTED = "lstm with a projection"  # which no cell of its own has
REGULARIZED = "lstm that drops and holds"  # with other numbers in each call
UNGATED = ("lif", "synaptic", "alif")  # which multiply nothing, and whose spikes jump
# A lone row, few and many; full panels, a last one cut off, and one alone
SIZES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 65, 100]) | st.integers(1, 70)
# T, B, I, H: chunks of several steps, weights and inputs of many panels, and weights that do not stay in a cache
LARGE = [(40, 70, 3, 9), (3, 130, 28, 64), (2, 3, 650, 100), (3, 1, 6, 650), (28, 16, 28, 128), (9, 160, 100, 100)]
LARGE += [(70, 2, 650, 100), (5, 200, 3, 7)]
LARGE += [(9, 5, 33, 64), (5, 40, 7, 128), (40, 3, 64, 64), (2, 70, 100, 192)]  # heads that the bf16 unit takes
EMPTY = [(0, 3, 5, 7), (3, 0, 5, 7), (0, 0, 4, 33)]
DRAWS = {"deadline": None, "suppress_health_check": list(HealthCheck)}  # the first call compiles


@cache
def jumps(cell):
    """Whether a rounding may change a result or a gradient by more than a rounding."""
    return bool({"relu", "maximum", "greater", "at_least"} & cell.derived().forward.operations().keys())


@dataclass
class Case:
    """A module of one layer, and one in float64 of the same weights. All numbers are those of bfloat16 that float16
    has, so that every type has them.

    Attributes:
        size: T, B, I and H. H is that of a head, and I is 0 for a cell without a product of x.
        every: whether the inner states of all steps are results, too.
        mask: "lengths", "sorted" for lengths that fall, "reset", "lengths+reset" or "".
        values: x or None, the initial states and the inputs. The padding of x and of the inputs is NaN.
        masks: the keywords `lengths` and `reset`, if there are any.
    """

    name: str
    size: tuple[int, int, int, int]
    heads: int = 1
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    every: bool = False
    bias: bool = True
    zeros: bool = False
    mask: str = ""
    dtype: torch.dtype = F32
    backend: str | None = None
    seed: int = 0
    masks: dict[str, torch.Tensor] = field(init=False, repr=False, default_factory=dict)
    place = staticmethod(lambda a: a)  # copies what the kernels read from outside

    def __post_init__(self):
        torch.manual_seed(self.seed)
        self.cell, (self.T, self.B, self.I, self.H) = CELLS.get(self.name, cells.lstm), self.size
        cell, make = self.cell, partial(fastlstm.RNN, self.cell)
        multiplies = cell.products or cell.gates_of_h
        self.heads = self.heads if multiplies and self.backend != "native" and self.name in CELLS else 1
        H = 15 if self.H < 3 and cell.derived().means else self.H  # a norm of one or two units divides by errors
        H = max(2, H) if self.name == PROJECTED else H
        self.H, self.I = H * self.heads, self.I if cell.gates_of_x else 0
        self.layers = self.layers if self.I else 1
        T, B, parts = self.T, self.B, self.layers * (1 + self.bidirectional)
        options = {name: getattr(self, name) for name in ("heads", "bidirectional", "batch_first", "bias")}
        options["num_layers"] = self.layers
        widths = [self.H] * len(cell.states)
        if self.name == PROJECTED:
            make, options["proj_size"] = fastlstm.LSTM, max(1, self.H // 3)
            widths[0] = options["proj_size"]
        elif self.name == REGULARIZED:
            make, options = fastlstm.LSTM, options | {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.1)}
        elif self.heads == 1 and not self.every:
            make = LIKE_TORCH.get(self.name, make)
        if not isinstance(make, partial):
            del options["heads"]
        self.module, self.exact = (
            make(self.I, self.H, dtype=dtype, backend=backend, **options)
            for dtype, backend in ((self.dtype, self.backend), (F64, "reference"))
        )
        with torch.no_grad():
            for a in self.module.parameters():
                a.copy_(a.bfloat16().half())
        self.exact.load_state_dict({name: a.double() for name, a in self.module.state_dict().items()})
        if "lengths" in self.mask or self.mask == "sorted":
            self.masks["lengths"] = torch.randint(0, T + 1, (B,))
        if self.mask == "sorted":
            self.masks["lengths"] = self.masks["lengths"].sort(descending=True).values
        if "reset" in self.mask and not self.bidirectional:
            self.masks["reset"] = torch.rand(T, B) < 0.3
        x, *inputs = [torch.randn(T, B, width) for width in (self.I, *[self.H] * len(cell.inputs))]
        if self.lengths is not None:
            for a in (x, *inputs):
                a[self.held] = torch.nan
        x, *inputs = map(self.laid, (x, *inputs))
        # a state n is a sum of positive numbers, and a divisor
        drawn = (torch.rand if name == "n" else torch.randn for name in cell.states)
        states = [0.3 * draw(parts, B, width) + (name == "n") for draw, width, name in zip(drawn, widths, cell.states)]
        self.values = [
            None if a is None else a.bfloat16().half().float() for a in (x if self.I else None, *states, *inputs)
        ]

    def laid(self, a):
        """Half of the cases have tensors (T, B, ...) that lie row by row, the others step by step."""
        return a.transpose(0, 1).contiguous().transpose(0, 1) if self.seed % 2 else a

    @property
    def lengths(self):
        return self.masks.get("lengths")

    @property
    def held(self):
        return torch.arange(self.T).unsqueeze(1) >= self.lengths

    def operands(self, module, values=None, wants=None):
        """x, the states as a layer takes them, and the inputs by name, in the module's type; and those of them that
        may have gradients. `wants`: of which values gradients are wanted, or None for all.
        """
        dtype, count = next(module.parameters()).dtype, len(self.cell.states)
        values = self.values if values is None else values
        wants = [True] * len(values) if wants is None else wants
        x, *others = [
            None if a is None else self.place(a.to(dtype, copy=True)).requires_grad_(g) for a, g in zip(values, wants)
        ]
        states, inputs = tuple(others[:count]), dict(zip(self.cell.inputs, others[count:]))
        leaves = [a for a in (x, *(() if self.zeros else states), *inputs.values()) if a is not None]
        return x, None if self.zeros else states if count > 1 else states[0], inputs, leaves

    def call(self, module, values=None, masks=None, run=None, wants=None):
        """The output and the last states, and with `every` all states, in a list; and the operands that may have
        gradients. `run` is called in the place of the module, time first.
        """
        x, hx, inputs, leaves = self.operands(module, values, wants)
        turned, masks = self.batch_first and run is None, self.masks if masks is None else masks

        def turn(a):
            return a.transpose(0, 1) if turned and a is not None and a.dim() > 1 else a

        options = {name: turn(a) for name, a in masks.items()}
        if inputs:
            options["inputs"] = {name: turn(a) for name, a in inputs.items()}
        if self.every:
            options["return_cells" if self.name == PROJECTED else "return_states"] = True
        results, count = flat((run or module)(turn(x), hx, **options)), 1 + len(self.cell.states)
        return [a if 0 < k < count else turn(a) for k, a in enumerate(results)], leaves

    def step(self, module, values=None, wants=None):
        """The states after the first step, of a layer or of a module that `single` returns; and those operands."""
        x, hx, inputs, leaves = self.operands(module, values, wants)
        options = {"inputs": {name: a[0] for name, a in inputs.items()}} if inputs else {}
        if not hasattr(module, "step"):
            hx = hx if hx is None else hx[0] if isinstance(hx, torch.Tensor) else tuple(a[0] for a in hx)
        result = getattr(module, "step", module)(None if x is None else x[0], hx, **options)
        return flat(result)[-len(self.cell.states) :], leaves

    def single(self):
        """An `LSTMCell`, `GRUCell` or `ElmanCell` of the module's weights, or None where the cell has none."""
        if self.name not in CELL_MODULES or self.heads * self.layers > 1 or self.bidirectional:
            return None
        module = CELL_MODULES[self.name](self.I, self.H, bias=self.bias, dtype=self.dtype, backend=self.backend)
        module.load_state_dict({name.removesuffix("_l0"): a for name, a in self.module.state_dict().items()})
        return module

    def results(self, module=None, values=None, masks=None, run=None):
        """What `call` returns; and the gradients of all operands and weights, by the same directions for every type."""
        module = module or self.module
        outputs, leaves = self.call(module, values, masks, run)
        pairs = [pair for pair in zip(outputs, self.directions(outputs, masks is None)) if pair[0].requires_grad]
        wanted, (ends, directions) = [*leaves, *module.parameters()], zip(*pairs) if pairs else ((), ())
        gradients = torch.autograd.grad(ends, wanted, directions, materialize_grads=True)
        return [a.detach() for a in outputs], list(gradients)

    def moved(self):
        """The results in float64, once each weight and value has moved by half a unit in its last place, as a rounding
        in the case's type may move it.
        """
        exact, generator = copy.deepcopy(self.exact), torch.Generator().manual_seed(self.seed)

        def move(a):
            signs = torch.randint(2, a.shape, generator=generator).double() * 2 - 1
            return a * (1 + torch.finfo(self.dtype).eps / 2 * signs)

        with torch.no_grad():
            for a in exact.parameters():
                a.copy_(move(a))
        return self.results(exact, [None if a is None else move(a.double()) for a in self.values])

    def directions(self, outputs, padded=True):
        directions = [
            (torch.linspace(-1, 1, a.shape[-1]) * 64).round().div(64).expand(a.shape).to(a.dtype, copy=True)
            for a in outputs
        ]
        if self.lengths is not None and padded:
            directions[0][self.held] = torch.nan  # which nothing looks at, as it does not at padding
        directions[0] = self.laid(directions[0])
        return [self.place(a) for a in directions]

    def rows(self, rows):
        """The operands and masks of some batch rows, for `results`."""
        values = [None if a is None else a[..., rows, :] for a in self.values]
        return values, {name: a[..., rows] for name, a in self.masks.items()}


def largest_error(got, want):
    """Of all tensors, relative to the largest value of each, or to one. NaN is infinitely wrong."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in pairs if b.numel()]
    return max([a.nan_to_num(nan=math.inf).item() for a in errors], default=0.0)


def cases(backend, dtypes=(F32, F64), **others):
    """A strategy for cases of a backend: of each cell that it runs."""
    names = [PROJECTED, *(name for name in CELLS if "bf16" not in backend or name not in UNGATED)]
    of_torch = st.sampled_from(["lstm", "gru"])
    drawn = {
        "name": of_torch if backend == "native" else st.sampled_from(names) | of_torch,
        "size": st.tuples(st.sampled_from([1, 2, 3, 5, 9]), SIZES, SIZES, SIZES) | st.sampled_from(LARGE + EMPTY),
        "heads": st.sampled_from([1, 1, 2, 3]),
        "layers": st.sampled_from([1, 1, 1, 2]),
        "bidirectional": st.booleans(),
        "batch_first": st.booleans(),
        "every": st.sampled_from([False, False, True]),
        "bias": st.sampled_from([True, True, False]),
        "zeros": st.booleans(),
        "mask": st.sampled_from(["", "", "lengths", "sorted", "reset", "lengths+reset"]),
        "dtype": st.sampled_from(dtypes),
        "seed": st.integers(0, 99),
    }
    return st.builds(Case, backend=st.just(backend), **(drawn | others))
