"""What holds for every contract test: strict promotion, as our own arithmetic names its types."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Off where a test says so, because a wrapper of optax or flax promotes on its own."""
    if request.node.get_closest_marker("lenient_promotion"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "lenient_promotion: default promotion rules, for code that is not ours"
    )
