"""A gradient that is not finite is no step of an alias, its momentum and decay included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.registry import all_finite
from tests.scale import defaults

pytestmark = pytest.mark.lenient_promotion  # momentum and decay are optax's


def rows(step: int, bad: float | None = None) -> jax.Array:
    """Rows of a step; with ``bad`` in one input, and thus in one row of a gradient."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(defaults.ROWS, defaults.WIDTH + defaults.DRAWN)).astype(np.float32)
    if bad is not None:
        x[1, 2] = bad
    return jnp.asarray(x)


def check(alias: defaults.Default, tx: Any) -> None:
    """The bad step moves nothing, and the steps after it are those of a run without it."""
    p, update = defaults.params(), jax.jit(tx.update)

    def run(batches: list[jax.Array]) -> tuple[list[Any], Any]:
        state, out = tx.init(p), []
        for x in batches:
            grads, extra = alias.measured(x)
            updates, state = update(grads, state, p, **extra)
            out.append(updates)
        return out, state

    plain, _ = run([rows(t) for t in range(4)])
    bad = [rows(7, value) for value in (np.nan, np.inf)]
    found, state = run([rows(0), rows(1), *bad, rows(2), rows(3)])
    for updates in found[2:4]:
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert all_finite((found, state))
    assert defaults.diagnostics(state)["skipped"] == 2
    for ours, theirs in zip(found[:2] + found[4:], plain, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs
        )


@defaults.over()
def test_momentum_and_decay_rest_at_a_bad_gradient(alias):
    check(alias, alias.make(0.1, momentum=0.9, weight_decay=0.1))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1, "weight_decay_mask": {"one": True, "two": False}},
        {"momentum": 0.9, "beta1": "none"},
    ],
    ids=str,
)
def test_other_chains_rest_too(options):
    alias = next(d for d in defaults.DEFAULTS if d.name == "shampoo")
    check(alias, alias.make(0.1, **options))


def test_decay_goes_on_where_the_gradient_is_zero():
    """A zero is a gradient; only what is not finite is skipped."""
    alias = next(d for d in defaults.DEFAULTS if d.name == "shampoo")
    tx, p = alias.make(0.1, weight_decay=0.5), defaults.params()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    jax.tree.map(lambda u, x: np.testing.assert_allclose(u, -0.05 * x, rtol=1e-5), updates, p)
