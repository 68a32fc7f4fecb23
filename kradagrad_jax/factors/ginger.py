"""Ginger on one block: a low-rank average of curvature vectors, inverted with damping.

``G = sum_i sigma_i u_i u_i^T`` averages the outer products of curvature vectors; the direction is
``(G + gamma I)^-1`` times the gradient. Memory and time are linear in the size of the block
(arXiv 2402.03295).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.linalg.spans import Span, fold, orthonormalized, solve


class GingerFactor(NamedTuple):
    """The curvature of one block."""

    # ``(tau, *block shape)``: orthonormal vectors, zero where not in use. No more than the block
    # has entries
    basis: jax.Array
    values: jax.Array  # ``(tau,)``: their curvatures sigma, descending


class GingerOptions(NamedTuple):
    """Numbers of Ginger; see :func:`scale_by_ginger`."""

    beta2: Any = 0.99
    rank: int = 4
    damping: Any = 1e-5
    clip: Any = 1.0
    fisher_scale: Any = 1.0
    basis_dtype: Any = None


def ginger_method(o: GingerOptions) -> BlockMethod:
    """The block method; statistics are curvature vectors ``(n, *block shape)`` of equal weight."""

    def init(shape: tuple[int, ...], dtype: Any) -> GingerFactor:
        rank = min(o.rank, math.prod(shape))
        basis = jnp.zeros((rank, *shape), o.basis_dtype or dtype)
        return GingerFactor(basis, jnp.zeros(rank, dtype))

    def accumulate(factor: GingerFactor, vectors: jax.Array, step: Step) -> GingerFactor:
        del step
        dtype = factor.values.dtype
        beta = jnp.asarray(o.beta2).astype(dtype)
        weight = (1 - beta) * jnp.asarray(o.fisher_scale).astype(dtype) / len(vectors)
        span = fold(_span(factor), vectors.astype(dtype), beta, weight)
        return GingerFactor(span.basis.astype(factor.basis.dtype), span.values)

    def precondition(factor: GingerFactor, g: jax.Array, step: Step) -> jax.Array:
        basis = factor.basis.astype(g.dtype)
        u = solve(Span(basis, factor.values), at_step(o.damping, step, g.dtype), g)
        if o.clip is None:
            return u
        limit = at_step(o.clip, step, g.dtype)
        return jnp.clip(u, -limit, limit)

    def refresh(factor: GingerFactor, step: Step) -> GingerFactor:
        """Rounding errors of many folds add up: some 1e-8 per step in float32."""
        del step
        basis = orthonormalized(factor.basis.astype(factor.values.dtype))
        return factor._replace(basis=basis.astype(factor.basis.dtype))

    return BlockMethod(init, accumulate, refresh, precondition, math.prod, name="ginger")


def _span(factor: GingerFactor) -> Span:
    """The span in full precision; a basis that was rounded for storage is made orthonormal."""
    basis = factor.basis.astype(factor.values.dtype)
    if factor.basis.dtype != basis.dtype:
        basis = orthonormalized(basis)
    return Span(basis, factor.values)
