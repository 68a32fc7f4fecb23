"""The protocol of matrix structures that are closed under products."""

import abc
from typing import Any

import jax
import jax.numpy as jnp

Stored = Any  # the numbers of one structured matrix: an array or a named tuple of arrays


def wide(x: jax.Array) -> jax.Array:
    """``x`` in float32 or better: sums of many half-precision numbers, and FFTs, need it."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


class Structure(abc.ABC):
    """A subspace of the (d, d) matrices that contains the identity and all products.

    Instances are frozen and hashable and hold static sizes only, not d; the numbers of a matrix K
    are kept apart, as a pytree of arrays of one dtype without arrays of size zero. No method has a
    batch axis (``vmap`` them), and no method but those with "dense" in their name forms a (d, d)
    array of a sparse structure.

    The projection P of a symmetric matrix M is the member N of the subspace that minimises
    ``||(N + N^T)/2 - M||_F`` (arXiv 2312.05705): diagonal blocks are copied, entries whose mirror
    image lies outside the structure are doubled. It keeps the trace.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What :func:`structure` understands, as ``"hierarchical:15,15"``."""

    @abc.abstractmethod
    def identity(self, d: int, dtype: Any) -> Stored:
        """The identity matrix of size ``d``."""

    @abc.abstractmethod
    def to_dense(self, k: Stored) -> jax.Array:
        """K as a (d, d) array."""

    @abc.abstractmethod
    def project_dense(self, m: jax.Array) -> Stored:
        """P(M) of a symmetric (d, d) array."""

    @abc.abstractmethod
    def project_gram(self, s: jax.Array) -> Stored:
        """P(S S^T) of a (d, n) array, without forming S S^T where the structure is sparse."""

    @abc.abstractmethod
    def ktk(self, k: Stored) -> Stored:
        """P(K^T K)."""

    @abc.abstractmethod
    def matmul(self, k: Stored, n: Stored) -> Stored:
        """K N, which lies in the structure."""

    @abc.abstractmethod
    def apply(self, k: Stored, x: jax.Array) -> jax.Array:
        """K X for X: (d, n)."""

    @abc.abstractmethod
    def apply_transposed(self, k: Stored, x: jax.Array) -> jax.Array:
        """K^T X for X: (d, n)."""

    @abc.abstractmethod
    def average(self, k: Stored) -> jax.Array:
        """trace(K) / d, a scalar in float32 or better."""

    @abc.abstractmethod
    def subtract_identity(self, k: Stored) -> Stored:
        """K - I, from the stored diagonal alone."""

    def apply_square(self, k: Stored, x: jax.Array) -> jax.Array:
        """K K^T X for X: (d, n)."""
        return self.apply(k, self.apply_transposed(k, x))

    def project_congruence(self, k: Stored, m: jax.Array) -> Stored:
        """P(K^T M K) of a symmetric (d, d) array, or of the diagonal (d,) of a diagonal one."""
        if m.ndim == 1:
            return self.project_gram(self.apply_transposed(k, jnp.diag(jnp.sqrt(m))))
        return self.project_dense(self.apply_transposed(k, self.apply_transposed(k, m).T))

    def frobenius(self, k: Stored) -> jax.Array:
        """Frobenius norm of the represented matrix, a scalar in float32 or better."""
        leaves = [wide(x) for x in jax.tree.leaves(k)]
        return jnp.sqrt(sum(jnp.sum(x * x) for x in leaves))

    def max_entry(self, k: Stored) -> jax.Array:
        """Largest absolute value of a stored number, a scalar in float32 or better."""
        tops = [jnp.max(jnp.abs(wide(x))) for x in jax.tree.leaves(k)]
        return jnp.max(jnp.stack(tops))

    def numbers(self, d: int) -> int:
        """How many numbers a matrix of size ``d`` is kept as."""
        shapes = jax.eval_shape(lambda: self.identity(d, jnp.float32))
        return sum(x.size for x in jax.tree.leaves(shapes))
