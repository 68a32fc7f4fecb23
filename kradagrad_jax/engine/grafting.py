"""Grafting: the length of the step is taken from another method, the direction from ours."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

_ADAPTIVE = ("adagrad", "rmsprop", "adam")


@dataclasses.dataclass(frozen=True)
class Graft:
    """Where the length of a step comes from (arXiv 2002.11803; shampoo spec section 3.4).

    Attributes:
      kind: ``"none"``: no rescaling. ``"sgd"``: the norm of the gradient. ``"adagrad"``,
        ``"rmsprop"``, ``"adam"``: the norm of ``g / (sqrt(v) + eps)`` with ``v`` the sum of
        squares, their average, their bias-corrected average.
      beta2: decay of the average of squares (rmsprop, adam).
      eps: added to the square root.
      per: norms over the whole ``"parameter"`` or over each ``"block"``.
      normalize: ``v`` and the direction are built from ``g / ||g||``.
    """

    kind: Literal["none", "sgd", "adagrad", "rmsprop", "adam"] = "none"
    beta2: float = 0.999
    eps: float = 1e-8
    per: Literal["parameter", "block"] = "parameter"
    normalize: bool = False

    def __post_init__(self):
        if self.kind not in ("none", "sgd", *_ADAPTIVE):
            raise ValueError(
                f"graft must be one of none, sgd, adagrad, rmsprop, adam; got {self.kind!r}"
            )
        if self.per not in ("parameter", "block"):
            raise ValueError(f"Graft.per must be 'parameter' or 'block', got {self.per!r}")

    @property
    def adaptive(self) -> bool:
        """Whether it keeps an accumulator of squares."""
        return self.kind in _ADAPTIVE


def as_graft(graft: "Graft | str | None") -> Graft:
    """A Graft from its name, itself, or None (no grafting)."""
    if graft is None:
        return Graft("none")
    return Graft(graft) if isinstance(graft, str) else graft  # type: ignore[arg-type]


def norm(x: jax.Array) -> jax.Array:
    """Frobenius norm, float32 or better (the engine skips gradients whose square overflows)."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def accumulate(graft: Graft, nu: jax.Array, g: jax.Array) -> jax.Array:
    """New accumulator of squares, in the dtype of ``nu``."""
    x = g.astype(nu.dtype)
    if graft.normalize:
        x = x / (norm(x) + 1e-16)
    if graft.kind == "adagrad":
        return nu + x * x
    return graft.beta2 * nu + (1.0 - graft.beta2) * x * x


def direction(
    graft: Graft, nu: jax.Array | None, filtered: jax.Array, steps: jax.Array
) -> jax.Array:
    """The step that the graft's own method would take (up to its learning rate).

    Args:
      graft: the method.
      nu: accumulator of squares after this step, for adaptive kinds.
      filtered: gradient, or its bias-corrected average where ``beta1`` is used.
      steps: number of accepted gradients, for the bias correction.
    """
    if graft.normalize:
        filtered = filtered / (norm(filtered) + 1e-16)
    if nu is None:
        return filtered
    v = nu.astype(filtered.dtype)
    if graft.kind == "adam":
        v = v / (1.0 - jnp.asarray(graft.beta2, v.dtype) ** steps.astype(v.dtype))
    return filtered / (jnp.sqrt(v) + graft.eps)


def rescale(u: jax.Array, target: jax.Array) -> jax.Array:
    """``u`` with the norm ``target``; zero stays zero."""
    length = norm(u)
    return u * (target / jnp.where(length > 0, length, 1))
