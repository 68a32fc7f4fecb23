"""Maps a block method over the stacks of all buckets, with guards and refresh timing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import collecting, sharding
from kradagrad_jax.engine import timing as timing_lib
from kradagrad_jax.engine.collecting import Methods, Stacks, method_of, place
from kradagrad_jax.engine.layout import Bucket, Plan
from kradagrad_jax.engine.sharding import Split
from kradagrad_jax.factors.method import BlockMethod, Step


def init(methods: Methods, plan: Plan, split: Split | None = None) -> Stacks:
    """One stacked factor per bucket."""

    def stack(x: jax.Array, size: int) -> jax.Array:
        return jnp.tile(x[None], (size,) + (1,) * x.ndim)

    out = {}
    for b in plan.buckets:
        size = b.size if split is None else split.padded(b.size)
        one = method_of(methods, b).init(b.shape, b.dtype)
        out[b.key] = jax.tree.map(lambda x, n=size: stack(x, n), one)
    return place(split, methods, plan, out)


def as_stored(plan: Plan, factors: Stacks) -> Plan:
    """The plan with the dtypes of the state: gradients may be wider than parameters."""

    def stored(bucket: Bucket) -> Bucket:
        leaves = jax.tree.leaves(factors.get(bucket.key)) if isinstance(factors, dict) else []
        dtypes = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        dtypes = [d for d in dtypes if jnp.finfo(d).bits >= 32]  # half-precision storage: no hint
        return bucket._replace(dtype=dtypes[0]) if dtypes else bucket

    return plan._replace(buckets=tuple(stored(b) for b in plan.buckets))


def check(methods: Methods, plan: Plan, factors: Stacks, split: Split | None = None) -> None:
    """Raises ValueError where the state's stacks are not those of the given parameters."""
    for bucket in plan.buckets:
        size = bucket.size if split is None else split.padded(bucket.size)
        want = jax.eval_shape(lambda b=bucket: method_of(methods, b).init(b.shape, b.dtype))
        have = factors.get(bucket.key) if isinstance(factors, dict) else None
        sizes = [x.shape[:1] for x in jax.tree.leaves(have)]
        if (
            have is None
            or any(n != (size,) for n in sizes)
            or len(sizes) != len(jax.tree.leaves(want))
        ):
            names = sorted({plan.covered[slot.leaf].path for slot in bucket.slots})
            raise ValueError(
                f"the optimizer state has no stack of {size} blocks of shape {bucket.key} for "
                f"parameters {', '.join(repr(n) for n in names[:4])}: it was initialised with "
                "other parameters, another layout or for another number of devices; call init "
                "again with these parameters (or see fit_state)"
            )


def _finite(x: jax.Array) -> jax.Array:
    """Per block, whether all entries are finite; one reduction (x*0 is 0, or NaN)."""
    return jnp.sum(x * 0, axis=tuple(range(1, x.ndim))) == 0


def _guard(new: Any, old: Any, counted: jax.Array | bool = True) -> tuple[Any, jax.Array]:
    """Keeps the old factor of every block whose new one is not finite; counts such blocks.

    ``counted``: per block, whether it counts.
    """
    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    checks = [_finite(n) for n, o in pairs if n is not o and jnp.issubdtype(n.dtype, jnp.floating)]
    if not checks:
        return new, jnp.zeros((), jnp.int32)
    good = jnp.all(jnp.stack(checks), axis=0)

    def keep(n: jax.Array, o: jax.Array) -> jax.Array:
        return n if n is o else jnp.where(good.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(keep, new, old), jnp.sum(~good & counted).astype(jnp.int32)


def accumulate(
    methods: Methods,
    plan: Plan,
    factors: Stacks,
    statistics: Stacks,
    step: Step,
    split: Split | None = None,
) -> tuple[Stacks, jax.Array]:
    """Folds the statistics of every bucket in; also the number of rejected blocks."""

    def share(step: Step, factors: Stacks, statistics: Stacks) -> tuple[Stacks, Stacks]:
        out, rejected = dict(factors), {}
        for bucket in plan.buckets:
            if bucket.key not in statistics:
                continue
            fold, old = method_of(methods, bucket).accumulate, factors[bucket.key]
            new = jax.vmap(lambda f, s, fold=fold: fold(f, s, step))(old, statistics[bucket.key])
            out[bucket.key], rejected[bucket.key] = _guard(new, old)
        return out, rejected

    statistics = sharding.divided(split, statistics)
    return collecting.change(split, methods, plan, factors, share, step, statistics)


def refresh(
    methods: Methods, plan: Plan, factors: Stacks, step: Step, split: Split | None = None
) -> tuple[Stacks, jax.Array]:
    """Refreshes every block of every bucket; also the number of rejected blocks."""

    def share(step: Step, factors: Stacks) -> tuple[Stacks, Stacks]:
        out, rejected = {}, {}
        for bucket in plan.buckets:
            renew, old = method_of(methods, bucket).refresh, factors[bucket.key]
            new = jax.vmap(lambda f, renew=renew: renew(f, step))(old)
            out[bucket.key], rejected[bucket.key] = _guard(new, old)
        return out, rejected

    return collecting.change(split, methods, plan, factors, share, step)


def precondition(
    methods: Methods,
    plan: Plan,
    factors: Stacks,
    gradients: Stacks,
    step: Step,
    split: Split | None = None,
) -> Stacks:
    """Preconditioned gradient blocks of every bucket, whole on every device."""

    def share(step: Step, factors: Stacks, gradients: Stacks) -> tuple[Stacks, Stacks]:
        out = {}
        for bucket in plan.buckets:
            apply = method_of(methods, bucket).precondition
            out[bucket.key] = jax.vmap(lambda f, g, apply=apply: apply(f, g, step))(
                factors[bucket.key], gradients[bucket.key]
            )
        return out, {}

    return collecting.apply(split, methods, plan, factors, gradients, share, step)


def refresh_share(
    methods: Methods,
    plan: Plan,
    factors: Stacks,
    step: Step,
    every: int,
    split: Split | None = None,
) -> tuple[Stacks, jax.Array]:
    """Refreshes the blocks whose turn it is (staggered timing): about ``1/every`` of the work."""
    rows = [b.size if split is None else split.share(b.size) for b in plan.buckets]
    costs = [
        (n, method_of(methods, b).refresh_cost(b.shape))
        for n, b in zip(rows, plan.buckets, strict=True)
    ]
    tables = timing_lib.stagger_table(costs, every)

    def share(step: Step, factors: Stacks) -> tuple[Stacks, Stacks]:
        out, rejected = dict(factors), {}
        for bucket, table in zip(plan.buckets, tables, strict=True):
            due = jnp.asarray(table)[step.count % every]
            method = method_of(methods, bucket)
            out[bucket.key], rejected[bucket.key] = jax.lax.cond(
                jnp.any(due >= 0),
                lambda f, m=method, d=due: _refresh_some(m, f, d, step),
                lambda f: (f, jnp.zeros((), jnp.int32)),
                factors[bucket.key],
            )
        return out, rejected

    return collecting.change(split, methods, plan, factors, share, step)


def _refresh_some(
    method: BlockMethod, factor: Any, due: jax.Array, step: Step
) -> tuple[Any, jax.Array]:
    """Refreshes the blocks with the given indices; -1 stands for "none"."""
    rows = jnp.where(due >= 0, due, due[0])  # padding repeats a block that is due anyway
    old = jax.tree.map(lambda x: x[rows], factor)
    new, bad = _guard(jax.vmap(lambda f: method.refresh(f, step))(old), old, due >= 0)
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
