"""Which power of which matrix multiplies the gradient, and by which algorithm."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax import linalg
from kradagrad_jax.factors.kron import eye


class Root(NamedTuple):
    """A way to turn statistics into preconditioners."""

    # ``(n, dtype) -> preconditioner`` that changes nothing, of one mode
    init: Callable[[int, Any], Any]
    # ``(statistic, old preconditioner, exponent, exact) -> preconditioner`` of one mode; ``exact``:
    # the old one says nothing of the statistic yet (bool, may be traced)
    compute: Callable[[jax.Array, Any, Any, Any], Any]
    # ``(gradient, preconditioners, skip=()) -> gradient`` multiplied in all modes that have one and
    # are not to be skipped
    apply: Callable[..., jax.Array]


class Spectral(NamedTuple):
    """A preconditioner by its eigenbasis, which outlives eigenvalues that are zero."""

    basis: jax.Array  # ``(n, n)``: orthonormal columns
    values: jax.Array  # ``(n,)``: eigenvalues of the preconditioner, in no order


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
        power = lambda s, p, e, exact: linalg.symmetric_power(s, e, damping, rule)  # noqa: E731
        return Root(eye, power, linalg.multiply_modes)
    if kind == "newton":
        return Root(eye, lambda s, p, e, exact: _newton(s, p, e, damping), linalg.multiply_modes)
    if kind == "tracked":
        return Root(
            lambda n, dtype: Spectral(eye(n, dtype), jnp.ones(n, dtype)),
            lambda s, p, e, exact: _tracked(s, p, e, damping, rule, exact),
            _apply_spectral,
        )
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
        x, error = linalg.inverse_root(s, p, damping)
    else:
        x, error = linalg.checked_positive_root(s, p, jnp.maximum(damping, 1e-6))
    return jnp.where(error < 0.1, x, old)  # not converged (or NaN): the previous root serves on


def _tracked(
    s: jax.Array, old: Spectral, exponent: Any, damping: Any, rule: Any, exact: Any
) -> Spectral:
    """Eigenvalues of the preconditioner, and an approximate eigenbasis of the statistic."""
    refined = linalg.refine_eigenbasis(s, old.basis)
    w, basis = linalg.when(
        jnp.asarray(exact), lambda _, s: tuple(linalg.eigh(s)), tuple(refined), s
    )
    return Spectral(basis, linalg.powered_spectrum(w, exponent, damping, rule))


def _apply_spectral(
    g: jax.Array, preconditioners: Sequence[Any], skip: Sequence[int] = ()
) -> jax.Array:
    bases, values = ([p and p[i] for p in preconditioners] for i in (0, 1))
    g = linalg.multiply_modes(g, bases, skip, transposed=True)
    return linalg.multiply_modes(linalg.multiply_modes(g, values, skip), bases, skip)
