"""Grafting: the length of the step is taken from another method, the direction from ours."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import timing

if TYPE_CHECKING:
    from kradagrad_jax.engine.apply import Applied
    from kradagrad_jax.engine.placement import Share
    from kradagrad_jax.engine.state import Kept
    from kradagrad_jax.engine.static import Static
    from kradagrad_jax.engine.timing import Now

_ADAPTIVE = ("adagrad", "rmsprop", "adam")
Stacks = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Graft:
    """Where the length of a step comes from (arXiv 2002.11803; shampoo spec section 3.4).

    Attributes:
      kind: ``"none"``: no rescaling. ``"sgd"``: the norm of the gradient. ``"adagrad"``,
        ``"rmsprop"``, ``"adam"``: the norm of ``g / (sqrt(v) + eps)`` with ``v`` the sum of
        squares, their average, their bias-corrected average.
      beta2: decay of the average of squares (rmsprop, adam).
      eps: added to the square root.
      per: norms over the whole ``"parameter"`` (each layer of a stack by itself) or over each
        ``"block"``.
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

    @property
    def squares(self) -> str:
        """What is unusual about the accumulator of squares; empty for a plain average, or none."""
        if not self.adaptive:
            return ""
        unit = " of unit gradients" if self.normalize else ""
        if self.kind == "adagrad":
            return f"sum of squares{unit}"
        return f"squares{unit}" if unit else ""


def as_graft(graft: "Graft | str | None") -> Graft:
    """A Graft from its name, itself, or None (no grafting)."""
    if graft is None:
        return Graft("none")
    return Graft(graft) if isinstance(graft, str) else graft  # type: ignore[arg-type]


def accumulate(graft: Graft, nu: jax.Array, g: jax.Array) -> jax.Array:
    """New accumulator of squares, in the dtype of ``nu``; ``g`` normalized where that is asked."""
    x = g.astype(nu.dtype)
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
      filtered: gradient, or its average where ``beta1`` is used; normalized where that is asked.
      steps: number of accepted gradients, for the bias correction.
    """
    if nu is None:
        return filtered
    v = nu.astype(filtered.dtype)
    if graft.kind == "adam":
        v = v / (1.0 - jnp.asarray(graft.beta2, v.dtype) ** steps.astype(v.dtype))
    return filtered / (jnp.sqrt(v) + graft.eps)


def lengthen(
    s: "Static",
    share: "Share",
    now: "Now",
    kept: "dict[str, Kept]",
    blocks: Stacks,
    applied: "Applied",
) -> "tuple[dict[str, Kept], Stacks]":
    """Gives directions the length of the graft's, blended in after the start; new ``nu``."""
    graft, out, u = s.options.graft, dict(kept), dict(applied.directions)
    unit = (lambda x: _unit(share, x)) if graft.normalize else dict
    targets = unit(applied.filtered)
    squares = unit(blocks) if graft.adaptive else blocks
    for key, k in kept.items():
        if k.nu is not None:
            new = jnp.where(now.usable, accumulate(graft, k.nu, squares[key]), k.nu)
            out[key] = k._replace(nu=new)
        targets[key] = direction(graft, out[key].nu, targets[key], now.accepted)
    if graft.kind != "none":
        pairs = {
            key: jnp.stack([applied.squares[key], _squares(targets[key])], axis=1) for key in u
        }
        sums = share.by_owner(pairs) if graft.per == "parameter" else pairs
        for key, found in sums.items():
            found = jnp.sqrt(found)
            # a direction of length zero stays zero: dividing by a tiny number gives 0 * inf
            scale = found[:, 1] / jnp.where(found[:, 0] > 0, found[:, 0], 1)
            u[key] = u[key] * _rows(scale, u[key])
    part = timing.blend(now.count, s.options.timing)
    if part is not None:
        u = {key: _blended(x, targets[key], part) for key, x in u.items()}
    return out, {key: jnp.where(now.usable, x, 0) for key, x in u.items()}


def _blended(u: jax.Array, d: jax.Array, part: jax.Array) -> jax.Array:
    part = part.astype(u.dtype)
    return jnp.where(part > 0, part * u + (1 - part) * d, d)


def _unit(share: "Share", x: Stacks) -> Stacks:
    """Blocks over the norm of the whole parameter, wherever lengths are taken."""
    sums = share.by_owner({key: _squares(a)[:, None] for key, a in x.items()})
    return {key: a / (_rows(jnp.sqrt(sums[key][:, 0]), a) + 1e-16) for key, a in x.items()}


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x, axis=tuple(range(1, x.ndim)))


def _rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """Numbers by block, ready to multiply the stack."""
    return x.astype(like.dtype).reshape((-1,) + (1,) * (like.ndim - 1))
