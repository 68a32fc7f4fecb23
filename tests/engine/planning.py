"""Trees of shapes, and plans for them as the engine makes them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.plan import Plan, make_plan


class _Numbers(NamedTuple):
    """As optax has them since 0.2.6."""

    reduction_axis: Any = 0
    output_axis: Any = 1


MUON = getattr(optax.contrib, "MuonDimensionNumbers", _Numbers)


def plan_for(tree, layout: Layout | None = None) -> Plan:
    leaves = jax.tree.leaves(tree)
    return make_plan(
        tuple(trees.paths_of(tree)),
        tuple(x.shape for x in leaves),
        tuple(trees.factor_dtype_of(x.dtype) for x in leaves),
        tuple(trees.names_of(tree)),
        layout or Layout(),
    )


def S(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def dense(*shape):
    return {"kernel": S(*shape), "bias": S(*shape[:-2], shape[-1])}


def gpt2(layers):
    def layer():
        out = {n: {"scale": S(768), "bias": S(768)} for n in ("ln1", "ln2")}
        kernels = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}
        return out | {n: dense(*s) for n, s in kernels.items()}

    return {"wte": S(50257, 768), "wpe": S(1024, 768)} | {f"h{i}": layer() for i in range(layers)}


def entries(plan):
    return {path: entry for entry in plan.covered for path in entry.paths}


def reasons(plan):
    return {path: reason for _, path, _, reason in plan.uncovered}


def keys(plan):
    return {bucket.key: bucket.size for bucket in plan.buckets}
