"""Adam in the eigenbasis of a block's statistics: rotations, new bases, directions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.numbers import is_number
from kradagrad_jax.linalg import eigh, matmul, multiply_modes, qr, refine_eigenbasis, when

Matrices = Sequence[Any]  # per mode (n_i, n_i), or None


def turned(x: jax.Array, bases: Matrices, skip: Sequence[int] = ()) -> jax.Array:
    """``x`` in the bases: every mode multiplied by ``Q_i^T``."""
    return multiply_modes(x, [None if q is None else q.T for q in bases], skip)


def along(vector: jax.Array, mode: int, ndim: int) -> jax.Array:
    """``(n,)`` as an array that varies along one of ``ndim`` modes."""
    return jnp.expand_dims(vector, [a for a in range(ndim) if a != mode])


def shares(x: jax.Array, mode: int) -> jax.Array:
    """Sums of squares along all other modes: the diagonal of the mode's Gram matrix, ``(n,)``."""
    return jnp.sum(x * x, axis=tuple(a for a in range(x.ndim) if a != mode))


def quotients(s: jax.Array, q: jax.Array) -> jax.Array:
    """Rayleigh quotients ``diag(Q^T S Q)``: ``(n,)``."""
    return jnp.sum(q * matmul(s, q), axis=0)


def power_step(s: jax.Array, q: jax.Array, order: jax.Array | None = None) -> jax.Array:
    """Q-factor of ``S Q``, its columns brought into an order before; safe for tiny ``S``."""
    size = jnp.max(jnp.abs(s))
    moved = matmul(s / jnp.where(size > 0, size, 1), q)
    return qr(moved if order is None else moved[:, order])[0]


def largest_first(s: jax.Array) -> jax.Array:
    """Eigenvectors of ``S``, that of the largest eigenvalue first."""
    return eigh(s)[1][:, ::-1]


def next_basis(
    kind: str, s: jax.Array, q: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A better eigenbasis, and where its columns come from.

    Args:
      kind: ``"qr"``: one power step and a QR decomposition (arXiv 2409.11321, Algorithm 4);
        ``"eigh"``: exact; ``"tracked"``: matmuls alone.
      s: ``(n, n)`` statistic.
      q: ``(n, n)`` basis so far.
      first: whether ``q`` says nothing of ``s`` yet (bool scalar): then all kinds decompose.

    Returns:
      The basis, and the permutation ``(n,)`` that takes its columns from those of ``q``: sorted
      by Rayleigh quotients, largest first; columns that are tracked stay where they are.
    """
    same = jnp.arange(len(s))
    if kind == "tracked":
        refined = refine_eigenbasis(s, q)[1]
        return when(first, lambda _, s: largest_first(s), refined, s), same
    order = jnp.where(first, same, jnp.argsort(-quotients(s, q), stable=True))
    if kind == "eigh":
        return largest_first(s), order
    return when(first, lambda _, s: largest_first(s), power_step(s, q, order), s), order


def ascending_basis(
    kind: str, s: jax.Array, q: jax.Array, first: jax.Array, iterations: int, tolerance: Any
) -> jax.Array:
    """A better eigenbasis as facebookresearch/optimizers finds it, smallest eigenvalue first.

    Args:
      kind: ``"eigh"``; ``"qr"``: ``iterations`` steps of the QR algorithm, from whatever basis
        there is; ``"tracked"``: as in :func:`next_basis`.
      s: ``(n, n)`` statistic.
      q: ``(n, n)`` basis so far.
      first: as in :func:`next_basis`.
      iterations: most steps of ``"qr"``.
      tolerance: the basis is good, and kept, where the part of ``Q^T S Q`` off the diagonal is at
        most this share of it in norm.
    """
    if kind == "tracked":
        return when(first, lambda _, s: eigh(s)[1], refine_eigenbasis(s, q)[1], s)
    if kind == "eigh" and is_number(tolerance, 0):
        return eigh(s)[1]
    b = matmul(q.T, matmul(s, q))
    if kind == "eigh":
        return when(_is_full(b, tolerance), lambda _, s: eigh(s)[1], q, s)
    for _ in range(iterations):

        def step(old: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            turn, r = qr(old[0])
            return matmul(r, turn), matmul(old[1], turn)

        b, q = when(_is_full(b, tolerance), step, (b, q))
    return q[:, jnp.argsort(jnp.diagonal(b), stable=True)]


def _is_full(b: jax.Array, tolerance: Any) -> jax.Array:
    rest = b - jnp.diag(jnp.diagonal(b))
    return jnp.sum(rest * rest) > jnp.asarray(tolerance, b.dtype) ** 2 * jnp.sum(b * b)


def whitened(
    x: jax.Array, squares: jax.Array, eps: Any, rule: str, exponent: Any = 0.5
) -> jax.Array:
    """``x / (v^exponent + eps)``; 0 where both are 0.

    Args:
      x: momentum in the basis, of the block's shape.
      squares: v, likewise.
      eps: with ``rule="relative"`` times the largest ``v^exponent`` of the block.
      rule: ``"absolute"`` or ``"relative"``.
      exponent: 1/2 is Adam.
    """
    root = jnp.sqrt(squares) if exponent == 0.5 else squares**exponent
    floor = jnp.asarray(eps, x.dtype)
    size = root + (floor * jnp.max(root) if rule == "relative" else floor)
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)


def live(x: jax.Array, energies: Matrices) -> jax.Array:
    """``x`` without the directions that hold nothing but rounding.

    A direction of the basis whose share e of the statistic is at most ``n u max(e)``, u the
    rounding unit, is an arbitrary one of the null space: what the rotated gradient holds there is
    noise, and dividing it by its own size would make steps of order one of it.
    """
    for mode, e in enumerate(energies):
        if e is not None:
            least = len(e) * 0.5 * float(jnp.finfo(e.dtype).eps) * jnp.max(e)
            x = jnp.where(along(e > least, mode, x.ndim), x, 0)
    return x


def root_mean_square(u: jax.Array) -> jax.Array:
    """Without squares that over- or underflow; its derivative at zero is zero."""
    largest = jnp.max(jnp.abs(u))
    unit = u / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.where(largest > 0, jnp.mean(unit * unit), 1))


def limited(u: jax.Array, normalize: bool, clip: Any = None) -> jax.Array:
    """``u`` with a root mean square of one, or of at most ``clip``."""
    if not normalize and clip is None:
        return u
    rms = root_mean_square(u)
    if normalize:
        return u / (1e-30 + rms)
    limit = jnp.asarray(clip, u.dtype)
    return u * jnp.where(rms > limit, limit / jnp.where(rms > 0, rms, 1), 1)
