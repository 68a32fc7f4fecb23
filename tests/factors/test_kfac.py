"""K-FAC of one layer against closed forms (float64); property numbers are those of the method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.factors.method import Grams, Rows, Step
from tests.x64 import x64

RNG = np.random.default_rng(0)


def step(count=1):
    """Statistics so far; all refreshes but the one under way."""
    return Step(jnp.asarray(count, jnp.int32), 1, *(jnp.asarray(count, jnp.int32),) * 2)


def rows(n=40, d_in=5, d_out=4, seed=0):
    rng = np.random.default_rng(seed)
    return Rows(jnp.asarray(rng.normal(size=(n, d_in))), jnp.asarray(rng.normal(size=(n, d_out))))


def after(batches, shape=(5, 4), **options):
    method = kfac_method(KfacOptions(**options))
    factor = method.init(shape, jnp.float64)
    for k, s in enumerate(batches, 1):
        factor = method.accumulate(factor, s, step(k))
    return method, method.refresh(factor, step(len(batches)))


def direction(batches, gradient, **options):
    method, factor = after(batches, gradient.shape, **options)
    return method.precondition(factor, jnp.asarray(gradient), step(len(batches)))


def kron_solve(a, g, m, lam):
    """Solution U of ``A U G + lam U = M`` by a dense system."""
    system = np.kron(a, g) + lam * np.eye(a.shape[0] * g.shape[0])
    return np.linalg.solve(system, np.asarray(m).reshape(-1)).reshape(m.shape)


def test_exact_damping_solves_the_damped_system():
    with x64():
        s, m = rows(), RNG.normal(size=(5, 4))
        u = direction([s], m, damping=0.03, damping_rule="exact", inverse="eigh")
        expected = kron_solve(s.a.T @ s.a, s.g.T @ s.g, m, 0.03)
        np.testing.assert_allclose(u, expected, rtol=1e-11)


def test_factored_damping_is_the_published_formula():
    with x64():
        s, m, lam = rows(), RNG.normal(size=(5, 4)), 0.2
        a, g = np.asarray(s.a.T @ s.a), np.asarray(s.g.T @ s.g)
        pi = np.sqrt(np.trace(a) / 5 / (np.trace(g) / 4))
        left = np.linalg.inv(a + pi * np.sqrt(lam) * np.eye(5))
        right = np.linalg.inv(g + np.sqrt(lam) / pi * np.eye(4))
        for inverse in ("cholesky", "eigh"):
            u = direction([s], m, damping=lam, inverse=inverse)
            np.testing.assert_allclose(u, left @ m @ right, rtol=1e-11)


def test_factored_damping_is_stronger_than_exact_damping():
    with x64():
        s = rows()
        for seed in range(5):
            m = np.random.default_rng(seed).normal(size=(5, 4))
            factored = np.sum(m * direction([s], m, damping=0.5))
            exact = direction([s], m, damping=0.5, damping_rule="exact", inverse="eigh")
            assert 0 < factored < np.sum(m * exact)


def test_corrected_average_is_the_weighted_mean():
    with x64():
        batches, ema = [rows(seed=k) for k in range(6)], 0.8
        _, factor = after(batches, ema=ema)
        weights = ema ** np.arange(6)[::-1]
        for i in range(2):
            expected = sum(w * b[i].T @ b[i] for w, b in zip(weights, batches, strict=True))
            np.testing.assert_allclose(factor.statistics[i], expected / weights.sum(), rtol=1e-13)


def test_capped_average_is_a_plain_mean_at_first():
    with x64():
        batches = [rows(seed=k) for k in range(5)]
        _, factor = after(batches, averaging="capped")
        np.testing.assert_allclose(
            factor.statistics[0], sum(b.a.T @ b.a for b in batches) / 5, rtol=1e-13
        )


def test_affine_invariance_without_damping():
    """Other coordinates for inputs and outputs change the step as they change the weight."""
    with x64():
        s, m = rows(), RNG.normal(size=(5, 4))
        o, f = RNG.normal(size=(5, 5)), RNG.normal(size=(4, 4))
        moved = Rows(s.a @ o.T, s.g @ f)
        # a -> a O^T needs W -> O^-T W F^-T; the gradient moves the other way
        u = direction([s], m, damping=0.0)
        v = direction([moved], o @ m @ f, damping=0.0)
        np.testing.assert_allclose(o.T @ v @ f.T, u, rtol=1e-9)


def test_scaling_the_loss():
    with x64():
        s, m, c = rows(), RNG.normal(size=(5, 4)), 7.0
        u = direction([s], m, damping=0.1)
        v = direction([Rows(s.a, c * s.g)], c * m, damping=0.1 * c**2)
        np.testing.assert_allclose(v, u / c, rtol=1e-12)
        relative = {"damping_rule": "relative", "inverse": "eigh", "damping": 0.1}
        np.testing.assert_allclose(
            direction([Rows(s.a, c * s.g)], m, **relative),
            direction([s], m, **relative) / c**2,
            rtol=1e-12,
        )


def test_infinite_damping_is_gradient_descent():
    with x64():
        s, m = rows(), RNG.normal(size=(5, 4))
        for options in ({}, {"damping_rule": "exact", "inverse": "eigh"}):
            u = direction([s], m, damping=1e14, **options)
            np.testing.assert_allclose(1e14 * u, m, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1, 1)])
def test_factors_of_size_one_take_no_damping(shape):
    with x64():
        s, m, lam = rows(40, *shape), RNG.normal(size=shape), 0.3
        expected = kron_solve(s.a.T @ s.a, s.g.T @ s.g, m, lam)
        for inverse in ("cholesky", "eigh"):
            u = direction([s], m, damping=lam, inverse=inverse)
            np.testing.assert_allclose(u, expected, rtol=1e-11)


def test_without_curvature_the_gradient_is_only_scaled():
    with x64():
        zero, m = Rows(jnp.zeros((3, 5)), jnp.zeros((3, 4))), RNG.normal(size=(5, 4))
        np.testing.assert_allclose(direction([zero], m, damping=0.25), m / 0.25, rtol=1e-12)


def test_square_root_statistics_are_the_same_method():
    with x64():
        batches, m = [rows(seed=k) for k in range(4)], RNG.normal(size=(5, 4))
        for rule in ("factored", "exact", "relative"):
            options = {"damping": 0.02, "damping_rule": rule, "inverse": "eigh"}
            u = direction(batches, m, **options)
            v = direction(batches, m, statistics="square_root", **options)
            np.testing.assert_allclose(u, v, rtol=1e-10)


def test_square_root_statistics_keep_small_curvature_in_float32():
    """Condition number 1e8 of A: the Gram form in float32 loses the smallest curvature."""
    with x64():
        basis = np.linalg.qr(RNG.normal(size=(60, 5)))[0]
        a = basis * 10.0 ** -np.linspace(0, 4, 5) @ np.linalg.qr(RNG.normal(size=(5, 5)))[0]
        g = RNG.normal(size=(60, 4))
        m = np.ones((5, 4))
        s = Rows(jnp.asarray(a), jnp.asarray(g))
        exact = np.asarray(direction([s], m, damping=1e-24, inverse="eigh"))
    errors = {}
    for form in ("gram", "square_root"):
        s = Rows(jnp.asarray(a, jnp.float32), jnp.asarray(g, jnp.float32))
        method = kfac_method(KfacOptions(damping=1e-24, inverse="eigh", statistics=form))
        factor = method.accumulate(method.init((5, 4), jnp.float32), s, step())
        u = method.precondition(method.refresh(factor, step()), jnp.ones((5, 4)), step())
        errors[form] = np.abs(np.asarray(u) - exact).max() / np.abs(exact).max()
    assert errors["square_root"] < 1e-2 < errors["gram"]


def test_diagonal_factors():
    with x64():
        s, m, lam = rows(), RNG.normal(size=(5, 4)), 0.1
        a = np.sum(np.square(s.a), 0)
        full = direction([Grams(jnp.diag(jnp.asarray(a)), s.g.T @ s.g)], m, damping=lam)
        for given in (s, Grams(jnp.asarray(a), s.g.T @ s.g), Grams(s.a.T @ s.a, s.g.T @ s.g)):
            for inverse in ("cholesky", "eigh"):
                u = direction([given], m, damping=lam, diagonal=(True, False), inverse=inverse)
                np.testing.assert_allclose(u, full, rtol=1e-11)
        with pytest.raises(ValueError, match="max_dim"):
            direction([Grams(jnp.asarray(a), s.g.T @ s.g)], m)


def test_square_root_statistics_need_rows():
    s = rows()
    with x64(), pytest.raises(ValueError, match="reducer='raw'"):
        after([Grams(s.a.T @ s.a, s.g.T @ s.g)], statistics="square_root", inverse="eigh")


def test_rank_deficient_factors_in_float32_stay_finite():
    s = Rows(jnp.ones((3, 50), jnp.float32), jnp.ones((3, 40), jnp.float32))
    for options in ({}, {"inverse": "eigh"}, {"inverse": "eigh", "damping_rule": "exact"}):
        for damping in (1e-3, 1e-30):
            method = kfac_method(KfacOptions(damping=damping, **options))
            factor = method.accumulate(method.init((50, 40), jnp.float32), s, step())
            factor = method.refresh(factor, step())
            assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), factor))
