"""What transformations of sampled statistics share: their source, and their layout."""

import dataclasses
from typing import Any

import jax

from kradagrad_jax.engine import Layout
from kradagrad_jax.engine.cut import cut
from kradagrad_jax.engine.plan import Plan
from kradagrad_jax.engine.static import Source

WHOLE = Layout(
    block_size=None, merge="none", vectors="block", scalars="block", max_dim=None,
    state_limit=None, biases=None,
)  # fmt: skip
# of recommended presets: long modes are cut, and have no factor where that would be too many pieces
CUT = dataclasses.replace(WHOLE, block_size=2048, max_dim=8192)


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
    columns: dict[int, jax.Array] = {}
    for group in plan.covered:
        for index, path in zip(group.indices, group.paths, strict=True):
            x = samples.vectors(path) if vectors else samples.gradients(path)
            columns[index] = matching(x, path, group.shape)
    leaves = [columns.get(i) for i in range(max(columns, default=-1) + 1)]
    return jax.vmap(lambda draw: cut(plan, draw), out_axes=1)(leaves) if columns else {}


def matching(x: jax.Array, path: str, shape: tuple[int, ...]) -> jax.Array:
    """Samples ``(n, *shape)`` of a parameter.

    Raises:
      ValueError: they have another shape.
    """
    if x.shape[1:] != shape:
        raise ValueError(
            f"samples of parameter '{path}' have shape {x.shape[1:]}, the parameter {shape}: take "
            "them of the parameters that the optimizer gets"
        )
    return x
