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

from kradagrad_jax.factors.method import BlockMethod, Rows, Step
from kradagrad_jax.factors.modes import Groups, Merge, axis_groups
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.linalg import (
    cholesky_inverse,
    eigh,
    inverse_root,
    matmul,
    mode_gram,
    multiply_modes,
    qr_r,
    sr_update,
    symmetrize,
    triangular_inverse,
    unfold,
)

Shape = tuple[int, ...]


class TntFactor(NamedTuple):
    """Factors of one block whose merged shape is ``(d_1, .., d_k)``.

    Attributes:
      statistics: per mode Omega ``(d_i, d_i)``, averaged mode Gram of sampled gradients; its
        diagonal ``(d_i,)`` for long modes; with square-root statistics the upper triangular R with
        ``R^T R`` = Omega.
      preconditioners: per mode the damped inverse of U; with square-root statistics K with
        ``K K^T`` = inverse; for joint damping the eigenvectors of U. Vectors for diagonals.
      spectra: per mode the eigenvalues of U, for joint damping; else None.
      weight: how many statistics the average stands for (0: none yet); scalar.
    """

    statistics: tuple[jax.Array, ...]
    preconditioners: tuple[jax.Array, ...]
    spectra: tuple[jax.Array, ...] | None
    weight: jax.Array


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

    def init(shape: Shape, dtype: Any) -> TntFactor:
        sizes = merging(shape).merged
        diagonal = [o.max_dim is not None and n > o.max_dim for n in sizes]
        eye = [
            jnp.ones(n, dtype) if short else jnp.eye(n, dtype=dtype)
            for n, short in zip(sizes, diagonal, strict=True)
        ]
        spectra = None
        if o.damping_rule == "joint":
            spectra = tuple(jnp.ones(n, dtype) for n in sizes)
        zeros = tuple(jnp.zeros_like(x) for x in eye)
        return TntFactor(zeros, tuple(eye), spectra, jnp.zeros((), dtype))

    def accumulate(factor: TntFactor, statistic: Any, step: Step) -> TntFactor:
        old, new, weight = _weights(o, factor.weight, step)
        warm = (step.count == 1) & (factor.weight > 0)  # the pass before training counts instead
        old, new = jnp.where(warm, 1, old), jnp.where(warm, 0, new)
        columns = _columns(statistic, merging)
        scale = new * jnp.asarray(o.fisher_scale).astype(new.dtype)
        updated = tuple(
            _fold(o.statistics, omega, x, mode, old, scale)
            for (x, mode), omega in zip(columns, factor.statistics, strict=True)
        )
        updated = tuple(
            jnp.where(warm, s, n) for s, n in zip(factor.statistics, updated, strict=True)
        )
        return factor._replace(statistics=updated, weight=jnp.where(warm, factor.weight, weight))

    def refresh(factor: TntFactor, step: Step) -> TntFactor:
        new = _refreshed(o, factor, at_step(o.damping, step, factor.weight.dtype))
        # a block that has seen nothing but zeros has no curvature to invert: P = I/eps would blow
        # its first gradient up by eps^-k
        seen = _trace(factor, o.statistics) > 0
        return jax.tree.map(lambda n, old: n if n is old else jnp.where(seen, n, old), new, factor)

    def precondition(factor: TntFactor, g: jax.Array, step: Step) -> jax.Array:
        view = merging(g.shape)
        direction = view.unmerge(_applied(o, factor, view.merge(g), step))
        if o.max_gain is None:
            return direction
        return _bounded(direction, g, at_step(o.max_gain, step, g.dtype))

    return BlockMethod(init, accumulate, refresh, precondition)


def _weights(
    o: TntOptions, weight: jax.Array, step: Step
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of the average and of the new statistic, and the new number of statistics."""
    beta = jnp.asarray(o.beta2).astype(weight.dtype)
    if o.averaging == "mean":  # the pass before training
        return weight / (weight + 1), 1 / (weight + 1), weight + 1
    if o.averaging == "corrected":
        total = beta * weight + 1
        return 1 - 1 / total, 1 / total, total
    share = 1 - beta
    if o.averaging == "official":  # their sum exceeds one: as published
        share = jnp.maximum(1 / step.count.astype(beta.dtype), share)
    first = weight == 0
    return jnp.where(first, 0, beta), jnp.where(first, 1, share), jnp.maximum(weight, 1)


def _columns(statistic: Any, merging: Callable[[Shape], Merge]) -> list[tuple[jax.Array, int]]:
    """Per mode a tensor and the axis of it whose Gram is the new statistic."""
    if isinstance(statistic, Rows):
        a, g = statistic  # sum over rows of contractions of a g^T: less noise than of their sum
        lengths = [jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True)) for x in (a, g)]
        return [(a * lengths[1], 1), (g * lengths[0], 1)]
    view = merging(statistic.shape[1:])
    x = view.merge(statistic) / jnp.sqrt(jnp.asarray(len(statistic), statistic.dtype))
    return [(x, mode + 1) for mode in range(x.ndim - 1)]


def _fold(
    form: str, omega: jax.Array, x: jax.Array, mode: int, old: jax.Array, new: jax.Array
) -> jax.Array:
    if omega.ndim == 1:
        others = tuple(axis for axis in range(x.ndim) if axis != mode)
        return old * omega + new * jnp.sum(x * x, axis=others)
    if form == "square_root":
        return sr_update(omega, unfold(x, mode), old, new)
    return symmetrize(old * omega + new * mode_gram(x, mode))


def _trace(factor: TntFactor, form: str) -> jax.Array:
    """The trace, which all modes have in common."""
    omega = factor.statistics[0]
    if omega.ndim == 1:
        return jnp.sum(omega)
    return jnp.sum(omega * omega) if form == "square_root" else jnp.trace(omega)


def _scales(trace: jax.Array, sizes: list[int]) -> tuple[list[jax.Array], jax.Array]:
    """What makes U of Omega, per mode, and the common mean eigenvalue c of all U.

    ``c = (T / p)^(1/k)`` in logarithms: p may exceed the range of float32.
    """
    log_t = jnp.log(jnp.where(trace > 0, trace, 1))
    log_c = (log_t - sum(math.log(n) for n in sizes)) / len(sizes)
    return [jnp.exp(log_c - log_t + math.log(n)) for n in sizes], jnp.exp(log_c)


def _refreshed(o: TntOptions, factor: TntFactor, damping: jax.Array) -> TntFactor:
    sizes = [len(omega) for omega in factor.statistics]
    scales, c = _scales(_trace(factor, o.statistics), sizes)
    if o.damping_rule == "joint":
        pairs = [_spectrum(omega * s) for omega, s in zip(factor.statistics, scales, strict=True)]
        vectors = tuple(v for _, v in pairs)
        return factor._replace(preconditioners=vectors, spectra=tuple(w for w, _ in pairs))
    shift = damping ** (1 / len(sizes)) if o.damping_rule == "factored" else damping
    shift = shift + jnp.asarray(o.relative_damping).astype(c.dtype) * c
    return factor._replace(
        preconditioners=tuple(
            _inverse(o, omega, s, shift) for omega, s in zip(factor.statistics, scales, strict=True)
        )
    )


def _spectrum(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors; of a diagonal the vectors are ones (the identity)."""
    if u.ndim == 1:
        return u, jnp.ones_like(u)
    w, v = eigh(u)
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
        return triangular_inverse(qr_r(rows))
    u = scale * omega
    if o.inverse == "eigh":
        w, v = eigh(u)
        return symmetrize(matmul(v / (jnp.maximum(w, 0) + shift)[None, :], v.T))
    damped = u + shift * eye
    if o.inverse == "cholesky":
        return cholesky_inverse(damped)
    if o.inverse == "newton":
        x, error = inverse_root(damped, 1, 0.0)
        return jnp.where(error < 0.1, x, jnp.nan)  # not converged: the engine keeps the old one
    assert callable(o.inverse)
    return o.inverse(damped)


def _applied(o: TntOptions, factor: TntFactor, g: jax.Array, step: Step) -> jax.Array:
    """The merged gradient times the inverse in every mode."""
    p = factor.preconditioners
    if o.damping_rule == "joint":
        assert factor.spectra is not None
        x = _multiply(g, [m.T if m.ndim == 2 else m for m in p])
        x = _multiply(x / (_outer(factor.spectra) + at_step(o.damping, step, g.dtype)), p)
        return jnp.where(factor.weight > 0, x, g)
    if o.statistics == "square_root":
        g = _multiply(g, [m.T if m.ndim == 2 else m for m in p])
    return _multiply(g, p)


def _multiply(g: jax.Array, matrices: Any) -> jax.Array:
    """Multiplies every mode by its matrix, or by the vector that stands for a diagonal."""
    out = multiply_modes(g, [m if m.ndim == 2 else None for m in matrices])
    for mode, m in enumerate(matrices):
        if m.ndim == 1:
            out = out * jnp.expand_dims(m, [a for a in range(g.ndim) if a != mode])
    return out


def _outer(vectors: tuple[jax.Array, ...]) -> jax.Array:
    k = len(vectors)
    out = jnp.ones((1,) * k, vectors[0].dtype)
    for mode, v in enumerate(vectors):
        out = out * v.reshape([-1 if axis == mode else 1 for axis in range(k)])
    return out


def _bounded(direction: jax.Array, g: jax.Array, gain: jax.Array) -> jax.Array:
    """The direction, no longer than ``gain`` times the gradient."""
    length, limit = (jnp.sqrt(jnp.sum(x * x)) for x in (direction, g))
    limit = gain * limit
    return direction * jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)
