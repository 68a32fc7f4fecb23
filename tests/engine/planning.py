"""A plan for a tree, as the engine makes it."""

import jax

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.plan import Plan, make_plan


def plan_for(tree, layout: Layout | None = None) -> Plan:
    leaves = jax.tree.leaves(tree)
    return make_plan(
        tuple(trees.paths_of(tree)),
        tuple(x.shape for x in leaves),
        tuple(trees.factor_dtype_of(x.dtype) for x in leaves),
        tuple(trees.names_of(tree)),
        layout or Layout(),
    )
