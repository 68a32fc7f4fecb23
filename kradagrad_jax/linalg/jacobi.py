"""Eigendecomposition of a large symmetric matrix from those of small ones: block Jacobi.

For TPU, where XLA's own `eigh` is one kernel up to 256 and above that a recursive program that
takes minutes to compile. Here one small `eigh` stands in a loop, whatever the size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.linalg.products import matmul

_SWEEPS = 20  # three to eight are usual


def block_eigh(
    a: jax.Array, eigh: Callable[[jax.Array], tuple[jax.Array, jax.Array]], largest: int
) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors by rotations that diagonalise two blocks at a time.

    All blocks meet pairwise once per sweep, half of them at the same time (round robin). The
    smaller eigenvalues of a pair go to the block of the lower number, so that in the end the
    blocks are in ascending order and rotations close to the identity: convergence is quadratic.

    Args:
      a: (n, n) symmetric and finite, float32 or float64.
      eigh: decomposition of one symmetric matrix, ascending; it is `vmap`ped.
      largest: size up to which `eigh` may be used, at least 2.

    Returns:
      `(w, v)`: (n,) ascending and (n, n), columns; as accurate as LAPACK's.

    References:
      Golub and Van Loan, Matrix Computations, section 8.5 (block Jacobi, parallel orderings).
    """
    n = len(a)
    half = max(largest // 2, 1)
    blocks = 2 * max(-(-n // (2 * half)), 1)  # even
    size = -(-n // blocks)
    scale, padded = _padded(a, blocks * size)
    v = _sweeps(padded, blocks, size, eigh)
    v = 1.5 * v - 0.5 * matmul(v, matmul(v.T, v))  # a hundred rotations leave rounding behind
    w = jnp.sum(v * matmul(padded, v), axis=0)
    order = jnp.argsort(w)[:n]  # the padding has the largest eigenvalues
    return w[order] * scale, v[:n, order]


def _padded(a: jax.Array, total: int) -> tuple[jax.Array, jax.Array]:
    """`a` with norm at most one, enlarged by a multiple of the identity beyond its spectrum."""
    norm = jnp.max(jnp.sum(jnp.abs(a), axis=1))
    scale = jnp.where(norm > 0, norm, 1)
    more = total - len(a)
    edge = jnp.diag(jnp.where(jnp.arange(total) < len(a), 0, 2).astype(a.dtype))
    return scale, jnp.pad(a / scale, ((0, more), (0, more))) + edge


def _sweeps(
    a: jax.Array, blocks: int, size: int, eigh: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """Orthogonal matrix that diagonalises `a`: (blocks * size, blocks * size)."""
    total = blocks * size
    turn = _round_robin(blocks)
    outside = jnp.repeat(jnp.repeat(~jnp.eye(blocks, dtype=bool), size, 0), size, 1)
    enough = jnp.finfo(a.dtype).eps * jnp.sqrt(jnp.sum(a * a))

    def off(a: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.where(outside, a * a, 0)))

    def round_(_, carry):
        a, v, label = carry
        pairs = a.reshape(blocks // 2, 2 * size, blocks // 2, 2 * size)
        diagonal = jnp.stack([pairs[i, :, i] for i in range(blocks // 2)])
        _, w = jax.vmap(eigh)(diagonal)
        first, second = label[0::2], label[1::2]
        swapped = jnp.concatenate([w[:, :, size:], w[:, :, :size]], axis=2)
        w = jnp.where((first < second)[:, None, None], w, swapped)
        a = _rotate(_rotate(a, w, size).T, w, size).T
        a = 0.5 * (a + a.T)
        v = _rotate(v, w, size)
        a = _reorder(_reorder(a, turn).T, turn)
        return a, _reorder(v, turn), label[turn]

    def sweep(carry):
        a, v, label, now, _, count = carry
        a, v, label = jax.lax.fori_loop(0, blocks - 1, round_, (a, v, label))
        return a, v, label, off(a), now, count + 1

    def unfinished(carry):
        *_, now, before, count = carry
        stuck = (now < 32 * enough) & (now > 0.5 * before)  # at the level of rounding
        return (now > enough) & ~stuck & (count < _SWEEPS)

    v = jnp.eye(total, dtype=a.dtype) + 0 * a  # as varying over devices as `a`
    start = off(a)
    carry = (a, v, jnp.arange(blocks), start, start, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unfinished, sweep, carry)[1]


def _rotate(x: jax.Array, w: jax.Array, size: int) -> jax.Array:
    """`x` times the block diagonal matrix of the `w`: (blocks / 2, 2 size, 2 size)."""
    rows = len(x)
    columns = jnp.moveaxis(x.reshape(rows, len(w), 2 * size), 1, 0)
    return jnp.moveaxis(matmul(columns, w), 0, 1).reshape(rows, -1)


def _reorder(x: jax.Array, order: np.ndarray) -> jax.Array:
    """`x` with its blocks of columns in this order; slices, as TPU compiles gathers slowly."""
    columns = jnp.split(x, len(order), axis=1)
    return jnp.concatenate([columns[i] for i in order], axis=1)


def _round_robin(blocks: int) -> np.ndarray:
    """Permutation of places between rounds: neighbours (0, 1), (2, 3), ... meet; 0 stays.

    After `blocks - 1` rounds everybody has met everybody and stands at the first place again.
    """
    top, bottom = list(range(0, blocks, 2)), list(range(1, blocks, 2))
    new_top = [top[0], bottom[0], *top[1:-1]]
    new_bottom = [*bottom[1:], top[-1]]
    return np.stack([new_top, new_bottom], axis=1).reshape(-1)
