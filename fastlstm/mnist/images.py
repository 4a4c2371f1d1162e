"""Pictures of digits, from files, as the images that a model was trained on."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlstm.mnist.data import GZIP_MAGIC, DataError, check_size, read_images


def read(path: Path, size: tuple[int, int]) -> Tensor:
    """Return the images (N, rows, columns) of an IDX file or of a picture, float32 in [0, 1], ink 1 on background 0. A
    picture of `size`, rows and columns, light on dark, is taken as it is, others as `centred` makes them. A DataError
    says that the file is missing, another, empty or of another size.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(3)
    except OSError as error:
        raise DataError(f"{path}: expected a picture or an IDX file, found none ({error.strerror})") from error
    if magic.startswith((b"\0\0\x08", GZIP_MAGIC)):
        images = read_images(path)
        check_size(path, images, size)
        return images
    if importlib.util.find_spec("PIL") is None:
        raise DataError(f"{path}: pictures need the package pillow; pip install 'fastlstm[plots]'")
    brightness = _brightness(path)
    paper = np.median(np.concatenate((brightness[0], brightness[-1], brightness[:, 0], brightness[:, -1]))).item()
    if paper < 0.5 and brightness.shape == size:
        return torch.from_numpy(brightness).unsqueeze(0)
    ink = brightness - paper if paper < 0.5 else paper - brightness
    if ink.max() < 0.1:
        raise DataError(f"{path}: expected a picture with ink on it, found an even one")
    return torch.from_numpy(centred((ink / ink.max()).clip(0, 1), size)).unsqueeze(0)


def centred(ink: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `ink` in MNIST's form: 20 of 28 pixels high or wide, its proportions kept, its centre of mass central."""
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


def _brightness(path: Path) -> np.ndarray:
    """Return a picture's brightness (rows, columns) float32: black is 0, white 1, what is transparent white."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            colours = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected a picture or an IDX file, found another ({error})") from error
    white = Image.new("RGBA", colours.size, "white")
    return np.asarray(Image.alpha_composite(white, colours).convert("L"), np.float32) / 255
