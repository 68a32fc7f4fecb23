"""Roots of inverse curvature that are moved along tangents, one set per block, and kept in balance.

A Kronecker product of roots does not change if one is multiplied by c and another divided by it.
Nothing holds the roots along this direction, and steps whose lengths are bounded one by one push
them along it for ever, until one overflows. After every move they are brought to equal size.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import Step
from kradagrad_jax.factors.numbers import at_step, is_number
from kradagrad_jax.linalg.structures import Stored, Structure


class Moves(NamedTuple):
    """How a set of roots is moved."""

    lr_cov: Any  # length b of the step: a number or a schedule
    momentum: Any  # decay alpha of the Riemannian momentum; a plain 0: none, and no memory for it
    # what b is divided by where it exceeds one: ``"none"``, ``"frobenius"`` norm or ``"max_entry"``
    # of the momentum
    normalize: str = "none"
    second_order: bool = False  # the second term of the exponential as well
    averaged: bool = False  # the momentum is an average (tangents weigh ``1 - alpha``), not a sum
    # the roots have a free common scale, see above; False where each has its own meaning
    balanced: bool = True


def starting_momenta(momentum: Any, roots: Sequence[Stored]) -> tuple[Stored, ...]:
    """Zeros like the roots; None (no memory) where the momentum is a plain zero."""
    if is_number(momentum, 0):
        return (None,) * len(roots)
    return tuple(jax.tree.map(jnp.zeros_like, root) for root in roots)


def move_roots(
    how: Moves,
    structures: Sequence[Structure],
    roots: Sequence[Stored],
    momenta: Sequence[Stored],
    tangents: Sequence[Stored],
    step: Step,
) -> tuple[tuple[Stored, ...], tuple[Stored, ...]]:
    """New roots ``K exp(-b m)`` to first or second order, and their momenta m.

    ``m <- alpha m + tangent / 2``, or with ``(1 - alpha) / 2``. Roots and momenta may be None.
    """
    alpha = jnp.asarray(how.momentum)
    share = 0.5 * (1 - alpha) if how.averaged else 0.5
    new, kept = [], []
    for s, root, old, tangent in zip(structures, roots, momenta, tangents, strict=True):
        if root is None:
            new.append(None)
            kept.append(None)
            continue
        m = scaled(share, tangent)
        if old is not None:
            m = jax.tree.map(jnp.add, scaled(alpha, old), m)
        b = at_step(how.lr_cov, step)
        if how.normalize != "none":
            length = s.frobenius(m) if how.normalize == "frobenius" else s.max_entry(m)
            b = b / jnp.maximum(1, length).astype(b.dtype)
        new.append(_moved(s, root, m, b, how.second_order))
        kept.append(None if old is None else m)
    return (balanced(structures, new) if how.balanced else tuple(new)), tuple(kept)


def tangent(s: Structure, h: Stored, lam: jax.Array, root: Stored) -> Stored:
    """Whitened curvature h plus damping lam K^T K minus the identity, projected."""
    return s.subtract_identity(jax.tree.map(jnp.add, h, scaled(lam, s.ktk(root))))


def balanced(structures: Sequence[Structure], roots: Sequence[Stored]) -> tuple[Stored, ...]:
    """The roots, times powers of two whose product is one, so that their sizes are about equal.

    Two roots whose sizes differ by a factor of 8 or more are brought within a factor of 2, k roots
    within 2^(k/2); nearer ones stay as they are. Powers of two round nothing in any dtype: the
    Kronecker product is the same to the last bit, and so is what follows.
    Momenta are tangents and do not change.
    """
    live = [i for i, root in enumerate(roots) if root is not None]
    if len(live) < 2:
        return tuple(roots)
    sizes = jnp.stack([_size(structures[i], roots[i]) for i in live])
    usable = jnp.all(jnp.isfinite(sizes) & (sizes > 0))
    logs = jnp.log2(jnp.where(usable, sizes, 1))
    shifts = jnp.round(jnp.mean(logs) - logs).astype(jnp.int32)
    # the one that is furthest off takes what rounding left
    last = jnp.argmax(jnp.abs(shifts))
    shifts = shifts.at[last].add(-jnp.sum(shifts, dtype=jnp.int32))
    shifts = jnp.where(jnp.max(jnp.abs(shifts)) > 1, shifts, 0)
    out = list(roots)
    for place, i in enumerate(live):
        out[i] = scaled(jnp.ldexp(jnp.ones((), sizes.dtype), shifts[place]), roots[i])
    return tuple(out)


def _size(s: Structure, root: Stored) -> jax.Array:
    """Root of the mean square of a (d, d) matrix's rows, from the largest entry: no overflow."""
    top = s.max_entry(root)
    unit = jnp.where(top > 0, top, 1)
    d = jax.eval_shape(s.to_dense, root).shape[0]
    wide = jax.tree.map(lambda x: x.astype(unit.dtype) / unit, root)
    return jnp.where(top > 0, unit * (s.frobenius(wide) / math.sqrt(d)), 0)


def scaled(factor: Any, stored: Stored) -> Stored:
    """A scalar times a structured matrix, in the dtype of the latter."""
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, stored)


def dtype_of(stored: Stored) -> Any:
    """Dtype of the numbers of a structured matrix."""
    return jax.tree.leaves(stored)[0].dtype


def _moved(s: Structure, root: Stored, m: Stored, b: jax.Array, second_order: bool) -> Stored:
    """``K (I - b m)``, or with the second term of the exponential ``K (I - b m + (b m)^2 / 2)``."""
    change = s.matmul(root, m)
    out = jax.tree.map(jnp.subtract, root, scaled(b, change))
    if second_order:
        out = jax.tree.map(jnp.add, out, scaled(b * b / 2, s.matmul(change, m)))
    return out
