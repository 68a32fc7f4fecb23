"""KrAD: an inverse statistic that is updated by products only (arXiv 2305.19416, Algorithm 1)."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg import matmul, symmetrize

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
    """``L - eps L^2``, skipped while tracing where eps is the Python number 0."""
    if isinstance(damping, (int, float)) and damping == 0:
        return l
    return l - jnp.asarray(damping, l.dtype) * matmul(l, l)


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
      damping: eps of ``L <- L - eps L^2`` before the step; needs eps * lambda_max(L) < 1.

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


def first_scale(l: jax.Array, u: jax.Array, initial: Any) -> jax.Array:  # noqa: E741
    """Rescales an untouched ``initial * I`` to ``initial / mean eigenvalue of A``.

    Makes the method independent of the scale of the gradients (spec section 6.1.8). A factor that
    has seen no gradient but zeros is still untouched.
    """
    untouched = jnp.all(jnp.diagonal(l) == jnp.asarray(initial, l.dtype))
    mean = jnp.sum(u * u) / u.shape[0]
    usable = untouched & (mean > 0)
    return jnp.where(usable, l / jnp.where(usable, mean, 1.0), l)


def scheduled_mode(count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Mode that KrADagrad updates at step ``count`` (official schedule; spec section 3.3)."""
    k = len(shape)
    largest = max(range(k), key=lambda i: (shape[i], -i))
    s = count - 1
    root = jnp.floor(jnp.sqrt(s.astype(jnp.float32))).astype(s.dtype)
    root = jnp.where(root * root > s, root - 1, root)
    root = jnp.where((root + 1) * (root + 1) <= s, root + 1, root)
    rest = s - root * root
    later = jnp.where(rest < k, rest, largest)
    return jnp.where(s < k * k, s % k, later)
