"""K-FAC on one layer: second moments of its inputs and output gradients, damped inverses of both.

The damping acts on the Kronecker product A x G of the two; how it is shared out among the factors
is the damping rule. Formulas: arXiv 1503.05671 section 6.3, 1602.01407 for shared weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import BlockMethod, Grams, Rows, Step
from kradagrad_jax.factors.numbers import at_step, share_of_newest
from kradagrad_jax.linalg import damped_inverse, eigh, matmul, multiply_modes, sr_update, svd

Pair = tuple[Any, ...]  # of the inputs and of the output gradients


class KfacFactor(NamedTuple):
    """State of one layer."""

    # A ``(d_in, d_in)`` and G ``(d_out, d_out)``, or their diagonals; with square-root statistics
    # the upper triangular R with ``R^T R = A``
    statistics: Pair
    vectors: Pair  # eigenvectors of A and G; ``(None, None)`` for Cholesky inverses
    # damped inverses of A and G; beside eigenvectors: eigenvalues (inverted for the factored rule,
    # as they are for the other two)
    inverses: Pair


class KfacOptions(NamedTuple):
    """Static choices and numbers of K-FAC; see :func:`scale_by_kfac`."""

    ema: Any = 0.95
    averaging: str = "corrected"
    damping: Any = 1e-3
    damping_rule: str = "factored"
    inverse: str = "cholesky"
    statistics: str = "gram"
    diagonal: tuple[bool, bool] = (False, False)


def kfac_method(o: KfacOptions) -> BlockMethod:
    """The layer method for gradients ``(d_in, d_out)``.

    Statistics are :class:`Rows` (required by square-root statistics) or :class:`Grams`.
    """

    def init(shape: tuple[int, ...], dtype: Any) -> KfacFactor:
        start = 1.0 if o.averaging == "identity" else 0.0
        eye = [
            jnp.ones(n, dtype) if diagonal else jnp.eye(n, dtype=dtype)
            for n, diagonal in zip(shape, o.diagonal, strict=True)
        ]
        spectral = [o.inverse == "eigh" and not diagonal for diagonal in o.diagonal]
        both = list(zip(eye, spectral, strict=True))
        return KfacFactor(
            tuple(start * e for e in eye),
            tuple(e if has else None for e, has in both),
            tuple(jnp.ones(len(e), dtype) if has else e + 0.0 for e, has in both),
        )

    def accumulate(factor: KfacFactor, statistic: Rows | Grams, step: Step) -> KfacFactor:
        dtype = factor.statistics[0].dtype
        share = share_of_newest(o.averaging, o.ema, step.statistics, dtype)
        if o.statistics == "square_root":
            if not isinstance(statistic, Rows) or any(o.diagonal):
                raise ValueError(
                    "square-root statistics need the rows of a and g, not their Gram matrices: "
                    "capture with reducer='raw'"
                )
            new = [
                sr_update(r, rows.T, 1 - share, share)
                for r, rows in zip(factor.statistics, statistic, strict=True)
            ]
        else:
            new = [
                old + share * (batch - old)
                for old, batch in zip(factor.statistics, _grams(statistic, o), strict=True)
            ]
        return factor._replace(statistics=tuple(new))

    def refresh(factor: KfacFactor, step: Step) -> KfacFactor:
        lam = at_step(o.damping, step, factor.statistics[0].dtype)
        if o.inverse == "cholesky":
            return factor._replace(inverses=_factored(factor.statistics, lam, _inverse))
        values, vectors = zip(*(_spectrum(s, o.statistics) for s in factor.statistics), strict=True)
        values = tuple(jnp.maximum(w, 0) for w in values)
        if o.damping_rule == "factored":
            values = _factored(values, lam, lambda w, shift: 1 / (w + shift))
        elif o.damping_rule == "relative":  # as published: rounding noise is no curvature
            values = tuple(jnp.where(w <= 1e-10, 0, w) for w in values)
        return factor._replace(vectors=tuple(vectors), inverses=values)

    def precondition(factor: KfacFactor, g: jax.Array, step: Step) -> jax.Array:
        if o.damping_rule == "factored":
            if o.inverse == "cholesky":
                return multiply_modes(g, factor.inverses)
            turned = multiply_modes(g, factor.vectors, transposed=True)
            return multiply_modes(multiply_modes(turned, factor.inverses), factor.vectors)
        values = factor.inverses
        lam = at_step(o.damping, step, g.dtype)
        if o.damping_rule == "relative":
            lam = lam * jnp.max(values[0]) * jnp.max(values[1])
        curvature = values[0][:, None] * values[1][None, :] + lam
        turned = multiply_modes(g, factor.vectors, transposed=True)
        turned = turned / jnp.where(curvature > 0, curvature, 1)
        return jnp.where(step.refreshes > 0, multiply_modes(turned, factor.vectors), g)

    forms = "|".join("diagonal" if short else "full" for short in o.diagonal)
    return BlockMethod(
        init,
        accumulate,
        refresh,
        precondition,
        name=f"kfac({o.statistics}, {o.inverse}, {o.damping_rule}, {forms})",
    )


def _grams(statistic: Rows | Grams, o: KfacOptions) -> Pair:
    """Both second moments in the form (matrix or diagonal) that is kept of them."""
    parts = []
    for x, diagonal in zip(statistic, o.diagonal, strict=True):
        if isinstance(statistic, Rows):
            parts.append(jnp.sum(x * x, axis=0) if diagonal else matmul(x.T, x))
        elif diagonal:
            parts.append(x if x.ndim == 1 else jnp.diagonal(x))
        elif x.ndim == 1:
            raise ValueError(
                f"a factor of size {x.shape[0]} is kept as a matrix, its statistic is a diagonal: "
                "give the reducer and the optimizer the same max_dim"
            )
        else:
            parts.append(x)
    return tuple(parts)


def _factored(factors: Pair, lam: jax.Array, invert: Any) -> Pair:
    """Inverses of both factors with ``pi``-balanced damping (factored Tikhonov).

    Both are brought to unit mean eigenvalue first; a 1 x 1 factor takes no damping of its own.
    ``factors`` are matrices, or vectors of eigenvalues.
    """
    sizes = [f.shape[0] for f in factors]
    means = [(jnp.trace(f) if f.ndim == 2 else jnp.sum(f)) / f.shape[0] for f in factors]
    alive = jnp.minimum(means[0], means[1]) > 0
    means = [jnp.where(alive, m, 1) for m in means]
    c = jnp.sqrt(means[0]) * jnp.sqrt(means[1])
    live = sum(n > 1 for n in sizes)
    out = []
    for f, mean, n in zip(factors, means, sizes, strict=True):
        if live == 0:
            inverse = jnp.ones_like(f) / jnp.sqrt(c * c + lam)
        elif n == 1:
            inverse = jnp.ones_like(f) / c
        else:
            # the root first: c^2 is below the range of float32 after a long silence
            shift = (jnp.sqrt(lam) / c) ** (2 / live)
            inverse = invert(f / mean, shift) / c
        none = jnp.eye(n, dtype=f.dtype) if f.ndim == 2 else jnp.ones_like(f)
        out.append(jnp.where(alive, inverse, none / jnp.sqrt(lam)))
    return tuple(out)


def _inverse(f: jax.Array, shift: jax.Array) -> jax.Array:
    return 1 / (f + shift) if f.ndim == 1 else damped_inverse(f, shift)


def _spectrum(s: jax.Array, form: str) -> tuple[jax.Array, jax.Array | None]:
    """Eigenvalues and eigenvectors of a statistic; of a diagonal one the vectors are None."""
    if s.ndim == 1:
        return (s * s if form == "square_root" else s), None
    if form == "square_root":
        vectors, singular, _ = svd(s.T)
        return singular * singular, vectors
    return eigh(s)
