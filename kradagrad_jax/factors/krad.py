"""KrAD: an inverse statistic that is updated by products only (arXiv 2305.19416, Algorithm 1)."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.numbers import is_number
from kradagrad_jax.linalg import inverse_update, matmul, symmetrize

BOUNDS = ("sym", "fro", "trace", "spectral", "official")


def _spectral_norm(m: jax.Array) -> jax.Array:
    """Upper bound of the largest eigenvalue of a PSD matrix by repeated squaring.

    After k squarings it exceeds the eigenvalue by a factor of at most n^(1/2^k): products only.
    """
    squarings = 34 if m.dtype == jnp.float64 else 16
    tiny = jnp.finfo(m.dtype).tiny

    def square(_: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]):
        x, log, weight = carry
        size = jnp.sqrt(jnp.sum(x * x))
        x = x / jnp.maximum(size, tiny)
        return matmul(x, x), log + weight * jnp.log(jnp.maximum(size, tiny)), weight / 2

    zero, one = jnp.zeros((), m.dtype), jnp.ones((), m.dtype)
    x, log, weight = jax.lax.fori_loop(0, squarings, square, (m, zero, one))
    log += weight * jnp.log(jnp.maximum(jnp.sqrt(jnp.sum(x * x)), tiny))
    return jnp.where(jnp.any(m != 0), jnp.exp(log), 0.0)


def _damped(l: jax.Array, damping: Any) -> jax.Array:  # noqa: E741
    """``L - eps L^2``, skipped while tracing where eps is the Python number 0.

    eps is at most half the inverse of the largest row sum, a bound of lambda_max(L): from
    ``eps lambda_max(L) = 1`` on L would turn singular or negative.
    """
    if is_number(damping, 0):
        return l
    top = jnp.max(jnp.sum(jnp.abs(l), axis=1))
    eps = jnp.minimum(jnp.asarray(damping, l.dtype), 0.5 / jnp.where(top > 0, top, 1))
    return l - eps * matmul(l, l)


def _shortfall(bound: str, la: jax.Array | None, h: jax.Array, u: jax.Array) -> jax.Array:
    """s of t = 1 + s, from ``la = L A`` (dense form) or from ``h = L U`` (thin form)."""
    if bound == "trace" or bound == "official":
        return jnp.sum(h * u) if la is None else jnp.trace(la)
    if bound == "fro":
        x = matmul(h, u.T) if la is None else la
        return jnp.sqrt(jnp.sum(x * x))
    if la is not None and bound == "sym":
        return jnp.sqrt(jnp.maximum(jnp.sum(la * la.T), 0.0))
    x = matmul(u.T, h)
    return _spectral_norm(x) if bound == "spectral" else jnp.sqrt(jnp.sum(x * x))


def krad_step(
    l: jax.Array,  # noqa: E741
    u: jax.Array,
    *,
    bound: str = "sym",
    damping: Any = 0.0,
) -> jax.Array:
    """One KrAD step: ``L - L A L / t`` with ``A = U U^T``, without inverting anything.

    Args:
      l: (n, n) symmetric positive definite inverse statistic.
      u: (n, m) unfolded gradient.
      bound: s of ``t = 1 + s``: ``"fro"`` ||L A||_F (the paper), ``"trace"`` tr(L A), ``"sym"``
        ||L^1/2 A L^1/2||_F (the tightest cheap one), ``"spectral"`` its largest eigenvalue,
        ``"official"`` the released code's ``t = n (1 + tr(L A))``.
      damping: eps of ``L <- L - eps L^2`` before the step, at most ``1 / (2 lambda_max(L))``.

    Returns:
      (n, n), symmetric; between 0 and ``l`` in exact arithmetic.
    """
    n, m = u.shape
    l = _damped(l, damping)  # noqa: E741
    thin = m <= n or (bound in ("trace", "official") and m < 2 * n) or bound == "spectral"
    h = la = u
    if thin:
        h, la = matmul(l, u), None
        drop = matmul(h, h.T)
    else:
        la = matmul(l, matmul(u, u.T))
        drop = matmul(la, l)
    t = 1 + _shortfall(bound, la, h, u)
    if bound == "official":
        t = n * t
    return symmetrize(l - drop / t)


def krad_step_gram(l: jax.Array, a: jax.Array, damping: Any = 0.0) -> jax.Array:  # noqa: E741
    """The step for a given Gram matrix ``a`` (n, n) with ``t = 1 + tr(L A)`` (supplement C.2)."""
    l = _damped(l, damping)  # noqa: E741
    la = matmul(l, a)
    return symmetrize(l - matmul(la, l) / (1 + jnp.trace(la)))


def krad_factored(s: jax.Array, u: jax.Array) -> jax.Array:
    """The step for ``L = S S^T``: positive definite whatever the precision (spec section 3.9).

    Args:
      s: (n, n).
      u: (n, m).

    Returns:
      New ``s`` with ``S S^T <= (L^-1 + A / t)^-1``.
    """
    x = matmul(s.T, u)
    m = matmul(x, x.T)
    return s - matmul(s, m) * (0.5 / (1 + jnp.sqrt(jnp.sum(m * m))))


def exact_step(k: jax.Array, u: jax.Array, beta2: Any, start: jax.Array) -> jax.Array:
    """The exact inverse ``L = K K^T`` of ``B <- beta2 B + (1 - beta2) / start I + U U^T``.

    A decaying B forgets towards its start ``I / start``, not towards zero: along a direction that
    gradients leave out L would grow without bound.

    Args:
      k: (n, n).
      u: (n, m).
      beta2: in (0, 1]; the Python number 1 saves the additional rows.
      start: scalar l of ``L_0 = l I``.

    Returns:
      New ``k``.
    """
    if is_number(beta2, 1):
        return inverse_update(k, u)
    b = jnp.asarray(beta2, k.dtype)
    rest = jnp.sqrt((1 - b) / start) * jnp.eye(len(k), dtype=k.dtype)
    return inverse_update(k / jnp.sqrt(b), jnp.concatenate([u, rest], axis=1))


def forgotten(l: jax.Array, beta2: Any, start: jax.Array) -> jax.Array:  # noqa: E741
    """``L / beta2`` bent down to ``L_0 = start I``: ``(L - (1 - beta2) L^2 / start) / beta2``.

    The inverse of ``beta2 L^-1 + (1 - beta2) L_0^-1`` by one product: exact at L_0 and for small
    L, never below it, at most ``(1 - beta2)^2 / (4 beta2)`` above it (relative). For ``beta2 >=
    1/2`` it is increasing on [0, start], so that L stays between 0 and L_0.
    """
    if is_number(beta2, 1):
        return l
    b = jnp.asarray(beta2, l.dtype)
    return (l - matmul(l, l) * ((1 - b) / start)) / b


def forgotten_root(s: jax.Array, beta2: Any, start: jax.Array) -> jax.Array:
    """The same for ``L = S S^T``: ``(S - (1 - sqrt(beta2)) S S^T S / start) / sqrt(beta2)``."""
    if is_number(beta2, 1):
        return s
    b = jnp.sqrt(jnp.asarray(beta2, s.dtype))
    return (s - matmul(s, matmul(s.T, s)) * ((1 - b) / start)) / b


def scheduled_mode(count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Mode of the ``count``-th statistic of KrADagrad (official schedule; spec section 3.3)."""
    k = len(shape)
    largest = max(range(k), key=lambda i: (shape[i], -i))
    s = count - 1
    root = jnp.floor(jnp.sqrt(s.astype(jnp.float32))).astype(s.dtype)
    root = jnp.where(root * root > s, root - 1, root)
    root = jnp.where((root + 1) * (root + 1) <= s, root + 1, root)
    rest = s - root * root
    later = jnp.where(rest < k, rest, largest)
    return jnp.where(s < k * k, s % k, later)
