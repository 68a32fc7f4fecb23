"""Square-root (array form) statistics: triangular factors updated by QR, never Gram matrices.

Classical square-root information filtering (Potter; Bierman; Kailath's array algorithms) applied
to Kronecker statistics: `r^T r` is the statistic, and cond(r) is only the square root of its
condition number, so float32 keeps what Gram matrices need float64 for. Arrays of other shapes and
dtypes than stated are refused as by `lapack` (ValueError, TypeError).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kradagrad_jax.linalg.lapack import qr_r, triangular_inverse
from kradagrad_jax.linalg.products import matmul


def sr_update(
    r: jax.Array, u: jax.Array, decay: ArrayLike | None = None, weight: ArrayLike | None = None
) -> jax.Array:
    """Return the factor of `decay * r^T r + weight * u u^T`.

    Args:
      r: (n, n) factor, float32 or float64.
      u: (n, m) new columns, same dtype; m >= 1. Several statistics at once: concatenate columns.
      decay: weight of the old statistic, may be traced; None is 1.
      weight: weight of the new one, may be traced; None is `1 - decay`, or 1 without decay.

    Returns:
      (n, n) upper triangular, of arbitrary row signs. Entries of any size that the dtype holds
      are fine: nothing is squared.
    """
    if weight is None and decay is not None:
        weight = 1.0 - jnp.asarray(decay).astype(r.dtype)
    return _stacked_factor(_weighted(r, decay), _weighted(u.T, weight))


def inverse_update(k: jax.Array, u: jax.Array) -> jax.Array:
    """Return `k_new` with `k_new k_new^T = ((k k^T)^-1 + u u^T)^-1`, exact.

    For an exponential average scale first: `inverse_update(k / sqrt(b), sqrt(1 - b) * u)`.

    Args:
      k: (n, n) factor of an inverse statistic, float32 or float64; start at `sqrt(initial) I`,
        with initial <= 1e5 in float32 (the form `r` of `sr_update` has no such limit).
      u: (n, m) new columns, same dtype.

    Returns:
      (n, n); upper triangular if `k` is.
    """
    eye = jnp.eye(k.shape[0], dtype=k.dtype)
    factor = _stacked_factor(eye, matmul(u.T, k))
    return matmul(k, triangular_inverse(factor))


def _weighted(rows: jax.Array, weight: ArrayLike | None) -> jax.Array:
    return rows if weight is None else jnp.sqrt(jnp.asarray(weight).astype(rows.dtype)) * rows


def _stacked_factor(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Triangular factor of the rows of both, in units that keep column norms in range."""
    rows = jnp.concatenate([top, bottom])
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(rows)))
    exponent = jnp.frexp(largest)[1]  # a power of two: scaling rounds nothing
    unit = jnp.where(largest == 0.0, 1.0, jnp.ldexp(jnp.ones_like(largest), exponent))
    return unit * qr_r(rows / unit)
