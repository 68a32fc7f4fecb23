"""Maps a block method over the stacks of all buckets, with guards and refresh timing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import timing as timing_lib
from kradagrad_jax.engine.layout import Bucket, Plan
from kradagrad_jax.factors.method import BlockMethod, Step

Stacks = dict[str, Any]
Methods = BlockMethod | Mapping[str, BlockMethod]  # one for all, or by group of the layout


def method_of(methods: Methods, bucket: Bucket) -> BlockMethod:
    """The method that treats a bucket."""
    return methods if isinstance(methods, BlockMethod) else methods[bucket.group]


def init(methods: Methods, plan: Plan) -> Stacks:
    """One stacked factor per bucket."""

    def stack(x: jax.Array, size: int) -> jax.Array:
        return jnp.tile(x[None], (size,) + (1,) * x.ndim)

    return {
        b.key: jax.tree.map(
            lambda x, n=b.size: stack(x, n), method_of(methods, b).init(b.shape, b.dtype)
        )
        for b in plan.buckets
    }


def as_stored(plan: Plan, factors: Stacks) -> Plan:
    """The plan with the dtypes of the state: gradients may be wider than parameters."""

    def stored(bucket: Bucket) -> Bucket:
        leaves = jax.tree.leaves(factors.get(bucket.key)) if isinstance(factors, dict) else []
        dtypes = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        dtypes = [d for d in dtypes if jnp.finfo(d).bits >= 32]  # half-precision storage: no hint
        return bucket._replace(dtype=dtypes[0]) if dtypes else bucket

    return plan._replace(buckets=tuple(stored(b) for b in plan.buckets))


def check(methods: Methods, plan: Plan, factors: Stacks) -> None:
    """Raises ValueError where the state's stacks are not those of the given parameters."""
    for bucket in plan.buckets:
        want = jax.eval_shape(lambda b=bucket: method_of(methods, b).init(b.shape, b.dtype))
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
    methods: Methods, plan: Plan, factors: Stacks, statistics: Stacks, step: Step
) -> tuple[Stacks, jax.Array]:
    """Folds the statistics of every bucket in; also the number of rejected blocks."""
    out, rejected = dict(factors), jnp.zeros((), jnp.int32)
    for bucket in plan.buckets:
        if bucket.key not in statistics:
            continue
        fold, old = method_of(methods, bucket).accumulate, factors[bucket.key]
        new = jax.vmap(lambda f, s, fold=fold: fold(f, s, step))(old, statistics[bucket.key])
        out[bucket.key], bad = _guard(new, old)
        rejected += bad
    return out, rejected


def refresh(methods: Methods, plan: Plan, factors: Stacks, step: Step) -> tuple[Stacks, jax.Array]:
    """Refreshes every block of every bucket; also the number of rejected blocks."""
    out, rejected = {}, jnp.zeros((), jnp.int32)
    for bucket in plan.buckets:
        renew, old = method_of(methods, bucket).refresh, factors[bucket.key]
        out[bucket.key], bad = _guard(jax.vmap(lambda f, renew=renew: renew(f, step))(old), old)
        rejected += bad
    return out, rejected


def precondition(
    methods: Methods, plan: Plan, factors: Stacks, gradients: Stacks, step: Step
) -> Stacks:
    """Preconditioned gradient blocks of every bucket."""
    out = {}
    for bucket in plan.buckets:
        apply = method_of(methods, bucket).precondition
        out[bucket.key] = jax.vmap(lambda f, g, apply=apply: apply(f, g, step))(
            factors[bucket.key], gradients[bucket.key]
        )
    return out


def refresh_share(
    methods: Methods, plan: Plan, factors: Stacks, step: Step, every: int
) -> tuple[Stacks, jax.Array]:
    """Refreshes the blocks whose turn it is (staggered timing): about ``1/every`` of the work."""
    costs = [(b.size, method_of(methods, b).refresh_cost(b.shape)) for b in plan.buckets]
    tables = timing_lib.stagger_table(costs, every)
    out, rejected = dict(factors), jnp.zeros((), jnp.int32)
    for bucket, table in zip(plan.buckets, tables, strict=True):
        due = jnp.asarray(table)[step.count % every]
        method = method_of(methods, bucket)
        out[bucket.key], bad = jax.lax.cond(
            jnp.any(due >= 0),
            lambda f, m=method, d=due: _refresh_some(m, f, d, step),
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
