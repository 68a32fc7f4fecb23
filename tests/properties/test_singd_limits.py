"""IKFAC against K-FAC, where the factors diverge, and what half precision leaves of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors.method import Grams
from kradagrad_jax.factors.singd import singd_method
from tests.properties.singd_layer import (
    D_IN,
    D_OUT,
    dense_of,
    grams,
    moment,
    norm,
    options,
    roots,
    run,
)

# 1, 2: against K-FAC


def test_one_ikfac_step_is_kfac_to_second_order():
    """The difference is -3 b^2 K m^2 K^T + O(b^3)."""
    s, u, lam, last = moment(5, D_IN), moment(1, D_IN), 0.1, None
    k = np.linalg.inv(np.linalg.cholesky(s + lam * np.eye(D_IN))).T
    m = 0.5 * (k.T @ u @ k + lam * k.T @ k - np.eye(D_IN))
    for b in (0.1, 0.05, 0.025):
        o = options(ikfac=True, lr_cov=b)
        start = singd_method(o).init((D_IN, D_OUT), jnp.float64)._replace(k=jnp.asarray(k))
        new = dense_of(o, run(o, grams(1), start))[0]
        exact = np.linalg.inv((1 - b) * s + b * u + lam * np.eye(D_IN))
        difference = (new @ new.T - exact) / b**2
        gap = norm(difference + 3 * k @ m @ m @ k.T)
        assert last is None or 0.35 < gap / last < 0.65
        last = gap


def kfac(b, lam, batches):
    s = (1 - lam) * np.eye(D_IN)
    for u in batches:
        s = (1 - b) * s + b * u
        yield s


def test_ikfac_tracks_kfac():
    """From K = I, which is S = (1 - lam) I: O(b^2) after ten steps, O(b) over a horizon b t = 2."""
    fixed, horizon = [], []
    for b in (0.1, 0.05, 0.025):
        for steps, errors, power in ((10, fixed, 2), (round(2 / b), horizon, 1)):
            o = options(ikfac=True, lr_cov=b)
            batches = grams(steps, varying=True)
            new = dense_of(o, run(o, batches))[0]
            *_, s = kfac(b, 0.1, np.asarray(batches.a))
            exact = np.linalg.inv(s + 0.1 * np.eye(D_IN))
            errors.append(norm(new @ new.T - exact) / b**power)
    for errors in (fixed, horizon):
        assert max(errors) < 2 * min(errors)


@pytest.mark.parametrize("b", [0.05, 0.5])
def test_ikfac_stays_below_kfac(b):
    """K K^T <= (S + lam I)^-1 at every step."""
    batches = grams(100, varying=True)
    o = options(ikfac=True, lr_cov=b)
    factors = run(o, batches)
    for t, s in enumerate(kfac(b, 0.1, np.asarray(batches.a))):
        k = np.asarray(factors.k[t])
        exact = np.linalg.inv(s + 0.1 * np.eye(D_IN))
        assert np.linalg.eigvalsh(k @ k.T - exact)[-1] < 1e-12 * norm(exact)


# the scalar model of divergence, and low precision


@pytest.mark.parametrize("b", [0.01, 0.1, 0.5])
def test_where_it_diverges(b):
    """Stable below a curvature of 1 + 4 / b at the identity, unstable above."""
    ends = []
    for x in (0.99 * (1 + 4 / b), 1.01 * (1 + 4 / b)):
        s = Grams(jnp.full((3000, 1, 1), x), jnp.ones((3000, 1, 1)))
        o = options(ikfac=True, lr_cov=b, damping=0.0)
        ends.append(float(run(o, s).k[-1, 0, 0]) ** 2 * x)
    assert abs(ends[0] - 1) < 1e-6
    assert not abs(ends[1] - 1) < 1e-6


def test_the_frobenius_clamp_bounds_the_factors():
    """Rank-one curvature 1e4 * ones at d = 64: the entry clamp lets K grow, this one does not."""
    d = 64
    s = Grams(jnp.full((300, d, d), 1e4), jnp.ones((300, 1, 1)))
    for kind in ("frobenius", "max_entry"):
        o = options(ikfac=True, lr_cov=0.1, damping=0.1, normalize_lr_cov=kind)
        assert np.all(np.abs(run(o, s).k) < 10) == (kind == "frobenius")


@pytest.mark.parametrize(
    "dtype,b,low,high",
    [(jnp.float32, 0.1, 0, 1e-5), (jnp.bfloat16, 1.0, 1e-3, 0.1), (jnp.bfloat16, 0.1, 1e-3, 0.1),
     (jnp.bfloat16, 0.01, 0.1, 1.0)],
)  # fmt: skip
def test_precision_of_the_inverse(dtype, b, low, high):
    """bfloat16 factors freeze early for a small factor step; nothing is ever non-finite."""
    d, steps = 32, round(20 / b)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    u = (q * np.logspace(0, -4, d)) @ q.T
    s = Grams(jnp.broadcast_to(u, (steps, d, d)), jnp.ones((steps, 1, 1)))
    o = options(ikfac=True, lr_cov=b, damping=1e-2)
    k = np.asarray(run(o, s, dtype=dtype).k[-1], np.float64)
    exact = np.linalg.inv(u + 1e-2 * np.eye(d))
    error = norm(k @ k.T - exact) / norm(exact)
    assert low <= error < high


def test_second_order():
    """K (I - b m + (b m)^2 / 2) is the exponential up to O(b^3)."""
    gaps = []
    for b in (0.1, 0.05):
        k, _ = roots(ikfac=True, lr_cov=b, second_order=True)
        m = 0.5 * (moment(1, D_IN) - 0.9 * np.eye(D_IN))
        w, v = np.linalg.eigh(m)
        gaps.append(norm(k - (v * np.exp(-b * w)) @ v.T))
    assert 6.5 < gaps[0] / gaps[1] < 9.5
