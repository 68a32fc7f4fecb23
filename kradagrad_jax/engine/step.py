"""One update of the engine, in the order of the Shampoo specification (section 3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import buckets, grafting, sharding, stacks, trees
from kradagrad_jax.engine import timing as timing_lib
from kradagrad_jax.engine.grafting import Graft
from kradagrad_jax.engine.layout import Plan, factor_dtype_of
from kradagrad_jax.engine.options import (
    BlockState,
    Options,
    grafts_of,
    plan_of,
    runs_fallback,
    uncovered_only,
)
from kradagrad_jax.engine.sharding import Split
from kradagrad_jax.factors.method import Step

Leaves = list[Any]


def update(
    o: Options, updates: Any, state: BlockState, params: Any, extra: dict[str, Any]
) -> tuple[Any, BlockState]:
    """Preconditioned updates and the next state. See :func:`scale_by_blocks`."""
    leaves, treedef = trees.flatten(updates)
    real = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    count = jnp.asarray(optax.safe_increment(state.count))
    if not real:
        return updates, state._replace(count=count)
    plan = stacks.as_stored(plan_of(updates, o.layout, o.factor_dtype), state.factors)
    split = sharding.resolve(o.sharding)
    stacks.check(o.method, plan, state.factors, split)
    state = state._replace(factors=stacks.place(split, o.method, plan, state.factors))
    grafts = grafts_of(o, plan)

    raw = [leaves[i] for i in real]
    g = [x.astype(factor_dtype_of(x.dtype)) for x in raw]
    blocks = buckets.gather(plan, [g[leaf.index] for leaf in plan.covered], split)
    usable = _usable(plan, blocks, g)
    skipped = state.skipped + jnp.where(usable, 0, 1).astype(jnp.int32)
    accepted = jnp.maximum(count - skipped, 1)

    mu, filtered = _average(o, _slots(state.mu, real, len(leaves)), g, accepted, usable)
    nu = _squares(grafts, _slots(state.nu, real, len(leaves)), g, usable)
    factors, statistics_count, rejected, step = _factors(
        o, plan, state, blocks, count, usable, extra, split
    )
    out = _directions(grafts, nu, filtered, accepted)
    rejected += _precondition(o, plan, factors, blocks, g, filtered, out, step, usable, split)
    fallback = _own_fallback(o, plan, updates, state, params, extra, real, out, usable)
    for index, _, _, _ in plan.uncovered:
        out[index] = jnp.where(usable, out[index], 0)
    for j, x in enumerate(raw):
        leaves[real[j]] = trees.place_like(out[j].astype(x.dtype), x)
    return treedef.unflatten(leaves), BlockState(
        count=count,
        statistics_count=statistics_count,
        skipped=skipped,
        rejected=state.rejected + rejected,
        mu=_restore(state.mu, mu, real),
        nu=_restore(state.nu, nu, real),
        factors=factors,
        fallback=fallback,
    )


def _usable(plan: Plan, blocks: dict[str, jax.Array], g: Leaves) -> jax.Array:
    """Whether the squared norm of the gradient is finite: else the whole step is skipped.

    One reduction per bucket and one over all other leaves: a reduction per leaf would be copied
    into the kernel of every leaf, and compile time would grow with the square of the depth.
    """
    sums = [jnp.sum(x * x) for x in blocks.values()]
    rest = [trees.replicate(g[index]).reshape(-1) for index, _, _, _ in plan.uncovered]
    if rest:
        dtype = max((x.dtype for x in rest), key=lambda d: jnp.finfo(d).bits)
        flat = jnp.concatenate([x.astype(dtype) for x in rest])
        sums.append(jnp.sum(flat * flat))
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x) for x in sums])


def _slots(tree: Any, real: list[int], size: int) -> Leaves:
    """The arrays of a params-shaped state tree at the given positions, None where masked."""
    if tree is None:
        return [None] * len(real)
    leaves = trees.flatten(tree)[0]
    if len(leaves) != size:
        raise ValueError(
            f"the gradients have {size} leaves, the optimizer state was initialised for "
            f"{len(leaves)}; call init again with these parameters"
        )
    return [None if trees.is_masked(leaves[i]) else leaves[i] for i in real]


def _restore(tree: Any, values: Leaves, real: list[int]) -> Any:
    """The params-shaped state tree with new arrays."""
    if tree is None:
        return None
    leaves, treedef = trees.flatten(tree)
    for i, value in zip(real, values, strict=True):
        if value is not None:
            leaves[i] = value
    return treedef.unflatten(leaves)


def _average(
    o: Options, mu: Leaves, g: Leaves, accepted: jax.Array, usable: jax.Array
) -> tuple[Leaves, Leaves]:
    """New averages, and the bias-corrected average (or the gradient) that is preconditioned."""
    if o.beta1 is None:
        return mu, list(g)
    averages, filtered = [], []
    for m, x in zip(mu, g, strict=True):
        if m is None:
            averages.append(None)
            filtered.append(x)
            continue
        b = jnp.asarray(o.beta1, x.dtype)
        new = b * m.astype(x.dtype) + (1 - b) * x
        averages.append(jnp.where(usable, new.astype(m.dtype), m))
        filtered.append(new / (1 - b ** accepted.astype(x.dtype)))
    return averages, filtered


def _squares(grafts: dict[int, Graft | None], nu: Leaves, g: Leaves, usable: jax.Array) -> Leaves:
    """New accumulators of squares."""
    out = []
    for j, (v, x) in enumerate(zip(nu, g, strict=True)):
        graft = grafts[j]
        if v is None or graft is None:
            out.append(v)
        else:
            out.append(jnp.where(usable, grafting.accumulate(graft, v, x), v))
    return out


def _factors(
    o: Options,
    plan: Plan,
    state: BlockState,
    blocks: dict[str, jax.Array],
    count: jax.Array,
    usable: jax.Array,
    extra: dict[str, Any],
    split: Split | None,
) -> tuple[Any, jax.Array, jax.Array, Step]:
    """Accumulates and refreshes; also the new statistics count and number of rejected blocks."""
    factors, rejected = state.factors, jnp.zeros((), jnp.int32)
    every = timing_lib.interval_at(o.refresh_every, count)
    found = o.source(plan, blocks, extra)
    statistics, fresh = found if isinstance(found, tuple) else (found, True)
    taken, due = state.statistics_count, False
    if statistics is not None:
        interval = timing_lib.interval_at(o.statistics_every, count)
        due = usable & fresh & timing_lib.statistics_due(count, interval, o.timing)
        taken = taken + jnp.where(due, 1, 0).astype(jnp.int32)
    first = timing_lib.first_refresh(o.timing)
    step = Step(count, taken, every, count == first)
    if statistics is not None:
        factors, rejected = stacks.when(
            due, lambda f: stacks.accumulate(o.method, plan, f, statistics, step, split), factors
        )
    if o.timing.stagger and isinstance(every, int) and every > 1:
        # all blocks at the first refresh: a block without preconditioner would be a slow start
        factors, bad = stacks.when(
            usable & (count == first),
            lambda f: stacks.refresh(o.method, plan, f, step, split),
            factors,
        )
        factors, more = stacks.when(
            usable & (count > first),
            lambda f: stacks.refresh_share(o.method, plan, f, step, every, split),
            factors,
        )
        bad = bad + more
    else:
        due = usable & timing_lib.refresh_due(count, every, o.timing)
        factors, bad = stacks.when(
            due, lambda f: stacks.refresh(o.method, plan, f, step, split), factors
        )
    return stacks.place(split, o.method, plan, factors), taken, rejected + bad, step


def _directions(
    grafts: dict[int, Graft | None], nu: Leaves, filtered: Leaves, accepted: jax.Array
) -> Leaves:
    """What every leaf would do without a preconditioner."""
    out = []
    for j, (v, x) in enumerate(zip(nu, filtered, strict=True)):
        graft = grafts[j]
        out.append(x if graft is None or not x.size else grafting.direction(graft, v, x, accepted))
    return out


def _precondition(
    o: Options,
    plan: Plan,
    factors: Any,
    blocks: dict[str, jax.Array],
    g: Leaves,
    filtered: Leaves,
    out: Leaves,
    step: Step,
    usable: jax.Array,
    split: Split | None,
) -> jax.Array:
    """Replaces the direction of every covered leaf by the grafted, preconditioned one.

    A block whose direction overflows goes without preconditioner. Returns the number of these.

    Everything happens on whole buckets; a leaf is touched once, when its blocks are cut out again
    (each such cut is a kernel of its own to compile).
    """
    covered = [leaf.index for leaf in plan.covered]
    rejected = jnp.zeros((), jnp.int32)
    if not covered:
        return rejected
    if any(filtered[j] is not g[j] for j in covered):
        blocks = buckets.gather(plan, [filtered[j] for j in covered], split)
    u = stacks.precondition(o.method, plan, factors, blocks, step, split)
    for key, x in u.items():
        good = jnp.isfinite(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))
        u[key] = jnp.where(good.reshape((-1,) + (1,) * (x.ndim - 1)), x, blocks[key])
        rejected += jnp.where(usable, jnp.sum(~good), 0).astype(jnp.int32)
    directions = [out[j] for j in covered]
    if o.graft.kind != "none":
        if o.graft.per == "block":
            d_blocks = buckets.gather(plan, directions, split)
            u = {k: jax.vmap(_rescale)(x, d_blocks[k]) for k, x in u.items()}
        else:
            u = buckets.rescale(plan, u, directions)
    u = {k: jnp.where(usable, x, 0) for k, x in u.items()}
    share = timing_lib.blend(step.count, o.timing)
    pieces = buckets.scatter(plan, u)
    if split is not None:
        pieces = split.whole(pieces)
    for j, x, d in zip(covered, pieces, directions, strict=True):
        x = x.astype(d.dtype)
        if share is not None:
            s = share.astype(d.dtype)
            d = trees.replicate(d)
            x = jnp.where(usable, jnp.where(s > 0, s * x + (1 - s) * d, d), 0)
        out[j] = x
    return rejected


def _rescale(u: jax.Array, d: jax.Array) -> jax.Array:
    return grafting.rescale(u, grafting.norm(d))


def _own_fallback(
    o: Options,
    plan: Plan,
    updates: Any,
    state: BlockState,
    params: Any,
    extra: dict[str, Any],
    real: list[int],
    out: Leaves,
    usable: jax.Array,
) -> Any:
    """Runs the user's transformation on the leaves without blocks; its new state."""
    if not runs_fallback(o):
        return state.fallback
    own = None if params is None else uncovered_only(params, plan)
    run = optax.with_extra_args_support(o.fallback).update
    theirs, new = run(uncovered_only(updates, plan), state.fallback, own, **extra)
    values = trees.flatten(theirs)[0]
    for index, _, _, _ in plan.uncovered:
        out[index] = values[real[index]].astype(out[index].dtype)
    return jax.tree.map(lambda n, s: jnp.where(usable, n, s), new, state.fallback)
