"""Every test here runs with strict promotion; those asking for `double` run in float64."""

import jax
import pytest

from tests.x64 import x64


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def double():
    with x64():
        yield
