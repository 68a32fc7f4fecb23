"""Dense and triangular matrices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg.products import matmul
from kradagrad_jax.linalg.structures.base import Structure, wide


class _Full(Structure):
    """Structures whose products are those of dense matrices."""

    def project_gram(self, s: jax.Array) -> jax.Array:
        return self.project_dense(matmul(s, s.T))

    def ktk(self, k: jax.Array) -> jax.Array:
        return self.project_gram(self.to_dense(k).T)

    def apply(self, k: jax.Array, x: jax.Array) -> jax.Array:
        return matmul(self.to_dense(k), x)

    def apply_transposed(self, k: jax.Array, x: jax.Array) -> jax.Array:
        return matmul(self.to_dense(k).T, x)


@dataclasses.dataclass(frozen=True)
class Dense(_Full):
    """All matrices, kept as (d, d) arrays: d^2 numbers."""

    @property
    def name(self) -> str:
        return "dense"

    def identity(self, d: int, dtype: Any) -> jax.Array:
        return jnp.eye(d, dtype=dtype)

    def to_dense(self, k: jax.Array) -> jax.Array:
        return k

    def project_dense(self, m: jax.Array) -> jax.Array:
        return m

    def matmul(self, k: jax.Array, n: jax.Array) -> jax.Array:
        return matmul(k, n)

    def average(self, k: jax.Array) -> jax.Array:
        return jnp.mean(wide(jnp.diagonal(k)))

    def subtract_identity(self, k: jax.Array) -> jax.Array:
        row, column = _indices(k.shape)
        return jnp.where(row == column, k - 1, k)


@dataclasses.dataclass(frozen=True)
class Triangular(_Full):
    """Lower (or upper) triangular matrices: d (d + 1) / 2 numbers.

    The triangle is kept in rectangular full packed format: its last columns, transposed, fill the
    unused corner beside its first ones. Packing needs slices and a mask but no gather. An upper
    triangle is kept as its transpose. Products are dense.
    """

    lower: bool = True

    @property
    def name(self) -> str:
        return "tril" if self.lower else "triu"

    def identity(self, d: int, dtype: Any) -> jax.Array:
        return pack(jnp.eye(d, dtype=dtype))

    def to_dense(self, k: jax.Array) -> jax.Array:
        full = unpack(k)
        return full if self.lower else full.T

    def project_dense(self, m: jax.Array) -> jax.Array:
        packed = pack(m)
        return jnp.where(_on_diagonal(packed.shape), packed, 2 * packed)

    def matmul(self, k: jax.Array, n: jax.Array) -> jax.Array:
        first, second = (k, n) if self.lower else (n, k)
        return pack(matmul(unpack(first), unpack(second)))

    def average(self, k: jax.Array) -> jax.Array:
        on = _on_diagonal(k.shape)
        return jnp.sum(jnp.where(on, wide(k), 0)) / _size(k.shape)

    def subtract_identity(self, k: jax.Array) -> jax.Array:
        return jnp.where(_on_diagonal(k.shape), k - 1, k)


def pack(m: jax.Array) -> jax.Array:
    """The lower triangle of a (d, d) array as ``(d + 1, d / 2)``, d odd: ``(d, (d + 1) / 2)``."""
    d = m.shape[0]
    odd, width = d % 2, (d + 1) // 2
    left = jnp.pad(m[:, :width], ((1 - odd, 0), (0, 0)))
    right = m[width:, width:].T
    right = jnp.pad(right, ((0, left.shape[0] - right.shape[0]), (odd, 0)))
    return jnp.where(_in_corner(left.shape), right, left)


def unpack(packed: jax.Array) -> jax.Array:
    """The lower triangular (d, d) array."""
    d, width = _size(packed.shape), packed.shape[1]
    odd, rest = d % 2, d - width
    corner = _in_corner(packed.shape)
    left = jnp.where(corner, 0, packed)[1 - odd :]
    right = jnp.where(corner, packed, 0)[:rest, odd:].T
    return jnp.concatenate([left, jnp.pad(right, ((width, 0), (0, 0)))], axis=1)


def _size(shape: tuple[int, ...]) -> int:
    rows, width = shape
    return rows - 1 if rows == 2 * width + 1 else rows


def _indices(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def _in_corner(shape: tuple[int, ...]) -> jax.Array:
    row, column = _indices(shape)
    return row < column + 1 - _size(shape) % 2


def _on_diagonal(shape: tuple[int, ...]) -> jax.Array:
    row, column = _indices(shape)
    first = column + 1 - _size(shape) % 2
    return (row == first) | (row == first - 1)
