"""The only door to matrix factorisations (eigh, svd, QR, Cholesky, triangular inverse).

Why a door: since jaxlib 0.10 a *batched* LAPACK call on CPU spreads its batch over XLA's thread
pool and blocks one pool thread until the pieces are done. When as many batched calls run at once
as there are pool threads, nobody is left to do the pieces and the program hangs forever; two-core
machines hit this all the time. Here `jax.vmap` of a factorisation becomes `jax.lax.map` (a loop of
unbatched calls) where the program runs on CPU, and stays batched on every other platform.

A stack sharded over its leading axis is gathered on CPU (and refused if the mesh axis is
Explicit): to split it, call these inside `jax.shard_map`.

On TPU an eigendecomposition above 256 is put together from smaller ones (see `jacobi`): XLA's own
takes minutes to compile.

A matrix that is not finite gives NaN everywhere and never reaches LAPACK, whose SVD does not
return from an infinity.

All functions take ONE matrix of the shape that they state (ValueError), float32 or float64
(TypeError; cast half precision first), and are meant to be `vmap`ped, any number of times. They
differentiate in forward and in reverse mode; the derivatives use only products with primal outputs,
and directions in which the factorisation is not differentiable (equal eigenvalues, a singular
triangular factor) contribute zero or a large finite number, never NaN.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg.jacobi import block_eigh
from kradagrad_jax.linalg.products import matmul, symmetrize


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigendecomposition of the symmetric part of `a`.

    Args:
      a: (n, n), float32 or float64.

    Returns:
      `(w, v)`: eigenvalues (n,) ascending and eigenvectors (n, n) in columns. The derivative of
      `v` leaves out the rotation inside a group of equal eigenvalues.
    """
    return _eigh(one_matrix(a, "eigh"))


def svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Singular value decomposition `a = u @ diag(s) @ vt` of a square matrix.

    Args:
      a: (n, n), float32 or float64.

    Returns:
      `(u, s, vt)`: (n, n), (n,) descending, (n, n). The derivatives of `u` and `vt` leave out
      rotations inside a group of equal singular values and inside the null space.
    """
    return _svd(one_matrix(a, "svd"))


def qr_r(a: jax.Array) -> jax.Array:
    """Triangular factor of the QR decomposition of a tall matrix.

    Args:
      a: (p, n) with p >= n, float32 or float64.

    Returns:
      Upper triangular `r`: (n, n) with `r^T r = a^T a`. Row signs are arbitrary.
    """
    return _qr_r(one_matrix(a, "qr_r", square=False))


def qr(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin QR decomposition `a = q @ r` of a tall matrix.

    Args:
      a: (p, n) with p >= n, float32 or float64.

    Returns:
      `q`: (p, n) with orthonormal columns, also where `a` has not full rank; `r`: (n, n), upper
      triangular. The first k columns of `q` depend on the first k columns of `a` alone.
    """
    return _qr(one_matrix(a, "qr", square=False))


def cholesky(a: jax.Array) -> jax.Array:
    """Lower Cholesky factor of the symmetric part of `a`: (n, n); NaN if it is not definite."""
    return _cholesky(one_matrix(a, "cholesky"))


def triangular_inverse(r: jax.Array, lower: bool = False) -> jax.Array:
    """Inverse of the upper (or lower) triangle of `r`: (n, n), triangular of the same kind.

    The other triangle of `r` is not read. `lower` is a Python bool.
    """
    inverse = _lower_inverse if lower else _upper_inverse
    return inverse(one_matrix(r, "triangular_inverse"))


def one_matrix(a: jax.Array, name: str, square: bool = True) -> jax.Array:
    """The argument of the function ``name``, checked."""
    a = jnp.asarray(a)
    if a.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{name} needs float32 or float64, got {a.dtype}: cast the matrix first")
    if a.ndim != 2:
        raise ValueError(f"{name} takes one matrix, got shape {a.shape}: use jax.vmap for a stack")
    if square and a.shape[0] != a.shape[1]:
        raise ValueError(f"{name} takes a square matrix, got shape {a.shape}")
    if a.shape[0] < a.shape[1]:
        raise ValueError(f"{name} takes a matrix with rows >= columns, got shape {a.shape}")
    return a


def _loop(single: Callable[[jax.Array], Any], stack: jax.Array) -> Any:
    """`jax.lax.map` with a few unbatched calls per turn, which XLA runs on as many cores.

    Unbatched calls never wait for the thread pool, so several at once are safe.
    """
    lanes = min(len(stack), os.cpu_count() or 1, 4)
    spare = -len(stack) % lanes
    if spare and len(stack) > 8 * spare:
        # one more of the last matrix costs less than compiling the call once more
        more = jnp.concatenate([stack, jnp.repeat(stack[-1:], spare, axis=0)])
        return jax.tree.map(lambda x: x[: len(stack)], _loop(single, more))
    turns = len(stack) // lanes
    parts = [stack[i * turns : (i + 1) * turns] for i in range(lanes)]
    head = jax.lax.map(lambda rows: [single(row) for row in rows], parts)
    rest = [jax.tree.map(lambda x: x[None], single(x)) for x in stack[lanes * turns :]]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *head, *rest)


def _stackable(factorise: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Give `factorise` a guard and a vmap rule that loops on CPU (see the module docstring)."""

    def guarded(a: jax.Array) -> Any:
        finite = jnp.sum(a * 0) == 0  # one kernel; x * 0 is 0, or NaN
        out = factorise(jnp.where(finite, a, 0.0))
        return jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), out)

    single = jax.custom_batching.custom_vmap(guarded)

    @single.def_vmap
    def rule(axis_size, in_batched, a):
        del axis_size
        if in_batched[0]:
            out = jax.lax.platform_dependent(
                a, cpu=lambda stack: _loop(single, stack), default=jax.vmap(guarded)
            )
        else:
            out = single(a)
        return out, jax.tree.map(lambda _: in_batched[0], out)

    return single


LARGEST = 256  # up to this size a TPU has one kernel for `eigh`


def _any_eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    if len(a) <= LARGEST:
        return tuple(jnp.linalg.eigh(a))
    return jax.lax.platform_dependent(
        a,
        tpu=lambda a: block_eigh(symmetrize(a), _raw_eigh, LARGEST),
        default=lambda a: tuple(jnp.linalg.eigh(a)),
    )


_raw_eigh = _stackable(_any_eigh)


def _solve_identity(r: jax.Array, lower: bool) -> jax.Array:
    eye = jnp.eye(r.shape[0], dtype=r.dtype)
    return jax.lax.linalg.triangular_solve(r, eye, left_side=True, lower=lower)


# Derivatives. Each rule calls the differentiable function again for its primal outputs, so that
# derivatives of any order exist; what is inside of `custom_jvp` never sees a tangent.

_eigh = jax.custom_jvp(_raw_eigh)
_svd = jax.custom_jvp(_stackable(lambda a: tuple(jnp.linalg.svd(a))))
_qr_r = jax.custom_jvp(_stackable(lambda a: jnp.linalg.qr(a, mode="r")))
_qr = jax.custom_jvp(_stackable(lambda a: tuple(jnp.linalg.qr(a))))
_cholesky = jax.custom_jvp(_stackable(jnp.linalg.cholesky))


@_eigh.defjvp
def _eigh_jvp(primals, tangents):
    w, v = _eigh(*primals)
    inner = matmul(v.T, matmul(symmetrize(tangents[0]), v))
    rotation = inner * _inverse_gaps(w)
    return (w, v), (jnp.diagonal(inner), matmul(v, rotation))


@_svd.defjvp
def _svd_jvp(primals, tangents):
    u, s, vt = _svd(*primals)
    inner = matmul(u.T, matmul(tangents[0], vt.T))
    # With x = u^T da v the generators (x s_j + s_i x^T)/(s_j^2 - s_i^2) and its mirror split into
    # two quotients that need no squares of singular values.
    even = 0.5 * (inner + inner.T) * _inverse_gaps(s)
    odd = 0.5 * (inner - inner.T) * _inverse_sums(s)
    tangents = (matmul(u, even + odd), jnp.diagonal(inner), matmul((even - odd).T, vt))
    return (u, s, vt), tangents


@_qr_r.defjvp
def _qr_r_jvp(primals, tangents):
    r = _qr_r(*primals)
    inverse = _upper_inverse(_regular(r))
    q = matmul(primals[0], inverse)
    inner = matmul(q.T, matmul(tangents[0], inverse))
    # dr r^-1 is the upper triangle whose symmetric part equals that of q^T da r^-1.
    return r, matmul(jnp.triu(inner + inner.T, 1) + jnp.diag(jnp.diagonal(inner)), r)


@_qr.defjvp
def _qr_jvp(primals, tangents):
    q, r = _qr(*primals)
    moved = matmul(tangents[0], _upper_inverse(_regular(r)))
    inner = matmul(q.T, moved)
    upper = jnp.triu(inner + inner.T, 1) + jnp.diag(jnp.diagonal(inner))
    return (q, r), (moved - matmul(q, upper), matmul(upper, r))


@_cholesky.defjvp
def _cholesky_jvp(primals, tangents):
    factor = _cholesky(*primals)
    inverse = _lower_inverse(factor)
    inner = matmul(inverse, matmul(symmetrize(tangents[0]), inverse.T))
    return factor, matmul(factor, jnp.tril(inner, -1) + 0.5 * jnp.diag(jnp.diagonal(inner)))


def _triangular_inverse(lower: bool) -> Any:
    triangle = jnp.tril if lower else jnp.triu
    inverse = jax.custom_jvp(_stackable(lambda r: _solve_identity(r, lower)))

    @inverse.defjvp
    def rule(primals, tangents):
        x = inverse(*primals)
        return x, -matmul(x, matmul(triangle(tangents[0]), x))

    return inverse


_upper_inverse, _lower_inverse = _triangular_inverse(False), _triangular_inverse(True)


def _negligible(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.abs(x) <= x.shape[-1] * jnp.finfo(x.dtype).eps * scale


def _inverse_gaps(w: jax.Array) -> jax.Array:
    """Return `1 / (w_j - w_i)`, zero where the two values are equal to rounding."""
    gaps = w[None, :] - w[:, None]
    return _masked_reciprocal(gaps, jnp.max(jnp.abs(w)))


def _inverse_sums(s: jax.Array) -> jax.Array:
    """Return `1 / (s_j + s_i)`, zero where both are zero to rounding."""
    return _masked_reciprocal(s[None, :] + s[:, None], jnp.max(jnp.abs(s)))


def _masked_reciprocal(x: jax.Array, scale: jax.Array) -> jax.Array:
    masked = _negligible(x, scale)
    return jnp.where(masked, 0.0, 1.0 / jnp.where(masked, 1.0, x))


def _regular(r: jax.Array) -> jax.Array:
    """Replace negligible diagonal entries of a triangular `r`, so that its inverse is finite."""
    diagonal = jnp.diagonal(r)
    largest = jnp.max(jnp.abs(r))
    least = jnp.where(largest > 0.0, largest, 1.0) * r.shape[0] * jnp.finfo(r.dtype).eps
    return r + jnp.diag(jnp.where(_negligible(diagonal, largest), least - diagonal, 0.0))
