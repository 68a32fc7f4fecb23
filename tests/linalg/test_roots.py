import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import linalg
from tests.linalg.matrices import log_uniform, orthogonal, power, relative_error, with_spectrum

# Compiled, because op-by-op execution would compile every small operation for every shape.
symmetric_power = jax.jit(linalg.symmetric_power, static_argnames="rule")
powered_spectrum = jax.jit(linalg.powered_spectrum, static_argnames="rule")
svd_power, left_power = jax.jit(linalg.svd_power), jax.jit(linalg.left_power)

RULES = ("relative", "absolute", "shift", "pseudo", "none")
every_rule = pytest.mark.parametrize("rule", RULES)
both_signs = pytest.mark.parametrize("exponent", [-0.25, 0.5])


@every_rule
@both_signs
def test_identity(double, rule, exponent):
    damping = 0.0 if rule in ("pseudo", "none") else 0.5
    root = symmetric_power(4.0 * jnp.eye(5), exponent, damping, rule)
    shifted = 4.0 * (1 + damping) if rule == "relative" else 4.0 + damping
    np.testing.assert_allclose(root, shifted**exponent * np.eye(5), rtol=1e-14, atol=1e-14)


@both_signs
def test_diagonal(double, exponent):
    w = np.array([3.0, 1e-3, 20.0, 0.5])
    root = symmetric_power(jnp.diag(jnp.asarray(w)), exponent, 0.0, "absolute")
    np.testing.assert_allclose(root, np.diag(w**exponent), rtol=1e-13, atol=1e-14)


def test_two_by_two(double):
    a = jnp.array([[5.0, 4.0], [4.0, 5.0]])  # eigenvalues 9 and 1 along (1, 1) and (1, -1)
    np.testing.assert_allclose(
        symmetric_power(a, 0.5, 0.0, "none"), [[2.0, 1.0], [1.0, 2.0]], rtol=1e-14
    )
    np.testing.assert_allclose(
        symmetric_power(a, -0.5, 0.0, "none"), np.array([[2.0, -1.0], [-1.0, 2.0]]) / 3, rtol=1e-14
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tridiagonal(double, dtype):
    n = 20
    a = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    angles = np.arange(1, n + 1) * np.pi / (n + 1)
    v = np.sin(np.outer(np.arange(1, n + 1), angles)) * np.sqrt(2 / (n + 1))
    expected = (v * (2 - 2 * np.cos(angles)) ** -0.25) @ v.T
    root = symmetric_power(jnp.asarray(a, dtype), -0.25, 0.0, "none")
    assert root.dtype == dtype
    assert relative_error(root, expected) < (3e-6 if dtype == "float32" else 1e-13)


@every_rule
@both_signs
def test_rules_are_those_of_the_table(double, rule, exponent):
    """shampoo.md 3.3 (facebookresearch/optimizers, google-research/precondition, 2305.19416)."""
    w, d = np.array([-1e-3, 0.0, 1e-9, 0.1, 1.0]), 1e-4
    top, noise = w[-1], 5 * np.finfo(np.float64).eps * w[-1]
    if rule == "relative":
        base = np.maximum(w + d * top, d * top)
    elif rule == "absolute":
        base = np.maximum(w + d, d)
    elif rule == "shift":
        base = w - w[0] + d
    elif rule == "pseudo":
        base = np.where(w > noise, w, np.nan)
    else:
        base = np.maximum(w, 0.0 if exponent > 0 else noise)
    expected = np.nan_to_num(base**exponent, nan=0.0)
    w = jnp.asarray(w)
    np.testing.assert_allclose(powered_spectrum(w, exponent, d, rule), expected, rtol=1e-12)
    shuffled = powered_spectrum(w[::-1], exponent, d, rule)
    np.testing.assert_allclose(shuffled, expected[::-1], rtol=1e-12)
    if rule != "none":  # there rounding below zero is amplified without bound
        q = orthogonal(5)
        root = symmetric_power(jnp.asarray((q * np.asarray(w)) @ q.T), exponent, d, rule)
        assert relative_error(root, (q * expected) @ q.T) < 1e-6


def test_shift_of_a_definite_matrix_adds_the_damping_only(double):
    root = powered_spectrum(jnp.array([0.5, 2.0]), 1.0, 0.25, "shift")
    np.testing.assert_allclose(root, [0.75, 2.25], rtol=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_powers_of_the_root_invert_the_damped_matrix(double, k):
    a = with_spectrum(log_uniform(12, 1e4))
    root = np.asarray(symmetric_power(jnp.asarray(a), -1 / (2 * k), 1e-2, "absolute"))
    product = np.linalg.matrix_power(root, 2 * k) @ (a + 1e-2 * np.eye(12))
    assert np.abs(product - np.eye(12)).max() < 1e-13
    np.testing.assert_array_equal(root, root.T)


# Relative error in float32, n = 64, log-uniform spectrum: kradagrad.md 3.6 within a factor of 10.
MEASURED = {1e2: (8e-7, 1e-6, 8e-7), 1e4: (6e-6, 4e-5, 2e-6), 1e6: (1e-3, 2e-2, 1e-4)}
MEASURED |= {1e8: (6e-3, 2e-1, 3e-4), 1e10: (1e-2, 9e-1, 3e-4)}


@pytest.mark.parametrize("cond", MEASURED)
def test_float32_accuracy_is_the_measured_one(cond):
    a = with_spectrum(log_uniform(64, cond))
    cases = [(0.25, 0.0, "none"), (-0.25, 1e-8, "absolute"), (0.5, 0.0, "none")]
    for measured, (exponent, damping, rule) in zip(MEASURED[cond], cases, strict=True):
        root = symmetric_power(jnp.asarray(a, jnp.float32), exponent, damping, rule)
        assert relative_error(root, power(a, exponent)) < 10 * measured, exponent


@both_signs
@pytest.mark.parametrize("cond", [1e4, 1e8, 1e12])
def test_square_root_forms_resolve_what_gram_forms_cannot(cond, exponent):
    """square_root_statistics.md 4.3: below 1e-3 where the Gram form in float32 fails."""
    w = log_uniform(48, cond)
    q, left = orthogonal(48), orthogonal(48, seed=1)
    r = (left * np.sqrt(w)) @ q.T
    gradient = r.T @ orthogonal(48, seed=2)
    expected = (q * w**exponent) @ q.T @ gradient
    single = jnp.asarray(r, jnp.float32)

    def error(root):
        return relative_error(np.asarray(root, np.float64) @ gradient, expected)

    assert error(svd_power(single, exponent)) < 1e-3
    assert error(left_power(single.T, exponent)) < 1e-3
    if cond == 1e12 and exponent < 0:
        assert error(symmetric_power(single.T @ single, exponent, 1e-8, "relative")) > 2e-3


def test_svd_power_floor_and_damping(double):
    """The reference `sr_root` of square_root_statistics.md 6."""
    r = np.random.default_rng(0).normal(size=(6, 6)) * np.logspace(0, -6, 6)
    s, vt = np.linalg.svd(r)[1:]
    expected = (vt.T * (np.maximum(s * s, 1e-5) + 1e-3) ** -0.25) @ vt
    assert relative_error(svd_power(jnp.asarray(r), -0.25, 1e-5, 1e-3), expected) < 1e-13


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_svd_power_of_extreme_sizes(size):
    r = np.random.default_rng(0).normal(size=(6, 6))
    root = svd_power(jnp.asarray(size * r, jnp.float32), -0.25)
    assert relative_error(np.asarray(root, np.float64) * size**0.5, power(r.T @ r, -0.25)) < 1e-5


def finite(x):
    return bool(jnp.all(jnp.isfinite(x)))


value_and_gradient = jax.jit(
    jax.value_and_grad(lambda *args: jnp.sum(linalg.symmetric_power(*args))), static_argnums=3
)


@every_rule
@both_signs
@pytest.mark.parametrize("matrix", [np.zeros((4, 4)), np.eye(4), np.ones((4, 4)), -np.eye(4)])
def test_singular_matrices_give_finite_roots_and_derivatives(rule, exponent, matrix):
    value, gradient = value_and_gradient(jnp.asarray(matrix, jnp.float32), exponent, 1e-4, rule)
    assert finite(value) and finite(gradient)


def test_zero_stays_zero():
    zero = jnp.zeros((3, 3))
    np.testing.assert_array_equal(symmetric_power(zero, -0.25, 1e-6), zero)
    np.testing.assert_array_equal(svd_power(zero, -0.25), zero)
    assert finite(jax.jit(jax.grad(lambda r: jnp.sum(svd_power(r, -0.25))))(zero))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_input_is_not_hidden(value):
    a = jnp.eye(3).at[0, 0].set(value)
    assert not finite(symmetric_power(a, -0.25, 1e-6))
    assert not finite(svd_power(a, -0.25))


@every_rule
def test_derivatives_at_equal_eigenvalues(double, rule):
    # The largest eigenvalue, which scales the damping of "relative", has only one-sided
    # derivatives where it is multiple: it is simple here.
    a = jnp.diag(jnp.array([1.0, 1.0, 1.0, 2.5, 2.0, 0.5]))
    direction = np.random.default_rng(0).normal(size=(6, 6))
    direction = jnp.asarray(direction + direction.T)
    step = jnp.float64(1e-5)

    @jax.jit
    def derivative_and_difference(exponent):
        def curve(t):
            damping = 0.1 * (1.0 + t)
            return linalg.symmetric_power(a + t * direction, exponent + t, damping, rule)

        return jax.jacfwd(curve)(0.0 * step), (curve(step) - curve(-step)) / (2 * step)

    for exponent in (-0.25, 0.5):
        derivative, difference = derivative_and_difference(jnp.float64(exponent))
        np.testing.assert_allclose(derivative, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["relative", "shift"])
def test_both_modes_agree(double, rule):
    a = jnp.asarray(with_spectrum(np.arange(1.0, 7.0)))
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)))

    @jax.jit
    def modes(a):
        def f(a):
            return jnp.vdot(linalg.symmetric_power(a, -0.25, 0.1, rule), direction)

        return jnp.vdot(jax.grad(f)(a), direction), jax.jvp(f, (a,), (direction,))[1]

    np.testing.assert_allclose(*modes(a), rtol=1e-10)


def test_derivatives_of_svd_power_at_equal_singular_values(double):
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)))

    @jax.jit
    def curve(t):
        return svd_power(jnp.eye(5) + t * direction, t - 0.25, t * t, 0.1 + t)

    tangent = jax.jit(jax.jacfwd(curve))(jnp.float64(0))
    difference = (curve(jnp.float64(1e-5)) - curve(jnp.float64(-1e-5))) / 2e-5
    np.testing.assert_allclose(tangent, difference, rtol=1e-7, atol=1e-7)


def test_traced_exponent_and_damping_in_a_stack():
    a = jnp.asarray(np.stack([with_spectrum(log_uniform(6, 10.0, s)) for s in range(3)]), "float32")
    roots = jax.jit(jax.vmap(symmetric_power, in_axes=(0, 0, None)))(
        a, jnp.array([-0.25, -0.5, 1.0]), jnp.float32(1e-3)
    )
    for matrix, exponent, root in zip(a, (-0.25, -0.5, 1.0), roots, strict=True):
        np.testing.assert_allclose(root, symmetric_power(matrix, exponent, 1e-3), rtol=1e-4)


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="rule must be one of"):
        linalg.symmetric_power(jnp.eye(2), 1.0, 0.0, "ridge")
    with pytest.raises(TypeError, match="float32 or float64"):
        jax.eval_shape(
            lambda a: linalg.symmetric_power(a, 1.0), jax.ShapeDtypeStruct((2, 2), "bfloat16")
        )
    with pytest.raises(ValueError, match="square"):
        jax.eval_shape(lambda a: linalg.svd_power(a, 1.0), jax.ShapeDtypeStruct((3, 2), "float32"))
