"""Real powers of symmetric positive semidefinite matrices by eigendecomposition or SVD.

Derivatives are those of the matrix function itself (divided differences of the scalar function,
Daleckii and Krein), so they are right at equal eigenvalues, where the derivative of the
eigenvectors does not exist. Arrays of other shapes and dtypes than stated are refused as by
`lapack` (ValueError, TypeError).
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kradagrad_jax.linalg.lapack import cholesky, eigh, svd, triangular_inverse
from kradagrad_jax.linalg.products import matmul, symmetrize

Rule = Literal["relative", "absolute", "shift", "pseudo", "none"]


def symmetric_power(
    a: jax.Array, exponent: ArrayLike, damping: ArrayLike = 0.0, rule: Rule = "relative"
) -> jax.Array:
    """Return `a` to a real power, its eigenvalues `w` damped by one of five rules.

    With `top = max(w_max, 0)` and `d = damping` the powers are taken of
      "relative": `max(w + d top, d top)` (google-research/precondition; the safest in float32)
      "absolute": `max(w + d, d)` (arXiv 2305.19416)
      "shift":    `w - min(w_min, 0) + d` (facebookresearch/optimizers)
      "pseudo":   `w` where `w > n eps top`, else the result's eigenvalue is zero; no damping
      "none":     `max(w, 0)`, or `max(w, n eps top)` for a negative exponent; no damping
    An eigenvalue that is still zero then (a zero matrix without absolute damping) gives zero,
    as in the pseudo-inverse: results are finite for every finite `a`.

    Args:
      a: (n, n) symmetric, nominally positive semidefinite, float32 or float64.
      exponent: real scalar of either sign, may be traced.
      damping: nonnegative scalar, may be traced.
      rule: see above; static.

    Returns:
      (n, n), exactly symmetric, of the dtype of `a`. Not finite if `a` is not.

    Raises:
      ValueError: unknown rule, or `a` is not one square matrix.
      TypeError: `a` is not float32 or float64.
    """
    _check_rule(rule)
    exponent, damping = (_scalar(x, a.dtype) for x in (exponent, damping))
    return _symmetric_power(a, exponent, damping, rule)


def powered_spectrum(
    w: jax.Array, exponent: ArrayLike, damping: ArrayLike = 0.0, rule: Rule = "relative"
) -> jax.Array:
    """Return the eigenvalues of `symmetric_power` from those of its argument.

    Args:
      w: (n,) eigenvalues in any order, float32 or float64.
      exponent, damping, rule: as in `symmetric_power`.

    Returns:
      (n,), nonnegative, of the dtype of `w`.

    Raises:
      ValueError: unknown rule.
    """
    _check_rule(rule)
    exponent, damping = (_scalar(x, w.dtype) for x in (exponent, damping))
    return _damped_power(w, *_extremes(w), exponent, damping, rule)


def svd_power(
    r: jax.Array,
    exponent: ArrayLike,
    floor: ArrayLike = 0.0,
    damping: ArrayLike = 0.0,
    relative: bool = False,
) -> jax.Array:
    """Return `(r^T r)` to a real power without forming `r^T r`.

    The eigenvalues used are `max(s^2, floor) + damping` with the singular values `s` of `r`, so
    float32 resolves condition numbers of `r^T r` up to about 1e14. Zero eigenvalues give zero.

    Args:
      r: (n, n) square-root factor, float32 or float64.
      exponent: real scalar, power of `r^T r`, of either sign, may be traced.
      floor: smallest eigenvalue, nonnegative scalar, may be traced.
      damping: added to the eigenvalues, nonnegative scalar, may be traced.
      relative: `floor` and `damping` are multiples of the largest eigenvalue; static.

    Returns:
      (n, n), exactly symmetric, of the dtype of `r`.
    """
    exponent, floor, damping = (_scalar(x, r.dtype) for x in (exponent, floor, damping))
    return _svd_power(r, exponent, floor, damping, relative)


def svd_root(
    r: jax.Array,
    exponent: ArrayLike,
    floor: ArrayLike = 0.0,
    damping: ArrayLike = 0.0,
    relative: bool = False,
) -> jax.Array:
    """Return `k` with `k k^T = svd_power(r, ...)`: the eigenvectors, scaled.

    Multiplying by `k^T` and then by `k` keeps rounding errors of an ill-conditioned power in the
    directions where it is large; multiplying by the assembled power spreads them over all.

    Args:
      r, exponent, floor, damping, relative: as in `svd_power`.

    Returns:
      (n, n) of the dtype of `r`.
    """
    exponent, floor, damping = (_scalar(x, r.dtype) for x in (exponent, floor, damping))
    # of r^T, not of r: LAPACK's divide and conquer loses small singular values of graded rows
    v, s, _ = svd(r.T)
    unit = _unit(s, floor, damping, relative)
    half = 0.5 * exponent
    return v * _square_power((s / unit) ** 2, unit, half, floor, damping, relative)[None, :]


def cholesky_inverse(a: jax.Array) -> jax.Array:
    """Return the inverse of a symmetric positive definite matrix.

    Args:
      a: (n, n), float32 or float64.

    Returns:
      (n, n), exactly symmetric, of the dtype of `a`; NaN if `a` is not definite.
    """
    half = triangular_inverse(cholesky(a), lower=True)
    return symmetrize(matmul(half.T, half))


def damped_inverse(a: jax.Array, shift: ArrayLike) -> jax.Array:
    """Return `(a + shift I)^-1` by a Cholesky factorisation that does not fail.

    A shift below `n eps lambda_max` cannot be told from rounding errors of `a` and is replaced by
    it; for lambda_max stands an upper bound that is close where the spectrum is flat or where one
    eigenvalue dominates.

    Args:
      a: (n, n) symmetric positive semidefinite, float32 or float64.
      shift: nonnegative scalar, may be traced.

    Returns:
      (n, n), exactly symmetric, of the dtype of `a`.
    """
    n = a.shape[0]
    mean = jnp.trace(a) / n
    unit = jnp.where(mean > 0, mean, 1)  # squares stay in range
    spread = jnp.sum(jnp.square(a / unit)) - n * jnp.square(mean / unit)
    top = jnp.minimum(
        mean + unit * jnp.sqrt(jnp.maximum(spread, 0)), jnp.max(jnp.sum(jnp.abs(a), axis=1))
    )
    floor = n * jnp.finfo(a.dtype).eps * jax.lax.stop_gradient(top)
    shift = jnp.maximum(jnp.asarray(shift).astype(a.dtype), floor)
    return cholesky_inverse(a + shift * jnp.eye(n, dtype=a.dtype))


def left_power(
    k: jax.Array, exponent: ArrayLike, floor: ArrayLike = 0.0, damping: ArrayLike = 0.0
) -> jax.Array:
    """Return `(k k^T)` to a real power: `svd_power` of `k^T`."""
    return svd_power(k.T, exponent, floor, damping)


def _check_rule(rule: str) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {get_args(Rule)}, got {rule!r}")


def _scalar(x: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(x).astype(dtype)


def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return `base ** exponent`, zero with zero derivative where `base` is zero."""
    zero = base <= 0.0  # keeps NaN
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, base) ** exponent)


def _damped_power(w, top, low, exponent, damping, rule):
    """Power of the damped eigenvalues; `top`, `low` are the extreme ones, clamped at zero."""
    noise = w.shape[0] * jnp.finfo(w.dtype).eps * top
    if rule == "relative":
        base = jnp.maximum(w + damping * top, damping * top)
    elif rule == "absolute":
        base = jnp.maximum(w + damping, damping)
    elif rule == "shift":
        base = w - low + damping
    elif rule == "pseudo":
        base = jnp.where(w <= noise, 0.0, w)
    else:
        base = jnp.maximum(w, jnp.where(exponent < 0.0, noise, 0.0))
    return _power(base, exponent)


def _extremes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(jnp.max(w), 0.0), jnp.minimum(jnp.min(w), 0.0)


def _spectral_matrix(v: jax.Array, values: jax.Array) -> jax.Array:
    return symmetrize(matmul(v * values[None, :], v.T))


def _spectral_tangent(v, w, values, slopes, inner, value_tangents):
    """Tangent of `v diag(values) v^T` when `v^T da v = inner` and `values = f(w)`.

    `slopes` are f' at `w`; `value_tangents` the total tangents of the values. Between eigenvalues
    closer than eps^(1/3) the mean slope is more accurate than the difference quotient.
    """
    gap = w[:, None] - w[None, :]
    size = jnp.maximum(jnp.abs(w)[:, None], jnp.abs(w)[None, :])
    close = jnp.abs(gap) <= jnp.finfo(w.dtype).eps ** (1 / 3) * size
    quotient = (values[:, None] - values[None, :]) / jnp.where(close, 1.0, gap)
    mean = 0.5 * (slopes[:, None] + slopes[None, :])
    diagonal = jnp.eye(w.shape[0], dtype=bool)
    off_diagonal = jnp.where(diagonal, 0.0, jnp.where(close, mean, quotient) * inner)
    return symmetrize(matmul(v, matmul(off_diagonal + jnp.diag(value_tangents), v.T)))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _symmetric_power(a, exponent, damping, rule):
    w, v = eigh(a)
    return _spectral_matrix(v, powered_spectrum(w, exponent, damping, rule))


@_symmetric_power.defjvp
def _symmetric_power_jvp(rule, primals, tangents):
    a, exponent, damping = primals
    w, v = eigh(a)

    def elementwise(x):  # the extreme eigenvalues, which set the damping, held fixed
        return _damped_power(x, *_extremes(w), exponent, damping, rule)

    inner = matmul(v.T, matmul(symmetrize(tangents[0]), v))
    values, value_tangents = jax.jvp(
        lambda w, e, d: powered_spectrum(w, e, d, rule),
        (w, exponent, damping),
        (jnp.diagonal(inner), *tangents[1:]),
    )
    slopes = jax.jvp(elementwise, (w,), (jnp.ones_like(w),))[1]
    tangent = _spectral_tangent(v, w, values, slopes, inner, value_tangents)
    return _spectral_matrix(v, values), tangent


def _unit(s, floor, damping, relative):
    """Scale the squares are taken in: float32 overflows at 2e19 and underflows at 1e-19."""
    unit = jnp.max(s)
    if not relative:
        unit = jnp.maximum(unit, jnp.sqrt(jnp.maximum(floor, damping)))
    return jnp.where(unit > 0.0, unit, 1.0)


def _square_power(x, unit, exponent, floor, damping, relative):
    """`(max(s^2, floor) + damping) ** exponent` at `s^2 = x unit^2`."""
    if not relative:
        floor, damping = floor / unit / unit, damping / unit / unit
    base = jnp.maximum(x, floor) + damping
    # an exactly zero matrix stays zero, also where damping is relative to it
    base = jnp.where(jnp.max(x) > 0.0, base, 0.0) if relative else base
    return _power(base, exponent) * unit ** (2.0 * exponent)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _svd_power(r, exponent, floor, damping, relative):
    _, s, vt = svd(r)
    unit = _unit(s, floor, damping, relative)
    values = _square_power((s / unit) ** 2, unit, exponent, floor, damping, relative)
    return _spectral_matrix(vt.T, values)


@_svd_power.defjvp
def _svd_power_jvp(relative, primals, tangents):
    r, exponent, floor, damping = primals
    u, s, vt = svd(r)
    # absolute damping: the result does not depend on the unit; relative: it is held fixed
    unit = _unit(s, floor, damping, relative)
    s = s / unit
    x = s * s
    inner = s[:, None] * matmul(u.T, matmul(tangents[0] / unit, vt.T))
    inner = inner + inner.T
    values, value_tangents = jax.jvp(
        lambda x, e, f, d: _square_power(x, unit, e, f, d, relative),
        (x, exponent, floor, damping),
        (jnp.diagonal(inner), *tangents[1:]),
    )
    slopes = jax.jvp(
        lambda x: _square_power(x, unit, exponent, floor, damping, relative),
        (x,),
        (jnp.ones_like(x),),
    )[1]
    tangent = _spectral_tangent(vt.T, x, values, slopes, inner, value_tangents)
    return _spectral_matrix(vt.T, values), tangent
