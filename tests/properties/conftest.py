"""Float64 and strict promotion for every property; few examples, shapes from a handful."""

import hypothesis
import jax
import pytest

from tests.x64 import x64

hypothesis.settings.register_profile(
    "properties",
    deadline=None,
    max_examples=12,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("properties")


@pytest.fixture(autouse=True)
def double_and_strict():
    with x64(), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
