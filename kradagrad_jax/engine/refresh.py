"""Refreshes the blocks whose turn it is, and corrects them in their new basis."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.engine import timing as timing_lib
from kradagrad_jax.engine.fold import Flags, each, finite, keep, step_of
from kradagrad_jax.engine.plan import Bucket
from kradagrad_jax.engine.state import Clock, Kept
from kradagrad_jax.engine.static import Static
from kradagrad_jax.engine.timing import Now
from kradagrad_jax.factors.method import BlockMethod


def refresh(
    s: Static, now: Now, kept: dict[str, Kept], statistics: Any, taken: Flags
) -> tuple[dict[str, Kept], Flags]:
    """Refreshes what is due, then folds the statistics in a second time where a method asks.

    A block is refreshed for the first time at the first step at which it has a statistic.

    Args:
      s: the static part of the update.
      now: its scalars.
      kept: what is kept of the blocks, by bucket.
      statistics: those of this step, by bucket.
      taken: which blocks accepted one, by bucket.

    Returns:
      What is kept now, and by bucket, whose new factor was not finite.
    """
    out, rejected = dict(kept), {}
    tables = _tables(s, now)
    for bucket in s.plan.buckets:
        key, method = bucket.key, s.method(bucket)
        if method.refresh is not None:
            out[key], rejected[key] = _renewed(s, now, method, out[key], tables.get(key))
        if method.correct is not None and key in statistics:
            out[key], bad = _corrected(method, now, out[key], statistics[key], taken[key])
            rejected[key] = rejected.get(key, False) | bad
    return out, rejected


def _renewed(
    s: Static, now: Now, method: BlockMethod, old: Kept, table: np.ndarray | None
) -> tuple[Kept, jax.Array]:
    """A bucket after the refreshes of this step; which were undone."""
    ready = now.usable & (old.clock.statistics > 0)
    timing = s.options.timing
    begins = ready & (old.clock.refreshes == 0) & timing_lib.may_refresh(now.count, timing)
    if table is not None:
        # whoever has no preconditioner yet does not wait for its turn: that would be a slow start
        turn = jnp.asarray(table)[now.count % len(table)]
        late = now.usable & timing_lib.may_refresh(now.count - 1, timing)
        new, bad = _when(jnp.any(turn >= 0) & late, _turns, method, now, old, turn)
        first, more = _when(jnp.any(begins), _all, method, now, new, begins)
        return first, bad | more
    due = begins | (ready & timing_lib.refresh_due(now.count, now.refresh_every, timing))
    return _when(jnp.any(due), _all, method, now, old, due)


def _when(condition: jax.Array, change: Any, *args: Any) -> tuple[Kept, jax.Array]:
    """``change(*args)`` under ``lax.cond``; the third argument is what passes through else."""
    none = jnp.zeros(args[2].clock.statistics.shape, bool)
    return jax.lax.cond(condition, lambda: change(*args), lambda: (args[2], none))


def _all(method: BlockMethod, now: Now, old: Kept, due: jax.Array) -> tuple[Kept, jax.Array]:
    """Computes the refresh of every block and keeps those that are due."""
    assert method.refresh is not None
    renew = method.refresh

    def some(clock: Clock, factor: Any, due: jax.Array) -> tuple[Any, jax.Array]:
        step = step_of(now, clock.statistics, clock.refreshes)
        new = each(renew, factor, step=step)
        done = due & finite(new, factor)
        return keep(done, new, factor), done

    factor, done = in_parts(some, old.factor, old.clock, due)
    clock = old.clock._replace(refreshes=old.clock.refreshes + done.astype(jnp.int32))
    kept = old._replace(clock=clock, factor=factor)
    return kept, due & ~done


PART = 2**23  # numbers of factors that are refreshed at once: 32 MB in float32


def in_parts(
    some: Callable[..., tuple[Any, jax.Array]], factor: Any, clock: Clock, due: jax.Array
) -> tuple[Any, jax.Array]:
    """``some(clock, factor, due)`` on a part of the blocks after the other.

    A refresh needs several times the memory of what it works on.

    Returns:
      The factors after it; which blocks were done.
    """
    leaves, treedef = jax.tree.flatten(factor)
    size = len(due)
    numbers = sum(x.size for x in leaves) // size
    part = min(size, max(PART // max(numbers, 1), 8))
    if part * 2 > size:
        return some(clock, factor, due)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((part, *x.shape[1:]), x.dtype), factor)
    changes = _changed(some, jax.tree.map(lambda x: x[:part], clock), shapes, due[:part])

    put = jax.lax.dynamic_update_slice_in_dim

    def merged(values: list[jax.Array]) -> Any:
        own = iter(values)
        return treedef.unflatten(
            [next(own) if c else x for x, c in zip(leaves, changes, strict=True)]
        )

    def turn(i: Any, carry: tuple[list[jax.Array], jax.Array]) -> Any:
        values, flags = carry
        start = jnp.minimum(i * part, size - part)
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=part)
        ahead = start + jnp.arange(part) >= i * part  # the last part overlaps with the one before
        old = jax.tree.map(rows, (clock, merged(values)))
        new, done = some(*old, rows(due) & ahead)
        own = [x for x, c in zip(jax.tree.leaves(new), changes, strict=True) if c]
        values = [put(v, x, start, 0) for v, x in zip(values, own, strict=True)]
        return values, put(flags, rows(flags) | done, start, 0)

    own = [x for x, c in zip(leaves, changes, strict=True) if c]
    values, done = jax.lax.fori_loop(0, -(-size // part), turn, (own, jnp.zeros_like(due)))
    return merged(values), done


def _changed(some: Any, clock: Clock, factor: Any, due: jax.Array) -> list[bool]:
    """Which arrays of a factor a refresh changes."""
    jaxpr = jax.make_jaxpr(lambda f: some(clock, f, due)[0])(factor).jaxpr
    return [a is not b for a, b in zip(jaxpr.invars, jaxpr.outvars, strict=True)]


def _turns(method: BlockMethod, now: Now, old: Kept, turn: jax.Array) -> tuple[Kept, jax.Array]:
    """Refreshes the blocks with the given indices alone; -1 stands for "none"."""
    rows = jnp.where(turn >= 0, turn, turn[0])  # padding repeats a block whose turn it is anyway
    clock, factor = jax.tree.map(lambda x: x[rows], (old.clock, old.factor))
    part = Kept(clock, factor, None, None)
    due = (turn >= 0) & (part.clock.statistics > 0) & (part.clock.refreshes > 0)
    new, bad = _all(method, now, part, due)
    # what padding repeats must be written once: the copies are sent out of bounds
    at = jnp.where(turn >= 0, turn, jax.tree.leaves(old.factor)[0].shape[0])

    def put(x: jax.Array, n: jax.Array, o: jax.Array) -> jax.Array:
        return x if n is o else x.at[at].set(n, mode="drop")

    clock, factor = jax.tree.map(
        put, (old.clock, old.factor), (new.clock, new.factor), (part.clock, part.factor)
    )
    undone = jnp.zeros(old.clock.statistics.shape, bool).at[at].set(bad, mode="drop")
    return old._replace(clock=clock, factor=factor), undone


def _corrected(
    method: BlockMethod, now: Now, old: Kept, statistic: Any, taken: jax.Array
) -> tuple[Kept, jax.Array]:
    """Folds the statistic in a second time, where it was accepted."""

    def change() -> tuple[Any, jax.Array]:
        assert method.correct is not None
        step = step_of(now, old.clock.statistics, old.clock.refreshes)
        new = each(method.correct, old.factor, statistic, step=step)
        good = finite(new, old.factor)
        return keep(taken & good, new, old.factor), taken & ~good

    factor, bad = jax.lax.cond(jnp.any(taken), change, lambda: (old.factor, jnp.zeros_like(taken)))
    return old._replace(factor=factor), bad


def _tables(s: Static, now: Now) -> dict[str, np.ndarray]:
    """Whose turn it is at which phase, where refreshes are staggered; else nothing."""
    every = now.refresh_every
    if not s.options.timing.stagger or not isinstance(every, int) or every == 1:
        return {}
    own: list[Bucket] = [b for b in s.plan.buckets if s.method(b).refresh is not None]
    sizes = [b.size if s.split is None else s.split.share(b.size) for b in own]
    costs = [s.method(b).refresh_cost(b.shape) for b in own]
    tables = timing_lib.stagger_table(list(zip(sizes, costs, strict=True)), every)
    return {b.key: t for b, t in zip(own, tables, strict=True)}
