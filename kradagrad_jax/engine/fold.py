"""Folds statistics into the factors, and lets the clocks of the blocks run."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine.state import Kept
from kradagrad_jax.engine.static import Static
from kradagrad_jax.engine.timing import Now, statistics_due, statistics_overdue
from kradagrad_jax.factors.method import BlockMethod, Grams, Step

Flags = dict[str, jax.Array]  # by bucket, a bool for each block


def fold(
    s: Static, now: Now, kept: dict[str, Kept], blocks: dict[str, jax.Array], statistics: Any
) -> tuple[dict[str, Kept], Flags, Flags]:
    """Folds the statistics of this step in, where they are due.

    Args:
      s: the static part of the update.
      now: its scalars.
      kept: what is kept of the blocks, by bucket.
      blocks: their gradients.
      statistics: by bucket; without a bucket: none for it at this step.

    Returns:
      What is kept now; by bucket, which blocks accepted a statistic; by bucket, which refused one
      because the factor would not be finite.
    """
    out, taken, rejected = dict(kept), {}, {}
    for bucket in s.plan.buckets:
        old, method = kept[bucket.key], s.method(bucket)
        if bucket.key not in statistics:
            taken[bucket.key] = jnp.zeros(old.clock.statistics.shape, bool)
            continue
        due = _due(s, now, old, blocks[bucket.key])
        args = (method, now, old, statistics[bucket.key], due)
        if _at_every_step(now):
            new, accepted, bad = _folded(*args)
        else:
            none = jnp.zeros_like(due)
            new, accepted, bad = jax.lax.cond(
                jnp.any(due), lambda a=args: _folded(*a), lambda f=old.factor, n=none: (f, n, n)
            )
        clock = old.clock._replace(statistics=old.clock.statistics + accepted.astype(jnp.int32))
        out[bucket.key] = old._replace(clock=clock, factor=new)
        taken[bucket.key] = accepted
        rejected[bucket.key] = bad
    return out, taken, rejected


def _at_every_step(now: Now) -> bool:
    return isinstance(now.statistics_every, int) and now.statistics_every == 1


def _due(s: Static, now: Now, old: Kept, gradient: jax.Array) -> jax.Array:
    """Which blocks take a statistic: all when it is time; who missed the first, at once."""
    able = now.usable & now.fresh
    clock = old.clock.statistics
    regular = statistics_due(now.count, now.statistics_every, s.options.timing)
    if _at_every_step(now):
        return jnp.broadcast_to(able & regular, clock.shape)
    late = statistics_overdue(now.count, now.statistics_every, s.options.timing)
    waits = (clock == 0) & late & per_block(gradient != 0, jnp.any)
    return able & (regular | waits)


def _folded(
    method: BlockMethod, now: Now, old: Kept, statistic: Any, due: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """New factors; which blocks accepted the statistic; which refused it."""
    wanted = due & ((old.clock.statistics > 0) | _something(statistic))
    step = step_of(now, old.clock.statistics + 1, old.clock.refreshes)
    new = each(method.accumulate, old.factor, statistic, step=step)
    good = finite(new, old.factor)
    return keep(wanted & good, new, old.factor), wanted & good, wanted & ~good


def _something(statistic: Any) -> jax.Array:
    """Per block, whether no part of the statistic is all zero (or has squares that underflow)."""
    parts = jax.tree.leaves(statistic)
    if isinstance(statistic, Grams):
        found = [per_block(x != 0, jnp.any) for x in parts]
    else:
        found = [per_block(x * x, jnp.sum) > 0 for x in parts]
    return jnp.all(jnp.stack(found), axis=0)


def step_of(now: Now, statistics: jax.Array, refreshes: jax.Array) -> Step:
    """What methods are told, the clocks stacked like the blocks."""
    return Step(now.count, now.refresh_every, statistics, refreshes)


def each(function: Any, *stacks: Any, step: Step) -> Any:
    """``function(*block, step)`` on every block; blocks have their own clocks."""
    return jax.vmap(
        lambda clocks, *x: function(*x, step._replace(statistics=clocks[0], refreshes=clocks[1]))
    )((step.statistics, step.refreshes), *stacks)


def per_block(x: jax.Array, reduction: Any) -> jax.Array:
    """A reduction over all axes but the first."""
    return reduction(x, axis=tuple(range(1, x.ndim)))


def finite(new: Any, old: Any) -> jax.Array:
    """Per block, whether everything that changed is finite."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    changed = [n for n, o in pairs if n is not o and jnp.issubdtype(n.dtype, jnp.floating)]
    # one reduction: x * 0 is 0, or NaN
    checks = [per_block(x * 0, jnp.sum) == 0 for x in changed]
    size = jax.tree.leaves(old)[0].shape[0]
    return jnp.all(jnp.stack([jnp.ones(size, bool), *checks]), axis=0)


def keep(which: jax.Array, new: Any, old: Any) -> Any:
    """The new arrays of the given blocks, the old ones of all others."""

    def one(n: jax.Array, o: jax.Array) -> jax.Array:
        return n if n is o else jnp.where(which.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(one, new, old)
