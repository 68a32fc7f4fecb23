"""Leaves without blocks: biases and scales, and whatever the layout leaves out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import graft as graft_lib
from kradagrad_jax.engine import trees
from kradagrad_jax.engine.apply import averaged
from kradagrad_jax.engine.layout import factor_dtype_of
from kradagrad_jax.engine.state import Moments
from kradagrad_jax.engine.static import Options, Static, uncovered_only
from kradagrad_jax.engine.timing import Now


def init(o: Options, s: Static, params: Any) -> Moments:
    """Zeros for the averages and squares of the leaves without blocks."""
    leaves, treedef = trees.flatten(params)
    real = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    own = [real[i] for i, _, shape, _ in s.plan.uncovered if 0 not in shape]

    def zeros(dtype: Any) -> Any:
        out: list[Any] = [optax.MaskedNode()] * len(leaves)
        for i in own:
            out[i] = jnp.zeros_like(leaves[i], dtype=dtype or factor_dtype_of(leaves[i].dtype))
        return trees.unflatten(treedef, out)

    graft = o.leaf_graft
    return Moments(
        first=None if o.beta1 is None or o.runs_fallback else zeros(o.mu_dtype),
        second=zeros(None) if graft is not None and graft.adaptive else None,
    )


def step(
    s: Static, now: Now, moments: Moments, leaves: list[Any], real: list[int]
) -> tuple[Moments, dict[int, jax.Array]]:
    """The graft's own direction (or the average, for ``"identity"``) of every leaf without blocks.

    Args:
      s: the static part of the update.
      now: its scalars.
      moments: averages and squares.
      leaves: the gradients, masked ones included.
      real: positions of those that are not masked.

    Returns:
      New moments, and directions by the position of the leaf.
    """
    o, graft, out = s.options, s.options.leaf_graft, {}
    if o.runs_fallback:
        return moments, {}
    means = o._replace(average="mean") if graft is not None else o
    mus, nus = (_slots(tree, len(leaves), real) for tree in moments)
    stacks = dict(s.plan.stacks)
    for index, _, shape, _ in s.plan.uncovered:
        g = leaves[real[index]]
        g = g.astype(factor_dtype_of(g.dtype))
        if 0 in shape:
            out[index] = g
            continue
        mus[index], x = averaged(means, mus[index], g, now)
        if graft is not None:
            own = stacks.get(index, ())
            x = _unit(x, own) if graft.normalize else x
            if graft.adaptive:
                squared = _unit(g, own) if graft.normalize else g
                new = graft_lib.accumulate(graft, nus[index], squared)
                nus[index] = jnp.where(now.usable, new, nus[index])
            x = graft_lib.direction(graft, nus[index], x, now.accepted)
        out[index] = jnp.where(now.usable, x, 0)
    return Moments(_restored(moments.first, mus, real), _restored(moments.second, nus, real)), out


def _unit(x: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    """Over its norm; each layer of a stack by itself."""
    axes = tuple(a for a in range(x.ndim) if a not in stack)
    return x / (jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True)) + 1e-16)


def _slots(tree: Any, size: int, real: list[int]) -> list[Any]:
    """The arrays of a params-shaped tree at the given positions; None where masked."""
    if tree is None:
        return [None] * len(real)
    leaves = trees.flatten(tree)[0]
    if len(leaves) != size:
        raise ValueError(
            f"the gradients have {size} leaves, the optimizer state was initialised for "
            f"{len(leaves)}; call init again with these parameters"
        )
    return [None if trees.is_masked(leaves[i]) else leaves[i] for i in real]


def _restored(tree: Any, values: list[Any], real: list[int]) -> Any:
    if tree is None:
        return None
    leaves, treedef = trees.flatten(tree)
    for i, value in zip(real, values, strict=True):
        leaves[i] = leaves[i] if value is None else value
    return treedef.unflatten(leaves)


def run_fallback(
    s: Static, now: Now, state: Any, updates: Any, params: Any, extra: dict[str, Any]
) -> tuple[Any, dict[int, jax.Array]]:
    """Runs the user's transformation on the leaves without blocks."""
    o, plan = s.options, s.plan
    if not o.runs_fallback:
        return state, {}
    own = None if params is None else uncovered_only(params, plan)
    run = optax.with_extra_args_support(o.fallback).update
    theirs, new = run(uncovered_only(updates, plan), state, own, **extra)
    leaves = trees.flatten(updates)[0]
    values = [
        v for v, x in zip(trees.flatten(theirs)[0], leaves, strict=True) if not trees.is_masked(x)
    ]
    out = {index: jnp.where(now.usable, values[index], 0) for index, _, _, _ in plan.uncovered}
    return jax.tree.map(lambda n, o: jnp.where(now.usable, n, o), new, state), out
