"""Runs a transformation on all parameters as one long vector."""

import dataclasses
import itertools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.curvature.samples import Samples
from kradagrad_jax.engine import trees
from kradagrad_jax.engine.layout import factor_dtype_of
from kradagrad_jax.engine.options import plan_of
from kradagrad_jax.transforms.sampled import WHOLE, matching

ALL = "all"


def _positions(tree: Any) -> list[int]:
    """Leaves that take part: neither masked nor empty."""
    leaves = trees.flatten(tree)[0]
    return [i for i, x in enumerate(leaves) if not trees.is_masked(x) and math.prod(x.shape)]


def _wide(tree: Any) -> Any:
    leaves = trees.flatten(tree)[0]
    dtypes = [factor_dtype_of(leaves[i].dtype) for i in _positions(tree)]
    return max(dtypes, key=lambda d: jnp.finfo(d).bits)


def flatten(tree: Any, dtype: Any = None) -> dict[str, Any]:
    """``{"all": vector}`` of all leaves in order; of ShapeDtypeStructs another one."""
    leaves, own = trees.flatten(tree)[0], _positions(tree)
    dtype = dtype or _wide(tree)
    if any(isinstance(leaves[i], jax.ShapeDtypeStruct) for i in own):
        size = sum(math.prod(leaves[i].shape) for i in own)
        return {ALL: jax.ShapeDtypeStruct((size,), dtype)}
    parts = [trees.replicate(leaves[i]).astype(dtype).reshape(-1) for i in own]
    return {ALL: jnp.concatenate(parts)}


def unflatten(vector: jax.Array, like: Any, keep_dtype: bool = False) -> Any:
    """The tree ``like`` with the entries of the vector."""
    leaves, treedef = trees.flatten(like)
    own = _positions(like)
    ends = list(itertools.accumulate(math.prod(leaves[i].shape) for i in own))
    for i, part in zip(own, jnp.split(vector, ends[:-1]), strict=True):
        part = part if keep_dtype else part.astype(leaves[i].dtype)
        leaves[i] = trees.place_like(part.reshape(leaves[i].shape), leaves[i])
    return treedef.unflatten(leaves)


def as_one_vector(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of the engine applied to the concatenation of all leaves.

    Samples are concatenated as well; ``mu`` in the state has the shapes of the parameters.
    """

    run = cast(Any, inner)

    def init(params: Any) -> Any:
        if not _positions(params):
            return run.init(params)
        plan_of(params, WHOLE)  # refuses dtypes, naming the parameter
        state = run.init(flatten(params))
        if state.mu is None:
            return state
        return state._replace(mu=unflatten(state.mu[ALL], params, keep_dtype=True))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not _positions(updates):
            return run.update(updates, state, params, **extra)
        if state.mu is not None:
            dtype = jax.tree.leaves(state.mu)[0].dtype
            state = state._replace(mu=flatten(state.mu, dtype))
        if isinstance(extra.get("curvature"), Samples):
            extra = extra | {"curvature": _joined(extra["curvature"], updates)}
        own = None if params is None else flatten(params)
        out, new = run.update(flatten(updates), state, own, **extra)
        if new.mu is not None:
            new = new._replace(mu=unflatten(new.mu[ALL], updates, keep_dtype=True))
        return unflatten(out[ALL], updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def _joined(samples: Samples, like: Any) -> Samples:
    """Samples of the one vector."""
    leaves, paths, dtype = trees.flatten(like)[0], trees.paths_of(like), _wide(like)
    parts = []
    for i in _positions(like):
        x = trees.replicate(matching(samples.gradients(paths[i]), paths[i], leaves[i].shape))
        parts.append(x.reshape(len(x), -1).astype(dtype))
    return dataclasses.replace(samples, values={ALL: jnp.concatenate(parts, axis=1)})
