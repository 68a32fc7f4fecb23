"""The KrAD step on one factor (kradagrad.md section 6.1, numbers in the names)."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from kradagrad_jax.factors import krad_factored, krad_step
from tests.properties.draws import arrays, dense, smallest, spectrum

BOUNDS = ["sym", "fro", "trace", "spectral", "official"]
SHAPES = [(4, 3), (3, 5), (4, 1), (1, 3)]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**32 - 1)
over_bounds = pytest.mark.parametrize("bound", BOUNDS)


@functools.cache
def stepper(bound, damping=0.0):
    return jax.jit(lambda x, u: krad_step(x, u, bound=bound, damping=damping))


factored = jax.jit(krad_factored)


def inverse_statistic(n, seed, decades=3.0):
    """A positive definite L of condition up to ten to the `decades`."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return (q * 10 ** rng.uniform(-decades, 0, n)) @ q.T


def shortfall(bound, x, u):
    """s of t = 1 + s, as the specification writes it."""
    la = x @ u @ u.T
    if bound == "fro":
        return np.linalg.norm(la)
    if bound in ("trace", "official"):
        return np.trace(la)
    inner = u.T @ x @ u
    return np.linalg.norm(inner) if bound == "sym" else np.linalg.norm(inner, 2)


def scale_t(bound, x, u):
    t = 1 + shortfall(bound, x, u)
    return len(x) * t if bound == "official" else t


@over_bounds
@given(shape=shapes, seed=seeds, data=st.data())
def test_01_positive_definite_and_monotone(bound, shape, seed, data):
    x, u = inverse_statistic(shape[0], seed), data.draw(arrays(shape))
    for _ in range(3):
        new = np.asarray(stepper(bound)(x, u))
        assert spectrum(new)[0] > 0
        assert smallest(x - new, spectrum(x)[-1]) > -1e-14
        np.testing.assert_array_equal(new, new.T)
        x = new


@over_bounds
@given(shape=shapes, seed=seeds, data=st.data())
def test_02_dominated_by_the_exact_inverse(bound, shape, seed, data):
    x, u = inverse_statistic(shape[0], seed), data.draw(arrays(shape))
    new = np.asarray(stepper(bound)(x, u))
    t = scale_t(bound, x, u)
    exact = np.linalg.inv(np.linalg.inv(x) + u @ u.T / t)
    assert smallest(exact - new, spectrum(x)[-1]) > -1e-12


@over_bounds
@given(seed=seeds)
def test_02_accumulated(bound, seed):
    """L_k^-1 >= L_0^-1 + sum A_j / t_j."""
    x = np.eye(4)
    total = np.eye(4)
    for j in range(10):
        u = dense((4, 3), (seed, j))
        total = total + u @ u.T / scale_t(bound, x, u)
        x = np.asarray(stepper(bound)(x, u))
    assert smallest(np.linalg.inv(x) - total, spectrum(total)[-1]) > -1e-12


@given(shape=shapes, seed=seeds, data=st.data())
def test_03_order_of_the_bounds(shape, seed, data):
    """spectral <= sym <= min(fro, trace): a tighter bound moves L further."""
    x, u = inverse_statistic(shape[0], seed), data.draw(arrays(shape))
    moved = {b: np.trace(x - np.asarray(stepper(b)(x, u))) for b in BOUNDS}
    slack = 1e-12 * np.trace(x)
    assert moved["spectral"] >= moved["sym"] - slack
    assert moved["sym"] >= max(moved["fro"], moved["trace"]) - slack
    assert moved["trace"] >= moved["official"] - slack


@pytest.mark.parametrize("bound", ["sym", "trace", "spectral"])
@given(seed=seeds)
def test_04_rank_one_gradients_are_exact(bound, seed):
    x, b = 100.0 * np.eye(5), 0.01 * np.eye(5)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        u = np.outer(rng.normal(size=5), rng.normal(size=4))
        b = b + u @ u.T
        x = np.asarray(stepper(bound)(x, u))
    # the spectral norm is bounded by repeated squaring, exact to rounding
    assert np.abs(x @ b - np.eye(5)).max() < 1e-9


def test_04_but_not_with_the_frobenius_bound():
    x, b = 1e4 * np.eye(5), 1e-4 * np.eye(5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        u = np.outer(rng.normal(size=5), rng.normal(size=4))
        b = b + u @ u.T
        x = np.asarray(stepper("fro")(x, u))
    assert np.abs(x @ b - np.eye(5)).max() > 1.0


@over_bounds
@given(seed=seeds, columns=st.sampled_from([1, 3]))
def test_06_dimension_one_is_adagrad(bound, seed, columns):
    x, total = np.array([[4.0]]), 0.25
    for j in range(5):
        u = dense((1, columns), (seed, j))
        total += np.sum(u**2)
        x = np.asarray(stepper(bound)(x, u))
    np.testing.assert_allclose(x, [[1 / total]], rtol=1e-11)


@over_bounds
@given(shape=shapes, seed=seeds)
def test_09_a_zero_gradient_changes_nothing(bound, shape, seed):
    x = inverse_statistic(shape[0], seed)
    x = (x + x.T) / 2
    np.testing.assert_array_equal(stepper(bound)(x, np.zeros(shape)), x)


@over_bounds
@given(shape=shapes, seed=seeds, damping=st.sampled_from([0.0, 0.05]), data=st.data())
def test_10_thin_and_dense_forms_agree(bound, shape, seed, damping, data):
    """The formula of the paper, whichever of its two forms the shape selects."""
    x, u = inverse_statistic(shape[0], seed), data.draw(arrays(shape))
    new = np.asarray(stepper(bound, damping)(x, u))
    x = x - damping * x @ x
    expected = x - x @ u @ u.T @ x / scale_t(bound, x, u)
    # the spectral norm comes from repeated squaring: an upper bound, tight to 1e-9
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-9 * np.abs(x).max())


@given(shape=shapes, seed=seeds, data=st.data())
def test_13_the_official_step_is_short(shape, seed, data):
    x, u = inverse_statistic(shape[0], seed), data.draw(arrays(shape))
    new = np.asarray(stepper("official")(x, u))
    assert smallest(new - (1 - 1 / shape[0]) * x, spectrum(x)[-1]) > -1e-13


def test_14_quality_for_full_rank_streams():
    """Eigenvalues of B^(1/2) L B^(1/2): 1 for the exact inverse, larger in order of the bounds."""
    gradients = [dense((6, 6), (7, j)) for j in range(200)]
    b = np.eye(6) + sum(u @ u.T for u in gradients)
    c = np.linalg.cholesky(b)
    means = []
    for bound, highest in (("spectral", 1.5), ("sym", 2.1), ("fro", 2.3), ("trace", 4.2)):
        x = np.eye(6)
        for u in gradients:
            x = np.asarray(stepper(bound)(x, u))
        values = spectrum(c.T @ x @ c)
        assert values[0] > 1.0
        assert values[-1] < highest
        means.append(values.mean())
    assert means == sorted(means)


@given(shape=shapes, seed=seeds, data=st.data())
def test_15_factored_form(shape, seed, data):
    """L_new <= L and dominated by the exact inverse, with the Frobenius norm of S^T A S."""
    s = np.linalg.cholesky(inverse_statistic(shape[0], seed))
    u = data.draw(arrays(shape))
    new = np.asarray(factored(s, u))
    x, x_new = s @ s.T, new @ new.T
    t = 1 + np.linalg.norm(s.T @ u @ u.T @ s)
    exact = np.linalg.inv(np.linalg.inv(x) + u @ u.T / t)
    top = spectrum(x)[-1]
    assert smallest(x - x_new, top) > -1e-14
    assert smallest(exact - x_new, top) > -1e-12
    assert spectrum(x_new)[0] > 0


def test_15_positive_definite_in_float32_for_a_thousand_steps():
    """Spectrum of A over eight decades, start at 1e8, where the direct form fails."""
    n = 32
    weights = jnp.asarray(10 ** np.linspace(0.75, -3.25, n), jnp.float32)
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(1000, n, n)), jnp.float32)

    @jax.jit
    def run(s):
        return jax.lax.scan(
            lambda s, g: (krad_factored(s, weights[:, None] * g), None), s, gradients
        )

    s = np.asarray(run(1e4 * jnp.eye(n, dtype=jnp.float32))[0], np.float64)
    values = np.linalg.svd(s, compute_uv=False)
    assert np.isfinite(s).all()
    assert values[-1] > 0
    assert values[0] <= 1e4 * 1.0001
