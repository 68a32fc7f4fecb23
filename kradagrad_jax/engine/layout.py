"""From parameter shapes to blocks, and from blocks to buckets; static, from shapes alone.

A parameter is matricised (or merged, or left as it is), cut into blocks of at most ``block_size``
per mode, and all blocks of one shape in the whole model form one bucket. A *tile* is a region of a
parameter that is cut into equal blocks, so that the number of traced operations does not grow with
the number of blocks.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters are cut into blocks. Hashable, static, never traced.

    Attributes:
      block_size: largest size of a mode of a block; ``None`` leaves every mode whole. The default
        keeps eigendecompositions small: on TPU, ``eigh`` above 256 compiles to a far slower
        algorithm.
      merge: ``"matrix"`` turns every tensor into its most balanced matricisation (convolution
        kernels ``(h, w, i, o)`` become ``(h*w*i, o)``); ``"greedy"`` multiplies neighbouring
        dims from left to right while the product is at most ``merge_cap`` (as the official
        Shampoo-like codes; beware: a small matrix becomes one long vector); ``"none"`` keeps the
        shape.
      merge_cap: cap of ``"greedy"``; ``None`` means ``block_size``.
      split: ``"even"`` cuts a long mode into nearly equal pieces, ``"tail"`` at multiples of
        ``block_size`` with a shorter last piece (as published codes do).
      vectors: ``"diagonal"`` leaves parameters with a single mode to the fallback, ``"block"``
        gives them dense factors (full-matrix AdaGrad).
      max_dim: parameters with a longer (merged) mode are left to the fallback. ``None``: no limit.
      include: which parameters are preconditioned at all: a regular expression that is searched in
        the '/'-joined path, or a function ``(path, shape) -> bool``. ``None``: all.
      stacked: leading axes that stack layers (``nn.scan``, ``vmap``-ed experts) and are treated as
        batch: a regular expression for paths with ONE such axis, or ``(path, shape) -> int``.
      group: name of the method that treats a parameter, ``(path, shape) -> str``, where the engine
        is given several. ``None``: there is one method.
    """

    block_size: int | None = 256
    merge: Literal["matrix", "greedy", "none"] = "matrix"
    merge_cap: int | None = None
    split: Literal["even", "tail"] = "even"
    vectors: Literal["diagonal", "block"] = "diagonal"
    max_dim: int | None = None
    include: str | Callable[[str, Shape], bool] | None = None
    stacked: str | Callable[[str, Shape], int] | None = None
    group: Callable[[str, Shape], str] | None = None

    def __post_init__(self):
        choices = {
            "merge": ("matrix", "greedy", "none"),
            "split": ("even", "tail"),
            "vectors": ("diagonal", "block"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Layout.{name} must be one of {allowed}, got {getattr(self, name)!r}"
                )
        for name in ("block_size", "merge_cap", "max_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Layout.{name} must be a positive integer or None, got {value!r}")


class Tile(NamedTuple):
    """A region of a parameter cut into equal blocks: per mode its start, pieces and piece size."""

    starts: Shape
    counts: Shape
    sizes: Shape


class Leaf(NamedTuple):
    """A covered parameter: position among the leaves, shapes before and after merging, tiles."""

    index: int
    path: str
    shape: Shape
    stack: int
    merged: Shape
    tiles: tuple[Tile, ...]


class Slot(NamedTuple):
    """Where the blocks of one tile of one covered leaf lie in a bucket."""

    leaf: int
    tile: Tile
    offset: int
    count: int


class Bucket(NamedTuple):
    """All blocks of one group, shape and factor dtype, stacked to ``(size, *shape)``."""

    key: str
    group: str
    shape: Shape
    dtype: Any
    slots: tuple[Slot, ...]
    size: int


class Plan(NamedTuple):
    """The static layout of a whole tree: covered leaves, the others with a reason, buckets."""

    covered: tuple[Leaf, ...]
    uncovered: tuple[tuple[int, str, Shape, str], ...]
    buckets: tuple[Bucket, ...]


def merge_dims(shape: Shape, layout: Layout) -> Shape:
    """Shape of the tensor that is preconditioned (specs of Shampoo 3.1 and KrADagrad 3.4.1)."""
    if layout.merge == "none":
        return shape
    if layout.merge == "greedy":
        cap = layout.merge_cap or layout.block_size or max(shape, default=1)
        out, product = [], 1
        for d in shape:
            if product * d <= cap:
                product *= d
            else:
                out, product = out + [product] * (product > 1), d
        return tuple(out + [product] * (product > 1))
    dims = [d for d in shape if d != 1]
    if len(dims) <= 1:
        return tuple(dims)
    pairs = [(math.prod(dims[:i]), math.prod(dims[i:])) for i in range(1, len(dims))]
    return min(reversed(pairs), key=sum)  # ties: the later cut, (inputs, outputs) in JAX layouts


def _segments(d: int, layout: Layout) -> list[tuple[int, int, int]]:
    """Cuts one mode of length d into at most two runs ``(start, count, size)`` of equal pieces."""
    b = layout.block_size or d
    if d <= b:
        return [(0, 1, d)]
    q = -(-d // b)
    if layout.split == "tail":
        rest = d % b
        return [(0, d // b, b)] + ([(d - rest, 1, rest)] if rest else [])
    for pieces in range(q, q + q // 4 + 2):  # a few pieces more, if that makes them equal
        if d % pieces == 0:
            return [(0, pieces, d // pieces)]
    small, longer = divmod(d, q)
    return [(0, longer, small + 1), (longer * (small + 1), q - longer, small)]


def _tiles(shape: Shape, layout: Layout) -> tuple[Tile, ...]:
    out = []
    for combination in itertools.product(*(_segments(d, layout) for d in shape)):
        starts, counts, sizes = zip(*combination, strict=True)
        out.append(Tile(starts, counts, sizes))
    return tuple(out)


def _stack_axes(path: str, shape: Shape, layout: Layout) -> int:
    if layout.stacked is None:
        return 0
    if callable(layout.stacked):
        axes = int(layout.stacked(path, shape))
    else:
        axes = 1 if re.search(layout.stacked, path) else 0
    if not 0 <= axes <= len(shape):
        raise ValueError(
            f"parameter '{path}' has shape {shape}: Layout.stacked asks for {axes} leading axes"
        )
    return axes


def _reason_uncovered(path: str, shape: Shape, merged: Shape, layout: Layout) -> str | None:
    if 0 in shape:
        return "empty"
    if layout.include is not None:
        included = (
            layout.include(path, shape)
            if callable(layout.include)
            else re.search(layout.include, path) is not None
        )
        if not included:
            return "excluded by Layout.include"
    if not merged:
        return "scalar"
    if len(merged) == 1 and layout.vectors == "diagonal":
        return "vector"
    if layout.max_dim is not None and max(merged) > layout.max_dim:
        return f"mode of {max(merged)} > max_dim"
    return None


def factor_dtype_of(dtype: Any, override: Any = None) -> Any:
    """Dtype of the factors of a parameter: ``override``, or its own but never below float32."""
    dtype = jnp.dtype(dtype if override is None else override)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


@functools.lru_cache(maxsize=256)
def make_plan(
    paths: tuple[str, ...],
    shapes: tuple[Shape, ...],
    dtypes: tuple[Any, ...],
    layout: Layout,
) -> Plan:
    """Static plan for leaves given by path, shape and FACTOR dtype."""
    covered, uncovered, slots = [], [], {}
    for index, (path, shape, dtype) in enumerate(zip(paths, shapes, dtypes, strict=True)):
        axes = _stack_axes(path, shape, layout)
        merged = merge_dims(shape[axes:], layout)
        reason = _reason_uncovered(path, shape, merged, layout)
        if reason is not None:
            uncovered.append((index, path, shape, reason))
            continue
        group = "" if layout.group is None else layout.group(path, shape)
        leaf = Leaf(index, path, shape, math.prod(shape[:axes]), merged, _tiles(merged, layout))
        for tile in leaf.tiles:
            entry = (len(covered), tile, leaf.stack)
            slots.setdefault((group, tile.sizes, dtype), []).append(entry)
        covered.append(leaf)
    buckets = tuple(
        _bucket(key, entries, slots)
        for key, entries in sorted(slots.items(), key=lambda item: (*item[0][:2], str(item[0][2])))
    )
    return Plan(tuple(covered), tuple(uncovered), buckets)


def _bucket(key, entries, all_keys) -> Bucket:
    group, shape, dtype = key
    placed, offset = [], 0
    for leaf, tile, stack in entries:
        count = stack * math.prod(tile.counts)
        placed.append(Slot(leaf, tile, offset, count))
        offset += count
    name = "x".join(map(str, shape))
    if sum(other[:2] == (group, shape) for other in all_keys) > 1:  # two factor dtypes
        name = f"{name}:{np.dtype(dtype).name}"
    name = f"{group} {name}" if group else name
    return Bucket(name, group, shape, dtype, tuple(placed), offset)


def block_origins(slot: Slot, leaf: Leaf) -> list[tuple[int, Shape]]:
    """(layer of the stack, first index per mode) of each block of a slot, in stack order."""
    grid = itertools.product(range(leaf.stack), *(range(c) for c in slot.tile.counts))
    tile = slot.tile
    return [
        (g[0], tuple(o + i * n for o, i, n in zip(tile.starts, g[1:], tile.sizes, strict=True)))
        for g in grid
    ]
