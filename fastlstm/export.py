"""Write a trained row-LSTM for C: `python -m fastlstm.export runs/row-lstm row_lstm.flstm`. docs/native.md has the
format, and `fastlstm_model_load` of csrc/fastlstm.h reads it.
"""

import argparse
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastlstm.commands import Parser
from fastlstm.files import replacing
from fastlstm.int8.definition import BITS, quantize_weight
from fastlstm.mnist import saved
from fastlstm.mnist.data import DataError

MAGIC, FLOAT_VERSION, INT8_VERSION = b"fastlstm", 1, 2
EXAMPLES = f"""\
examples:
  a run's model, for fastlstm_model_load of csrc/fastlstm.h
    python -m fastlstm.train
    python -m fastlstm.export {saved.DIRECTORY} row_lstm.flstm
  with int8 weights, a quarter of the size and three times as fast
    python -m fastlstm.export --int8 {saved.DIRECTORY} row_lstm.flstm
"""


def model_bytes(state_dict: dict[str, Tensor], int8: bool = False, activations: str = "int8") -> bytes:
    """Return the content of a file that `fastlstm_model_load` of the C library reads, for a classifier's state dict.

    The classifier is an LSTM of one layer and one direction with biases, and a linear layer on its last output.

    Args:
        state_dict: ``lstm.weight_ih_l0`` (4H, I), ``lstm.weight_hh_l0`` (4H, H), ``lstm.bias_ih_l0`` and
            ``lstm.bias_hh_l0`` (4H,), ``linear.weight`` (C, H) and ``linear.bias`` (C,), and no others. They are
            written as float32.
        int8: round each row of the LSTM's weights to int8 with a scale of its own. All else stays float32.
        activations: with `int8`, to what C programs round x and h, ``int8`` or ``int16``.

    Returns:
        The bytes, in the format of docs/native.md.

    Raises:
        ValueError: when a tensor is missing or has another shape, or a weight to be rounded is not finite.
    """
    shape = state_dict["lstm.weight_ih_l0"].shape if "lstm.weight_ih_l0" in state_dict else (0, 0)
    C = len(state_dict.get("linear.bias", ()))
    H, I = shape[0] // 4, shape[1]
    shapes = {
        "lstm.weight_ih_l0": (4 * H, I),
        "lstm.weight_hh_l0": (4 * H, H),
        "lstm.bias_ih_l0": (4 * H,),
        "lstm.bias_hh_l0": (4 * H,),
        "linear.weight": (C, H),
        "linear.bias": (C,),
    }
    shapes_found = {name: tuple(value.shape) for name, value in state_dict.items()}
    if shapes_found != shapes or 0 in (I, H, C):
        raise ValueError(f"state_dict must hold tensors of the shapes {shapes}, got {shapes_found}")
    weight_ih, weight_hh, bias_ih, bias_hh, weight, linear_bias = (state_dict[name].float() for name in shapes)
    others = bias_ih + bias_hh, weight, linear_bias
    if int8:
        (rounded_ih, scale_ih), (rounded_hh, scale_hh) = (
            quantize_weight(a, name) for name, a in zip(shapes, (weight_ih, weight_hh))
        )
        payload = struct.pack("<I", BITS[activations])
        payload += _stored("<f4", scale_ih, scale_hh, *others) + _stored("i1", rounded_ih, rounded_hh)
    else:
        payload = _stored("<f4", weight_ih, weight_hh, *others)
    version = INT8_VERSION if int8 else FLOAT_VERSION
    return MAGIC + struct.pack("<5I", version, I, H, C, zlib.crc32(payload)) + payload


def _stored(kind: str, *tensors: Tensor) -> bytes:
    return b"".join(a.detach().cpu().contiguous().numpy().astype(kind).tobytes() for a in tensors)


def main(argv: Sequence[str] | None = None) -> int:
    """Export as `argv` says; the exit code is 0, or 2 after one line that says what was wrong."""
    description = "Write a trained row-LSTM as a file that C programs load."
    parser = Parser("python -m fastlstm.export", description, EXAMPLES, "%(prog)s [options] MODEL OUT")
    add = parser.add_argument_group("files").add_argument
    add("model", type=Path, metavar="MODEL", help="a run's directory or its model.pt")
    add("out", type=Path, metavar="OUT", help="the file to write, such as row_lstm.flstm")
    add = parser.add_argument_group("numbers").add_argument
    add("--int8", action="store_true", help="write the LSTM's weights as int8, with a scale for each row")
    add("--activations", choices=("int8", "int16"), default="int8", help="of inputs and states; int16: half the error")
    return parser.run(argv, _run)


def _run(parser: Parser, args: argparse.Namespace) -> int:
    with parser.naming("MODEL", DataError):
        model, _ = saved.load(args.model)
    with parser.naming(f"MODEL: {args.model}", ValueError):
        content = model_bytes(model.state_dict(), args.int8, args.activations)
    with replacing(args.out) as file:
        file.write(content)
    print(f"{args.out}: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
