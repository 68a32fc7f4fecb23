"""Diagonal matrices with dense borders: the hierarchical and the rank-k triangular family."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg.products import matmul
from kradagrad_jax.linalg.structures.base import Structure, wide


class HierarchicalParts(NamedTuple):
    """Numbers of ``[[A, B2, B3], [0, diag(c), 0], [0, D, E]]``; None where a part is empty."""

    a: jax.Array | None  # (k1, k1)
    b: jax.Array | None  # (k1, d - k1), the columns of B2 and B3
    c: jax.Array | None  # (d - k1 - k2,)
    d: jax.Array | None  # (k2, d - k1 - k2)
    e: jax.Array | None  # (k2, k2)


@dataclasses.dataclass(frozen=True)
class Hierarchical(Structure):
    """A dense leading block with its rows, a diagonal, a dense trailing block with its rows.

    ``(k1 + k2 + 1) d - k1 k2 - k1 - k2`` numbers, see :class:`HierarchicalParts`. A small matrix
    fills A first (dense up to k1), then E, then the diagonal. ``k1 = 0`` is lower triangular with a
    diagonal at the top left, ``k2 = 0`` upper triangular with a diagonal at the bottom right.
    """

    k1: int = 15
    k2: int = 15

    def __post_init__(self):
        if min(self.k1, self.k2) < 0:
            raise ValueError(f"hierarchical needs sizes >= 0, got {self.k1}, {self.k2}")

    @property
    def name(self) -> str:
        if self.k1 == 0 and self.k2:
            return f"tril_top_left_diag:{self.k2}"
        if self.k2 == 0 and self.k1:
            return f"triu_bottom_right_diag:{self.k1}"
        return f"hierarchical:{self.k1},{self.k2}"

    def _cuts(self, d: int) -> tuple[int, int]:
        """Where the middle and the last part begin."""
        first = min(self.k1, d)
        return first, max(d - self.k2, first)

    def _split(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, j = self._cuts(x.shape[0])
        return x[:i], x[i:j], x[j:]

    def identity(self, d: int, dtype: Any) -> HierarchicalParts:
        i, j = self._cuts(d)
        return _trim(
            jnp.eye(i, dtype=dtype),
            jnp.zeros((i, d - i), dtype),
            jnp.ones(j - i, dtype),
            jnp.zeros((d - j, j - i), dtype),
            jnp.eye(d - j, dtype=dtype),
        )

    def to_dense(self, k: HierarchicalParts) -> jax.Array:
        a, b, c, d, e = _fill(k)
        i, m = len(a), len(c)
        out = jnp.zeros((i + b.shape[1],) * 2, a.dtype)
        out = out.at[:i, :i].set(a).at[:i, i:].set(b).at[i : i + m, i : i + m].set(jnp.diag(c))
        return out.at[i + m :, i : i + m].set(d).at[i + m :, i + m :].set(e)

    def project_dense(self, m: jax.Array) -> HierarchicalParts:
        i, j = self._cuts(m.shape[0])
        middle = jnp.diagonal(m)[i:j]
        return _trim(m[:i, :i], 2 * m[:i, i:], middle, 2 * m[j:, i:j], m[j:, j:])

    def project_gram(self, s: jax.Array) -> HierarchicalParts:
        s1, s2, s3 = self._split(s)
        return _trim(
            matmul(s1, s1.T),
            2 * matmul(s1, s[len(s1) :].T),
            jnp.sum(s2 * s2, axis=1),
            2 * matmul(s3, s2.T),
            matmul(s3, s3.T),
        )

    def ktk(self, k: HierarchicalParts) -> HierarchicalParts:
        a, b, c, d, e = _fill(k)
        b2, b3 = b[:, : len(c)], b[:, len(c) :]
        return _trim(
            matmul(a.T, a),
            2 * matmul(a.T, b),
            c * c + jnp.sum(b2 * b2, axis=0) + jnp.sum(d * d, axis=0),
            2 * (matmul(b3.T, b2) + matmul(e.T, d)),
            matmul(e.T, e) + matmul(b3.T, b3),
        )

    def matmul(self, k: HierarchicalParts, n: HierarchicalParts) -> HierarchicalParts:
        a, b, c, d, e = _fill(k)
        a_, b_, c_, d_, e_ = _fill(n)
        b2, b3 = b[:, : len(c)], b[:, len(c) :]
        inner = jnp.concatenate([b2 * c_[None] + matmul(b3, d_), matmul(b3, e_)], axis=1)
        return _trim(
            matmul(a, a_),
            matmul(a, b_) + inner,
            c * c_,
            d * c_[None] + matmul(e, d_),
            matmul(e, e_),
        )

    def apply(self, k: HierarchicalParts, x: jax.Array) -> jax.Array:
        a, b, c, d, e = _fill(k)
        x1, x2, x3 = self._split(x)
        first = matmul(a, x1) + matmul(b, x[len(x1) :])
        return jnp.concatenate([first, c[:, None] * x2, matmul(d, x2) + matmul(e, x3)])

    def apply_transposed(self, k: HierarchicalParts, x: jax.Array) -> jax.Array:
        a, b, c, d, e = _fill(k)
        x1, x2, x3 = self._split(x)
        rest = matmul(b.T, x1)
        middle = rest[: len(c)] + c[:, None] * x2 + matmul(d.T, x3)
        return jnp.concatenate([matmul(a.T, x1), middle, rest[len(c) :] + matmul(e.T, x3)])

    def average(self, k: HierarchicalParts) -> jax.Array:
        a, b, c, _, e = _fill(k)
        diagonal = jnp.concatenate([jnp.diagonal(a), c, jnp.diagonal(e)])
        return jnp.sum(wide(diagonal)) / (len(a) + b.shape[1])

    def subtract_identity(self, k: HierarchicalParts) -> HierarchicalParts:
        a, b, c, d, e = _fill(k)
        return _trim(a - jnp.eye(len(a), dtype=a.dtype), b, c - 1, d,
                     e - jnp.eye(len(e), dtype=e.dtype))  # fmt: skip


def _fill(k: HierarchicalParts) -> tuple[jax.Array, ...]:
    """All parts, the missing ones as arrays of size zero."""
    dtype = next(x.dtype for x in k if x is not None)
    i, m, j = (0 if x is None else x.shape[0] for x in (k.a, k.c, k.e))
    shapes = ((i, i), (i, m + j), (m,), (j, m), (j, j))
    return tuple(jnp.zeros(s, dtype) if x is None else x for x, s in zip(k, shapes, strict=True))


def _trim(*parts: jax.Array) -> HierarchicalParts:
    return HierarchicalParts(*(x if x.size else None for x in parts))


class Bordered(Hierarchical):
    """A diagonal and ``k`` dense columns: (k + 1) d - k numbers.

    Upper triangular ``[[diag(c), B], [0, E]]``, or with ``lower``, ``[[E, 0], [B, diag(c)]]``; a
    matrix of at most k rows is dense. Kept as their transposes, which have dense rows: the
    :class:`Hierarchical` matrices with ``k1 = 0`` or ``k2 = 0``.
    """

    def __init__(self, k: int = 1, lower: bool = True):
        if k < 1:
            raise ValueError(f"rank-k structures need k >= 1, got {k}")
        super().__init__(*((k, 0) if lower else (0, k)))

    @property
    def name(self) -> str:
        return f"{'tril_bottom_right' if self.k1 else 'triu_top_left'}_diag:{self.k1 + self.k2}"

    def to_dense(self, k: HierarchicalParts) -> jax.Array:
        return super().to_dense(k).T

    def ktk(self, k: HierarchicalParts) -> HierarchicalParts:
        a, b, c, d, e = _fill(k)  # a and b, or d and e, are empty
        leading, trailing = matmul(a, a.T) + matmul(b, b.T), matmul(d, d.T) + matmul(e, e.T)
        return _trim(leading, 2 * b * c[None] if a.size else b, c * c, 2 * d * c[None], trailing)

    def matmul(self, k: HierarchicalParts, n: HierarchicalParts) -> HierarchicalParts:
        return super().matmul(n, k)

    def apply(self, k: HierarchicalParts, x: jax.Array) -> jax.Array:
        return super().apply_transposed(k, x)

    def apply_transposed(self, k: HierarchicalParts, x: jax.Array) -> jax.Array:
        return super().apply(k, x)
