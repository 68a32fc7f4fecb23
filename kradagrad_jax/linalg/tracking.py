"""Tracking the eigenbasis of a slowly changing symmetric matrix by products only."""

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg.lapack import one_matrix
from kradagrad_jax.linalg.products import matmul, nonzero, symmetrize

_LARGEST_ROTATION = 0.9  # norm of the generator; keeps the output within 0.2 of orthonormal
_CROWD = 0.7  # norm of all rotations above which the useless ones give way
_SMALL = 0.3  # angles below this are never held back one by one


def refine_eigenbasis(a: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Refine an approximate orthonormal eigenbasis once (six matrix products).

    The iteration of Ogita and Aishima (Japan J. Indust. Appl. Math. 35, 2018, Algorithm 1), which
    converges quadratically and restores orthonormality, with its rotations replaced so that a step
    from anywhere is safe and makes progress: Jacobi angles (at most 45 degrees, also between equal
    diagonal entries) for every pair at once; large angles of small entries, which mark close
    eigenvalues and change little, weighted down while there are many; the generator limited in
    norm and nearly exponentiated. Entries at rounding level are left alone, so clusters of equal
    eigenvalues need no special case. After a change of `a` by 1% one step leaves about a tenth of
    the error of a stale basis in a root of `a`.

    Args:
      a: (n, n) symmetric, float32 or float64.
      q: (n, n), within about 0.2 of orthonormal (in norm of `q^T q - I`): the previous result, or
        the identity to start with. From the identity expect 15 to 40 steps (n = 64 to 128).

    Returns:
      `(w, q_new)`: eigenvalues (n,) to go with the columns of `q_new` (n, n), in no order. The
      basis is differentiable, with the step sizes held constant.

    Raises:
      TypeError: `a` is not float32 or float64.
      ValueError: `a` and `q` are not square matrices of one shape.
    """
    a, q = one_matrix(a, "refine_eigenbasis"), one_matrix(q, "refine_eigenbasis")
    if q.shape != a.shape:
        raise ValueError(f"expected two square matrices, got shapes {a.shape} and {q.shape}")
    s = symmetrize(matmul(q.T, matmul(a, q)))
    defect = jnp.eye(a.shape[0], dtype=a.dtype) - matmul(q.T, q)
    w = jnp.diagonal(s) / (1.0 - jnp.diagonal(defect))
    coupling = _significant(s + 0.5 * (w[:, None] + w[None, :]) * defect, w)
    angles = _jacobi_angles(coupling, w)
    generator = angles * _weights(angles, coupling)
    square = matmul(generator, generator)
    size = _rotation_size(square)
    step = jnp.where(size > _LARGEST_ROTATION, _LARGEST_ROTATION / nonzero(size), 1.0)
    # The cubic coefficient 1/8 makes the factor orthogonal to sixth order in the generator.
    rotation = step * generator + 0.5 * step**2 * square
    rotation = rotation + 0.125 * step**3 * matmul(square, generator)
    change = rotation + 0.5 * defect
    return _moved(w, coupling, generator, step), q + matmul(q, change)


def _significant(coupling: jax.Array, w: jax.Array) -> jax.Array:
    """Zero the diagonal and what rounding alone can leave."""
    noise = 2.0 * jnp.finfo(w.dtype).eps * jnp.max(jnp.abs(w))
    ignored = (jnp.abs(coupling) <= noise) | jnp.eye(w.shape[0], dtype=bool)
    return jnp.where(ignored, 0.0, coupling)


def _jacobi_angles(coupling: jax.Array, w: jax.Array) -> jax.Array:
    """Angles that would diagonalise each pair alone, antisymmetric, at most pi/4."""
    gap = w[None, :] - w[:, None]
    place = jnp.arange(w.shape[0])
    order = jnp.where(place[None, :] > place[:, None], 1.0, -1.0).astype(w.dtype)
    sign = jax.lax.stop_gradient(jnp.where(gap == 0.0, order, jnp.sign(gap)))
    scale = nonzero(jnp.max(jnp.abs(w)))  # so that the squares stay in range
    sine = 2.0 * sign * coupling / scale
    cosine = jnp.where(coupling == 0.0, 1.0, jnp.abs(gap) / scale)  # of twice the angle, both
    tangent = sine / (cosine + jnp.sqrt(cosine * cosine + sine * sine))
    return tangent / (1.0 + 0.28 * tangent * tangent)  # arctan to 0.005, at a third of its cost


def _weights(angles: jax.Array, coupling: jax.Array) -> jax.Array:
    """Weights in [0, 1], below one for large angles only, and only when there are too many."""
    angles, coupling = jax.lax.stop_gradient((jnp.abs(angles), jnp.abs(coupling)))
    weights = jnp.sqrt(coupling / nonzero(jnp.max(coupling)))
    held = (angles > _SMALL) & (_skew_norm(angles) > _CROWD)
    gain = _CROWD / nonzero(_skew_norm(jnp.where(held, weights * angles, 0.0)))
    return jnp.where(held, jnp.minimum(jnp.maximum(gain, 1.0) * weights, 1.0), 1.0)


def _skew_norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(0.5 * jnp.sum(x * x))  # singular values of a skew matrix come in pairs


def _rotation_size(square: jax.Array) -> jax.Array:
    """Upper bound on the norm of a skew matrix from its square, constant for derivatives."""
    square = jax.lax.stop_gradient(square)
    return (0.5 * jnp.sum(square * square)) ** 0.25


def _moved(w: jax.Array, coupling: jax.Array, generator: jax.Array, step: jax.Array) -> jax.Array:
    """Eigenvalues after the rotation, to second order; never across zero."""
    change = (2.0 * step - step * step) * jnp.sum(generator * coupling, axis=1)
    moved = w - change
    return jnp.where(moved * jnp.sign(w) > 0.0, moved, w)
