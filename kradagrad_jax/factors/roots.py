"""Which power of which matrix multiplies the gradient, and by which algorithm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.kron import KronFactor, apply_dense, apply_square_root
from kradagrad_jax.factors.method import Step
from kradagrad_jax.linalg import (
    checked_positive_root,
    eigh,
    inverse_root,
    powered_spectrum,
    refine_eigenbasis,
    symmetric_power,
)


class Root(NamedTuple):
    """A way to turn statistics into preconditioners.

    Attributes:
      compute: ``(statistic, old preconditioner, exponent, step) -> preconditioner`` for one mode.
      apply: ``(factor, gradient) -> preconditioned gradient``.
    """

    compute: Callable[[jax.Array, jax.Array, Any, Step], jax.Array]
    apply: Callable[[KronFactor, jax.Array], jax.Array]


def make_root(kind: str, damping: Any, rule: Any) -> Root:
    """Root of symmetric statistics.

    Args:
      kind: ``"eigh"``; ``"newton"`` (coupled Newton, matmuls only, exponent ``+-1/p``);
        ``"tracked"`` (the eigenbasis is kept from refresh to refresh and improved by one
        matmul-only step; decomposed exactly at the first refresh).
      damping: see ``rule``; may be traced.
      rule: how eigenvalues are made safe, see :func:`kradagrad_jax.linalg.symmetric_power`.
    """
    if kind == "eigh":
        return Root(lambda s, p, e, step: symmetric_power(s, e, damping, rule), apply_dense)
    if kind == "newton":
        return Root(lambda s, p, e, step: _newton(s, p, e, damping), apply_dense)
    if kind == "tracked":
        return Root(lambda s, k, e, step: _tracked(s, k, e, damping, rule, step), apply_square_root)
    raise ValueError(f"root must be 'eigh', 'newton' or 'tracked', got {kind!r}")


def _newton(s: jax.Array, old: jax.Array, exponent: Any, damping: Any) -> jax.Array:
    if not isinstance(exponent, (int, float)):
        raise ValueError(
            "root='newton' needs a fixed exponent: name it in static_args of inject_hyperparams"
        )
    p = round(1.0 / abs(exponent))
    if abs(p * abs(exponent) - 1.0) > 1e-9:
        raise ValueError(f"root='newton' needs an exponent 1/p with an integer p, got {exponent}")
    if exponent < 0:
        x, error = inverse_root(s, p, damping)
    else:
        x, error = checked_positive_root(s, p, jnp.maximum(damping, 1e-6))
    return jnp.where(error < 0.1, x, old)  # not converged (or NaN): the previous root serves on


def _tracked(
    s: jax.Array, k: jax.Array, exponent: Any, damping: Any, rule: Any, step: Step
) -> jax.Array:
    """New square root ``K = Q f(w)^(1/2)`` of the preconditioner, Q an approximate eigenbasis."""
    tiny = jnp.finfo(k.dtype).tiny
    basis = k / jnp.maximum(jnp.sqrt(jnp.sum(k * k, axis=0, keepdims=True)), tiny)
    w, q = jax.lax.cond(step.first_refresh, lambda: eigh(s), lambda: refine_eigenbasis(s, basis))
    return q * jnp.sqrt(powered_spectrum(w, exponent, damping, rule))[None, :]


def unless_zero(statistic: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """``new``, but ``old`` for a statistic that has seen nothing but zeros.

    Its root would be zero: a parameter whose first gradients are zero (behind a zero-initialised
    layer, say) would not move when they come.
    """
    return jnp.where(jnp.any(statistic != 0), new, old)


def default_exponent(shape: tuple[int, ...], exponent: Any, scale: float) -> Any:
    """``exponent`` with the sign of ``scale`` if given, else ``scale / order``."""
    if exponent is None:
        return scale / len(shape)
    return exponent if scale > 0 else -exponent
