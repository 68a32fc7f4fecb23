import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import linalg
from kradagrad_jax.linalg import inverse_update, sr_update
from tests.linalg.matrices import log_uniform, orthogonal, power, relative_error

update = jax.jit(sr_update)


def start(n, eps, dtype):
    return jnp.sqrt(jnp.asarray(eps, dtype)) * jnp.eye(n, dtype=dtype)


update_inverse = jax.jit(inverse_update)
svd_power = jax.jit(linalg.svd_power)
symmetric_power = jax.jit(linalg.symmetric_power, static_argnames="rule")
decayed_update = jax.jit(lambda r, u, decay: sr_update(r, u, decay))


def stream(n, m, steps, decades=0.0, seed=0):
    """Gradients (steps, n, m) whose rows spread over `decades`."""
    rng = np.random.default_rng(seed)
    scales = orthogonal(n, seed) * np.logspace(0, -decades / 2, n)
    return scales @ rng.normal(size=(steps, n, m))


def folded(r, gradients, step=update):
    for u in gradients:
        r = step(r, jnp.asarray(u, r.dtype))
    return r


@pytest.mark.parametrize("m", [1, 3, 12])
def test_sum(double, m):
    gradients = stream(8, m, 100, decades=4)
    r = folded(start(8, 1e-3, "float64"), gradients)
    expected = 1e-3 * np.eye(8) + np.einsum("tij,tkj->ik", gradients, gradients)
    assert relative_error(r.T @ r, expected) < 1e-12
    np.testing.assert_array_equal(np.tril(r, -1), 0.0)


def test_moving_average(double):
    gradients, b = stream(8, 3, 100, decades=4), 0.9
    r = folded(start(8, 1e-3, "float64"), gradients, lambda r, u: decayed_update(r, u, b))
    expected = 1e-3 * np.eye(8)
    for u in gradients:
        expected = b * expected + (1 - b) * u @ u.T
    assert relative_error(r.T @ r, expected) < 1e-12


def test_weights_are_free(double):
    r, u = start(4, 2.0, "float64"), jnp.asarray(stream(4, 2, 1)[0])
    result = jax.jit(sr_update)(r, u, 0.5, 3.0)
    assert relative_error(result.T @ result, 0.5 * 2.0 * np.eye(4) + 3.0 * u @ u.T) < 1e-14
    kept = sr_update(r, u, 1.0, 1.0)
    assert relative_error(kept.T @ kept, np.asarray(2.0 * np.eye(4) + u @ u.T)) < 1e-14


def test_root_equals_that_of_the_gram_form(double):
    gradients = stream(8, 8, 50, decades=6)
    r = folded(start(8, 1e-7, "float64"), gradients)
    gram = jnp.asarray(1e-7 * np.eye(8) + np.einsum("tij,tkj->ik", gradients, gradients))
    assert np.linalg.cond(gram) < 1e8
    root = symmetric_power(gram, -0.25, 0.0, "absolute")
    assert relative_error(svd_power(r, -0.25), np.asarray(root)) < 1e-9


@pytest.mark.parametrize("cond", [1e4, 1e8, 1e12])
def test_float32_keeps_what_gram_form_in_float32_loses(cond):
    """P applied to a gradient, against float64; square_root_statistics.md 4.3."""
    n, steps = 32, 20
    scales = orthogonal(n) * np.sqrt(log_uniform(n, cond))
    gradients = (scales @ np.random.default_rng(1).normal(size=(steps, n, n))).astype(np.float32)
    r = folded(start(n, 0.0, "float32"), gradients)
    exact = np.einsum("tij,tkj->ik", gradients, gradients, dtype=np.float64)
    gram = np.einsum("tij,tkj->ik", gradients, gradients)
    expected = power(exact, -0.25) @ gradients[-1]
    array_form = np.asarray(svd_power(r, -0.25), np.float64) @ gradients[-1]
    assert relative_error(array_form, expected) < 1e-3
    w, v = np.linalg.eigh(gram)
    gram_form = (v * np.maximum(w, 1e-8 * w[-1]) ** -0.25) @ v.T @ gradients[-1]
    if cond == 1e12:
        assert relative_error(gram_form, expected) > 2e-3


@pytest.mark.parametrize("size", [0.0, 1e18, 1e-18])
def test_diagonal_never_vanishes(size):
    gradients = stream(6, 1, 20) * size  # of rank one each
    r = folded(start(6, 1e-4, "float32"), gradients)
    assert np.all(np.isfinite(r))
    assert np.abs(np.diagonal(r)).min() >= 1e-2 * (1 - 1e-5)
    assert np.all(np.isfinite(svd_power(r, -0.25, 1e-4)))


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_extreme_sizes_are_not_squared(size):
    gradients = stream(6, 6, 3)
    r = np.asarray(folded(start(6, 0.0, "float32"), gradients * size), np.float64) / size
    exact = np.einsum("tij,tkj->ik", gradients, gradients)
    assert relative_error(r.T @ r, exact) < 1e-5


def test_delayed_folding_gives_the_same_root(double):
    gradients = stream(6, 4, 12, decades=4)
    each = folded(start(6, 1e-6, "float64"), gradients)
    groups = gradients.reshape(3, 4, 6, 4).transpose(0, 2, 1, 3).reshape(3, 6, 16)
    delayed = folded(start(6, 1e-6, "float64"), groups)
    assert relative_error(svd_power(delayed, -0.25), np.asarray(svd_power(each, -0.25))) < 1e-12


def test_inverse_form_is_exact(double):
    gradients, initial = stream(8, 3, 100, decades=2), 10.0
    k = start(8, initial, "float64")
    k = folded(k, gradients, update_inverse)
    information = np.eye(8) / initial + np.einsum("tij,tkj->ik", gradients, gradients)
    assert relative_error(k @ k.T, np.linalg.inv(information)) < 1e-12
    np.testing.assert_array_equal(np.tril(k, -1), 0.0)


def test_inverse_form_of_a_moving_average(double):
    gradients, b, initial = stream(6, 3, 40), 0.9, 10.0
    k = start(6, initial, "float64")
    step = jax.jit(lambda k, u: inverse_update(k / jnp.sqrt(b), jnp.sqrt(1 - b) * u))
    k = folded(k, gradients, step)
    information = np.eye(6) / initial
    for u in gradients:
        information = b * information + (1 - b) * u @ u.T
    assert relative_error(k @ k.T, np.linalg.inv(information)) < 1e-12


def test_zero_gradient_changes_nothing(double):
    r = folded(start(5, 1e-2, "float64"), stream(5, 2, 3))
    k = folded(start(5, 1e2, "float64"), stream(5, 2, 3), update_inverse)
    zero = jnp.zeros((5, 2))
    np.testing.assert_allclose(jnp.abs(update(r, zero)), jnp.abs(r), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(jnp.abs(update_inverse(k, zero)), jnp.abs(k), rtol=1e-14, atol=0)


def test_stacks_and_derivatives():
    r = jnp.stack([start(4, eps, "float32") for eps in (0.1, 1.0, 10.0)])
    u = jnp.asarray(stream(4, 2, 3), jnp.float32)

    @jax.jit
    def total(r, u):
        updated = jax.vmap(lambda r, u: sr_update(r, u, 0.5))(r, u)
        inverse = jax.vmap(inverse_update)(r, u)
        return jnp.sum(updated @ jnp.swapaxes(updated, -1, -2)) + jnp.sum(inverse)

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(r, u):
        assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0.0)


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match="cast the matrix first"):
        sr_update(jnp.eye(2, dtype=jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16))
