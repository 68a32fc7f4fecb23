"""What holds for every contract test.

Strict promotion: our own arithmetic names its dtypes and shapes. Machine code without LLVM's
optimisations: two thirds of these tests' time is compilation of programs that run a few times,
and what they ask (trees, types, wrappers) does not depend on it. Numbers are tested elsewhere.
"""

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


@pytest.fixture(autouse=True)
def quick_machine_code():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "lenient_promotion: default promotion rules, for code that is not ours"
    )
