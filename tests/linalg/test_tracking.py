from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.linalg import refine_eigenbasis, symmetric_power
from tests.linalg.matrices import (
    FACTORISATIONS,
    log_uniform,
    orthogonal,
    power,
    primitives,
    relative_error,
    with_spectrum,
)

refine = jax.jit(refine_eigenbasis)
compiled_power = jax.jit(symmetric_power)


@partial(jax.jit, static_argnums=2)
def history(a, q, steps):
    """Bases and eigenvalues of `steps` refinements of the same matrix."""

    def step(q, _):
        w, q = refine_eigenbasis(a, q)
        return q, (w, q)

    return jax.lax.scan(step, q, None, length=steps)[1]


def off_diagonal(a, q):
    """Largest off-diagonal entry of q^T a q relative to its largest entry."""
    s = np.asarray(q, np.float64).T @ np.asarray(a, np.float64) @ np.asarray(q, np.float64)
    return np.abs(s - np.diag(np.diag(s))).max() / max(np.abs(s).max(), 1e-100)


def defect(q):
    q = np.asarray(q, np.float64)
    return np.linalg.norm(q.T @ q - np.eye(len(q)), 2)


def near_basis(q, size, seed=5):
    noise = np.random.default_rng(seed).normal(size=q.shape) / np.sqrt(len(q))
    return np.linalg.qr(q @ (np.eye(len(q)) + size * (noise - noise.T)))[0]


def test_converges_quadratically(double):
    w = np.linspace(1.0, 10.0, 24)
    a = with_spectrum(w)
    q = near_basis(orthogonal(24), 2e-2)
    errors = [off_diagonal(a, q)]
    values, bases = history(jnp.asarray(a), jnp.asarray(q), 4)
    errors += [off_diagonal(a, basis) for basis in bases]
    assert errors[0] > 1e-3
    for before, after in pairwise(errors):
        assert after < max(30.0 * before**2, 1e-14)
    assert errors[-1] < 1e-12 and defect(bases[-1]) < 1e-12
    np.testing.assert_allclose(np.sort(values[-1]), w, rtol=1e-12)


def test_single_step_is_that_of_the_paper_where_gaps_are_large(double):
    """Ogita and Aishima (2018), Algorithm 1, up to third order in the error."""
    a, size = with_spectrum(np.linspace(1.0, 6.0, 6)), 1e-4
    q = near_basis(orthogonal(6), size) * (1.0 + size)
    r, s = np.eye(6) - q.T @ q, q.T @ a @ q
    w = np.diag(s) / (1 - np.diag(r))
    with np.errstate(divide="ignore", invalid="ignore"):
        e = (s + w[None, :] * r) / (w[None, :] - w[:, None])
    e[np.diag_indices(6)] = np.diag(r) / 2
    _, new = refine(jnp.asarray(a), jnp.asarray(q))
    assert np.abs(new - q).max() > 1e-5
    np.testing.assert_allclose(new, q + q @ e, atol=20 * size**2)


SPECTRA = {
    "graded": lambda n: np.logspace(0, -8, n),
    "random over 8 decades": lambda n: log_uniform(n, 1e8),
    "two clusters": lambda n: np.repeat([1.0, 0.1], [n // 2, n - n // 2]),
    "rank four": lambda n: np.concatenate([[1.0, 0.5, 0.2, 0.1], np.zeros(n - 4)]),
    "narrow": lambda n: 1.0 + 1e-3 * np.random.default_rng(0).uniform(size=n),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", [8, 64])
def test_converges_from_the_identity(double, spectrum, n):
    a = with_spectrum(SPECTRA[spectrum](n), seed=2)
    _, bases = history(jnp.asarray(a), jnp.eye(n), 60)
    assert off_diagonal(a, bases[-1]) < 1e-6
    assert max(defect(q) for q in bases) < 0.2


@pytest.mark.parametrize("n", [2, 128])
def test_converges_from_the_identity_on_random_matrices(double, n):
    g = np.random.default_rng(n).normal(size=(n, 2 * n))
    values, bases = history(jnp.asarray(g @ g.T), jnp.eye(n), 60)
    assert off_diagonal(g @ g.T, bases[-1]) < 1e-6
    np.testing.assert_allclose(np.sort(values[-1]), np.linalg.eigvalsh(g @ g.T), rtol=1e-5)


def test_eigenvalues_belong_to_the_new_basis(double):
    """To second order, also where a large eigenvalue leaks into a small one."""
    w = np.logspace(0, -6, 12)
    q = near_basis(orthogonal(12), 3e-4)
    values, new = refine(jnp.asarray(with_spectrum(w)), jnp.asarray(q))
    old = np.diag(q.T @ with_spectrum(w) @ q)
    quotients = np.diag(new.T @ with_spectrum(w) @ new) / np.sum(new * new, axis=0)
    assert np.abs(old / quotients - 1).max() > 1e-2
    np.testing.assert_allclose(values, quotients, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_never_far_from_orthonormal(double, dtype):
    rng = np.random.default_rng(0)
    for trial in range(200):
        n = 6
        a = rng.normal(size=(n, n)) * 10.0 ** rng.uniform(-4, 4, size=n)
        a = a + a.T if trial % 2 else a @ a.T
        q = orthogonal(n, trial) * np.sqrt(1 + 0.19 * rng.choice([-1, 1], size=n))
        q = jnp.asarray(q if trial % 3 else q @ orthogonal(n, trial + 1), dtype)
        for _ in range(4):
            w, q = refine(jnp.asarray(a, dtype), q)
            assert defect(q) < 0.2 and np.all(np.isfinite(w))


gradient_of_sums = jax.jit(jax.grad(lambda a, q: sum(jnp.sum(x) for x in refine_eigenbasis(a, q))))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["zero", "identity", "rank one", "clustered", "one entry"])
def test_degenerate_matrices(double, dtype, kind):
    matrices = {
        "zero": np.zeros((6, 6)),
        "identity": 3.0 * np.eye(6),
        "rank one": np.ones((6, 6)),
        "clustered": with_spectrum(np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])),
        "one entry": np.eye(6) + np.eye(6, k=3) + np.eye(6, k=-3),  # equal diagonal, coupled
    }
    a = jnp.asarray(matrices[kind], dtype)
    values, bases = history(a, jnp.eye(6, dtype=dtype), 40)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    assert off_diagonal(a, bases[-1]) < tolerance
    np.testing.assert_allclose(np.sort(values[-1]), np.linalg.eigvalsh(a), atol=10 * tolerance)
    assert jnp.all(jnp.isfinite(gradient_of_sums(a, bases[0])))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_sizes_in_float32(size):
    a = with_spectrum(np.linspace(1.0, 2.0, 6))
    values, bases = history(jnp.asarray(size * a, jnp.float32), jnp.eye(6), 30)
    assert off_diagonal(a, bases[-1]) < 1e-5
    np.testing.assert_allclose(np.sort(values[-1]) / size, np.linspace(1.0, 2.0, 6), rtol=1e-4)


@pytest.mark.parametrize("cond", [1e2, 1e4])
def test_one_step_after_a_small_change(double, cond):
    """Close eigenvalues turn far, to no effect; they must not hold back the rest."""
    n, scales = 128, orthogonal(128) * np.sqrt(log_uniform(128, cond))
    g = scales @ np.random.default_rng(1).normal(size=(n, n)) / np.sqrt(n)
    old = scales @ scales.T
    new = 0.99 * old + 0.01 * g @ g.T
    w, q = refine(jnp.asarray(new), jnp.asarray(np.linalg.eigh(old)[1]))
    root = (np.asarray(q) * np.asarray(w) ** -0.25) @ np.asarray(q).T
    expected = power(new, -0.25) @ scales
    stale = relative_error(power(old, -0.25) @ scales, expected)
    assert relative_error(root @ scales, expected) < 0.25 * stale


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tracks_a_moving_average(double, dtype):
    """One step per refresh keeps the inverse fourth root, with a spectrum over 4 decades."""
    n, rng = 32, np.random.default_rng(0)
    scales = orthogonal(n) * np.logspace(0, -2, n)
    a = scales @ scales.T
    q = jnp.asarray(np.linalg.eigh(a)[1], dtype)
    for _ in range(30):
        previous = a
        g = scales @ rng.normal(size=(n, n)) / np.sqrt(n)
        a = 0.95 * a + 0.05 * g @ g.T
        w, q = refine(jnp.asarray(a, dtype), q)
    expected = np.asarray(compiled_power(jnp.asarray(a), -0.25, 1e-6))
    stale = np.asarray(compiled_power(jnp.asarray(previous), -0.25, 1e-6))
    tracked = (np.asarray(q, np.float64) * np.asarray(w, np.float64) ** -0.25) @ np.asarray(q).T
    assert relative_error(tracked, expected) < 0.3 * relative_error(stale, expected)
    assert relative_error(tracked, expected) < 5e-3


def test_only_products_in_the_program():
    program = jax.make_jaxpr(refine_eigenbasis)(jnp.eye(4), jnp.eye(4))
    assert not primitives(program) & FACTORISATIONS
    assert str(program).count("dot_general[") == 6


def test_stacks():
    a = jnp.asarray(np.stack([with_spectrum(np.arange(1.0, 5.0), s) for s in range(3)]), "float32")
    q = jnp.broadcast_to(jnp.eye(4), a.shape)
    w, bases = jax.jit(jax.vmap(refine_eigenbasis))(a, q)
    for i in range(3):
        w_i, basis = refine(a[i], q[i])
        np.testing.assert_allclose(w[i], w_i, rtol=1e-5)
        np.testing.assert_allclose(bases[i], basis, atol=1e-5)


def test_bad_input_is_not_hidden():
    w, q = refine(jnp.eye(3).at[0, 1].set(jnp.nan), jnp.eye(3))
    assert not (jnp.all(jnp.isfinite(w)) and jnp.all(jnp.isfinite(q)))


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="square matrices"):
        refine_eigenbasis(jnp.eye(3), jnp.eye(4))
    with pytest.raises(TypeError, match="cast the matrix first"):
        refine_eigenbasis(jnp.eye(3, dtype=jnp.bfloat16), jnp.eye(3, dtype=jnp.bfloat16))
