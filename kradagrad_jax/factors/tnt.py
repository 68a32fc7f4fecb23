"""TNT on one block: the covariance of sampled gradients as one factor per tensor mode.

A gradient is taken as tensor normal, ``Cov(vec G) = U_1 x .. x U_k``; the factors are the averaged
mode Grams of sampled gradients, scaled to a common mean eigenvalue c, and inverted with damping
(arXiv 2106.02925).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax import linalg
from kradagrad_jax.factors.kron import Factored, per_mode
from kradagrad_jax.factors.method import BlockMethod, Rows, Step
from kradagrad_jax.factors.modes import Groups, Merge, axis_groups
from kradagrad_jax.factors.numbers import at_step, corrected_share

Shape = tuple[int, ...]


class TntFactor(NamedTuple):
    """Factors of one block whose merged shape is ``(d_1, .., d_k)``; None for modes without factor.

    Such a mode has ``U = c I``: no direction along it is told from another, and all else is as if
    it had a factor.
    """

    # per mode Omega ``(d_i, d_i)``, averaged mode Gram of sampled gradients (the mean over modes
    # without factor); its diagonal ``(d_i,)`` for long modes; with square-root statistics the upper
    # triangular R with ``R^T R`` = Omega
    statistics: tuple[Any, ...]
    # per mode the damped inverse of U; with square-root statistics K with ``K K^T`` = inverse; for
    # joint damping the eigenvectors of U. Vectors for diagonals
    preconditioners: tuple[Any, ...]
    spectra: tuple[Any, ...] | None  # per mode the eigenvalues of U, for joint damping; else None


class TntOptions(NamedTuple):
    """Static choices and numbers; see :func:`scale_by_tnt`."""

    beta2: Any = 0.9
    averaging: str = "first"
    damping: Any = 0.1
    damping_rule: str = "per_mode"
    relative_damping: Any = 0.0
    inverse: str | Callable[[jax.Array], jax.Array] = "cholesky"
    statistics: str = "gram"
    grouping: str | Callable[[Shape], Groups] = "filter_flattening"
    max_dim: int | None = None
    fisher_scale: Any = 1.0
    max_gain: Any = None


def tnt_method(o: TntOptions) -> BlockMethod:
    """The method; statistics are samples ``(n, *block shape)``, or :class:`Rows` of a layer."""

    def merging(shape: Shape) -> Merge:
        return Merge(axis_groups(o.grouping, shape), shape)

    def init(shape: Shape, dtype: Any, factored: Factored = None) -> TntFactor:
        view = merging(shape)
        has = (True,) * len(shape) if factored is None else tuple(factored)
        kept = [all(has[axis] for axis in group) for group in view.groups]

        def start(n: int) -> jax.Array:
            short = o.max_dim is not None and n > o.max_dim
            return jnp.ones(n, dtype) if short else jnp.eye(n, dtype=dtype)

        sizes = [n if use else None for n, use in zip(view.merged, kept, strict=True)]
        eye = per_mode(lambda i, n: start(n), sizes)
        spectra = None
        if o.damping_rule == "joint":
            spectra = per_mode(lambda i, n: jnp.ones(n, dtype), sizes)
        return TntFactor(per_mode(lambda i, x: jnp.zeros_like(x), eye), eye, spectra)

    def accumulate(factor: TntFactor, statistic: Any, step: Step) -> TntFactor:
        dtype = next(s.dtype for s in factor.statistics if s is not None)
        old, new = _weights(o, step, dtype)
        # the first update after the pass before training, which counts instead
        warm = (step.count == 1) & (step.statistics > 1)
        scale = new * jnp.asarray(o.fisher_scale).astype(dtype)

        def one(mode: int, omega: jax.Array, column: tuple[jax.Array, int]) -> jax.Array:
            return jnp.where(warm, omega, _fold(o.statistics, omega, *column, old, scale))

        columns = _columns(statistic, merging, [s is None for s in factor.statistics])
        return factor._replace(statistics=per_mode(one, factor.statistics, columns))

    def refresh(factor: TntFactor, step: Step) -> TntFactor:
        dtype = next(s.dtype for s in factor.statistics if s is not None)
        return _refreshed(o, factor, at_step(o.damping, step, dtype))

    def precondition(factor: TntFactor, g: jax.Array, step: Step) -> jax.Array:
        view = merging(g.shape)
        direction = view.unmerge(_applied(o, factor, view.merge(g), step))
        if o.max_gain is None:
            return direction
        return _bounded(direction, g, at_step(o.max_gain, step, g.dtype))

    name = f"tnt({o.statistics}, {'joint' if o.damping_rule == 'joint' else 'inverse'})"
    return BlockMethod(init, accumulate, refresh, precondition, name=name, partial=True)


def _weights(o: TntOptions, step: Step, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Weights of the average and of the new statistic."""
    beta, first = jnp.asarray(o.beta2).astype(dtype), step.statistics == 1
    if o.averaging in ("mean", "corrected"):  # the plain mean is that of the pass before training
        share = corrected_share(1 if o.averaging == "mean" else beta, step.statistics, dtype)
        return 1 - share, share
    share = 1 - beta
    if o.averaging == "official":  # their sum exceeds one: as published
        share = jnp.maximum(1 / step.count.astype(dtype), share)
    return jnp.where(first, 0, beta), jnp.where(first, 1, share)


def _columns(
    statistic: Any, merging: Callable[[Shape], Merge], without: list[bool]
) -> list[tuple[jax.Array, int]]:
    """Per mode a tensor and the axis of it whose Gram is the new statistic.

    ``without``: per mode, whether it has no factor; Grams are means over such modes.
    """
    if isinstance(statistic, Rows):
        a, g = statistic  # sum over rows of contractions of a g^T: less noise than of their sum
        lengths = [jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True)) for x in (a, g)]
        x, y, sizes = a * lengths[1], g * lengths[0], (a.shape[1], g.shape[1])
        root = math.sqrt(math.prod(n for n, drop in zip(sizes, without, strict=True) if drop))
        return [(x / root, 1), (y / root, 1)]
    view = merging(statistic.shape[1:])
    x = view.merge(statistic)
    count = len(statistic) * math.prod(
        n for n, drop in zip(view.merged, without, strict=True) if drop
    )
    x = x / jnp.sqrt(jnp.asarray(count, statistic.dtype))
    return [(x, mode + 1) for mode in range(x.ndim - 1)]


def _fold(
    form: str, omega: jax.Array, x: jax.Array, mode: int, old: jax.Array, new: jax.Array
) -> jax.Array:
    if omega.ndim == 1:
        others = tuple(axis for axis in range(x.ndim) if axis != mode)
        return old * omega + new * jnp.sum(x * x, axis=others)
    if form == "square_root":
        return linalg.sr_update(omega, linalg.unfold(x, mode), old, new)
    return linalg.symmetrize(old * omega + new * linalg.mode_gram(x, mode))


def _trace(factor: TntFactor, form: str) -> jax.Array:
    """The trace, which all modes have in common."""
    omega = next(s for s in factor.statistics if s is not None)
    if omega.ndim == 1:
        return jnp.sum(omega)
    return jnp.sum(omega * omega) if form == "square_root" else jnp.trace(omega)


def _scales(trace: jax.Array, sizes: list[int], order: int) -> tuple[list[jax.Array], jax.Array]:
    """What makes U of Omega, per mode with a factor, and the common mean eigenvalue c of all U.

    ``c = (T / p)^(1/k)`` in logarithms: p may exceed the range of float32. k counts all modes.
    """
    log_t = jnp.log(jnp.where(trace > 0, trace, 1))
    log_c = (log_t - sum(math.log(n) for n in sizes)) / order
    return [jnp.exp(log_c - log_t + math.log(n)) for n in sizes], jnp.exp(log_c)


def _refreshed(o: TntOptions, factor: TntFactor, damping: jax.Array) -> TntFactor:
    order, omegas = len(factor.statistics), [s for s in factor.statistics if s is not None]
    found, c = _scales(_trace(factor, o.statistics), [len(x) for x in omegas], order)
    first, *others = found
    missing = order - len(omegas)
    if o.damping_rule == "joint":
        # eigenvalues c of modes without factor, at those of the first mode that has one
        scales = _placed(factor.statistics, [first * c**missing, *others])
        pairs = per_mode(lambda i, s, scale: _spectrum(s * scale), factor.statistics, scales)
        return factor._replace(
            preconditioners=per_mode(lambda i, pair: pair[1], pairs),
            spectra=per_mode(lambda i, pair: pair[0], pairs),
        )
    shift = damping ** (1 / order) if o.damping_rule == "factored" else damping
    shift = shift + jnp.asarray(o.relative_damping).astype(c.dtype) * c
    inverses = per_mode(
        lambda i, s, scale: _inverse(o, s, scale, shift),
        factor.statistics,
        _placed(factor.statistics, found),
    )
    if missing:  # their inverses 1 / (c + shift), likewise
        rest = (c + shift) ** (-missing * (0.5 if o.statistics == "square_root" else 1.0))
        lead = next(i for i, p in enumerate(inverses) if p is not None)
        inverses = per_mode(lambda i, p: rest * p if i == lead else p, inverses)
    return factor._replace(preconditioners=inverses)


def _placed(modes: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    """The values at the modes that have a factor."""
    rest = iter(values)
    return per_mode(lambda i, _: next(rest), modes)


def _spectrum(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors; of a diagonal the vectors are ones (the identity)."""
    if u.ndim == 1:
        return u, jnp.ones_like(u)
    w, v = linalg.eigh(u)
    return jnp.maximum(w, 0), v


def _inverse(o: TntOptions, omega: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Damped inverse of ``U = scale * Omega``, or its root K with square-root statistics."""
    root = o.statistics == "square_root"
    if omega.ndim == 1:
        inverse = 1 / (scale * omega + shift)
        return jnp.sqrt(inverse) if root else inverse
    eye = jnp.eye(len(omega), dtype=omega.dtype)
    if root:  # U + eps I = R'^T R' by QR, K = R'^-1: no Gram matrix is formed
        rows = jnp.concatenate([jnp.sqrt(scale) * omega, jnp.sqrt(shift) * eye])
        return linalg.triangular_inverse(linalg.qr_r(rows))
    u = scale * omega
    if o.inverse == "eigh":
        w, v = linalg.eigh(u)
        return linalg.symmetrize(linalg.matmul(v / (jnp.maximum(w, 0) + shift)[None, :], v.T))
    if o.inverse == "cholesky":
        return linalg.damped_inverse(u, shift)
    damped = u + shift * eye
    if o.inverse == "newton":
        x, error = linalg.inverse_root(damped, 1, 0.0)
        return jnp.where(error < 0.1, x, jnp.nan)  # not converged: the engine keeps the old one
    assert callable(o.inverse)
    return o.inverse(damped)


def _applied(o: TntOptions, factor: TntFactor, g: jax.Array, step: Step) -> jax.Array:
    """The merged gradient times the inverse in every mode."""
    p = factor.preconditioners
    if o.damping_rule == "joint":
        assert factor.spectra is not None
        x = linalg.multiply_modes(g, p, transposed=True)
        x = linalg.multiply_modes(
            x / (_outer(factor.spectra) + at_step(o.damping, step, g.dtype)), p
        )
        return jnp.where(step.refreshes > 0, x, g)
    if o.statistics == "square_root":
        g = linalg.multiply_modes(g, p, transposed=True)
    return linalg.multiply_modes(g, p)


def _outer(vectors: tuple[Any, ...]) -> jax.Array:
    k = len(vectors)
    out = jnp.ones((1,) * k, next(v.dtype for v in vectors if v is not None))
    for mode, v in enumerate(vectors):
        if v is not None:
            out = out * v.reshape([-1 if axis == mode else 1 for axis in range(k)])
    return out


def _bounded(direction: jax.Array, g: jax.Array, gain: jax.Array) -> jax.Array:
    """The direction, no longer than ``gain`` times the gradient."""
    length, limit = (jnp.sqrt(jnp.sum(x * x)) for x in (direction, g))
    limit = gain * limit
    return direction * jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)
