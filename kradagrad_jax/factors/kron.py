"""One square factor per mode of a block: the state that all Kronecker methods share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg import multiply_modes


class KronFactor(NamedTuple):
    """Factors of one block of shape ``(n_1, ..., n_k)``.

    Attributes:
      statistics: per mode ``(n_i, n_i)``: what gradients are folded into.
      preconditioners: per mode ``(n_i, n_i)``: what multiplies the gradient.
    """

    statistics: tuple[jax.Array, ...]
    preconditioners: tuple[jax.Array, ...]


def scaled_identities(shape: tuple[int, ...], scale: Any, dtype: Any) -> tuple[jax.Array, ...]:
    """``scale * I`` per mode; the scale may be traced."""
    return tuple(jnp.eye(n, dtype=dtype) * jnp.asarray(scale, dtype) for n in shape)


def init_kron(shape: tuple[int, ...], scale: Any, dtype: Any) -> KronFactor:
    """Statistics ``scale * I``, preconditioners ``I``."""
    return KronFactor(scaled_identities(shape, scale, dtype), scaled_identities(shape, 1.0, dtype))


def apply_dense(factor: KronFactor, g: jax.Array) -> jax.Array:
    """``g`` multiplied in every mode by its (symmetric) preconditioner."""
    return multiply_modes(g, factor.preconditioners)


def apply_square_root(factor: KronFactor, g: jax.Array) -> jax.Array:
    """The same where the preconditioner is kept as ``K`` with ``P = K K^T``."""
    inner = multiply_modes(g, [k.T for k in factor.preconditioners])
    return multiply_modes(inner, factor.preconditioners)
