"""Data loaders."""

import gzip

import numpy as np
import pytest

from kradagrad_jax.experiments import data
from kradagrad_jax.experiments.names import UsageError


def test_digits():
    split = data.digits()
    assert split.train.x.shape == (1500, 64) and split.valid.x.shape == (297, 64)
    assert split.train.x.dtype == np.float32 and split.train.y.dtype == np.int32
    assert split.train.x.min() == 0 and split.train.x.max() == 1
    assert np.bincount(split.valid.y, minlength=10).min() >= 15  # shuffled: every class is there
    assert all(np.array_equal(a, b) for a, b in zip(split.train, data.digits().train, strict=True))


def test_idx_format(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array(array.shape, ">u4").tobytes()
    path = tmp_path / "array.gz"
    path.write_bytes(gzip.compress(header + array.tobytes()))
    assert np.array_equal(data.read_idx(path), array)


def test_absent_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv(data.FASHION_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=r"is not in .*apt-get install dataset-fashion-mnist"):
        data.fashion_mnist()


def test_fashion_mnist():
    try:
        split = data.fashion_mnist()
    except UsageError as reason:
        pytest.skip(str(reason))
    assert split.train.x.shape == (60000, 784) and split.valid.x.shape == (10000, 784)
    assert np.array_equal(np.bincount(split.valid.y), np.full(10, 1000))
    assert split.train.x.min() == 0 and split.train.x.max() == 1
