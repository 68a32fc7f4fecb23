"""Averages the gradients and applies the preconditioners to them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.engine.fold import Flags, each, per_block, step_of
from kradagrad_jax.engine.state import Kept
from kradagrad_jax.engine.static import Options, Static
from kradagrad_jax.engine.timing import Now

Stacks = dict[str, jax.Array]


class Applied(NamedTuple):
    """By bucket: what was preconditioned, the directions, and their squared lengths ``(size,)``."""

    filtered: Stacks
    directions: Stacks
    squares: Stacks


def apply(
    s: Static, now: Now, kept: dict[str, Kept], blocks: Stacks
) -> tuple[dict[str, Kept], Applied, Flags]:
    """Preconditions the gradients, or their averages.

    A direction that is not finite becomes zero, which is a safe step in every unit. One that
    vanishes although the gradient does not gives way to the gradient where a graft gives the
    length. Both are counted.

    Args:
      s: the static part of the update.
      now: its scalars.
      kept: what is kept of the blocks, by bucket.
      blocks: their gradients.

    Returns:
      What is kept now (new averages); what came of it; by bucket, which directions were not
      taken (bools).
    """
    out, rejected = dict(kept), {}
    filtered, directions, squares = {}, {}, {}
    for bucket in s.plan.buckets:
        key, method, old = bucket.key, s.method(bucket), kept[bucket.key]
        mu, x = averaged(s.options, old.mu, blocks[key], now)
        step = step_of(now, old.clock.statistics, old.clock.refreshes)
        u = each(method.precondition, old.factor, x, step=step)
        clock = old.clock.statistics if method.refresh is None else old.clock.refreshes
        g = blocks[key]
        length, given = per_block(u * u, jnp.sum), per_block(g * g, jnp.sum)
        good = jnp.isfinite(length)
        lost = (clock > 0) & (length == 0) & (given > 0)
        u = jnp.where(_rows(good, u), u, 0)
        if s.options.graft.kind != "none":
            u = jnp.where(_rows(lost, u), g, u)
        out[key] = old._replace(mu=mu)
        filtered[key], directions[key] = x, u
        squares[key] = jnp.where(lost, given, jnp.where(good, length, 0))
        rejected[key] = now.usable & (lost | ~good)
    return out, Applied(filtered, directions, squares), rejected


def _rows(which: jax.Array, like: jax.Array) -> jax.Array:
    return which.reshape((-1,) + (1,) * (like.ndim - 1))


def averaged(o: Options, mu: Any, g: jax.Array, now: Now) -> tuple[Any, jax.Array]:
    """The new average, and what is preconditioned: its bias-corrected form, the sum, or ``g``."""
    if mu is None:
        return None, g
    b = jnp.asarray(o.beta1, g.dtype)
    if o.average == "sum":  # heavy ball
        new = b * mu.astype(g.dtype) + g
        filtered = new
    else:
        new = b * mu.astype(g.dtype) + (1 - b) * g
        filtered = new / (1 - b ** now.accepted.astype(g.dtype))
    return jnp.where(now.usable, new.astype(mu.dtype), mu), filtered
