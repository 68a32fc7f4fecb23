"""KL-Shampoo and KL-SOAP: Kronecker factors that are fitted in Kullback-Leibler divergence."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.eigenbasis import (
    along,
    largest_first,
    limited,
    live,
    power_step,
    quotients,
    root_mean_square,
    turned,
    whitened,
)
from kradagrad_jax.factors.kron import Factored, on_modes, per_mode, roots_of
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import total_weight
from kradagrad_jax.factors.soap import moment_correction
from kradagrad_jax.linalg import mode_gram, multiply_modes, symmetrize, when


class KlFactor(NamedTuple):
    """State of one block of shape ``(n_1, ..., n_k)``; None for a mode without factor.

    Attributes:
      statistics: per mode S ``(n_i, n_i)``: average of Gram matrices of the gradient that is
        whitened in all other modes. It serves the basis alone.
      bases: per mode Q ``(n_i, n_i)``: approximate eigenvectors of S in columns.
      scales: per mode w ``(n_i,)``: eigenvalues to the power -1/2, tracked at every step.
      used: per mode, those of the step before: what the direction is scaled by.
      energies: per mode ``(n_i,)``: diagonal of ``Q^T S Q``; None where no direction is masked.
      start: scalar: what all w start from.
      mean: average of gradients, of the block's shape; None where there is none.
      squares: KL-SOAP: average of squares of the rotated gradient; None in KL-Shampoo.
    """

    statistics: tuple[Any, ...]
    bases: tuple[Any, ...]
    scales: tuple[Any, ...]
    used: tuple[Any, ...]
    energies: tuple[Any, ...]
    start: jax.Array
    mean: Any
    squares: Any


@dataclasses.dataclass(frozen=True)
class KlOptions:
    """Settings of :func:`kl_method`; see :func:`kradagrad_jax.scale_by_kl_shampoo`.

    ``adam``: KL-SOAP, the direction is Adam's in the bases.
    """

    adam: bool
    beta1: Any
    beta2: Any
    shampoo_beta: Any
    eps: Any
    eps_rule: str
    initial: Any
    cap: Any
    cap_rule: str
    damped: bool
    mask: bool
    bias_correction: bool
    normalize_grads: bool
    clip: Any


def kl_method(o: KlOptions) -> BlockMethod:
    """KL-Shampoo or KL-SOAP on one block (arXiv 2509.03378); the engine must refresh last."""

    def init(shape: tuple[int, ...], dtype: Any, factored: Factored = None) -> KlFactor:
        kept = (True,) * len(shape) if factored is None else tuple(factored)
        masked = [o.mask and has for has in kept]
        start = jnp.asarray(1 if o.initial == "gradient" else o.initial, dtype) ** -0.5
        scales = on_modes(lambda n: jnp.full(n, start), shape, kept)
        return KlFactor(
            on_modes(lambda n: jnp.zeros((n, n), dtype), shape, kept),
            on_modes(lambda n: jnp.eye(n, dtype=dtype), shape, kept),
            scales,
            jax.tree.map(jnp.copy, scales),
            on_modes(lambda n: jnp.zeros(n, dtype), shape, masked),
            start,
            None if o.beta1 is None else jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype) if o.adam else None,
        )

    own = "gradient" if o.initial == "gradient" else "number"
    return BlockMethod(
        init=init,
        accumulate=lambda f, g, step: _fold(o, f, g, step),
        refresh=_refresh,
        precondition=lambda f, g, step: _apply(o, f, g, step),
        name=f"{'kl_soap' if o.adam else 'kl_shampoo'}(from {own}{', masked' if o.mask else ''})",
        partial=True,
    )


def _fold(o: KlOptions, f: KlFactor, g: jax.Array, step: Step) -> KlFactor:
    """The first gradient makes statistics (and the start) alone; all w on the right are old."""
    first = step.statistics == 1
    if o.initial == "gradient":
        start = jnp.where(first, _scale_of(g, f), f.start)
        f = f._replace(start=start)
        f = f._replace(scales=per_mode(lambda i, w: jnp.where(first, start, w), f.scales))
        white = f.scales
    else:  # the official code does not whiten the first one
        white = per_mode(lambda i, w: jnp.where(first, jnp.ones_like(w), w), f.scales)
    rotated = turned(g, f.bases)
    b = jnp.asarray(o.shampoo_beta, g.dtype)
    shares = per_mode(lambda i, _: _share(o, rotated, white, i), white)
    statistics = per_mode(
        lambda i, s: b * s + (1 - b) * _whitened_gram(g, f.bases, white, i), f.statistics
    )

    def later(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(first, old, new)

    mean, squares = f.mean, f.squares
    if mean is not None:
        b1 = jnp.asarray(o.beta1, g.dtype)
        mean = later(b1 * mean + (1 - b1) * g, mean)
    if squares is not None:
        b2 = jnp.asarray(o.beta2, g.dtype)
        squares = later(b2 * squares + (1 - b2) * rotated * rotated, squares)
    return f._replace(
        statistics=statistics,
        scales=per_mode(
            lambda i, w, c: later(_next_scale(o, b, w, c, f.start), w), f.scales, shares
        ),
        used=f.scales,
        energies=per_mode(lambda i, e, c: b * e + (1 - b) * c, f.energies, shares),
        mean=mean,
        squares=squares,
    )


def _scale_of(g: jax.Array, f: KlFactor) -> jax.Array:
    """``mean(g^2)^(-1/(2j))``, j the number of modes with a factor."""
    rms = root_mean_square(g)
    j = sum(w is not None for w in f.scales)
    return jnp.where(rms > 0, rms, 1) ** (-1 / j)


def _others(white: tuple[Any, ...], mode: int) -> list[tuple[int, jax.Array]]:
    return [(i, w) for i, w in enumerate(white) if w is not None and i != mode]


def _whitened_gram(
    g: jax.Array, bases: tuple[Any, ...], white: tuple[Any, ...], mode: int
) -> jax.Array:
    """Gram matrix of a mode of the gradient that is whitened in all others, over their size."""
    x = turned(g, bases, (mode,))
    for i, w in _others(white, mode):
        x = x * along(w, i, g.ndim)
    return mode_gram(x, mode) * (g.shape[mode] / math.prod(g.shape))


def _share(o: KlOptions, rotated: jax.Array, white: tuple[Any, ...], mode: int) -> jax.Array:
    """Means over the other modes of the whitened squares, ``(n,)``."""
    x = rotated
    for i, w in _others(white, mode):
        x = x * along(w, i, x.ndim)
    share = jnp.mean(x * x, axis=tuple(a for a in range(x.ndim) if a != mode))
    if o.damped:
        means = [jnp.mean(w * w) for _, w in _others(white, mode)]
        share = share + math.prod(means, start=jnp.asarray(o.eps, x.dtype))
    return share


def _next_scale(
    o: KlOptions, b: jax.Array, w: jax.Array, share: jax.Array, start: jax.Array
) -> jax.Array:
    eigenvalue = b * _inverse(w) ** 2 + (1 - b) * share
    new = _inverse(jnp.sqrt(eigenvalue))
    if o.cap_rule == "none":
        return new
    cap = jnp.asarray(o.cap, w.dtype)
    if o.cap_rule == "relative":
        return jnp.minimum(new, cap * start)
    return jnp.minimum(new, jnp.maximum(10, jnp.minimum(len(w), cap)).astype(w.dtype))


def _inverse(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _refresh(f: KlFactor, step: Step) -> KlFactor:
    """New bases, w stays with its column: a power step keeps their order."""
    first = step.refreshes == 0

    def one(_: Any, s: jax.Array, q: jax.Array) -> jax.Array:
        s = symmetrize(s)
        return when(first, lambda _, s: largest_first(s), power_step(s, q), s)

    bases = roots_of(one, (0,) * len(f.bases), f.statistics, f.bases)
    energies = per_mode(lambda i, _, s, q: quotients(s, q), f.energies, f.statistics, bases)
    return f._replace(bases=bases, energies=energies)


def _apply(o: KlOptions, f: KlFactor, g: jax.Array, step: Step) -> jax.Array:
    """The mean, which holds the gradient already; nothing while there is no other gradient."""
    mean = jnp.where(step.statistics > 1, g, 0) if f.mean is None else f.mean
    x = turned(mean, f.bases)
    if o.adam:
        x = whitened(x, f.squares, o.eps, o.eps_rule)
    else:
        w = math.prod((along(v, i, g.ndim) for i, v in _others(f.used, -1)), start=1)
        x = x * (w / (1 + jnp.asarray(o.eps, x.dtype) * w))
    u = multiply_modes(live(x, f.energies), f.bases)
    u = limited(u, o.normalize_grads)
    if o.bias_correction and o.adam:
        u = u * moment_correction(o.beta1, o.beta2, step.statistics - 1, u.dtype)
    elif o.bias_correction and o.beta1 is not None:
        u = u / total_weight(o.beta1, step.statistics - 1, u.dtype)
    return limited(u, False, o.clip)
