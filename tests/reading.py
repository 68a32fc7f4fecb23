"""Reads and writes what a state keeps of each parameter."""

from typing import Any

import jax

import kradagrad_jax as kj
from kradagrad_jax.engine import trees
from kradagrad_jax.engine.cut import cut, paste
from kradagrad_jax.engine.plan import Plan, block_origins
from kradagrad_jax.engine.static import plan_of


def plan(params: Any, layout: kj.Layout | None = None) -> Plan:
    return plan_of(params, layout or kj.Layout())


def averages(state: kj.BlockState, params: Any, layout: kj.Layout | None = None) -> Any:
    """The averages of the gradient, shaped like the parameters."""
    leaves, treedef = jax.tree.flatten(params)
    found = paste(plan(params, layout), state.mu)
    rest = trees.flatten(state.rest.first)[0] if state.rest.first is not None else leaves
    return treedef.unflatten([found.get(i, rest[i]) for i in range(len(leaves))])


def with_averages(state: kj.BlockState, mean: Any, layout: kj.Layout | None = None) -> Any:
    """The state with other averages."""
    leaves, treedef = trees.flatten(state.rest.first)
    given = jax.tree.leaves(mean)
    own = [x if trees.is_masked(x) else given[i] for i, x in enumerate(leaves)]
    mu = cut(plan(mean, layout), given)
    return state._replace(mu=mu, rest=state.rest._replace(first=treedef.unflatten(own)))


def orders(params: Any, layout: kj.Layout) -> dict[str, int]:
    """Number of modes of every parameter after merging; 0 where it has no factors."""
    found = plan(params, layout)
    out = {path: 0 for _, path, _, _ in found.uncovered}
    return out | {path: len(group.merged) for group in found.covered for path in group.paths}


def blocks_of(params: Any, layout: kj.Layout) -> dict[str, list[Any]]:
    """Origins of the blocks of every parameter that has any."""
    found = plan(params, layout)
    out: dict[str, list[Any]] = {path: [] for group in found.covered for path in group.paths}
    for bucket in found.buckets:
        for slot in bucket.slots:
            group = found.covered[slot.leaves]
            named = dict(zip(group.indices, group.paths, strict=True))
            for origin in block_origins(found, slot):
                out[named[origin.index]].append(origin)
    return out
