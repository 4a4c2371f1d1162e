"""IDX files, the split of the TensorFlow tutorials, batches without replacement, and small movements of images.

The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
uint32, then the values. MNIST, Fashion-MNIST and KMNIST come as four such files of the same names.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

EMBEDDED = Path(__file__).parent
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
GZIP_MAGIC = b"\x1f\x8b"
CLASSES = 10
VALIDATION = 5000  # the first images of the training files
WITHOUT_IMAGES = (
    "this installation of fastlstm has no images of MNIST, as no wheel of a release has; install its source "
    "distribution (pip install --force-reinstall --no-deps --no-binary fastlstm fastlstm) or a clone, or name a folder "
    "of IDX files"
)
SHIFT, TURN, SCALE = 2.0, math.radians(10), 0.1  # the most that an image is moved: pixels of 28, an angle, a share


class DataError(ValueError):
    """A file is missing, damaged or foreign: the text names it, what was expected and what was found."""


class Split(NamedTuple):
    images: Tensor  # (N, rows, columns) float32 in [0, 1]
    labels: Tensor  # (N,) int64


class Dataset(NamedTuple):
    train: Split
    validation: Split
    test: Split


def load(directory: Path | None = None, device: torch.device | str = "cpu") -> Dataset:
    """Return the set in `directory`, or the MNIST of this package, on `device`. The first 5 000 training images are the
    validation split, as in tensorflow.examples.tutorials.mnist.input_data. A DataError says that a file, gzipped or
    not, is missing, damaged or foreign, or that the files do not go together.
    """
    if directory is None and not (EMBEDDED / f"{FILES[0]}.gz").exists():
        raise DataError(WITHOUT_IMAGES)
    paths = [find(directory or EMBEDDED, name) for name in FILES]
    images, test_images = read_images(paths[0]), read_images(paths[2])
    labels, test_labels = read_labels(paths[1], len(images)), read_labels(paths[3], len(test_images))
    if len(labels) <= VALIDATION:
        raise DataError(f"{paths[0]}: expected more images than the {VALIDATION} for validation, found {len(labels)}")
    check_size(paths[2], test_images, images.shape[1:])
    train, validation = slice(VALIDATION, None), slice(VALIDATION)
    parts = (images[train], labels[train]), (images[validation], labels[validation]), (test_images, test_labels)
    return Dataset(*(Split(a.to(device), b.to(device)) for a, b in parts))


def find(directory: Path, name: str) -> Path:
    """Return the path of the file `name` in `directory`, gzipped or not; a DataError says that there is neither."""
    for path in (directory / name, directory / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"{directory / name}: expected this file or {name}.gz, found neither")


def read_images(path: Path) -> Tensor:
    """Return the images (N, rows, columns) of an IDX file, float32 in [0, 1]."""
    return torch.from_numpy(np.divide(read_idx(path, 3), np.float32(255), dtype=np.float32))


def check_size(path: Path, images: Tensor, size: tuple[int, ...]) -> None:
    """Raise a DataError where the images (N, rows, columns) of the file `path` are not of `size`, (rows, columns)."""
    if images.shape[1:] != size:
        expected, found = (f"{rows} x {columns}" for rows, columns in (size, images.shape[1:]))
        raise DataError(f"{path}: expected images of {expected} pixels, found {found}")


def read_labels(path: Path, count: int) -> Tensor:
    """Return the labels (count,) int64 of an IDX file. Another number of them, or one that is no class, raises."""
    labels = read_idx(path, 1)
    if len(labels) != count:
        raise DataError(f"{path}: expected {count} labels, one for each image, found {len(labels)}")
    if labels.max() >= CLASSES:
        raise DataError(f"{path}: expected labels 0 to {CLASSES - 1}, found {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file with `ndim` dimensions, gzipped or not. Any other is a DataError."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip file raises one of the three
        raise DataError(f"{path}: expected an IDX file, found none that can be read ({error})") from error
    header = 4 + 4 * ndim
    shape = struct.unpack_from(f">{ndim}I", content.ljust(header, b"\0"), 4)
    if content[:4] != bytes((0, 0, 8, ndim)) or 0 in shape or len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes with {ndim} dimensions, "
            f"found {len(content)} bytes that begin with {content[:header]!r}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def shuffled_batches(
    count: int, batch_size: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield endless batches of indices (batch_size,) into `count` examples, `batch_size` at most `count`:
    `input_data`'s `next_batch`. Each epoch is shuffled anew, by the CPU `generator` alone, and gives every example
    once. The tail of one epoch is joined with the head of the next.
    """
    rest = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        if len(rest) < batch_size:
            rest = torch.cat((rest, torch.randperm(count, generator=generator).to(device)))
        yield rest[:batch_size]
        rest = rest[batch_size:]


def draw_maps(batch_size: int, generator: torch.Generator) -> Tensor:
    """Return affine maps (batch_size, 2, 3) from the moved image's coordinates to the original's, in [-1, 1]: shift,
    turn and scale, each uniform between its bounds. The maps depend on the CPU `generator` alone.
    """
    turn, wide, high, right, down = (2 * torch.rand(5, batch_size, generator=generator) - 1).unbind()
    cos, sin = (TURN * turn).cos(), (TURN * turn).sin()
    wide, high = 1 + SCALE * wide, 1 + SCALE * high
    shift = SHIFT * 2 / 28
    return torch.stack((cos * wide, -sin * wide, shift * right, sin * high, cos * high, shift * down), 1).view(-1, 2, 3)


def moved(images: Tensor, maps: Tensor) -> Tensor:
    """Return `images` (B, rows, columns) moved by the affine `maps` (B, 2, 3): bilinear, and zero outside."""
    pictures = images.unsqueeze(1)
    grid = affine_grid(maps.to(images.device), list(pictures.shape), align_corners=False)
    return grid_sample(pictures, grid, align_corners=False).squeeze(1)
