"""Maps a block method over the stacks of all buckets, with guards and refresh timing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import timing as timing_lib
from kradagrad_jax.engine.layout import Bucket, Plan
from kradagrad_jax.factors.method import BlockMethod, Step

Stacks = dict[str, Any]


def init(method: BlockMethod, plan: Plan) -> Stacks:
    """One stacked factor per bucket."""

    def stack(x: jax.Array, size: int) -> jax.Array:
        return jnp.tile(x[None], (size,) + (1,) * x.ndim)

    return {
        b.key: jax.tree.map(lambda x, n=b.size: stack(x, n), method.init(b.shape, b.dtype))
        for b in plan.buckets
    }


def as_stored(plan: Plan, factors: Stacks) -> Plan:
    """The plan with the dtypes of the state: gradients may be wider than parameters."""

    def stored(bucket: Bucket) -> Bucket:
        leaves = jax.tree.leaves(factors.get(bucket.key)) if isinstance(factors, dict) else []
        dtypes = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        return bucket._replace(dtype=dtypes[0]) if dtypes else bucket

    return plan._replace(buckets=tuple(stored(b) for b in plan.buckets))


def check(method: BlockMethod, plan: Plan, factors: Stacks) -> None:
    """Raises ValueError where the state's stacks are not those of the given parameters."""
    for bucket in plan.buckets:
        want = jax.eval_shape(lambda b=bucket: method.init(b.shape, b.dtype))
        have = factors.get(bucket.key) if isinstance(factors, dict) else None
        sizes = [x.shape[:1] for x in jax.tree.leaves(have)]
        if (
            have is None
            or any(n != (bucket.size,) for n in sizes)
            or len(sizes) != len(jax.tree.leaves(want))
        ):
            names = sorted({plan.covered[slot.leaf].path for slot in bucket.slots})
            raise ValueError(
                f"the optimizer state has no {bucket.size} blocks of shape {bucket.key} for "
                f"parameters {', '.join(repr(n) for n in names[:4])}: it was initialised with "
                "other parameters or another layout; call init again with these parameters"
            )


def _finite(x: jax.Array) -> jax.Array:
    """Per block, whether all entries are finite; one reduction (x*0 is 0, or NaN)."""
    return jnp.sum(x * 0, axis=tuple(range(1, x.ndim))) == 0


def _guard(new: Any, old: Any) -> tuple[Any, jax.Array]:
    """Keeps the old factor of every block whose new one is not finite; counts such blocks."""
    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    checks = [_finite(n) for n, o in pairs if n is not o and jnp.issubdtype(n.dtype, jnp.floating)]
    if not checks:
        return new, jnp.zeros((), jnp.int32)
    good = jnp.all(jnp.stack(checks), axis=0)

    def keep(n: jax.Array, o: jax.Array) -> jax.Array:
        return n if n is o else jnp.where(good.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(keep, new, old), jnp.sum(~good).astype(jnp.int32)


def accumulate(
    method: BlockMethod, factors: Stacks, statistics: Stacks, step: Step
) -> tuple[Stacks, jax.Array]:
    """Folds the statistics of every bucket in; also the number of rejected blocks."""
    out, rejected = {}, jnp.zeros((), jnp.int32)
    for key, old in factors.items():
        if key not in statistics:
            out[key] = old
            continue
        new = jax.vmap(lambda f, s: method.accumulate(f, s, step))(old, statistics[key])
        out[key], bad = _guard(new, old)
        rejected += bad
    return out, rejected


def refresh(method: BlockMethod, factors: Stacks, step: Step) -> tuple[Stacks, jax.Array]:
    """Refreshes every block of every bucket; also the number of rejected blocks."""
    out, rejected = {}, jnp.zeros((), jnp.int32)
    for key, old in factors.items():
        out[key], bad = _guard(jax.vmap(lambda f: method.refresh(f, step))(old), old)
        rejected += bad
    return out, rejected


def precondition(method: BlockMethod, factors: Stacks, gradients: Stacks, step: Step) -> Stacks:
    """Preconditioned gradient blocks of every bucket."""
    return {
        key: jax.vmap(lambda f, g: method.precondition(f, g, step))(factors[key], gradients[key])
        for key in gradients
    }


def refresh_share(
    method: BlockMethod, plan: Plan, factors: Stacks, step: Step, every: int
) -> tuple[Stacks, jax.Array]:
    """Refreshes the blocks whose turn it is (staggered timing): about ``1/every`` of the work."""
    costs = [(b.size, method.refresh_cost(b.shape)) for b in plan.buckets]
    tables = timing_lib.stagger_table(costs, every)
    out, rejected = dict(factors), jnp.zeros((), jnp.int32)
    for bucket, table in zip(plan.buckets, tables, strict=True):
        due = jnp.asarray(table)[step.count % every]
        out[bucket.key], bad = jax.lax.cond(
            jnp.any(due >= 0),
            lambda f, due=due: _refresh_some(method, f, due, step),
            lambda f: (f, jnp.zeros((), jnp.int32)),
            factors[bucket.key],
        )
        rejected += bad
    return out, rejected


def _refresh_some(
    method: BlockMethod, factor: Any, due: jax.Array, step: Step
) -> tuple[Any, jax.Array]:
    """Refreshes the blocks with the given indices; -1 stands for "none"."""
    rows = jnp.where(due >= 0, due, due[0])  # padding repeats a block that is due anyway
    old = jax.tree.map(lambda x: x[rows], factor)
    new, bad = _guard(jax.vmap(lambda f: method.refresh(f, step))(old), old)
    return jax.tree.map(lambda x, n, o: x if n is o else x.at[rows].set(n), factor, new, old), bad


def when(
    condition: jax.Array | bool,
    change: Callable[[Stacks], tuple[Stacks, jax.Array]],
    factors: Stacks,
) -> tuple[Stacks, jax.Array]:
    """``change(factors)`` under ``lax.cond``; where nothing is due the factors pass through."""
    if condition is True:
        return change(factors)
    return jax.lax.cond(condition, change, lambda f: (f, jnp.zeros((), jnp.int32)), factors)
