"""Reading IDX files, the split, and batches without replacement."""

import gzip
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from fastlstm.mnist import data
from fastlstm.mnist.data import DataError, load, read_idx, shuffled_batches
from tests.helpers.idx import (
    NAMES,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    idx_bytes,
    tiny_arrays,
    write_idx,
    write_set,
)


def refused(path):
    """Expect a DataError that names `path`."""
    return pytest.raises(DataError, match=f"^{re.escape(str(path))}: ")


@given(
    array=st_np.arrays(np.uint8, st_np.array_shapes(max_dims=3, max_side=5)),
    name=st.sampled_from(["plain", "packed.gz"]),
)
def test_idx_round_trip(tmp_path_factory, array, name):
    path = tmp_path_factory.mktemp("idx") / name
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path, array.ndim), array, strict=True)


@given(content=st.binary(max_size=40), ndim=st.sampled_from([1, 3]), packed=st.booleans())
def test_any_other_bytes_are_refused(tmp_path_factory, content, ndim, packed):
    assume(content[:4] != bytes([0, 0, 8, ndim]))
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(content) if packed else content)
    with refused(path):
        read_idx(path, ndim)


LABELS = idx_bytes(np.arange(20) % 10)
IMAGES = idx_bytes(np.zeros((2, 5, 3)))


@pytest.mark.parametrize(
    ("content", "ndim"),
    [
        pytest.param(LABELS, 3, id="labels for images"),
        pytest.param(bytes([0, 0, 13, 1]) + LABELS[4:], 1, id="floats"),
        pytest.param(IMAGES[:10], 3, id="half a header"),
        pytest.param(LABELS[:-1], 1, id="a byte short"),
        pytest.param(IMAGES + b"\0", 3, id="a byte long"),
        pytest.param(IMAGES[:4] + b"\xff" * 12, 3, id="counts past 64 bits"),
        pytest.param(IMAGES[:12] + b"\0" * 4, 3, id="no columns"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_is_not_the_expected_idx_file_is_refused(tmp_path, content, ndim, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(content))
    with refused(path):
        read_idx(path, ndim)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:30] + b"\xff" * 9])
def test_a_file_that_is_not_whole_gzip_is_refused(tmp_path, damage):
    path = tmp_path / "labels.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(np.random.default_rng().integers(0, 10, 200)))))
    with refused(path):
        read_idx(path, 1)


def test_mnist_is_embedded_and_split_as_the_tutorial_does():
    train, validation, test = load()
    assert [len(split.images) for split in (train, validation, test)] == [55000, 5000, 10000]
    whole = read_idx(data.EMBEDDED / f"{TRAIN_LABELS}.gz", 1)
    assert whole[:5].tolist() == [5, 0, 4, 1, 9]  # the digits that MNIST is known to begin with
    np.testing.assert_array_equal(validation.labels, whole[:5000])
    np.testing.assert_array_equal(train.labels, whole[5000:])
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    for split in (train, validation, test):
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert split.images.shape == (len(split.labels), 28, 28)
        assert (split.images.min(), split.images.max()) == (0, 1)
    np.testing.assert_array_equal(
        (255 * test.images).round().to(torch.uint8), read_idx(data.EMBEDDED / f"{TEST_IMAGES}.gz", 3)
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_another_set_is_read_gzipped_or_not(tmp_path, suffix):
    arrays = tiny_arrays(rows=1, columns=7)
    train, validation, test = load(write_set(tmp_path, arrays, suffix))
    for images, name in ((torch.cat((validation.images, train.images)), TRAIN_IMAGES), (test.images, TEST_IMAGES)):
        # one rounding to float32 apart from the quotient in float64
        np.testing.assert_allclose(images, arrays[name] / 255, rtol=6e-8, atol=0)
    np.testing.assert_array_equal(torch.cat((validation.labels, train.labels)), arrays[TRAIN_LABELS])
    np.testing.assert_array_equal(test.labels, arrays[TEST_LABELS])


def test_without_the_images_of_the_package_the_error_says_how_to_come_by_them(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "EMBEDDED", tmp_path)  # as in a wheel of a release
    with pytest.raises(DataError, match="--no-binary fastlstm fastlstm"):
        load()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_and_a_directory_in_its_place_are_named(tmp_path, name):
    write_set(tmp_path, tiny_arrays())
    (tmp_path / name).unlink()
    with refused(tmp_path / name):
        load(tmp_path)
    (tmp_path / name).mkdir()
    with refused(tmp_path / name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (TRAIN_LABELS, lambda a: a[:-1]),
        (TEST_LABELS, lambda a: np.append(a, 0)),
        (TRAIN_LABELS, lambda a: np.append(a[1:], 10)),
        (TEST_LABELS, lambda a: np.append(a[1:], 47)),
        (TEST_IMAGES, lambda a: a[:, 1:]),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, name, change):
    arrays = tiny_arrays()
    arrays[name] = change(arrays[name])
    write_set(tmp_path, arrays)
    with refused(tmp_path / name):
        load(tmp_path)


def test_a_set_without_images_beyond_the_validation_split_is_refused(tmp_path):
    write_set(tmp_path, tiny_arrays(train=5000))
    with refused(tmp_path / TRAIN_IMAGES):
        load(tmp_path)


def take(count, batch_size, seed, batches_taken):
    stream = shuffled_batches(count, batch_size, torch.Generator().manual_seed(seed))
    return [next(stream) for _ in range(batches_taken)]


@given(count=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), batch=st.data())
def test_each_epoch_gives_every_example_once(count, seed, batch):
    batch_size = batch.draw(st.integers(1, count))
    taken = take(count, batch_size, seed, 3 * count)
    assert {len(indices) for indices in taken} == {batch_size}
    epochs = torch.cat(taken).view(-1, count)  # a batch may lie in two of them
    assert torch.equal(epochs.sort(1).values, torch.arange(count).expand_as(epochs))


def test_epochs_are_shuffled_anew_and_a_seed_repeats_them():
    taken = torch.cat(take(1000, 128, 3, 24))  # 3 epochs and a bit
    first, second = taken[:1000], taken[1000:2000]
    assert not torch.equal(first, torch.arange(1000))
    assert not torch.equal(first, second)
    assert torch.equal(taken, torch.cat(take(1000, 128, 3, 24)))
    assert not torch.equal(taken, torch.cat(take(1000, 128, 4, 24)))
