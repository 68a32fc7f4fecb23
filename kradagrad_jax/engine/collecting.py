"""Which arrays of the factors are divided over devices, and when they are collected again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kradagrad_jax.engine import sharding
from kradagrad_jax.engine.layout import Bucket, Plan
from kradagrad_jax.engine.sharding import Split
from kradagrad_jax.factors.method import BlockMethod, Step

Stacks = dict[str, Any]
Methods = BlockMethod | Mapping[str, BlockMethod]  # one for all, or by group of the layout
Share = Callable[..., tuple[Stacks, Stacks]]


def method_of(methods: Methods, bucket: Bucket) -> BlockMethod:
    """The method that treats a bucket."""
    return methods if isinstance(methods, BlockMethod) else methods[bucket.group]


def _applied(methods: Methods, bucket: Bucket) -> list[bool]:
    """Which arrays of a factor ``precondition`` reads, in the order of the leaves."""
    method = method_of(methods, bucket)
    factor = jax.eval_shape(lambda: method.init(bucket.shape, bucket.dtype))
    count, flag = (jax.ShapeDtypeStruct((), d) for d in (jnp.int32, jnp.bool_))
    gradient = jax.ShapeDtypeStruct(bucket.shape, bucket.dtype)
    step: Any = (count, count, count, flag)
    jaxpr = jax.make_jaxpr(method.precondition)(factor, gradient, Step(*step))
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    read |= {id(v) for v in jaxpr.jaxpr.outvars}
    return [id(v) in read for v in jaxpr.jaxpr.invars[: len(jax.tree.leaves(factor))]]


def _whole(split: Split, methods: Methods, bucket: Bucket, arrays: int) -> list[bool]:
    """Which of the arrays of a factor every device holds for all blocks."""
    if bucket.size > 1 and split.gather == "preconditioners":
        return _applied(methods, bucket)
    return [bucket.size == 1] * arrays


def place(split: Split | None, methods: Methods, plan: Plan, factors: Stacks) -> Stacks:
    """The factors where they belong."""
    if split is None:
        return factors
    out = dict(factors)
    for bucket in plan.buckets:
        leaves, treedef = jax.tree.flatten(factors[bucket.key])
        whole = _whole(split, methods, bucket, len(leaves))
        specs = [PartitionSpec() if w else split.parts for w in whole]
        placed = [split.place(x, s) for x, s in zip(leaves, specs, strict=True)]
        out[bucket.key] = treedef.unflatten(placed)
    return out


def change(
    split: Split | None,
    methods: Methods,
    plan: Plan,
    factors: Stacks,
    share: Share,
    step: Step,
    *args: Stacks,
) -> tuple[Stacks, jax.Array]:
    """Changes the factors on every device's share; also the number of rejected blocks.

    Where all devices hold the preconditioners, those that changed are collected.
    """
    if split is None or split.gather == "updates":
        return sharding.over_devices(split, share, step, factors, *args)
    divided = {
        b.key: split.place(factors[b.key], split.parts) if b.size > 1 else factors[b.key]
        for b in plan.buckets
    }
    new, rejected = sharding.over_devices(split, share, step, divided, *args)
    out, stale, trees = {}, {}, {}
    for bucket in plan.buckets:
        old, trees[bucket.key] = jax.tree.flatten(factors[bucket.key])
        pairs = zip(
            jax.tree.leaves(new[bucket.key]), jax.tree.leaves(divided[bucket.key]), old, strict=True
        )
        out[bucket.key] = [o if n is d else n for n, d, o in pairs]
        for i, whole in enumerate(_whole(split, methods, bucket, len(old))):
            if whole and bucket.size > 1 and out[bucket.key][i] is not old[i]:
                stale[bucket.key, i] = out[bucket.key][i]
    if stale:
        for (key, i), x in sharding.gathered(split, stale).items():
            out[key][i] = x
    return {key: trees[key].unflatten(leaves) for key, leaves in out.items()}, rejected


def apply(
    split: Split | None,
    methods: Methods,
    plan: Plan,
    factors: Stacks,
    gradients: Stacks,
    share: Share,
    step: Step,
) -> Stacks:
    """Preconditioned gradients, whole on every device."""
    if split is None:
        return share(step, factors, gradients)[0]
    if split.gather == "preconditioners":
        return share(step, _read(methods, plan, factors), gradients)[0]
    parts = sharding.divided(split, gradients)
    out, _ = sharding.over_devices(split, share, step, factors, parts)
    several = {b.key: b.size for b in plan.buckets if b.size > 1}
    if several:
        out |= sharding.gathered(split, {key: out[key] for key in several})
    return {b.key: out[b.key][: b.size] for b in plan.buckets}


def _read(methods: Methods, plan: Plan, factors: Stacks) -> Stacks:
    """The arrays that ``precondition`` reads; in place of the others those of a new factor."""
    out = {}
    for bucket in plan.buckets:
        leaves, treedef = jax.tree.flatten(factors[bucket.key])
        blank = jax.tree.leaves(method_of(methods, bucket).init(bucket.shape, bucket.dtype))
        used = _applied(methods, bucket)
        out[bucket.key] = treedef.unflatten(
            [
                x[: bucket.size] if u else jnp.broadcast_to(b, (bucket.size, *b.shape))
                for x, u, b in zip(leaves, used, blank, strict=True)
            ]
        )
    return out
