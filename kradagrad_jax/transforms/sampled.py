"""What transformations of sampled statistics share: their source, scalars, momentum."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import BlockState, Layout, buckets, trees
from kradagrad_jax.engine.layout import Plan, factor_dtype_of
from kradagrad_jax.engine.options import Source, plan_of

WHOLE = Layout(block_size=None, merge="none", vectors="block")


def unmerged(layout: Layout) -> Layout:
    """The layout with the shapes of the parameters left as they are."""
    return dataclasses.replace(layout, merge="none")


def curvature_of(extra: dict[str, Any], name: str) -> Any:
    """The argument ``curvature=`` of an update.

    Raises:
      ValueError: it is missing.
      TypeError: it holds no sampled gradients.
    """
    if "curvature" not in extra:
        raise ValueError(
            f"`curvature=` is missing in the update of {name}; did a wrapper drop extra arguments "
            "(TrainState, lookahead)? Pass curvature=None for a step without new statistics, or "
            "use fisher='empirical'"
        )
    samples = extra["curvature"]
    if samples is not None and not hasattr(samples, "gradients"):
        raise TypeError(
            f"{name} takes sampled gradients (curvature.Samples), got {type(samples).__name__}; "
            "see curvature.sampled_gradients"
        )
    return samples


def source(name: str, fisher: str, vectors: bool = False) -> Source:
    """The engine's source of statistics ``(n, *block shape)``: samples, or the gradient itself.

    Args:
      name: of the method, for messages.
      fisher: ``"model"`` or ``"empirical"``.
      vectors: curvature vectors in place of sampled gradients.
    """

    def empirical(plan: Plan, blocks: dict[str, jax.Array], extra: dict[str, Any]) -> Any:
        del plan, extra
        return {key: x[:, None] for key, x in blocks.items()}, True

    def model(plan: Plan, blocks: dict[str, jax.Array], extra: dict[str, Any]) -> Any:
        del blocks
        samples = curvature_of(extra, name)
        return (
            (None, False) if samples is None else (stacked(plan, samples, vectors), samples.fresh)
        )

    return empirical if fisher == "empirical" else model


def stacked(plan: Plan, samples: Any, vectors: bool = False) -> dict[str, jax.Array]:
    """Samples as blocks: ``{bucket: (size, n, *block shape)}``."""
    columns = []
    for leaf in plan.covered:
        x = samples.vectors(leaf.path) if vectors else samples.gradients(leaf.path)
        columns.append(matching(x, leaf.path, leaf.shape))
    draws = [buckets.gather(plan, draw) for draw in zip(*columns, strict=True)]
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *draws)


def matching(x: jax.Array, path: str, shape: tuple[int, ...]) -> jax.Array:
    """Samples ``(n, *shape)`` of a parameter; those of a scalar may be ``(n,)``.

    Raises:
      ValueError: they have another shape.
    """
    if x.shape[1:] != shape and (x.shape[1:], shape) != ((), (1,)):
        raise ValueError(
            f"samples of parameter '{path}' have shape {x.shape[1:]}, the parameter {shape}: take "
            "them of the parameters that the optimizer gets"
        )
    return x.reshape(len(x), *shape)


def covered_by(layout: Layout) -> Callable[[Any], Any]:
    """``tree -> tree of bools``: which leaves have blocks."""

    def covered(tree: Any) -> Any:
        own = {leaf.path for leaf in plan_of(scalars_to_vectors(tree), layout).covered}
        leaves, treedef = trees.flatten(tree)
        paths = trees.paths_of(tree)
        flags = [
            x if trees.is_masked(x) else path in own for x, path in zip(leaves, paths, strict=True)
        ]
        return treedef.unflatten(flags)

    return covered


def heavy_ball(
    inner: optax.GradientTransformationExtraArgs,
    momentum: Any,
    covered: Callable[[Any], Any],
    fallback: Any,
) -> optax.GradientTransformationExtraArgs:
    """Turns the engine's average ``(1-b)/(1-b^t) sum b^(t-s) g_s`` into the sum without a factor.

    The preconditioner is linear: scaling its result is the same as scaling what it is applied to.

    Args:
      inner: transformation of the engine.
      momentum: its ``beta1``; None: nothing to do.
      covered: ``tree -> tree of bools``: leaves that are preconditioned.
      fallback: that of the engine: with ``"identity"`` the others are momentum, too.
    """
    if momentum is None:
        return inner

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        # half precision is rounded once, after the scaling; a user's fallback gets what it expects
        wide = trees.widened(updates) if fallback == "identity" else updates
        out, new = inner.update(wide, state, params, **extra)
        counts = cast(BlockState, new)
        accepted = jnp.maximum(counts.count - counts.skipped, 1)
        leaves, treedef = trees.flatten(out)
        flags, given = trees.flatten(covered(updates))[0], trees.flatten(updates)[0]
        for i, (x, flag) in enumerate(zip(leaves, flags, strict=True)):
            if not trees.is_masked(x) and (fallback == "identity" or flag):
                leaves[i] = _summed(x, momentum, accepted).astype(given[i].dtype)
        return treedef.unflatten(leaves), new

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _summed(x: jax.Array, momentum: Any, accepted: jax.Array) -> jax.Array:
    wide = factor_dtype_of(x.dtype)
    b = jnp.asarray(momentum).astype(wide)
    return x.astype(wide) * ((1 - b ** accepted.astype(wide)) / (1 - b))


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return jnp.reshape(x, shape)


def scalars_to_vectors(tree: Any) -> Any:
    """The tree with scalars as vectors of length one."""
    leaves, treedef = trees.flatten(tree)
    short = [not trees.is_masked(x) and x.shape == () for x in leaves]
    leaves = [_reshaped(x, (1,)) if s else x for x, s in zip(leaves, short, strict=True)]
    return treedef.unflatten(leaves)


def _back(tree: Any, like: Any) -> Any:
    """Inverse of :func:`scalars_to_vectors`."""
    leaves, treedef = trees.flatten(tree)
    originals = trees.flatten(like)[0]
    out = [
        x if trees.is_masked(x) or trees.is_masked(y) or y.shape != () else _reshaped(x, ())
        for x, y in zip(leaves, originals, strict=True)
    ]
    return treedef.unflatten(out)


def scalars_as_vectors(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Runs the engine, which has no blocks for scalars, on vectors of length one in their place."""

    def moved(state: Any, change: Callable[[Any], Any]) -> Any:
        state = cast(BlockState, state)
        if state.mu is None:
            return state
        return state._replace(mu=change(state.mu))

    def init(params: Any) -> Any:
        if not jax.tree.leaves(params):
            return inner.init(params)
        state = inner.init(scalars_to_vectors(params))
        return moved(state, lambda mu: _back(mu, params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        vectors = None if params is None else scalars_to_vectors(params)
        out, new = inner.update(
            scalars_to_vectors(updates), moved(state, scalars_to_vectors), vectors, **extra
        )
        return _back(out, updates), moved(new, lambda mu: _back(mu, updates))

    return optax.GradientTransformationExtraArgs(init, update)
