"""IDX files, the split of the TensorFlow tutorials, and batches without replacement.

The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
uint32, then the values. MNIST, Fashion-MNIST and KMNIST come as four such files of the same names.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

EMBEDDED = Path(__file__).parent
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = 10
VALIDATION = 5000  # the first images of the training files


class DataError(ValueError):
    """A file of the set is missing, truncated or foreign: the text names it, what was expected and what was found."""


class Split(NamedTuple):
    images: Tensor  # (N, rows, columns) float32 in [0, 1]
    labels: Tensor  # (N,) int64


class Dataset(NamedTuple):
    train: Split
    validation: Split
    test: Split


def load(directory: Path | None = None, device: torch.device | str = "cpu") -> Dataset:
    """Return the set in `directory`, or the MNIST of this package, as tensors on `device`.

    Each file may be gzipped (name.gz) or not. The first 5 000 training images are the validation split, as
    TensorFlow's tutorials have it (tensorflow.examples.tutorials.mnist.input_data).

    Raises:
        DataError: when a file is missing, truncated or foreign, or when the files do not belong together.
    """
    if directory is not None and not directory.is_dir():
        existing = "a file" if directory.exists() else "nothing"
        raise DataError(f"{directory}: expected a directory with the files {', '.join(FILES)}, found {existing}")
    sums = _sums() if directory is None else {}
    paths = [_find(directory or EMBEDDED, name) for name in FILES]
    contents = [_content(path, sums.get(name)) for path, name in zip(paths, FILES, strict=True)]
    arrays = [_parse(path, content, ndim) for path, content, ndim in zip(paths, contents, (3, 1, 3, 1), strict=True)]
    for images, labels in ((0, 1), (2, 3)):
        if len(arrays[labels]) != len(arrays[images]):
            raise DataError(
                f"{paths[labels]}: expected {len(arrays[images])} labels, one for each image of {paths[images].name}, "
                f"found {len(arrays[labels])}"
            )
        if arrays[labels].max() >= CLASSES:
            raise DataError(f"{paths[labels]}: expected labels 0 to {CLASSES - 1}, found {arrays[labels].max()}")
    if len(arrays[0]) <= VALIDATION:
        raise DataError(
            f"{paths[0]}: expected more than {VALIDATION} images, the first {VALIDATION} being the validation split, "
            f"found {len(arrays[0])}"
        )
    if arrays[2].shape[1:] != arrays[0].shape[1:]:
        raise DataError(
            f"{paths[2]}: expected images of {_size(arrays[0].shape[1:])} pixels, as in {paths[0].name}, "
            f"found {_size(arrays[2].shape[1:])}"
        )
    train, test = _split(arrays[0], arrays[1], device), _split(arrays[2], arrays[3], device)
    return Dataset(
        Split(train.images[VALIDATION:], train.labels[VALIDATION:]),
        Split(train.images[:VALIDATION], train.labels[:VALIDATION]),
        test,
    )


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return the unsigned bytes of one IDX file with `ndim` dimensions; a name that ends in .gz is uncompressed.

    Raises:
        DataError: when the file is missing, truncated or not such a file.
    """
    return _parse(path, _content(path), ndim)


class Batches:
    """Endless batches of indices (batch_size,) into `count` examples, `batch_size` at most `count`.

    Each epoch is shuffled anew and gives every example once; the tail of one epoch is joined with the head of the
    next. Equivalent to `input_data`'s `next_batch`. The order depends on the CPU `generator`, not on the device.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator, device: torch.device | str = "cpu"):
        self._count, self._batch_size, self._generator, self._device = count, batch_size, generator, device
        self._start = 0
        self._shuffle()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Tensor:
        end = self._start + self._batch_size
        if end <= self._count:
            taken = self._order[self._start : end]
        else:
            tail = self._order[self._start :]
            self._shuffle()
            end -= self._count
            taken = torch.cat((tail, self._order[:end]))
        self._start = end
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the generator as it was before this epoch's shuffle, and the examples taken since."""
        return {"generator": self._before, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._shuffle()
        self._start = state["start"]

    def _shuffle(self) -> None:
        self._before = self._generator.get_state()
        self._order = torch.randperm(self._count, generator=self._generator).to(self._device)


def fingerprint(split: Split) -> str:
    """Return the SHA-256 sum of the images and labels, whatever device they are on."""
    digest = hashlib.sha256()
    for tensor in split:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums() -> dict[str, str]:
    lines = (EMBEDDED / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"{directory / name}: expected this file or {name}.gz, found neither")


def _content(path: Path, sha256: str | None = None) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file, found another ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, found none ({error.strerror})") from error
    if sha256 is not None and (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path}: expected content with the SHA-256 sum {sha256}, found {digest}")
    return content


def _parse(path: Path, content: bytes, ndim: int) -> np.ndarray:
    header = 4 + 4 * ndim
    magic = bytes((0, 0, 8, ndim))
    if content[:4] != magic:
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes with {ndim} dimension{'s' * (ndim > 1)} "
            f"(magic number 0x{magic.hex()}), found {_format_of(content[:4])}"
        )
    if len(content) < header:
        raise DataError(f"{path}: expected a header of {header} bytes, found a file of {len(content)}")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    size = math.prod(shape)
    if size == 0:
        raise DataError(f"{path}: expected at least one value, found the shape {_size(shape)}")
    if len(content) != header + size:
        raise DataError(
            f"{path}: expected {header + size} bytes, a header of {header} and {_size(shape)} values, "
            f"found {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _format_of(magic: bytes) -> str:
    return f"0x{magic.hex()}" if magic else "an empty file"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _split(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> Split:
    pixels = np.divide(images, np.float32(255), dtype=np.float32)
    return Split(torch.from_numpy(pixels).to(device), torch.from_numpy(labels.astype(np.int64)).to(device))
