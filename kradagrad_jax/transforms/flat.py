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
    """The tree ``like`` with the entries of the vector.

    With ``keep_dtype`` the vector's dtype stays and empty leaves are masked, as state has them.
    """
    leaves, treedef = trees.flatten(like)
    own = _positions(like)
    ends = list(itertools.accumulate(math.prod(leaves[i].shape) for i in own))
    for i, part in zip(own, jnp.split(vector, ends[:-1]), strict=True):
        part = part if keep_dtype else part.astype(leaves[i].dtype)
        leaves[i] = trees.place_like(part.reshape(leaves[i].shape), leaves[i])
    if keep_dtype:  # state: no zero-size arrays
        leaves = [x if i in own else optax.MaskedNode() for i, x in enumerate(leaves)]
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
        plan_of(params, WHOLE)  # refuses dtypes by name
        state = run.init(flatten(params))
        if state.mu is None:
            return state
        return state._replace(mu=unflatten(state.mu[ALL], params, keep_dtype=True))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not _positions(updates):
            return run.update(updates, state, params, **extra)
        plan_of(updates, WHOLE)
        if state.mu is not None:
            _check(updates, state.mu)
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


def _check(updates: Any, mu: Any) -> None:
    """Raises ValueError where the state is that of other parameters."""
    leaves, averages = trees.flatten(updates)[0], trees.flatten(mu)[0]
    shapes = [x.shape for x in averages if not trees.is_masked(x)]
    paths = trees.paths_of(updates)
    own = _positions(updates)
    for i, shape in itertools.zip_longest(own, shapes[: len(own)]):
        if shape != leaves[i].shape:
            raise ValueError(
                f"the optimizer state was initialised with other parameters than '{paths[i]}' of "
                f"shape {leaves[i].shape}; call init again with these parameters"
            )
    if len(shapes) > len(own):
        raise ValueError(
            f"the optimizer state was initialised for {len(shapes)} parameters, the gradients have "
            f"{len(own)} ('{paths[own[0]]}', ..); call init again with these parameters"
        )


def _joined(samples: Samples, like: Any) -> Samples:
    """Samples of the one vector."""
    leaves, paths, dtype = trees.flatten(like)[0], trees.paths_of(like), _wide(like)
    parts = []
    for i in _positions(like):
        x = trees.replicate(matching(samples.gradients(paths[i]), paths[i], leaves[i].shape))
        parts.append(x.reshape(len(x), -1).astype(dtype))
    return dataclasses.replace(samples, values={ALL: jnp.concatenate(parts, axis=1)})
