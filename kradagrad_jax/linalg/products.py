"""Products of matrices and tensors at full precision.

Every product of the package's matrix algebra goes through here, so that no caller's
`jax.default_matmul_precision` and no hardware default (bfloat16 passes on TPU, TF32 on GPU)
reaches the statistics and their roots.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a @ b` with `precision=HIGHEST`; shapes and dtypes as in `jnp.matmul`."""
    return jnp.matmul(a, b, precision=_HIGHEST)


def symmetrize(a: jax.Array) -> jax.Array:
    """Return `(a + a^T) / 2` over the last two axes of `a`: (..., n, n)."""
    return 0.5 * (a + jnp.swapaxes(a, -1, -2))


def unfold(g: jax.Array, mode: int) -> jax.Array:
    """Return the mode unfolding of `g`: (n_mode, g.size / n_mode), other axes in their order."""
    return jnp.moveaxis(g, mode, 0).reshape(g.shape[mode], -1)


def mode_gram(g: jax.Array, mode: int) -> jax.Array:
    """Return `unfold(g, mode) @ unfold(g, mode).T`: (n_mode, n_mode), symmetric.

    The other axes are contracted where they lie: no unfolding is materialised.
    """
    mode = range(g.ndim)[mode]
    others = tuple(axis for axis in range(g.ndim) if axis != mode)
    return jax.lax.dot_general(g, g, ((others, others), ((), ())), precision=_HIGHEST)


def multiply_modes(
    g: jax.Array,
    matrices: Sequence[jax.Array | None],
    skip: Sequence[int] = (),
    transposed: bool = False,
) -> jax.Array:
    """Multiply every mode of `g` by its matrix: `unfold(result, i) = matrices[i] @ unfold(g, i)`.

    Args:
      g: (n_0, ..., n_{k-1}).
      matrices: one (m_i, n_i) matrix per mode; or the diagonal (n_i,) of one; or None to leave the
        mode alone.
      skip: modes to leave alone although they have a matrix.
      transposed: multiply by the transposes.

    Returns:
      (m_0, ..., m_{k-1}), with `m_i = n_i` for the modes left alone.
    """
    if len(matrices) != g.ndim:
        raise ValueError(f"expected one matrix per mode of shape {g.shape}, got {len(matrices)}")
    for mode, matrix in enumerate(matrices):
        if matrix is not None and mode not in skip:
            g = _multiply_mode(g, matrix.T if transposed else matrix, mode)
    return g


def _multiply_mode(g: jax.Array, matrix: jax.Array, mode: int) -> jax.Array:
    if matrix.ndim == 1:
        return g * jnp.expand_dims(matrix, [axis for axis in range(g.ndim) if axis != mode])
    if mode == g.ndim - 1 and mode > 0:  # the new axis comes last by itself: no transposition
        return jax.lax.dot_general(g, matrix, (((mode,), (1,)), ((), ())), precision=_HIGHEST)
    out = jax.lax.dot_general(matrix, g, (((1,), (mode,)), ((), ())), precision=_HIGHEST)
    return jnp.moveaxis(out, 0, mode)


def nonzero(x: jax.Array) -> jax.Array:
    """One in place of zero; keeps NaN."""
    return jnp.where(x == 0.0, 1.0, x)
