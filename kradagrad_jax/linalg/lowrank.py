"""The strongest eigenpairs of a symmetric matrix: randomised, updated online, and applied.

A positive semidefinite `M ~ u diag(w) u^T` is held as pairs in descending order. Halko, Martinsson
and Tropp, arXiv 0909.4061 (sketches); Brand, 2006 (online update); arXiv 2206.15397 and 2210.08494
(their use for curvature).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kradagrad_jax.linalg.lapack import eigh, qr, svd
from kradagrad_jax.linalg.products import matmul, symmetrize


class LowRank(NamedTuple):
    """Eigenpairs.

    Attributes:
      w: (r,) eigenvalues, nonnegative, descending.
      u: (d, r) eigenvectors, orthonormal columns.
    """

    w: jax.Array
    u: jax.Array


def randomized_svd(
    m: jax.Array, omega: jax.Array, rank: int, power: int = 4, width: ArrayLike | None = None
) -> LowRank:
    """Strongest pairs of `m` by a randomised SVD with re-orthonormalised power iterations.

    Args:
      m: (d, d) symmetric positive semidefinite, float32 or float64.
      omega: (d, q) standard normal test matrix, q >= rank, of the dtype of `m`.
      rank: number of pairs, static.
      power: power iterations; the sketch sees `2 * power + 1` products, static.
      width: use the first so many columns of `omega` only; may be traced. None: all.

    Returns:
      `rank` pairs, from the right singular vectors of `q^T m` (one power step more accurate than
      the left ones). Values at rounding level are zero.
    """
    q = _masked(qr(matmul(m, omega))[0], width)
    for _ in range(2 * power):
        q = _masked(qr(matmul(m, q))[0], width)
    # svd of the wide q^T m by the square triangle of its transpose: m q = q2 r2, r2^T = a s b^T
    q2, r2 = qr(matmul(m, q))
    _, s, bt = svd(r2.T)
    return LowRank(_clean(s)[:rank], matmul(q2, bt.T)[:, :rank])


def symmetric_sketch(
    m: jax.Array,
    omega: jax.Array,
    rank: int,
    power: int = 4,
    width: ArrayLike | None = None,
    orthonormalize: bool = True,
) -> LowRank:
    """Strongest pairs of `m` by a randomised symmetric eigendecomposition.

    Args:
      m, omega, rank, width: as in :func:`randomized_svd`.
      power: number of products before the projection, static.
      orthonormalize: a QR after each product; without it (as published) float32 loses weak pairs.

    Returns:
      `rank` pairs. Values at rounding level are zero.
    """
    q = omega
    for _ in range(power):
        q = matmul(m, q)
        q = _masked(qr(q)[0], width) if orthonormalize else q
    q = _masked(qr(q)[0], width)
    w, v = eigh(matmul(q.T, matmul(m, q)))
    return LowRank(_clean(w[::-1])[:rank], matmul(q, v[:, ::-1])[:, :rank])


def brand_update(pairs: LowRank, columns: jax.Array) -> LowRank:
    """Pairs of `u diag(w) u^T + columns columns^T`: all `r + n` of them, exact.

    The joint QR orthonormalises `u` anew at every call; without that rank-deficient columns (dead
    units, softmax gradients) destroy orthogonality within a few hundred updates.

    Args:
      pairs: r pairs.
      columns: (d, n) with r + n <= d, of the same dtype.

    Returns:
      `r + n` pairs, at cost `O(d (r + n)^2)`.
    """
    q, r = qr(jnp.concatenate([pairs.u, columns], axis=1))
    weights = jnp.concatenate([jnp.maximum(pairs.w, 0), jnp.ones(columns.shape[1], pairs.w.dtype)])
    w, v = eigh(symmetrize(matmul(r * weights[None, :], r.T)))
    return LowRank(jnp.maximum(w[::-1], 0), matmul(q, v[:, ::-1]))


def correct(pairs: LowRank, m: jax.Array, index: jax.Array) -> LowRank:
    """Replaces some pairs by the eigenpairs of the projection of `m` on their span.

    Args:
      pairs: r pairs.
      m: (d, d) the matrix that they stand for.
      index: (k,) positions of the pairs, distinct integers, may be traced.

    Returns:
      r pairs; `|m - u diag(w) u^T|_F` never grows.
    """
    chosen = pairs.u[:, index]
    w, v = eigh(matmul(chosen.T, matmul(m, chosen)))
    w_all = pairs.w.at[index].set(w)
    u_all = pairs.u.at[:, index].set(matmul(chosen, v))
    order = jnp.argsort(-w_all, stable=True)
    return LowRank(w_all[order], u_all[:, order])


def low_rank_solve(
    pairs: LowRank,
    x: jax.Array,
    damping: ArrayLike,
    floor: ArrayLike = 0.0,
) -> jax.Array:
    """Return `(u diag(w) u^T + floor (I - u u^T) + damping I)^-1 x`, in time linear in d.

    Args:
      pairs: r pairs; pairs of value zero and any vectors stand for none if `floor` is zero.
      x: (d, k).
      damping: positive scalar.
      floor: eigenvalue assumed for the complement of the pairs (spectrum continuation).

    Returns:
      (d, k).
    """
    damping = jnp.asarray(damping, x.dtype)
    rest = 1 / (damping + floor)
    inner = (1 / (pairs.w + damping) - rest)[:, None] * matmul(pairs.u.T, x)
    return rest * x + matmul(pairs.u, inner)


def _masked(q: jax.Array, width: ArrayLike | None) -> jax.Array:
    """Drops columns from `width` on: of a QR the first columns do not depend on them."""
    return q if width is None else jnp.where((jnp.arange(q.shape[1]) < width)[None, :], q, 0)


def _clean(w: jax.Array) -> jax.Array:
    """Values at the rounding level of the published code, or below zero, are zero."""
    return jnp.where(w <= 1e-10, 0, w)
