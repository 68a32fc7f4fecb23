"""Where a documented option rounds to nothing, or a factorisation fails by rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax import curvature
from tests.scale import defaults


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", ["kradagrad", "kradagrad_star"])
def test_damping_of_kradagrad_does_not_depend_on_the_unit_of_the_loss(name, scale):
    """L starts at 1 / mean square of the gradient: damping is relative to it, or refused."""
    try:
        tx = getattr(kj, name)(1.0, damping=1e-4)
    except ValueError:
        return
    p = {"w": jnp.zeros((7, 5))}
    state, update = tx.init(p), jax.jit(tx.update)
    for t in range(12):
        g = {"w": scale * jax.random.normal(jax.random.key(t), (7, 5))}
        updates, state = update(g, state, p)
        assert float(jnp.linalg.norm(updates["w"])) > 0.1, t
    assert defaults.diagnostics(state)["rejected"] == 0


def test_a_factor_step_that_can_make_a_root_singular_is_refused():
    """With 1, an entry with B g^2 + damping > 3 makes K zero at the first step, for good."""
    with pytest.raises(ValueError, match="lr_cov"):
        kj.scale_by_sirfshampoo(batch_size=4, lr_cov=1.0)
    kj.scale_by_sirfshampoo(batch_size=4, lr_cov=0.99)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1024, 2048])
def test_inputs_that_are_nearly_equal(n):
    """One eigenvalue of n and rounding: the decomposition must not fail for want of a floor."""
    spec = curvature.CaptureSpec.from_layers([curvature.Layer.dense("w", (n, 3))])
    tx = kj.scale_by_kfac(spec)
    p = {"w": jnp.zeros((n, 3))}
    state, update = tx.init(p), jax.jit(tx.update)
    for t in range(11):
        a, g = (
            jax.random.normal(jax.random.key(2 * t + i), shape)
            for i, shape in enumerate(((32, n), (32, 3)))
        )
        rows = ((30 + 1e-3 * a) / 32**0.5, g / 32**0.5)
        found = curvature.Curvature.from_rows({"w": rows}, spec)
        grads = {"w": jnp.matmul(rows[0].T, rows[1], precision="highest")}
        updates, state = update(grads, state, p, curvature=found)
    assert defaults.diagnostics(state)["rejected"] == 0
    assert np.isfinite(np.asarray(updates["w"])).all()


@pytest.mark.parametrize("name", ["shampoo", "kradagrad_star"])
def test_a_basis_that_is_carried_along_under_singular_statistics(name):
    """Rank two of seven, no damping: no refresh fails, and the directions are those of `eigh`."""
    options = {"damping": 0.0, "damping_rule": "pseudo"} if name == "shampoo" else {}
    found = {}
    for root in ("eigh", "tracked"):
        tx = getattr(kj, f"scale_by_{name}")(root=root, refresh_every=1, **options)
        p = {"w": jnp.zeros((7, 5))}
        state, update = tx.init(p), jax.jit(tx.update)
        left = jax.random.normal(jax.random.key(0), (7, 2))
        for t in range(60):
            right = jax.random.normal(jax.random.key(t + 1), (2, 5))
            updates, state = update({"w": left @ right}, state, p)
        assert defaults.diagnostics(state)["rejected"] == 0, root
        found[root] = np.asarray(updates["w"]).ravel()
    u, v = found["eigh"], found["tracked"]
    assert u @ v / np.sqrt((u @ u) * (v @ v)) > 0.999
