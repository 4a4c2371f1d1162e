"""The library's cells with norms, as modules on backends by name, against their papers' formulas in plain PyTorch."""

import io
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import fastlstm
from fastlstm import cells
from tests.helpers.rnn import results
from tests.helpers.tolerances import close

NORMS = (cells.layer_norm_lstm, cells.layer_norm_gru, cells.dreamer_gru)
every_norm = pytest.mark.parametrize("cell", NORMS, ids=lambda cell: cell.name)
backends = pytest.mark.parametrize("backend", ["numba", "reference"])  # auto would hide one that does not load
F64 = torch.float64


def joined(w, kind, names):
    """The vectors of several gates, side by side."""
    return torch.cat([w[f"{kind}_{name}"] for name in names.split()])


def ba_lstm(w, x, h, c):
    """Ba, Kiros and Hinton, 2016, equations 20 to 22, with one bias for the sum of three."""
    H = h.shape[-1]
    of_x = F.layer_norm(F.linear(x, w["weight_ih"], w.get("bias_ih")), (4 * H,), joined(w, "gain", "i_x f_x g_x o_x"))
    of_h = F.layer_norm(F.linear(h, w["weight_hh"], w.get("bias_hh")), (4 * H,), joined(w, "gain", "i_h f_h g_h o_h"))
    i, f, g, o = (of_x + of_h + joined(w, "bias", "i f g o")).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * F.layer_norm(c, (H,), w["gain_c"], w["bias_c"]).tanh(), c


def ba_gru(w, x, h):
    """Ba, Kiros and Hinton, 2016, the supplement's GRU, with one bias for the sum of two of a gate."""
    H = h.shape[-1]
    of_x, of_h = F.linear(x, w["weight_ih"], w.get("bias_ih")), F.linear(h, w["weight_hh"], w.get("bias_hh"))
    gates = F.layer_norm(of_x[:, : 2 * H], (2 * H,), joined(w, "gain", "r_x z_x"), joined(w, "bias", "r z"))
    gates = gates + F.layer_norm(of_h[:, : 2 * H], (2 * H,), joined(w, "gain", "r_h z_h"))
    r, z = gates.sigmoid().chunk(2, -1)
    n = F.layer_norm(of_x[:, 2 * H :], (H,), w["gain_n_x"], w["bias_n_x"])
    n = (n + r * F.layer_norm(of_h[:, 2 * H :], (H,), w["gain_n_h"], w["bias_n_h"])).tanh()
    return ((1 - z) * h + z * n,)


def hafner_gru(w, x, h):
    """DreamerV2's GRUCell with norm=True: one dense layer of x and h side by side, and update_bias=-1."""
    weight = torch.cat([w["weight_ih"], w["weight_hh"]], 1)
    parts = F.linear(torch.cat([x, h], -1), weight, w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else None)
    scale, offset = joined(w, "gain", "r n u"), joined(w, "bias", "r n u")
    reset, cand, update = F.layer_norm(parts, parts.shape[-1:], scale, offset, 1e-3).chunk(3, -1)
    update = (update - 1).sigmoid()
    return (update * (reset.sigmoid() * cand).tanh() + (1 - update) * h,)


PAPERS = {cells.layer_norm_lstm: ba_lstm, cells.layer_norm_gru: ba_gru, cells.dreamer_gru: hafner_gru}


def published(module, x, states, lengths=None, reset=None):
    """A layer, a step at a time: the output and the last states."""
    w, outputs = {name.removesuffix("_l0"): a for name, a in module.named_parameters()}, []
    state = [a[0] for a in states]
    for t, x_t in enumerate(x):
        held = torch.zeros(len(x_t), 1, dtype=torch.bool) if lengths is None else (t >= lengths).unsqueeze(1)
        start = state if reset is None else [a.masked_fill(reset[t].unsqueeze(1), 0) for a in state]
        state = [torch.where(held, a, b) for a, b in zip(state, PAPERS[module.cell](w, x_t, *start))]
        outputs.append(state[0].masked_fill(held, 0))
    return torch.stack(outputs), tuple(a.unsqueeze(0) for a in state)


def made(cell, I, H, backend, dtype=F64, **options):
    """A module whose params are not the numbers they start from, so that each of them counts."""
    torch.manual_seed(I + H)
    module = fastlstm.RNN(cell, I, H, backend=backend, dtype=dtype, **options)
    with torch.no_grad():
        for a in module.parameters():
            a += 0.2 * torch.randn_like(a) / (1 if a.dim() == 1 else H**0.5)
    return module


def operands(module, T=5, B=3):
    states = tuple(torch.randn(1, B, module.hidden_size, dtype=F64) for _ in module.cell.states)
    return torch.randn(T, B, module.input_size, dtype=F64), states


@backends
@every_norm
@pytest.mark.parametrize(
    ("H", "masked", "bias"), [(1, False, True), (7, True, False), (100, True, True), (650, False, False)]
)
def test_the_papers_formula(cell, backend, H, masked, bias):
    module = made(cell, 3, H, backend, bias=bias)
    x, states = operands(module)
    masks = {"lengths": torch.tensor([5, 0, 3]), "reset": torch.rand(5, 3) < 0.3} if masked else {}
    calls = module, partial(published, module)
    close(*(results(call, module, x, states, **masks) for call in calls), "gradients")


def test_onnx_has_no_operator():
    module = fastlstm.RNN(cells.dreamer_gru, 3, 4).eval()
    with pytest.raises(Exception, match=r"the aten backend runs the cells .*, got dreamer_gru"):
        torch.onnx.export(module, (torch.randn(2, 1, 3),), io.BytesIO(), dynamo=True, verbose=False)


@every_norm
def test_what_params_start_from(cell):
    """Gains start from 1 and biases of norms from 0, at reset_parameters, too; weights are drawn as for other cells."""
    torch.manual_seed(0)
    module = fastlstm.RNN(cell, 3, 5, 2, bidirectional=True)
    for _ in range(2):
        for name, a in module.named_parameters():
            start = 1.0 if name.startswith("gain") else 0.0
            if name.startswith(("weight_", "bias_ih", "bias_hh")):
                assert 0 < a.abs().max() <= 5**-0.5
            else:
                assert torch.equal(a, torch.full_like(a, start))
        with torch.no_grad():
            for a in module.parameters():
                a += 0.25
        module.reset_parameters()


def test_a_mapping_says_what_params_start_from():
    @cells.cell(gates={"a": "xh"}, states=("h",), params={"scale": 2, "drawn": None, "shift": -0.5})
    def affine(a, scale, drawn, shift):
        return scale * cells.tanh(a) + drawn + shift

    assert affine.params == ("scale", "drawn", "shift")
    assert affine.initial == {"scale": 2, "shift": -0.5}
    module = fastlstm.RNN(affine, 3, 5)
    assert torch.equal(module.scale_l0, torch.full((5,), 2.0))
    assert torch.equal(module.shift_l0, torch.full((5,), -0.5))
    assert len(module.drawn_l0.unique()) == 5
