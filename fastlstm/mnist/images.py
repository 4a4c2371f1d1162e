"""Pictures of digits, from files, as the images that a model was trained on."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlstm.mnist.data import DataError, read_idx

IDX_MAGIC = b"\0\0\x08\x03"  # unsigned bytes, three dimensions
GZIP_MAGIC = b"\x1f\x8b"


def read(path: Path, size: tuple[int, int], invert: bool | None = None) -> Tensor:
    """Return the images (N, rows, columns) of one file, float32 in [0, 1], ink 1 on background 0.

    Args:
        path: an IDX file of images of `size`, gzipped or not, or a picture (PNG, JPEG and what else Pillow reads).
        size: rows and columns. A picture of this size with light ink on a dark ground is taken as it is, and every
            other is brought into MNIST's form, see `centred`.
        invert: whether a picture has dark ink on a light background; None finds out by its border.

    Raises:
        DataError: when the file is missing, neither of the two, empty of ink, or an IDX file of another size, and for
            a picture where Pillow is not installed.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: expected a picture or an IDX file, found none ({error.strerror})") from error
    if magic == IDX_MAGIC or magic.startswith(GZIP_MAGIC):
        images = read_idx(path, 3)
        if images.shape[1:] != size:
            rows, columns = images.shape[1:]
            raise DataError(f"{path}: expected images of {size[0]} x {size[1]} pixels, found {rows} x {columns}")
        return torch.from_numpy(np.divide(images, np.float32(255), dtype=np.float32))
    if importlib.util.find_spec("PIL") is None:
        needed = "pictures need the package pillow; pip install 'fastlstm[plots]'"
        raise DataError(f"{path}: expected an IDX file, found another ({needed})")
    ink, as_drawn = _ink(path, invert)
    taken = ink if as_drawn and ink.shape == size else centred(_on_blank(ink, path), size)
    return torch.from_numpy(taken).unsqueeze(0)


def centred(ink: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `ink` in MNIST's form: 20 of 28 pixels high or wide, in its proportions, with its centre of mass in the
    middle.
    """
    from PIL import Image  # not above: it is an extra of this package

    drawn = ink > 0.2  # paper has its shades
    rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
    drawing = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = min(size) * 20 / 28 / max(drawing.shape)
    shape = [max(1, round(scale * side)) for side in drawing.shape]
    small = np.asarray(Image.fromarray(drawing).resize((shape[1], shape[0]), Image.Resampling.BOX)).clip(0, 1)
    image = np.zeros(size, np.float32)
    places = []
    for axis in (0, 1):
        centre = small.sum(1 - axis) @ np.arange(shape[axis]) / small.sum()
        start = min(max(0, round(size[axis] / 2 - centre)), size[axis] - shape[axis])  # MNIST's centres lie at 14 of 28
        places.append(slice(start, start + shape[axis]))
    image[tuple(places)] = small
    return image


def _ink(path: Path, invert: bool | None) -> tuple[np.ndarray, bool]:
    """Return a picture's ink (rows, columns) float32: what is opaque on a transparent ground, else what is not paper.

    Also whether that is the picture's own brightness, as in MNIST.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            layers = ImageOps.exif_transpose(picture).convert("LA").split()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected a picture or an IDX file, found another ({error})") from error
    grey, opaque = (np.asarray(layer, np.float32) / 255 for layer in layers)
    if _border(opaque) < 0.5:
        return opaque, False
    if invert is None:
        invert = _border(grey) > 0.5
    return (1 - grey, False) if invert else (grey, True)


def _on_blank(ink: np.ndarray, path: Path) -> np.ndarray:
    """Return `ink` on a scale from 0, the shade of the paper, to 1, its darkest."""
    paper = _border(ink)
    depth = ink.max() - paper
    if depth < 0.1:
        raise DataError(f"{path}: expected a picture with ink on it, found an even one")
    return ((ink - paper) / depth).clip(0, 1)


def _border(layer: np.ndarray) -> float:
    return np.median(np.concatenate((layer[0], layer[-1], layer[:, 0], layer[:, -1]))).item()
