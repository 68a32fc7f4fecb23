"""The first refresh is postponed, not lost: bad, empty or missing first statistics leave no trace.

After some steps without a statistic an optimizer does what one does that never saw these steps,
until a refresh falls due; the calendar of refreshes runs on: they are due at steps 1, 11, ..
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from tests.scale import defaults
from tests.x64 import x64

STEPS = 7  # good ones; after three bad ones the refresh of step 11 is not due yet
TRACKED = {"root": "tracked"}
VARIANTS = [
    ("shampoo", TRACKED),
    ("shampoo", {"refresh_every": 100}),
    ("kradagrad_star", TRACKED),
    ("kradagrad_star", {"beta2": 0.99, "form": "exact"}),
    ("kradagrad_star", {"form": "delayed"}),
    ("kradagrad", TRACKED),
    ("kfac", {"damping_rule": "relative"}),
]


@functools.cache
def rows() -> np.ndarray:
    """Rows of all steps; the first three are those of the bad ones."""
    rng = np.random.default_rng(3)
    return rng.normal(size=(3 + STEPS, defaults.ROWS, defaults.WIDTH + defaults.DRAWN))


class Prepared:
    """An optimizer with one compiled update, and what it does without bad steps."""

    def __init__(self, alias: defaults.Default, **options: Any):
        self.alias, self.tx = alias, alias.make(**options)
        self.update = jax.jit(self.tx.update)
        self.clean = self.run(0, "")

    def run(self, bad: int, fault: str) -> list[Any]:
        """Updates of some faulty steps and all good ones."""
        with x64():
            p = defaults.params(jnp.float64)
            state, out = self.tx.init(p), []
            for t in range(3 - bad, 3 + STEPS):
                grads, extra = self.alias.measured(jnp.asarray(rows()[t]))
                if t < 3:
                    grads, extra = faulty(self.alias, fault, grads, extra)
                updates, state = self.update(grads, state, p, **extra)
                out.append(jax.tree.map(np.asarray, updates))
            assert defaults.diagnostics(state)["rejected"] == 0
        return out


@functools.cache
def prepared(alias: defaults.Default) -> Prepared:
    return Prepared(alias)


def faulty(alias: defaults.Default, fault: str, grads: Any, extra: Any) -> tuple[Any, Any]:
    """NaN or zero everywhere; or the curvature alone is missing.

    Transformations of samples average gradients: without curvature their gradient is zero, too.
    """
    if fault == "missing":
        still = alias.kind == "samples"
        return jax.tree.map(lambda x: 0 * x if still else x, grads), {"curvature": None}
    if fault == "nan":
        return jax.tree.map(lambda x: x * jnp.nan, grads), extra
    rows = jnp.zeros((defaults.ROWS, defaults.WIDTH + defaults.DRAWN))
    return alias.measured(rows)


def directions(updates: Any, normalized: bool) -> Any:
    """As they are; or of length one: averages of the graft have seen steps of zeros.

    The first step of SOAP and its relatives is zero: it makes the first basis.
    """
    return jax.tree.map(lambda u: u / (np.linalg.norm(u) or 1) if normalized else u, updates)


def check(own: Prepared, bad: int, fault: str) -> None:
    found, alias = own.run(bad, fault), own.alias
    for u in jax.tree.leaves(found[:bad]):
        assert np.isfinite(u).all()
        assert np.any(u) == (fault == "missing" and alias.kind == "layers")
    for t, (ours, theirs) in enumerate(zip(found[bad:], own.clean, strict=True), 1):
        ours, theirs = (directions(x, fault != "nan") for x in (ours, theirs))
        jax.tree.map(
            lambda a, b, t=t: np.testing.assert_allclose(
                a, b, rtol=1e-5, atol=1e-7, err_msg=f"step {t} after {bad} bad ones"
            ),
            ours,
            theirs,
        )


@pytest.mark.parametrize("bad", [1, 3])
@pytest.mark.parametrize("fault", ["nan", "zero"])
@defaults.over()
def test_first_gradients_are(alias, fault, bad):
    check(prepared(alias), bad, fault)


@pytest.mark.parametrize("bad", [1, 3])
@defaults.over("layers", "samples")
def test_first_curvature_is_missing(alias, bad):
    check(prepared(alias), bad, "missing")


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_variants(name, options):
    own = Prepared(next(d for d in defaults.DEFAULTS if d.name == name), **options)
    check(own, 3, "nan")
    check(own, 3, "zero")


def test_the_first_refresh_of_a_run_with_a_bad_start_comes_at_the_first_statistic():
    """Ten steps of zeros: the eleventh step both is the first refresh and is due."""
    tx, p = kj.scale_by_shampoo(), {"w": jnp.zeros((4, 3))}
    state, update = tx.init(p), jax.jit(tx.update)
    for t in range(1, 14):
        g = {"w": jax.random.normal(jax.random.key(t), (4, 3)) * (t in (5, 6, 7))}
        _, state = update(g, state)
        found = defaults.diagnostics(state)
        assert found["refreshes"] == (t >= 5) + (t >= 11), t
        assert found["statistics"] == max(0, t - 4), t


@pytest.mark.parametrize("every", [4, 20])
def test_every_mode_of_kradagrad_has_its_turn_whatever_the_interval(every):
    """Its schedule runs through statistics, not through steps."""
    tx, p = kj.scale_by_kradagrad(statistics_every=every), {"w": jnp.zeros((7, 5))}
    first = state = tx.init(p)
    update = jax.jit(tx.update)
    for t in range(5 * every):
        _, state = update({"w": jax.random.normal(jax.random.key(t), (7, 5))}, state)
    assert defaults.diagnostics(state)["statistics"] == 5
    arrays = [[x for x in jax.tree.leaves(s.factors) if x.ndim == 3] for s in (first, state)]
    assert {x.shape[1] for x in arrays[0]} == {7, 5}
    assert all(np.any(np.asarray(a != b)) for a, b in zip(*arrays, strict=True))


def test_a_function_as_interval_of_statistics_postpones_the_first_like_a_number():
    found = []
    for every in (3, lambda count: 3):
        tx, p = kj.scale_by_shampoo(statistics_every=every), {"w": jnp.zeros((4, 3))}
        state, update = tx.init(p), jax.jit(tx.update)
        for t in range(4):
            g = {"w": jax.random.normal(jax.random.key(t), (4, 3))}
            u, state = update(jax.tree.map(lambda x: x / (t > 0), g), state)  # noqa: B023
        assert defaults.diagnostics(state)["statistics"] == 2  # of steps 2 and 4
        found.append(u)
    jax.tree.map(np.testing.assert_array_equal, *found)
