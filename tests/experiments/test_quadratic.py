"""configs/quadratic.toml shows what it says: where float32 is enough, and where it is not.

The reference values are the spread-free ones of the same recipe in numpy, seeds 0 and 1.
"""

from pathlib import Path

import pytest

from kradagrad_jax.experiments import config, summary
from kradagrad_jax.experiments.compare import execute
from kradagrad_jax.experiments.plan import all_series
from kradagrad_jax.experiments.store import Store

# one worker: all tests read the same runs
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quadratic")]
VARIANTS = ("q = 8", "q = 2")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Mean final loss over seeds by (variant, optimizer, dtype)."""
    c = config.load(Path(__file__).parents[2] / "configs" / "quadratic.toml")
    rows = all_series(c)
    folder = tmp_path_factory.mktemp("quadratic")
    findings = execute(c, rows, Store(folder, resume=False, overwrite=False))
    return {
        (table.variant, row.series.optimizer, row.series.dtype): row.loss
        for table in summary.tabulate(c, rows, findings)
        for row in table.rows
    }


@pytest.mark.parametrize(
    ("variant", "reference"), list(zip(VARIANTS, (0.00393, 0.0864), strict=True))
)
def test_float64_shampoo_is_the_reference(losses, variant, reference):
    assert losses[variant, "shampoo_gram", "float64"] == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_square_root_statistics_need_no_float64(losses, variant):
    in_float64 = losses[variant, "shampoo_gram", "float64"]
    assert losses[variant, "shampoo_sqrt", "float32"] <= 1.05 * in_float64
    assert losses[variant, "shampoo_sqrt", "float64"] == pytest.approx(in_float64, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gram_statistics_fail_in_float32(losses, variant):
    in_float64 = losses[variant, "shampoo_gram", "float64"]
    assert losses[variant, "shampoo_gram", "float32"] > 5 * in_float64
    # an eps above the rounding noise repairs most of it
    assert losses[variant, "shampoo_ridge", "float32"] < 10 * in_float64


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["kradagrad_star", "kradagrad_star_official", "kradagrad"])
def test_precision_does_not_matter_to_kradagrad(losses, variant, name):
    assert losses[variant, name, "float32"] == pytest.approx(
        losses[variant, name, "float64"], rel=1e-2
    )


def test_kradagrad_star_beats_no_preconditioner_unless_official(losses):
    for variant in VARIANTS:
        nothing = losses[variant, "identity", "float32"]
        assert losses[variant, "kradagrad_star", "float32"] < 0.7 * nothing
        official = losses[variant, "kradagrad_star_official", "float32"]
        assert official == pytest.approx(nothing, rel=0.03)
    assert losses["q = 8", "kradagrad_star", "float32"] < 1.0
