"""The study of precision: columns are what they say, at least at a few steps."""

import numpy as np
import pytest

from kradagrad_jax.experiments.precision_study import CASES, COLUMNS, TASK, Study
from kradagrad_jax.experiments.rounding import inverse_error, nearest, stochastic
from kradagrad_jax.experiments.tasks import make_task
from kradagrad_jax.experiments.training import float64_mode


@pytest.mark.slow
def test_errors_are_ordered_as_the_dtypes_are():
    with float64_mode(True):
        study = Study("singd", CASES["singd"], make_task("digits", TASK), 4)
        errors, losses = study.run()
    assert list(errors) == list(COLUMNS)
    assert 0 < errors["float32"] < 1e-4 < errors["fp16 + master"] < errors["bf16 + master"] < 0.1
    assert errors["float32"] < errors["bf16 factors"] and errors["fp16"] < errors["bf16"]
    assert np.allclose(list(losses.values()), losses["float64"], rtol=0.05)


@pytest.mark.slow
def test_factors_that_are_rounded_to_nearest_stall_at_a_small_step():
    assert inverse_error(nearest, 0.01) > 10 * inverse_error(stochastic, 0.01)
