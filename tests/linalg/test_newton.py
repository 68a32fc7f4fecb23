from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.linalg import checked_positive_root, inverse_root, symmetric_power
from tests.linalg.matrices import (
    FACTORISATIONS,
    log_uniform,
    power,
    primitives,
    relative_error,
    with_spectrum,
)


def positive_root(a, p, *args, **options):
    return checked_positive_root(a, p, *args, **options)[0]


compiled = jax.jit(inverse_root, static_argnames="p")
compiled_positive = jax.jit(positive_root, static_argnames="p")
compiled_power = jax.jit(symmetric_power, static_argnames="rule")


def roots_of(p, **options):
    return partial(compiled, p=p, **options)


def dots(f, *args) -> int:
    return str(jax.make_jaxpr(f)(*args)).count("dot_general[")


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_root_and_residual(double, p):
    a = with_spectrum(log_uniform(16, 1e4))
    x, error = roots_of(p, damping=0.0, tolerance=1e-12)(jnp.asarray(a))
    assert error < 1e-12
    assert relative_error(x, power(a, -1 / p)) < 1e-11
    assert np.abs(np.linalg.matrix_power(x, p) @ a - np.eye(16)).max() < 1e-8
    np.testing.assert_array_equal(x, x.T)


@pytest.mark.parametrize(("p", "tolerance"), [(2, 3e-9), (4, 2e-9)])
def test_agrees_with_eigh_at_condition_1e8(double, p, tolerance):
    # Both are 3e-10 to 1e-9 from the exact root there, by their own conditioning.
    a = jnp.asarray(with_spectrum(log_uniform(16, 1e8)))
    x, _ = roots_of(p, damping=0.0, tolerance=1e-12)(a)
    assert relative_error(x, np.asarray(compiled_power(a, -1 / p, 0.0))) < tolerance


def test_damping_is_relative_to_the_largest_eigenvalue(double):
    for spectrum, tolerance in (((0, 1, 2, 30), 1e-9), (np.linspace(0.0, 30.0, 16), 1e-4)):
        w = np.concatenate([np.zeros(16 - len(spectrum)), spectrum])
        a = jnp.asarray(with_spectrum(w))
        x, _ = roots_of(4, damping=1e-2, tolerance=1e-12)(a)
        assert relative_error(x, np.asarray(compiled_power(a, -0.25, 1e-2))) < tolerance


def test_closed_forms(double):
    x, _ = compiled(16.0 * jnp.eye(3), 4, 0.0, tolerance=1e-13)
    np.testing.assert_allclose(x, 0.5 * np.eye(3), rtol=1e-13, atol=1e-14)
    x, _ = compiled(jnp.array([[81.0]]), 4, 0.0, tolerance=1e-13)
    np.testing.assert_allclose(x, [[1 / 3]], rtol=1e-13)
    x, _ = compiled(jnp.array([[5.0, 4.0], [4.0, 5.0]]), 2, 0.0, tolerance=1e-13)
    np.testing.assert_allclose(x, np.array([[2.0, -1.0], [-1.0, 2.0]]) / 3, rtol=1e-12)


# Relative error in float32, n = 64, log-uniform spectrum: kradagrad.md 3.6 within a factor of 10.
# Columns: inverse root with relative ridge 1e-6, positive root.
MEASURED = {1e2: (1e-5, 4e-6), 1e4: (1e-3, 1e-4), 1e6: (9e-2, 4e-3)}


@pytest.mark.parametrize("cond", MEASURED)
def test_float32_accuracy_is_the_measured_one(cond):
    a = with_spectrum(log_uniform(64, cond))
    single = jnp.asarray(a, jnp.float32)
    inverse, positive = MEASURED[cond]
    assert relative_error(roots_of(4)(single)[0], power(a, -0.25)) < 10 * inverse
    assert relative_error(compiled_positive(single, 4, 1e-7), power(a, 0.25)) < 10 * positive


@pytest.mark.parametrize("p", [1, 4])
def test_positive_root_is_that_of_the_damped_matrix(double, p):
    a = jnp.asarray(with_spectrum(np.logspace(0, -3, 16)))
    root = compiled_positive(a, p, 1e-3, tolerance=1e-12)
    assert relative_error(root, np.asarray(compiled_power(a, 1 / p, 1e-3))) < 1e-6


def test_scaled_start_halves_the_steps(double):
    """Plain coupled Newton needs 10, 15, 20, 25 steps (shampoo.md 3.3)."""
    for cond, steps in ((1e2, 8), (1e4, 12), (1e6, 15), (1e8, 18)):
        a = jnp.asarray(with_spectrum(log_uniform(16, cond)))
        _, error = roots_of(4, damping=0.0, iterations=steps, tolerance=1e-10)(a)
        assert error < 1e-9, cond
        _, error = roots_of(4, damping=0.0, iterations=steps // 2, tolerance=1e-10)(a)
        assert error > 1e-3, cond


@pytest.mark.parametrize("p", [2, 4])
def test_only_products_in_the_program(p):
    a = jnp.eye(8)
    for f in (lambda a: inverse_root(a, p), lambda a: positive_root(a, p)):
        used = primitives(jax.make_jaxpr(jax.vmap(f))(a[None]))
        assert "dot_general" in used and not used & FACTORISATIONS
    eigen = primitives(jax.make_jaxpr(lambda a: symmetric_power(a, -1 / p))(a))
    assert eigen & FACTORISATIONS  # the search does find them


def test_four_products_a_step():
    a = jnp.eye(8)
    start = dots(lambda a: inverse_root(a, 1), a)  # two products a step
    assert dots(lambda a: inverse_root(a, 4), a) == start + 2  # N^2, N^4


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e36])
def test_extreme_sizes_in_float32(size):
    a = with_spectrum(log_uniform(16, 1e3))
    x, error = roots_of(4)(jnp.asarray(size * a, jnp.float32))
    assert error < 1e-4
    assert relative_error(np.asarray(x, np.float64) * size**0.25, power(a, -0.25)) < 1e-3
    root = compiled_positive(jnp.asarray(size * a, jnp.float32), 2)
    assert relative_error(np.asarray(root, np.float64) / size**0.5, power(a, 0.5)) < 1e-3


@jax.jit
def values_and_gradients(a):
    functions = (lambda a: inverse_root(a, 4)[0], lambda a: positive_root(a, 4))
    return [jax.value_and_grad(lambda a, f=f: jnp.sum(f(a)))(a) for f in functions]


@pytest.mark.parametrize("matrix", [np.zeros((4, 4)), np.ones((4, 4)), np.diag([1.0, 0, 0, 0])])
def test_singular_matrices(matrix):
    a = jnp.asarray(matrix, jnp.float32)
    for value, gradient in values_and_gradients(a):
        assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    expected = compiled_power(a, -0.25, 1e-6)
    np.testing.assert_allclose(compiled(a, 4)[0], expected, rtol=1e-2, atol=1e-6)


def test_bad_input_is_reported():
    x, error = compiled(jnp.eye(4).at[0, 0].set(jnp.nan), 4)
    assert not jnp.any(jnp.isfinite(x)) and jnp.isnan(error)


def test_too_few_steps_are_reported(double):
    a = jnp.asarray(with_spectrum(log_uniform(16, 1e6)))
    assert roots_of(4, iterations=3)(a)[1] > 0.5


def test_derivatives_are_those_of_the_matrix_function(double):
    a = jnp.asarray(with_spectrum(np.logspace(0, -2, 6)))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)))
    pairs = [
        (lambda a, d: inverse_root(a, 4, d, tolerance=1e-12)[0], -0.25),
        (lambda a, d: positive_root(a, 4, d, tolerance=1e-12), 0.25),
    ]
    for f, exponent in pairs:
        gradient, reference = (
            jax.jit(jax.grad(lambda a, d, g=g: jnp.vdot(g(a, d), weights), argnums=(0, 1)))(a, 0.1)
            for g in (f, lambda a, d, e=exponent: symmetric_power(a, e, d))
        )
        np.testing.assert_allclose(gradient[0], reference[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradient[1], reference[1], rtol=1e-4, atol=1e-4)


def test_gradient_of_a_stack():
    a = jnp.asarray(np.stack([with_spectrum(log_uniform(6, 10.0, s)) for s in range(3)]), "float32")
    total = jax.jit(jax.grad(lambda a: jnp.sum(jax.vmap(lambda a: inverse_root(a, 4)[0])(a))))
    assert jnp.all(jnp.isfinite(total(a)))


def test_loops_inside_shard_map():
    mesh = jax.make_mesh((1,), ("d",))
    a = jnp.stack([jnp.eye(4), 16.0 * jnp.eye(4)])

    def roots(a):
        return jax.vmap(lambda a: inverse_root(a, 4, 0.0)[0])(a)

    spec = jax.sharding.PartitionSpec("d")
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else nullcontext():
        a = jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
        out = jax.jit(jax.shard_map(roots, mesh=mesh, in_specs=spec, out_specs=spec))(a)
    np.testing.assert_allclose(out[1], 0.5 * np.eye(4), rtol=1e-5, atol=1e-6)


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="positive Python int"):
        inverse_root(jnp.eye(2), 0)
    with pytest.raises(ValueError, match="square matrix"):
        positive_root(jnp.ones((2, 3)), 2)
    with pytest.raises(TypeError, match="cast the matrix first"):
        inverse_root(jnp.eye(2, dtype=jnp.bfloat16), 2)
