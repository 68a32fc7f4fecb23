"""Finds stacked layers of which a layout says nothing."""

from collections.abc import Sequence
from typing import Any

from kradagrad_jax.engine.layout import Layout, axes_of, is_biases
from kradagrad_jax.engine.rules import Shape


def undeclared_stacks(
    paths: Sequence[str],
    shapes: Sequence[Shape],
    names: Sequence[tuple[Any, ...] | None] | None,
    layout: Layout,
) -> list[tuple[str, int, int]]:
    """Parts of the tree that look like stacked layers but are not all declared as such.

    Below one path all leaves have the same size on axis 0 (or all on axis 1), their numbers of axes
    differ and one has at least three. A leaf whose shape is the tail of another's (the bias of a
    fused kernel) is no evidence. Of two such axes the shorter one is named.

    Returns:
      (path, axis, size), the path as short as possible.
    """
    below: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        steps = path.split("/")
        for n in range(1, len(steps)):
            below.setdefault("/".join(steps[:n]), []).append(i)
    found: list[tuple[str, int, int]] = []
    for prefix in sorted(below, key=lambda p: (p.count("/") + bool(p), p)):
        if any(not p or prefix.startswith(f"{p}/") for p, _, _ in found):
            continue
        members = below[prefix]
        axes = [a for a in (0, 1) if _looks_stacked([shapes[i] for i in members], a)]
        if axes and any(
            _is_open(layout, paths[i], shapes[i], None if names is None else names[i])
            for i in members
        ):
            size, axis = min((shapes[members[0]][a], a) for a in axes)
            found.append((prefix, axis, size))
    return found


def _looks_stacked(shapes: list[Shape], axis: int) -> bool:
    if any(len(s) < 2 for s in shapes) or len({s[axis] for s in shapes}) != 1:
        return False
    tails = {s[i:] for s in shapes for i in range(1, len(s))}
    orders = {len(s) for s in shapes if s not in tails}
    return shapes[0][axis] > 1 and len(orders) > 1 and max(orders) > 2


def _is_open(layout: Layout, path: str, shape: Shape, names: Any) -> bool:
    """Whether a parameter may be taken for what it is not: biases are vectors in any case."""
    axes = axes_of(layout, path, shape, names)
    return not (axes is None or axes.declared or is_biases(layout, path))
