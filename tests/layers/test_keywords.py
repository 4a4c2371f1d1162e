"""`forget_bias` and `backend` at construction."""

from copy import deepcopy

import pytest
import torch

import fastlstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}])
def test_forget_bias(arguments):
    torch.manual_seed(0)
    plain = fastlstm.LSTM(3, 5, **arguments)
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(3, 5, forget_bias=1.5, **arguments)
    for parameters in (lstm, deepcopy(lstm)):
        for (name, a), b in zip(parameters.named_parameters(), plain.parameters(), strict=True):
            if "bias" in name:
                assert torch.equal(a[5:10], torch.full((5,), 1.5 if "bias_ih" in name else 0.0))
                assert torch.equal(torch.cat([a[:5], a[10:]]), torch.cat([b[:5], b[10:]]))
            else:
                assert torch.equal(a, b)
        parameters.reset_parameters()
    assert "forget_bias=1.5" in repr(lstm)
    assert fastlstm.LSTM(3, 5, forget_bias=1, device="meta").bias_ih_l0.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forget_bias": "1"}, TypeError, "forget_bias should be a number or None, got: str"),
        ({"forget_bias": True}, TypeError, "forget_bias should be a number or None, got: bool"),
        (
            {"forget_bias": 1.0, "bias": False},
            ValueError,
            "forget_bias needs bias=True, got forget_bias=1.0 and bias=False",
        ),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_keywords(arguments, error, message):
    with pytest.raises(error, match=message):
        fastlstm.LSTM(3, 5, **arguments)


def test_backend_of_the_module():
    x = torch.randn(4, 2, 3)
    lstm, cell = fastlstm.LSTM(3, 5, backend="reference"), fastlstm.LSTMCell(3, 5, backend="reference")
    assert "backend=reference" in repr(lstm)
    assert "backend=reference" in repr(cell)
    with fastlstm.use_backend("aten"):  # a module's own wins: aten takes no mask
        lstm(x, lengths=torch.tensor([4, 2]))
        with pytest.raises(RuntimeError, match="aten backend has no reset and no lengths"):
            fastlstm.LSTM(3, 5)(x, lengths=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.LSTMCell(3, 5, backend="cudnn")
