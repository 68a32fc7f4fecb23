"""From one parameter to the parts of it that are preconditioned, and which modes have a factor."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from kradagrad_jax.engine.layout import (
    Axes,
    Layout,
    axes_of,
    bounds_of,
    factored_modes,
    is_biases,
    is_included,
)
from kradagrad_jax.engine.rules import Shape

FREE_STATE = 2**18  # numbers of state that are never too many: 1 MB in float32


class Tile(NamedTuple):
    """A region of a merged shape cut into equal blocks: per mode its start, pieces, piece size."""

    starts: Shape
    counts: Shape
    sizes: Shape


class Leaves(NamedTuple):
    """Covered parameters, or equal slices of them, that are cut alike.

    Attributes:
      indices: positions among the leaves.
      paths: their paths.
      shape: of each leaf as given.
      region: ``(axis, start, stop)`` where the entry is a slice of each leaf; None: all of it.
      view: the (sliced) leaf is reshaped to this before the transpose.
      order: axes of ``view``, those that stack first.
      stack: product of the axes that stack (equal parts of a split among them).
      merged: shape that is preconditioned, without the stack.
      factored: per merged mode whether it has a factor.
      reasons: per merged mode why it has no factor, or "".
      explicit: whether ``Layout.modes`` speaks of them.
      group: name of the method that treats them.
      dtype: of their factors.
      tiles: regions of ``merged``.
    """

    indices: tuple[int, ...]
    paths: tuple[str, ...]
    shape: Shape
    region: tuple[int, int, int] | None
    view: Shape
    order: tuple[int, ...]
    stack: int
    merged: Shape
    factored: tuple[bool, ...]
    reasons: tuple[str, ...] = ("",)
    explicit: bool = False
    group: str = ""
    dtype: Any = None
    tiles: tuple[Tile, ...] = ()


def balanced(shape: Shape) -> Shape:
    """The most balanced matricisation, a vector or nothing where there are fewer long axes."""
    dims = [d for d in shape if d != 1]
    if len(dims) <= 1:
        return tuple(dims)
    pairs = [(math.prod(dims[:i]), math.prod(dims[i:])) for i in range(1, len(dims))]
    return min(reversed(pairs), key=sum)  # ties: the later cut, (inputs, outputs) in JAX layouts


def merge_dims(shape: Shape, layout: Layout) -> Shape:
    """Shape of the tensor that is preconditioned (specs of Shampoo 3.1 and KrADagrad 3.4.1)."""
    if layout.merge == "none":
        return shape
    if layout.merge == "matrix":
        return balanced(shape)
    cap = layout.merge_cap or layout.block_size or max(shape, default=1)
    out, product = [], 1
    for d in shape:
        if product * d <= cap:
            product *= d
        else:
            out, product = out + [product] * (product > 1), d
    return tuple(out + [product] * (product > 1))


def _segments(d: int, layout: Layout) -> list[tuple[int, int, int]]:
    """Cuts one mode of length d into at most two runs ``(start, count, size)`` of equal pieces."""
    b = layout.block_size or d
    if d <= b:
        return [(0, 1, d)]
    q = -(-d // b)
    if layout.pieces == "tail":
        rest = d % b
        return [(0, d // b, b)] + ([(d - rest, 1, rest)] if rest else [])
    for pieces in range(q, q + q // 4 + 2):  # a few pieces more, if that makes them equal
        if d % pieces == 0:
            return [(0, pieces, d // pieces)]
    small, longer = divmod(d, q)
    return [(0, longer, small + 1), (longer * (small + 1), q - longer, small)]


@functools.lru_cache(maxsize=1024)
def tiles_of(merged: Shape, factored: tuple[bool, ...], layout: Layout) -> tuple[Tile, ...]:
    """Tiles of a merged shape, row-major; a mode without a factor is one piece."""
    runs = [
        _segments(d, layout) if f else [(0, 1, d)] for d, f in zip(merged, factored, strict=True)
    ]
    return tuple(Tile(*zip(*combination, strict=True)) for combination in itertools.product(*runs))


def state_numbers(merged: Shape, factored: tuple[bool, ...], layout: Layout) -> int:
    """Numbers of factor state of one merged shape: two matrices per factored mode of a block."""
    return sum(
        math.prod(tile.counts)
        * 2
        * sum(n * n for n, f in zip(tile.sizes, factored, strict=True) if f)
        for tile in tiles_of(merged, factored, layout)
    )


def parts_of(
    index: int, path: str, shape: Shape, dtype: Any, names: Any, layout: Layout
) -> list[Leaves] | str:
    """The parts of a leaf, one unless ``split`` cuts it unevenly; or why it is not covered."""
    if 0 in shape:
        return "empty"
    if not is_included(layout, path, shape):
        return "excluded by Layout.include"
    axes = axes_of(layout, path, shape, names)
    if axes is None:
        return "no MuonDimensionNumbers"
    equal, regions = _cuts(path, shape, axes, layout)
    out = []
    for region in regions:
        part = part_of(index, path, shape, region, axes, equal, dtype, layout)
        if isinstance(part, str):
            return part
        out.append(part)
    return out


def _cuts(
    path: str, shape: Shape, axes: Axes, layout: Layout
) -> tuple[dict[int, int], list[tuple[int, int, int] | None]]:
    """Number of equal parts by axis, and the regions of an axis that is cut unevenly."""
    equal: dict[int, int] = {}
    regions: list[tuple[int, int, int] | None] = []
    for axis, bounds in bounds_of(layout, path, shape).items():
        if axis in axes.stack:
            raise ValueError(
                f"parameter '{path}' has shape {shape}: Layout.split cuts axis {axis}, which "
                "stacks layers; leave it out of split"
            )
        if len(set(np.diff(bounds))) == 1:
            equal[axis] = len(bounds) - 1
        elif regions:
            raise ValueError(
                f"parameter '{path}' has shape {shape}: Layout.split cuts more than one axis into "
                "unequal parts; cut one"
            )
        else:
            regions = [(axis, a, b) for a, b in itertools.pairwise(bounds)]
    return equal, regions or [None]


def part_of(index, path, shape, region, axes: Axes, equal, dtype, layout: Layout) -> Leaves | str:
    local = list(shape)
    if region is not None:
        local[region[0]] = region[2] - region[1]
    view, parts, place = [], [], {}  # place: axis of the leaf -> axis of the view
    for axis, d in enumerate(local):
        if equal.get(axis, 1) > 1:
            parts.append(len(view))
            view.append(equal[axis])
            d //= equal[axis]
        place[axis] = len(view)
        view.append(d)
    first = [place[a] for a in axes.stack] + parts
    rows, columns = axes.matrix or ((), ())
    last = rows + columns if axes.matrix else [a for a in place if a not in axes.stack]
    order = (*first, *(place[a] for a in last))
    rest = tuple(view[place[a]] for a in last)
    bias = axes.matrix is None and is_biases(layout, path)
    if axes.matrix is not None:
        merged = balanced(tuple(math.prod(view[place[a]] for a in side) for side in axes.matrix))
    else:
        merged = merge_dims((math.prod(rest),) if bias and rest else rest, layout)
    if not merged:
        if layout.scalars == "diagonal":
            return "scalar"
        merged = (1,)
    elif len(merged) == 1 and layout.vectors == "diagonal":
        return "bias" if bias else "vector"
    asked = factored_modes(layout, path, merged)
    long = [layout.max_dim is not None and d > layout.max_dim for d in merged]
    if all(long) and len(merged) > 1 and layout.block_size is not None:
        long = [False] * len(merged)  # a square of a very wide model: all modes are cut
    reasons = tuple(
        "Layout.modes"
        if asked is not None and not asked[i]
        else f"mode of {d} > max_dim"
        if long[i]
        else ""
        for i, d in enumerate(merged)
    )
    if all(reasons):
        return ", ".join(dict.fromkeys(reasons))
    return Leaves(
        (index,), (path,), shape, region, tuple(view), order, math.prod(view[a] for a in first),
        merged, tuple(not r for r in reasons), reasons, asked is not None,
        "" if layout.group is None else layout.group(path, shape), np.dtype(dtype),
    )  # fmt: skip


def limited(parts: list[Leaves], layout: Layout) -> list[Leaves]:
    """Applies ``state_limit``: by merged shapes, so that scanned and unrolled trees agree."""
    number: dict[tuple[Shape, tuple[bool, ...]], int] = {}  # how many, of those that may change
    state, weights = 0, 0
    for p in parts:
        if len(p.merged) == 1:
            continue  # nothing to choose from
        state += p.stack * state_numbers(p.merged, p.factored, layout)
        weights += p.stack * math.prod(p.merged)
        if not p.explicit and sum(p.factored) > 1:
            key = p.merged, p.factored
            number[key] = number.get(key, 0) + p.stack
    if layout.state_limit is None or state <= FREE_STATE:
        return parts
    most = sorted(number, key=lambda k: (-state_numbers(*k, layout) / math.prod(k[0]), *k))
    changed = {}
    for merged, factored in most:
        if state <= layout.state_limit * weights:
            break
        shortest = min(d for d, f in zip(merged, factored, strict=True) if f)
        at = max(i for i, d in enumerate(merged) if factored[i] and d == shortest)
        kept = tuple(i == at for i in range(len(merged)))
        saved = state_numbers(merged, factored, layout) - state_numbers(merged, kept, layout)
        state -= number[merged, factored] * saved
        changed[merged, factored] = kept
    out = []
    for p in parts:
        kept = None if p.explicit else changed.get((p.merged, p.factored))
        if kept is not None:
            reasons = tuple(
                r or ("" if k else "state_limit") for r, k in zip(p.reasons, kept, strict=True)
            )
            p = p._replace(factored=kept, reasons=reasons)
        out.append(p)
    return out
