"""Inverse and positive roots by matrix products only (no factorisation in the program).

Coupled Newton iteration for the inverse p-th root (arXiv 2002.09018 section 7 and its public
code; arXiv 2305.19416 supplement C.3), with two changes that do not move its limit: the first
steps are scaled so that small eigenvalues grow up to (p + 1)/2 times faster (as in scaled
Newton-Schulz iterations; a larger factor saves few steps and costs digits), and the iteration
ends when rounding stops its quadratic decrease.

The iterations are `while_loop`s, which have no reverse mode. The derivative of the roots is
therefore given separately, as the exact derivative of the matrix function by an
eigendecomposition (`roots.symmetric_power`): programs that do not differentiate contain products
only, programs that do pay one `eigh`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kradagrad_jax.linalg.lapack import one_matrix
from kradagrad_jax.linalg.products import matmul, nonzero, symmetrize
from kradagrad_jax.linalg.roots import symmetric_power

_POWER_STEPS = 32  # matrix-vector products for the largest eigenvalue
_GROWTH = 1.2  # an error growing more than this is divergence
_LOCAL = 0.5  # below this error the plain iteration converges quadratically


def inverse_root(
    a: jax.Array,
    p: int,
    damping: ArrayLike = 1e-6,
    iterations: ArrayLike = 100,
    tolerance: ArrayLike = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Return `(a + damping * lambda_max * I) ** (-1 / p)` by the coupled Newton iteration.

    Cost: 7, 10, 12 steps of 4 products for p = 4 and condition number 1e2, 1e4, 1e6 (8, 13, 16
    steps of 3 products for p = 2).

    Args:
      a: (n, n) symmetric positive semidefinite, float32 or float64.
      p: positive root order, a Python int.
      damping: multiple of the largest eigenvalue added to the diagonal, may be traced.
      iterations: most steps, may be traced.
      tolerance: stop when the error is below this, may be traced.

    Returns:
      `(x, error)`: the symmetric root (n, n) and max |x^p a - I| as the iteration sees it, a
      scalar. An error near or above 0.1, or NaN, means failure: keep the previous root. A zero
      matrix has the root zero with error zero, as in `symmetric_power`.

    Raises:
      ValueError: p < 1, or `a` is not one square matrix.
      TypeError: `a` is not float32 or float64.
    """
    a = one_matrix(a, "inverse_root")
    if not isinstance(p, int) or p < 1:
        raise ValueError(f"p must be a positive Python int, got {p!r}")
    damping, tolerance = (jnp.asarray(x).astype(a.dtype) for x in (damping, tolerance))
    return _inverse_root(a, damping, tolerance, jnp.int32(iterations), p)


def checked_positive_root(
    a: jax.Array,
    p: int,
    damping: ArrayLike = 1e-6,
    iterations: ArrayLike = 100,
    tolerance: ArrayLike = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Return `(a + damping * lambda_max * I) ** (1 / p)` and the error of `inverse_root`.

    The root is `a_damped @ x ** (p - 1)` with the inverse root `x` (arXiv 2305.19416, supplement
    C.3). Arguments and errors are those of `inverse_root`; from an error of 0.1 on, or NaN, it
    failed.
    """
    x, error = inverse_root(a, p, damping, iterations, tolerance)
    damping = jnp.asarray(damping).astype(a.dtype)
    ridge = damping * _largest_eigenvalue(a)
    damped = symmetrize(a) + ridge * jnp.eye(a.shape[0], dtype=a.dtype)
    return symmetrize(matmul(damped, _matrix_power(x, p - 1))), error


class _Iterate(NamedTuple):
    x: jax.Array  # (n, n)
    m: jax.Array  # (n, n), x^p a for the damped a
    error: jax.Array  # (), max |m - I|
    low: jax.Array  # (), lower bound on the eigenvalues of m, for the scaling
    count: jax.Array  # (), int32
    active: jax.Array  # (), bool


def _matrix_power(a: jax.Array, p: int) -> jax.Array:
    """Return `a ** p` for a static p >= 0 by repeated squaring."""
    if p == 0:
        return jnp.eye(a.shape[0], dtype=a.dtype)
    while p % 2 == 0:
        a = matmul(a, a)
        p //= 2
    result = a
    while p := p // 2:
        a = matmul(a, a)
        if p % 2:
            result = matmul(result, a)
    return result


def _largest_eigenvalue(a: jax.Array) -> jax.Array:
    """Largest eigenvalue of a positive semidefinite matrix by power iteration, from below."""
    fixed = jax.lax.stop_gradient(symmetrize(a))
    scale = nonzero(jnp.max(jnp.abs(fixed)))
    fixed = fixed / scale
    columns = jnp.sum(fixed * fixed, axis=0)
    # The heaviest column points at the top eigenvector; the irregular part forbids orthogonality.
    irregular = jnp.cos(2.4 * jnp.arange(a.shape[0], dtype=a.dtype))
    heaviest = (columns == jnp.max(columns)).astype(a.dtype)
    start = matmul(fixed, heaviest) + irregular * jnp.sqrt(jnp.mean(columns))

    def step(_, v):
        v = matmul(fixed, v)
        return v / jnp.sqrt(nonzero(jnp.sum(v * v)))

    v = jax.lax.fori_loop(0, _POWER_STEPS, step, start)
    return jnp.sum(v * matmul(symmetrize(a), v))


def _spectral_bound(a: jax.Array) -> jax.Array:
    """Upper bound on the norm of `a`, above it by a factor n^(1/8) at most (two products)."""
    scale = nonzero(jnp.max(jnp.abs(a)))
    a = a / scale
    norm = nonzero(jnp.sqrt(jnp.sum(a * a)))
    fourth = _matrix_power(a / norm, 4)
    return scale * norm * nonzero(jnp.sum(fourth * fourth)) ** 0.125


def _distance(m: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(m - jnp.eye(m.shape[0], dtype=m.dtype)))


def _alike(value: jax.Array, x: jax.Array) -> jax.Array:
    """Return `value`, typed to vary over a mesh as the scalar `x` does (for loops in shard_map)."""
    return jnp.where(x == x, value, value)


def _cold(a: jax.Array, ridge: jax.Array, p: int) -> _Iterate:
    """Start at a multiple of the identity, the eigenvalues of `m` in (0, 1]."""
    bound = _spectral_bound(a)
    m = a / bound
    low = jnp.maximum(0.5 * ridge / bound, 2.0 * jnp.finfo(a.dtype).eps)
    x = bound ** (-1.0 / p) * jnp.eye(a.shape[0], dtype=a.dtype)
    error = _distance(m)
    return _Iterate(x, m, error, low, _alike(jnp.int32(0), error), _alike(jnp.bool_(True), error))


def _step(state: _Iterate, p: int, iterations: jax.Array, tolerance: jax.Array) -> _Iterate:
    scaled = state.error >= _LOCAL
    low = jnp.minimum(state.low, 0.9)
    # The best s maps both ends of [low, 1] to one: s low (p+1 - s low)^p = s (p+1 - s)^p.
    best = (p + 1) * (1.0 - low ** (1.0 / p)) / (1.0 - low ** (1.0 + 1.0 / p))
    scale = jnp.where(scaled, jnp.minimum(best, 0.5 * (p + 1)), 1.0)
    eye = jnp.eye(state.m.shape[0], dtype=state.m.dtype)
    factor = (1.0 + 1.0 / p) * eye - (scale / p) * state.m
    x = scale ** (1.0 / p) * symmetrize(matmul(state.x, factor))
    m = symmetrize(matmul(_matrix_power(factor, p), scale * state.m))
    error = _distance(m)
    low = scale * low * ((p + 1 - scale * low) / p) ** p
    accepted = error <= _GROWTH * jnp.where(scaled, jnp.maximum(state.error, 1.0), state.error)
    stalled = (state.error < 0.1) & (error > 0.5 * state.error)  # rounding: no more digits
    count = state.count + 1
    active = accepted & ~stalled & (error > tolerance) & (count < iterations)
    new = _Iterate(x, m, error, low, count, active)
    improved = accepted & ~(stalled & (error > state.error))
    kept = jax.tree.map(lambda fresh, old: jnp.where(improved, fresh, old), new, state)
    return kept._replace(count=count, active=active)


def _iterate(state: _Iterate, p: int, iterations: jax.Array, tolerance: jax.Array) -> _Iterate:
    step = partial(_step, p=p, iterations=iterations, tolerance=tolerance)
    return jax.lax.while_loop(lambda state: state.active, step, state)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _inverse_root(a, damping, tolerance, iterations, p):
    unit = nonzero(jnp.max(jnp.abs(a)))  # so that no product over- or underflows
    zero = jnp.max(jnp.abs(a)) == 0.0
    a = symmetrize(a) / unit
    ridge = damping * _largest_eigenvalue(a)
    a = a + ridge * jnp.eye(a.shape[0], dtype=a.dtype)
    end = _iterate(_cold(a, ridge, p), p, iterations, tolerance)
    x = jnp.where(zero, 0.0, end.x * unit ** (-1.0 / p))
    return x, jnp.where(zero, 0.0, end.error)


@_inverse_root.defjvp
def _inverse_root_jvp(p, primals, tangents):
    a, damping = primals[:2]
    x, error = _inverse_root(*primals, p)
    tangent = jax.jvp(
        lambda a, damping: symmetric_power(a, -1.0 / p, damping, "relative"),
        (a, damping),
        tangents[:2],
    )[1]
    return (x, error), (tangent, jnp.zeros_like(error))
