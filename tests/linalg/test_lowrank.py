"""Low-rank eigenpairs: randomised, updated, corrected, applied (float64 unless said)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import linalg
from kradagrad_jax.linalg import LowRank
from tests.x64 import x64


def rng(seed=0):
    return np.random.default_rng(seed)


def spectrum(d, decay, seed=0):
    """A matrix with eigenvalues ``decay**i``, and its eigenpairs."""
    q = np.linalg.qr(rng(seed).normal(size=(d, d)))[0]
    w = decay ** np.arange(d)
    return jnp.asarray(q * w @ q.T), LowRank(jnp.asarray(w), jnp.asarray(q))


def matrix(pairs):
    return (pairs.u * pairs.w[None, :]) @ pairs.u.T


def orthogonality(pairs):
    return float(np.abs(np.asarray(pairs.u.T @ pairs.u) - np.eye(pairs.u.shape[1])).max())


@pytest.mark.parametrize("method", [linalg.randomized_svd, linalg.symmetric_sketch])
def test_sketches_of_low_rank_matrices_are_exact(method):
    with x64():
        b = rng().normal(size=(12, 4))
        m = jnp.asarray(b @ b.T)
        omega = jnp.asarray(rng(1).normal(size=(12, 6)))
        pairs = method(m, omega, 4, 1)
        np.testing.assert_allclose(matrix(pairs), m, atol=1e-12)
        assert orthogonality(pairs) < 1e-13


def test_sketches_of_full_width_are_the_eigenpairs():
    with x64():
        m, exact = spectrum(9, 0.5)
        omega = jnp.asarray(rng(1).normal(size=(9, 9)))
        for method in (linalg.randomized_svd, linalg.symmetric_sketch):
            pairs = method(m, omega, 9, 0)
            np.testing.assert_allclose(pairs.w, exact.w, rtol=1e-10)


def test_sketched_values_are_bounds_from_below():
    """Symmetric sketch <= randomised SVD <= eigenvalues, for the same range (P8)."""
    with x64():
        m, exact = spectrum(40, 0.9)
        omega = jnp.asarray(rng(1).normal(size=(40, 10)))
        svd = linalg.randomized_svd(m, omega, 8, 1).w
        sre = linalg.symmetric_sketch(m, omega, 8, 3).w
        assert np.all(sre <= svd + 1e-14) and np.all(svd <= exact.w[:8] + 1e-14)


def test_a_sketch_depends_on_the_range_of_the_test_matrix_alone():
    with x64():
        m, _ = spectrum(20, 0.8)
        omega = jnp.asarray(rng(1).normal(size=(20, 6)))
        mixed = omega @ jnp.asarray(rng(2).normal(size=(6, 6)))
        for method in (linalg.randomized_svd, linalg.symmetric_sketch):
            a, b = method(m, omega, 4, 2), method(m, mixed, 4, 2)
            np.testing.assert_allclose(matrix(a), matrix(b), atol=1e-12)


def test_columns_beyond_the_width_do_not_matter():
    with x64():
        m, _ = spectrum(20, 0.8)
        omega = jnp.asarray(rng(1).normal(size=(20, 8)))
        for method in (linalg.randomized_svd, linalg.symmetric_sketch):
            small = method(m, omega[:, :5], 4, 2)
            masked = jax.jit(lambda w, f=method: f(m, omega, 4, 2, w))(5)
            np.testing.assert_allclose(matrix(masked), matrix(small), atol=1e-12)


def test_orthonormalised_products_keep_weak_pairs_in_float32():
    m, exact = spectrum(30, 0.5)
    m = jnp.asarray(m, jnp.float32)
    omega = jnp.asarray(rng(1).normal(size=(30, 8)), jnp.float32)
    safe = linalg.symmetric_sketch(m, omega, 8, 6)
    plain = linalg.symmetric_sketch(m, omega, 8, 6, orthonormalize=False)
    error = lambda pairs: float(abs(pairs.w[7] / exact.w[7] - 1))  # noqa: E731
    assert error(safe) < 1e-3 < error(plain)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data", ["generic", "duplicate", "subspace", "zero"])
def test_brand_updates_are_exact_and_stay_orthonormal(data, dtype):
    with x64():
        tolerance = 1e-12 if dtype == "float64" else 2e-5
        fixed = rng(9).normal(size=(24, 5))

        def columns(k):
            c = rng(k).normal(size=(24, 4))
            if data == "duplicate":
                c[:, 3] = c[:, 0]
            elif data == "subspace":
                c = fixed @ rng(k).normal(size=(5, 4))
            return jnp.asarray(0 * c if data == "zero" else c, dtype)

        pairs = LowRank(jnp.zeros(6, dtype), jnp.eye(24, 6, dtype=dtype))
        update = jax.jit(linalg.brand_update)
        for k in range(60):
            kept = LowRank(0.9 * pairs.w[:6], pairs.u[:, :6])
            pairs = update(kept, columns(k))
            expected = matrix(kept) + columns(k) @ columns(k).T
            scale = max(float(jnp.abs(expected).max()), 1e-30)
            assert float(jnp.abs(matrix(pairs) - expected).max()) < tolerance * scale
        assert orthogonality(pairs) < (1e-13 if dtype == "float64" else 2e-6)
        assert bool(jnp.all(pairs.w[:-1] >= pairs.w[1:])) and float(pairs.w[-1]) >= 0


def test_corrections_are_optimal_on_their_span():
    with x64():
        m, _ = spectrum(20, 0.8)
        rough = linalg.randomized_svd(m + 0.1 * jnp.eye(20), jnp.eye(20, 8), 8, 0)
        index = jnp.asarray([5, 0, 2])
        after = linalg.correct(rough, m, index)
        assert orthogonality(after) < 1e-13
        assert bool(jnp.all(after.w[:-1] >= after.w[1:]))
        before, now = (float(jnp.linalg.norm(m - matrix(p))) for p in (rough, after))
        assert now <= before
        span = rough.u[:, index]
        inner = span.T @ (m - matrix(after)) @ span
        np.testing.assert_allclose(inner, 0, atol=1e-13)


def test_solve_is_the_inverse_of_the_continued_matrix():
    with x64():
        m, exact = spectrum(15, 0.7)
        pairs = LowRank(exact.w[:5], exact.u[:, :5])
        x = jnp.asarray(rng().normal(size=(15, 3)))
        u = pairs.u
        for floor in (0.0, float(pairs.w[-1])):
            dense = matrix(pairs) + floor * (jnp.eye(15) - u @ u.T) + 0.1 * jnp.eye(15)
            ours = linalg.low_rank_solve(pairs, x, 0.1, floor)
            np.testing.assert_allclose(ours, np.linalg.solve(dense, x), rtol=1e-11)
        # shorter steps in the tail with continuation than exact, longer without (P6)
        steps = [float(jnp.sum(x * linalg.low_rank_solve(pairs, x, 0.1, f)))
                 for f in (pairs.w[-1], 0.0)]  # fmt: skip
        true = float(np.sum(x * np.linalg.solve(m + 0.1 * np.eye(15), x)))
        assert steps[0] <= true <= steps[1]


def test_thin_qr_in_stacks_and_derivatives():
    with x64():
        a = jnp.asarray(rng().normal(size=(3, 7, 4)))
        q, r = jax.vmap(linalg.qr)(a)
        np.testing.assert_allclose(q @ r, a, atol=1e-13)
        np.testing.assert_allclose(
            jnp.swapaxes(q, 1, 2) @ q, jnp.stack([jnp.eye(4)] * 3), atol=1e-13
        )
        da = jnp.asarray(rng(1).normal(size=(7, 4)))
        (q, r), (dq, dr) = jax.jvp(linalg.qr, (a[0],), (da,))
        h = 1e-6
        (qa, ra), (qb, rb) = linalg.qr(a[0] + h * da), linalg.qr(a[0] - h * da)
        np.testing.assert_allclose(dq, (qa - qb) / (2 * h), atol=1e-7)
        np.testing.assert_allclose(dr, (ra - rb) / (2 * h), atol=1e-7)
        singular = linalg.qr(jnp.zeros((5, 3)))[0]
        np.testing.assert_allclose(singular.T @ singular, np.eye(3), atol=1e-14)
        assert bool(jnp.isnan(linalg.qr(a[0].at[0, 0].set(jnp.inf))[0]).all())
