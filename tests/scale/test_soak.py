"""20,000 steps of every alias at its default: nothing drifts, nothing freezes, the past fades.

Gradients whose scale jumps over twelve decades, stretches of nothing, a NaN in one step of a
hundred, a row and a column of every weight that never get gradient; at the end calm, after which an
optimizer must do what a fresh one does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from tests.registry import all_finite
from tests.scale import defaults

STEPS, STRETCH, CALM, CHUNK = 20_000, 500, 2_000, 2_000
SILENT = (7, 33, 34, 35)  # stretches of zeros; the last ones let averages of squares (0.99) fade
RUNAWAY = 3.0  # decades between the norms of the factors of a block

# A sum never forgets: all of its stretches, not the calm alone, have one distribution up to scale.
SUMS = ("kradagrad", "kradagrad_star")
# its schedule, too, has updated the modes at other steps than a fresh one; and the mode that comes
# first carries the scale of the gradient alone (2 * 6 decades), from the start and for good;
# KL-Shampoo's scales are capped relative to the first gradient of the run
LEAST, APART = {"kradagrad": 0.8, "kl_shampoo": 0.98}, {"kradagrad": 12 + RUNAWAY}
VARIANTS = [
    ("kradagrad_star", {"beta2": 0.99}),
    ("kradagrad_star", {"beta2": 0.9, "form": "factored"}),
    ("kradagrad_star", {"beta2": 0.99, "form": "exact"}),
    ("kradagrad_star", {"beta2": 0.9, "form": "delayed"}),
    ("kradagrad", {"beta2": 0.99}),
    ("kradagrad", {"beta2": 0.9, "form": "exact"}),
    ("shampoo", {"root": "tracked", "damping": 0.0, "damping_rule": "pseudo"}),
    ("singd", {"structures": "diagonal"}),
]


def mixing(rng: np.random.Generator, n: int) -> np.ndarray:
    """A covariance's root with standard deviations from 1 to 0.1; entry 0 is dead."""
    q = np.linalg.qr(rng.normal(size=(n - 1, n - 1)))[0]
    out = np.zeros((n, n))
    out[1:, 1:] = (q * 10.0 ** -np.linspace(0, 1, n - 1)) @ q.T
    return out


@functools.cache
def rows(wander: bool, spread: float = 6) -> tuple[np.ndarray, int]:
    """Rows of all steps ``(STEPS, ROWS, width)``, and the number of steps with a NaN.

    Args:
      wander: every stretch has a distribution of its own; else they differ in scale alone.
      spread: decades of the scale, up and down.
    """
    rng = np.random.default_rng(0)
    widths = [s for shape in defaults.SHAPES.values() for s in shape]
    out = rng.normal(size=(STEPS, defaults.ROWS, defaults.WIDTH + defaults.DRAWN))
    wild = (STEPS - CALM) // STRETCH
    for i in range(wild + 1):
        span = slice(i * STRETCH, (i + 1) * STRETCH if i < wild else STEPS)
        own = np.random.default_rng((1, i if wander else wild))
        scale = 10.0 ** rng.uniform(-spread, spread) if i < wild else 1.0
        scale *= i not in SILENT
        roots = [mixing(own, n) * (scale if j % 2 else 1.0) for j, n in enumerate(widths)]
        roots += roots[1::2]  # drawn labels: distributed as the gradients
        ends = np.cumsum([len(r) for r in roots])
        for end, root in zip(ends, roots, strict=True):
            part = slice(end - len(root), end)
            out[span, :, part] = out[span, :, part] @ root
    bad = rng.choice(np.arange(2, STEPS - 2), STEPS // 100, replace=False)
    out[bad, 0, rng.integers(1, 4, len(bad))] = np.nan  # in an input of the first layer
    return out.astype(np.float32), len(bad)


def runner(alias: defaults.Default, **options: Any) -> Any:
    """The optimizer, and ``(state, rows) -> (state, last updates, were all updates finite)``."""
    tx, p = alias.make(**options), defaults.params()

    def step(carry: Any, x: jax.Array) -> Any:
        state, _, finite = carry
        grads, extra = alias.measured(x)
        updates, state = tx.update(grads, state, p, **extra)
        sums = [jnp.sum(u) for u in jax.tree.leaves(updates)]
        return (state, updates, finite & jnp.isfinite(sum(sums[1:], sums[0]))), None

    @jax.jit
    def run(state: Any, x: jax.Array) -> Any:
        return jax.lax.scan(step, (state, p, jnp.asarray(True)), x)[0]

    return tx, run


def cosine(u: Any, v: Any) -> float:
    u, v = (np.asarray(x, np.float64).ravel() for x in (u, v))
    return float(u @ v / np.sqrt((u @ u) * (v @ v)))


def decades(state: Any) -> float:
    """The largest log10 of a ratio of norms between the factors of the two sides of one block.

    Weights are not square: of a factor's arrays, those of one side's size and those of the other's
    come in the same order, whatever the method calls them.
    """
    engines = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kj.BlockState))
    engine = next(x for x in engines if isinstance(x, kj.BlockState))
    worst = 0.0
    for factor in engine.factors.values():
        square = [x for x in jax.tree.leaves(factor) if x.ndim == 3 and x.shape[1] == x.shape[2]]
        sizes = sorted({x.shape[1] for x in square})
        if len(sizes) != 2:
            continue
        sides = [[x for x in square if x.shape[1] == n] for n in sizes]
        for x, y in zip(*sides, strict=True):
            a, b = (np.linalg.norm(np.asarray(z, np.float64), axis=(1, 2)) for z in (x, y))
            worst = max(worst, float(np.max(np.abs(np.log10(a) - np.log10(b)))))
    return worst


def soaked(tx: Any, run: Any, steps: np.ndarray, bad: int) -> tuple[Any, Any]:
    """State and updates after all steps; nothing was undone but the steps with a NaN."""
    state, updates = tx.init(defaults.params()), None
    for start in range(0, STEPS, CHUNK):
        state, updates, finite = run(state, steps[start : start + CHUNK])
        assert finite and all_finite(state), f"not finite before step {start + CHUNK}"
    found = defaults.diagnostics(state)
    assert (found["count"], found["skipped"]) == (STEPS, bad)
    assert found["rejected"] == 0
    return state, updates


@pytest.mark.slow
@defaults.over()
def test_soak(alias):
    steps, bad = rows(alias.name not in SUMS)
    tx, run = runner(alias)
    state, updates = soaked(tx, run, steps, bad)
    assert decades(state) < APART.get(alias.name, RUNAWAY)
    fresh = run(tx.init(defaults.params()), steps[-CALM:])[1]
    for name in defaults.SHAPES:
        ours, theirs = updates[name]["kernel"], fresh[name]["kernel"]
        assert cosine(ours, theirs) > LEAST.get(alias.name, 0.99), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_soak_of_variants(name, options):
    """Decay under a dead row, roots of singular statistics: still moving, with nothing undone."""
    alias = next(d for d in defaults.DEFAULTS if d.name == name)
    steps, bad = rows(True, 2)
    _, updates = soaked(*runner(alias, **options), steps, bad)
    for layer in updates.values():
        assert float(jnp.linalg.norm(layer["kernel"])) > 1e-3
