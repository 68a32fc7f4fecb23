"""B-R-KFAC replaces its eigenpairs now and then, whatever the calendar of refreshes is.

At such a step it is RS-KFAC that decomposes at every step; until the first one it is B-KFAC.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax import curvature

LAYERS, SHAPE, ROWS, STEPS = 4, (12, 9), 3, 17


def draw(step: Any, shape: tuple[int, int], side: int) -> jax.Array:
    """The same test matrices at every step."""
    del step
    return jax.random.normal(jax.random.key(side), (shape[side], 4))


def directions(name: str, timing: kj.Timing, every: int) -> np.ndarray:
    """``(STEPS, LAYERS, *SHAPE)``; both sides can be followed online (2 + 3 < 9)."""
    layers = [curvature.Layer.dense(f"w{i}", SHAPE) for i in range(LAYERS)]
    spec = curvature.CaptureSpec.from_layers(layers)
    options: dict[str, Any] = {
        "sketch": kj.Sketch(rank=2, oversampling=2, draw=draw),
        "refresh_every": every,
        "timing": timing,
    }
    if name != "rs_kfac":
        options["online"] = kj.Online(batch_size=ROWS, overwrite_every=2)
    tx = getattr(kj, f"scale_by_{name}")(spec, **options)
    p = {f"w{i}": jnp.zeros(SHAPE) for i in range(LAYERS)}
    state, update, out = tx.init(p), jax.jit(tx.update), []
    for t in range(STEPS):
        keys = jax.random.split(jax.random.key(t), 2 * LAYERS)
        rows = {
            f"w{i}": (
                jax.random.normal(keys[2 * i], (ROWS, SHAPE[0])),
                jax.random.normal(keys[2 * i + 1], (ROWS, SHAPE[1])),
            )
            for i in range(LAYERS)
        }
        grads = {k: a.T @ g for k, (a, g) in rows.items()}
        found = curvature.Curvature.from_rows(rows, spec)
        updates, state = update(grads, state, p, curvature=found)
        out.append([np.asarray(updates[k]) for k in p])
    return np.asarray(out)


def equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(STEPS, LAYERS)``: where two methods take the same direction."""
    return np.all(np.isclose(a, b, rtol=1e-3, atol=1e-5), axis=(2, 3))


@pytest.mark.parametrize(
    "timing",
    [kj.Timing(), kj.Timing(phase=2), kj.Timing(start=3), kj.Timing(stagger=True)],
    ids=["plain", "phase", "start", "stagger"],
)
def test_every_layer_is_overwritten(timing):
    plain, replaced = (directions(name, timing, 4) for name in ("b_kfac", "br_kfac"))
    exact = directions("rs_kfac", kj.Timing(), 1)
    overwritten = equal(replaced, exact) & ~equal(plain, exact)
    assert np.all(np.sum(overwritten[3:], axis=0) >= 1), overwritten
    assert np.all(np.sum(overwritten[3:], axis=0) <= 3)  # at every second of its refreshes
    # no layer loses a statistic on the way
    first = np.argmax(overwritten, axis=0)
    for layer, step in enumerate(first):
        assert np.all(equal(plain, replaced)[:step, layer])
