"""IDX files for the tests, written by a few lines that share nothing with the package's reader."""

import gzip
from pathlib import Path

import numpy as np

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(path: Path, array: np.ndarray) -> None:
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def tiny_arrays(rows: int = 4, columns: int = 3, train: int = 5090, test: int = 130) -> dict[str, np.ndarray]:
    """Fresh random images whose brightness tells their class apart; the first 5000 are the validation split."""
    rng = np.random.default_rng()
    arrays = {}
    for images, labels, count in ((TRAIN_IMAGES, TRAIN_LABELS, train), (TEST_IMAGES, TEST_LABELS, test)):
        classes = rng.integers(0, 10, count)
        arrays[images] = classes[:, None, None] * 25 + rng.integers(0, 25, (count, rows, columns))
        arrays[labels] = classes
    return arrays


def write_set(directory: Path, arrays: dict[str, np.ndarray], suffix: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    for name, array in arrays.items():
        write_idx(directory / f"{name}{suffix}", array)
    return directory
