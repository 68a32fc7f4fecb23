"""SOAP and eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's statistics."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.eigenbasis import (
    ascending_basis,
    limited,
    live,
    next_basis,
    quotients,
    shares,
    turned,
    whitened,
)
from kradagrad_jax.factors.kron import Factored, on_modes, per_mode, roots_of
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import averaged, total_weight, weights
from kradagrad_jax.linalg import mode_gram, multiply_modes, symmetrize, when


class SoapFactor(NamedTuple):
    """State of one block of shape ``(n_1, ..., n_k)``; None for a mode without factor.

    Attributes:
      statistics: per mode S ``(n_i, n_i)``: average of the gradient's Gram matrices.
      bases: per mode Q ``(n_i, n_i)``: approximate eigenvectors of S in columns.
      energies: per mode ``(n_i,)``: diagonal of ``Q^T S Q``; None where no direction is masked.
      mean: average of gradients, of the block's shape; None where there is none, or the engine
        keeps it.
      squares: average of squares of the rotated gradient, of the block's shape.
    """

    statistics: tuple[Any, ...]
    bases: tuple[Any, ...]
    energies: tuple[Any, ...]
    mean: Any
    squares: jax.Array


@dataclasses.dataclass(frozen=True)
class SoapOptions:
    """Settings of :func:`soap_method`; see :func:`kradagrad_jax.scale_by_soap`."""

    order: str
    basis: str
    beta1: Any
    beta2: Any
    shampoo_beta: Any
    eps: Any
    eps_rule: str
    exponent: Any
    mask: bool
    bias_correction: bool
    normalize_grads: bool
    iterations: int
    tolerance: Any


def soap_method(o: SoapOptions) -> BlockMethod:
    """SOAP on one block (arXiv 2409.11321, Algorithm 3).

    With ``order="last"`` the engine must refresh last: the direction is that of the basis of the
    steps before, and the first statistic makes the basis alone. With ``"first"`` it refreshes
    first, averages the gradients, and squares are taken in the new basis.
    """
    last = o.order == "last"

    def init(shape: tuple[int, ...], dtype: Any, factored: Factored = None) -> SoapFactor:
        kept = (True,) * len(shape) if factored is None else tuple(factored)
        return SoapFactor(
            on_modes(lambda n: jnp.zeros((n, n), dtype), shape, kept),
            on_modes(lambda n: jnp.eye(n, dtype=dtype), shape, kept),
            on_modes(lambda n: jnp.zeros(n, dtype), shape, [o.mask and has for has in kept]),
            jnp.zeros(shape, dtype) if last and o.beta1 is not None else None,
            jnp.zeros(shape, dtype),
        )

    return BlockMethod(
        init=init,
        accumulate=lambda f, g, step: _fold(o, f, g, step),
        refresh=lambda f, step: (_refresh_last if last else _refresh_first)(o, f, step),
        precondition=lambda f, g, step: (_apply_last if last else _apply_first)(o, f, g, step),
        correct=None if last else lambda f, g, step: _fold_squares(o, f, turned(g, f.bases)),
        name=f"soap({o.order}, {averaged(o.beta2)}{', masked' if o.mask else ''})",
        partial=True,
    )


def _fold(o: SoapOptions, f: SoapFactor, g: jax.Array, step: Step) -> SoapFactor:
    old, new = weights(o.shampoo_beta, g.dtype)
    statistics = per_mode(lambda i, s: old * s + new * mode_gram(g, i), f.statistics)
    if o.order == "first":
        return f._replace(statistics=statistics)
    later = step.statistics > 1  # the first gradient makes the basis and is in neither moment
    mean = f.mean
    if mean is not None:
        b1 = jnp.asarray(o.beta1, g.dtype)
        mean = jnp.where(later, b1 * mean + (1 - b1) * g, mean)
    moved = _fold_squares(o, f, turned(g, f.bases))
    squares = jnp.where(later, moved.squares, f.squares)
    return moved._replace(statistics=statistics, mean=mean, squares=squares)


def _fold_squares(o: SoapOptions, f: SoapFactor, x: jax.Array) -> SoapFactor:
    """With the squares of a rotated gradient in."""
    old, new = weights(o.shampoo_beta, x.dtype)
    kept, fresh = weights(o.beta2, x.dtype)
    return f._replace(
        energies=per_mode(lambda i, e: old * e + new * shares(x, i), f.energies),
        squares=kept * f.squares + fresh * x * x,
    )


def _refresh_last(o: SoapOptions, f: SoapFactor, step: Step) -> SoapFactor:
    """New bases; squares go with the columns. They never turn: that is worse than permuting."""
    first = step.refreshes == 0
    found = roots_of(
        lambda _, s, q: next_basis(o.basis, symmetrize(s), q, first),
        (0,) * len(f.bases),
        f.statistics,
        f.bases,
    )
    bases = per_mode(lambda i, pair: pair[0], found)
    # before a first refresh that was put off the basis is the identity: nothing to permute then
    squares = when(
        first & (step.statistics > 1),
        lambda v, own: multiply_modes(v, [None if q is None else (q * q).T for q in own]),
        f.squares,
        bases,
    )
    for mode, pair in enumerate(found):
        if pair is not None:
            squares = jnp.take(squares, pair[1], axis=mode)
    return f._replace(bases=bases, energies=_energies(f, bases), squares=squares)


def _refresh_first(o: SoapOptions, f: SoapFactor, step: Step) -> SoapFactor:
    first = step.refreshes == 0

    def one(_: Any, s: jax.Array, q: jax.Array) -> jax.Array:
        if o.bias_correction:
            s = s / total_weight(o.shampoo_beta, step.statistics, s.dtype)
        if o.eps_rule == "absolute":
            s = s + jnp.asarray(o.eps, s.dtype) * jnp.eye(len(s), dtype=s.dtype)
        return ascending_basis(o.basis, symmetrize(s), q, first, o.iterations, o.tolerance)

    bases = roots_of(one, (0,) * len(f.bases), f.statistics, f.bases)
    return f._replace(bases=bases, energies=_energies(f, bases))


def _energies(f: SoapFactor, bases: tuple[Any, ...]) -> tuple[Any, ...]:
    return per_mode(lambda i, _, s, q: quotients(s, q), f.energies, f.statistics, bases)


def _apply_last(o: SoapOptions, f: SoapFactor, g: jax.Array, step: Step) -> jax.Array:
    """The mean, which holds the gradient already; nothing while there is no other gradient."""
    mean = jnp.where(step.statistics > 1, g, 0) if f.mean is None else f.mean
    x = turned(mean, f.bases)
    u = whitened(x, f.squares, o.eps, o.eps_rule)
    u = limited(multiply_modes(live(u, f.energies), f.bases), o.normalize_grads)
    if o.bias_correction:
        u = u * moment_correction(o.beta1, o.beta2, step.statistics - 1, u.dtype)
    return u


def _apply_first(o: SoapOptions, f: SoapFactor, g: jax.Array, step: Step) -> jax.Array:
    v, exponent = f.squares, o.exponent
    if o.bias_correction:
        v = v / total_weight(o.beta2, step.statistics, v.dtype)
    if isinstance(exponent, Mapping):
        exponent = exponent.get(g.ndim, 0.5)
    u = whitened(turned(g, f.bases), v, o.eps, o.eps_rule, exponent)
    return limited(multiply_modes(live(u, f.energies), f.bases), o.normalize_grads)


def moment_correction(beta1: Any, beta2: Any, number: jax.Array, dtype: Any) -> jax.Array:
    """``sqrt(1 - beta2^t) / (1 - beta1^t)``; t gradients are in the moments, None is no moment."""
    second = jnp.sqrt(total_weight(beta2, number, dtype))
    return second if beta1 is None else second / total_weight(beta1, number, dtype)
