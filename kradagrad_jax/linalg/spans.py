"""Weighted orthonormal bases of few long vectors: a low-rank average of outer products.

``G = sum_i values_i u_i u_i^T`` is held by tau orthonormal vectors ``u_i`` (rows; of any shape, so
that they are sharded like what they belong to) and their values, descending. Rows that are not in
use are exactly zero. Costs are linear in the length of the vectors; products of long vectors are
matrix products with one long axis, decompositions are of the size of tau only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg.lapack import eigh, svd
from kradagrad_jax.linalg.products import matmul

_DEAD = 1e-9  # values below this share of the largest are dropped with their vectors
_HIGHEST = jax.lax.Precision.HIGHEST


class Span(NamedTuple):
    """The matrix ``sum_i values_i u_i u_i^T``."""

    basis: jax.Array  # (tau, *shape), orthonormal or zero rows
    values: jax.Array  # (tau,), nonnegative, descending; zero where the row is


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of the rows of `x`: (m, *shape) and `y`: (n, *shape), as (m, n)."""
    axes = tuple(range(1, x.ndim))
    return jax.lax.dot_general(x, y, ((axes, axes), ((), ())), precision=_HIGHEST)


def combine(c: jax.Array, x: jax.Array) -> jax.Array:
    """Linear combinations `sum_j c_ij x_j` of the rows of `x`: (n, *shape), as (m, *shape)."""
    return jax.lax.dot_general(c, x, (((1,), (0,)), ((), ())), precision=_HIGHEST)


def fold(span: Span, rows: jax.Array, decay: jax.Array, weight: jax.Array) -> Span:
    """Best approximation of ``decay * G + weight * sum_j h_j h_j^T`` by as many vectors as before.

    One singular value decomposition of a (tau + n) square matrix and matrix products; the long
    vectors are orthonormalised by their Gram matrix, twice. With one vector the error in float32
    is a few roundings of the largest value.

    Args:
      span: tau vectors; float32 or float64.
      rows: (n, *shape) new vectors, same dtype.
      decay, weight: nonnegative scalars, may be traced.

    Returns:
      The new span. Values below 1e-9 of the largest are dropped: keeping noise as directions
      would ruin orthogonality.

    References:
      Brand, incremental singular value decomposition, 2006; arXiv 2402.03295.
    """
    u, tau = span.basis, len(span.basis)
    h = rows * jnp.sqrt(weight)
    m, p = _split(u, h)
    short = _norms(p) <= 8 * jnp.finfo(h.dtype).eps * _norms(h)
    p = jnp.where(_per_row(short, p), 0, p)
    q, r, more = _orthonormal_rows(u, p)
    top = jnp.concatenate([jnp.diag(jnp.sqrt(decay * span.values)), m + more], axis=1)
    bottom = jnp.concatenate([jnp.zeros((len(r), tau), r.dtype), r], axis=1)
    v, s, _ = svd(jnp.concatenate([top, bottom]))
    values = jnp.square(s)
    live = values[:tau] > _DEAD * values[0]
    turn = jnp.where(live[:, None], v[:, :tau].T, 0)
    basis = combine(turn[:, :tau], u) + combine(turn[:, tau:], q)
    return Span(basis, jnp.where(live, values[:tau], 0))


def solve(span: Span, damping: jax.Array, x: jax.Array) -> jax.Array:
    """``(damping * I + G)^-1 x`` for one vector `x` of the shape of a row.

    The part of `x` in the span is taken off twice: what is left of it outside would be divided by
    the damping alone.
    """
    coefficients, rest = _split(span.basis, x[None])
    inside = coefficients / (damping + span.values)[:, None]
    return (rest / damping + combine(inside.T, span.basis))[0]


def orthonormalized(basis: jax.Array) -> jax.Array:
    """One Newton-Schulz step towards the nearest rows that are orthonormal (or zero)."""
    return 1.5 * basis - 0.5 * combine(inner(basis, basis), basis)


def _norms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))


def _per_row(v: jax.Array, x: jax.Array) -> jax.Array:
    return v.reshape(-1, *(1,) * (x.ndim - 1))


def _split(u: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coefficients ``(tau, n)`` in the span of `u`, and the rest; two passes, or noise remains."""
    m = inner(u, h)
    p = h - combine(m.T, u)
    d = inner(u, p)
    return m + d, p - combine(d.T, u)


def _orthonormal_rows(u: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``p = q^T r + u^T more`` with rows of q orthonormal (or zero) and orthogonal to those of u.

    Returns q ``(n, *shape)``, r ``(n, n)`` and more ``(tau, n)``. Rows of p are brought to unit
    length first, so that short ones keep their digits; directions at rounding level are dropped.
    """
    lengths = _norms(p)
    q = p / _per_row(jnp.where(lengths > 0, lengths, 1), p)
    if len(p) == 1:
        return q, lengths[None], jnp.zeros((len(u), 1), p.dtype)
    turn, back = _roots(inner(q, q))
    q = combine(turn.T, q)
    c = inner(u, q)  # the division by small roots has amplified what was left of u
    q = q - combine(c.T, u)
    turn, root = _roots(inner(q, q))
    return combine(turn.T, q), matmul(root, back) * lengths[None], matmul(c, back) * lengths[None]


def _roots(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """T and its inverse with ``T^T gram T = I`` on what is above rounding level, zero elsewhere."""
    w, v = eigh(gram)
    floor = 64 * len(w) * jnp.finfo(w.dtype).eps * jnp.sum(jnp.maximum(w, 0))
    live = w > floor
    root = jnp.sqrt(jnp.where(live, w, 1))[None, :]
    return jnp.where(live[None, :], v / root, 0), jnp.where(live[None, :], v * root, 0).T
