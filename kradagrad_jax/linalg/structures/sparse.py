"""Diagonal, block-diagonal and triangular Toeplitz matrices."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg.products import matmul
from kradagrad_jax.linalg.structures.base import Structure, wide


@dataclasses.dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices, kept as (d,) arrays: d numbers."""

    @property
    def name(self) -> str:
        return "diagonal"

    def identity(self, d: int, dtype: Any) -> jax.Array:
        return jnp.ones(d, dtype)

    def to_dense(self, k: jax.Array) -> jax.Array:
        return jnp.diag(k)

    def project_dense(self, m: jax.Array) -> jax.Array:
        return jnp.diagonal(m)

    def project_gram(self, s: jax.Array) -> jax.Array:
        return jnp.sum(s * s, axis=1)

    def project_congruence(self, k: jax.Array, m: jax.Array) -> jax.Array:
        return k * k * (m if m.ndim == 1 else jnp.diagonal(m))

    def ktk(self, k: jax.Array) -> jax.Array:
        return k * k

    def matmul(self, k: jax.Array, n: jax.Array) -> jax.Array:
        return k * n

    def apply(self, k: jax.Array, x: jax.Array) -> jax.Array:
        return k[:, None] * x

    apply_transposed = apply

    def average(self, k: jax.Array) -> jax.Array:
        return jnp.mean(wide(k))

    def subtract_identity(self, k: jax.Array) -> jax.Array:
        return k - 1


class Blocks(NamedTuple):
    """Numbers of a block-diagonal matrix."""

    equal: jax.Array | None  # (count, size, size) blocks; None where d is smaller than one block
    last: jax.Array | None  # (d % size, d % size) block; None where nothing is left over


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Diagonal blocks of ``size``, and a smaller one for what is left over.

    ``(d // size) size^2 + (d % size)^2`` numbers, see :class:`Blocks`.
    """

    size: int = 30

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"block_diagonal needs a block size of at least 1, got {self.size}")

    @property
    def name(self) -> str:
        return f"block_diagonal:{self.size}"

    def _each(self, one: Any, *matrices: Any) -> Blocks:
        """A function of single blocks on all blocks of some matrices or split arrays."""
        parts = []
        for mapped, args in zip((jax.vmap(one), one), zip(*matrices, strict=True), strict=True):
            parts.append(None if args[0] is None else mapped(*args))
        return Blocks(*parts)

    def _split(self, x: jax.Array) -> Blocks:
        """The rows of (d, n) by block."""
        count, rest = divmod(x.shape[0], self.size)
        equal = x[: count * self.size].reshape(count, self.size, x.shape[1]) if count else None
        return Blocks(equal, x[count * self.size :] if rest else None)

    def identity(self, d: int, dtype: Any) -> Blocks:
        count, rest = divmod(d, self.size)
        equal = jnp.tile(jnp.eye(self.size, dtype=dtype), (count, 1, 1)) if count else None
        return Blocks(equal, jnp.eye(rest, dtype=dtype) if rest else None)

    def to_dense(self, k: Blocks) -> jax.Array:
        blocks = [b for x in jax.tree.leaves(k) for b in x.reshape(-1, *x.shape[-2:])]
        d = sum(len(b) for b in blocks)
        out, start = jnp.zeros((d, d), blocks[0].dtype), 0
        for b in blocks:
            out = out.at[start : start + len(b), start : start + len(b)].set(b)
            start += len(b)
        return out

    def project_dense(self, m: jax.Array) -> Blocks:
        count, rest = divmod(m.shape[0], self.size)
        cut, equal = count * self.size, None
        if count:
            tiles = m[:cut, :cut].reshape(count, self.size, count, self.size)
            equal = jnp.moveaxis(jnp.diagonal(tiles, axis1=0, axis2=2), -1, 0)
        return Blocks(equal, m[cut:, cut:] if rest else None)

    def project_gram(self, s: jax.Array) -> Blocks:
        return self._each(lambda x: matmul(x, x.T), self._split(s))

    def ktk(self, k: Blocks) -> Blocks:
        return self._each(lambda b: matmul(b.T, b), k)

    def matmul(self, k: Blocks, n: Blocks) -> Blocks:
        return self._each(matmul, k, n)

    def apply(self, k: Blocks, x: jax.Array) -> jax.Array:
        parts = self._each(matmul, k, self._split(x))
        return jnp.concatenate([y.reshape(-1, x.shape[1]) for y in jax.tree.leaves(parts)])

    def apply_transposed(self, k: Blocks, x: jax.Array) -> jax.Array:
        return self.apply(self._each(jnp.transpose, k), x)

    def average(self, k: Blocks) -> jax.Array:
        diagonals = [jnp.diagonal(x, axis1=-2, axis2=-1).reshape(-1) for x in jax.tree.leaves(k)]
        return jnp.mean(wide(jnp.concatenate(diagonals)))

    def subtract_identity(self, k: Blocks) -> Blocks:
        return self._each(lambda b: b - jnp.eye(len(b), dtype=b.dtype), k)


@dataclasses.dataclass(frozen=True)
class Toeplitz(Structure):
    """Triangular matrices with constant diagonals, kept as coefficients: d numbers.

    The j-th coefficient stands on the j-th sub- (upper: super-) diagonal. Products are
    convolutions, by FFT in O(d log d) per column; half precision is cast to float32 for them.
    """

    lower: bool = True

    @property
    def name(self) -> str:
        return "tril_toeplitz" if self.lower else "triu_toeplitz"

    def identity(self, d: int, dtype: Any) -> jax.Array:
        return jnp.zeros(d, dtype).at[0].set(1)

    def to_dense(self, k: jax.Array) -> jax.Array:
        i = jnp.arange(k.shape[0])
        lag = i[:, None] - i[None, :] if self.lower else i[None, :] - i[:, None]
        return jnp.where(lag >= 0, k[jnp.abs(lag)], 0)

    def project_dense(self, m: jax.Array) -> jax.Array:
        d = m.shape[0]
        # rows of length 2d read with stride 2d + 1: the j-th diagonal becomes the j-th column
        flat = jnp.pad(jnp.pad(wide(m), ((0, 0), (0, d))).reshape(-1), (0, d))
        return _scaled(jnp.sum(flat.reshape(d, 2 * d + 1)[:, :d], axis=0), m.dtype)

    def project_gram(self, s: jax.Array) -> jax.Array:
        d, f = s.shape[0], _spectrum(s)
        power = jnp.sum(f.real * f.real + f.imag * f.imag, axis=1)
        return _scaled(jnp.fft.irfft(power, _length(d))[:d], s.dtype)

    def ktk(self, k: jax.Array) -> jax.Array:
        weighted = _counts(wide(k)) * wide(k)
        return _scaled(_product(k, weighted, True), k.dtype)

    def matmul(self, k: jax.Array, n: jax.Array) -> jax.Array:
        return _product(k, n, False).astype(k.dtype)

    def apply(self, k: jax.Array, x: jax.Array) -> jax.Array:
        return _product(k[:, None], x, not self.lower).astype(x.dtype)

    def apply_transposed(self, k: jax.Array, x: jax.Array) -> jax.Array:
        return _product(k[:, None], x, self.lower).astype(x.dtype)

    def apply_square(self, k: jax.Array, x: jax.Array) -> jax.Array:
        """As in the base class; the spectrum of K is computed once."""
        d, f = k.shape[0], _spectrum(k[:, None])
        first, second = (jnp.conj(f), f) if self.lower else (f, jnp.conj(f))
        inner = jnp.fft.irfft(first * _spectrum(x), _length(d), axis=0)[:d]
        return jnp.fft.irfft(second * _spectrum(inner), _length(d), axis=0)[:d].astype(x.dtype)

    def average(self, k: jax.Array) -> jax.Array:
        return wide(k[0])

    def subtract_identity(self, k: jax.Array) -> jax.Array:
        return k.at[0].add(-1)

    def frobenius(self, k: jax.Array) -> jax.Array:
        k = wide(k)
        return jnp.sqrt(jnp.sum(_counts(k) * k * k))


def _length(d: int) -> int:
    """Length of FFTs whose first d terms are free of wrapped ones: a power of two >= 2d - 1."""
    return max(2, 1 << (2 * d - 2).bit_length())


def _spectrum(x: jax.Array) -> jax.Array:
    return jnp.fft.rfft(wide(x), _length(x.shape[0]), axis=0)


def _product(k: jax.Array, x: jax.Array, correlate: bool) -> jax.Array:
    """First d terms of the convolution (or correlation) of coefficients and columns."""
    d, f = k.shape[0], _spectrum(k)
    f = (jnp.conj(f) if correlate else f) * _spectrum(x)
    return jnp.fft.irfft(f, _length(d), axis=0)[:d]


def _counts(k: jax.Array) -> jax.Array:
    """Lengths of the diagonals: d, d - 1, .., 1."""
    return jnp.arange(k.shape[0], 0, -1, dtype=k.dtype)


def _scaled(sums: jax.Array, dtype: Any) -> jax.Array:
    """Coefficients of the projection, from the sums over the diagonals of a symmetric matrix."""
    means = sums / _counts(sums)
    return (2 * means).at[0].set(means[0]).astype(dtype)
