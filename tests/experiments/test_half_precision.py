"""SINGD trains a transformer in bfloat16; rounded statistics are counted, whatever they do."""

import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.experiments.half_precision import CASES, TASK, rounded, train
from kradagrad_jax.experiments.tasks import make_task


def test_rounding_keeps_dtypes_and_what_is_no_float():
    tree = {"a": jnp.full(3, 1 / 3), "n": jnp.arange(300)}
    out = rounded(tree)
    assert out["a"].dtype == tree["a"].dtype
    np.testing.assert_array_equal(out["a"], jnp.bfloat16(1 / 3).astype(jnp.float32))
    np.testing.assert_array_equal(out["n"], tree["n"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SINGD dense, factors bf16", "SINGD hierarchical"])
def test_nothing_is_ever_non_finite(name):
    """The table of docs/methods/singd.md has 1,000 steps; this is its beginning."""
    out = train(CASES[name], make_task("characters", TASK), 100)
    assert (out.losses, out.skipped, out.rejected, out.left) == (0, 0, 0, 0)
    assert out.end < out.start - 0.5


@pytest.mark.slow
def test_what_is_not_finite_is_counted():
    """K-FAC without damping has factors that are not definite, rounded or not."""
    case = CASES["K-FAC, own length, statistics bf16"]
    case = case._replace(options=case.options | {"damping": 0.0})
    out = train(case, make_task("characters", TASK), 20)
    assert out.losses + out.skipped + out.rejected > 0
