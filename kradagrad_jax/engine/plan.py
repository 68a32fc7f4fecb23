"""From parameter shapes to blocks, and from blocks to buckets; static, from shapes alone.

A parameter is matricised (or merged, or left as it is), cut into blocks of at most ``block_size``
per factored mode, and all blocks of one shape in the model form one bucket. Parameters of one
shape that are cut alike are one entry (:class:`Leaves`), and a :class:`Tile` is a region that is
cut into equal blocks: traced operations grow with neither depth nor number of blocks.
"""

import functools
import itertools
import math
import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kradagrad_jax.engine.layout import Layout, axes_of, check_patterns, is_included
from kradagrad_jax.engine.parts import Leaves, Tile, limited, parts_of, tiles_of
from kradagrad_jax.engine.rules import Shape


class Slot(NamedTuple):
    """Where the blocks of one tile of an entry lie in a bucket: by leaf, stack, grid."""

    leaves: int
    tile: Tile
    offset: int
    count: int


class Bucket(NamedTuple):
    """All blocks of one group, shape, factored modes and dtype, stacked to ``(size, *shape)``."""

    key: str
    group: str
    shape: Shape
    factored: tuple[bool, ...]
    dtype: Any
    slots: tuple[Slot, ...]
    size: int


class Plan(NamedTuple):
    """The static layout of a whole tree.

    Attributes:
      covered: entries of covered parameters.
      uncovered: (index, path, shape, reason) of all others.
      buckets: the stacks of blocks.
      joined: (index, shape) of the leaves that are one vector in this order, where
        ``Layout.joined`` says so; there is then one bucket without slots.
      stacks: (index, axes that stack) of the uncovered vectors that stack layers.
    """

    covered: tuple[Leaves, ...]
    uncovered: tuple[tuple[int, str, Shape, str], ...]
    buckets: tuple[Bucket, ...]
    joined: tuple[tuple[int, Shape], ...] = ()
    stacks: tuple[tuple[int, Shape], ...] = ()


@functools.lru_cache(maxsize=256)
def make_plan(
    paths: tuple[str, ...],
    shapes: tuple[Shape, ...],
    dtypes: tuple[Any, ...],
    names: tuple[tuple[Any, ...] | None, ...] | None,
    layout: Layout,
) -> Plan:
    """Static plan for leaves.

    Args:
      paths: '/'-joined, one per leaf.
      shapes: likewise.
      dtypes: FACTOR dtypes, likewise.
      names: likewise what :func:`~kradagrad_jax.engine.trees.names_of` says, or None for all.
      layout: how to cut.

    Raises:
      ValueError: for what the layout says about axes, cut points and patterns that does not fit the
        parameters; it names the parameter and the field.
    """
    check_patterns(layout, paths)
    if layout.joined:
        return _joined(paths, shapes, dtypes, layout)
    parts: list[Leaves] = []
    uncovered, stacks = [], []
    for index, (path, shape, dtype) in enumerate(zip(paths, shapes, dtypes, strict=True)):
        own = None if names is None else names[index]
        found = parts_of(index, path, shape, dtype, own, layout)
        if isinstance(found, str):
            uncovered.append((index, path, shape, found))
            if found in ("bias", "vector", "scalar"):
                axes = axes_of(layout, path, shape, own)
                stacks += [(index, axes.stack)] if axes is not None and axes.stack else []
        else:
            parts += found
    alike: dict[Leaves, list[Leaves]] = {}
    for p in limited(parts, layout):
        alike.setdefault(p._replace(indices=(), paths=()), []).append(p)
    covered, slots = [], {}
    for entry, same in alike.items():
        for tile in (tiles := tiles_of(entry.merged, entry.factored, layout)):
            where = len(covered), tile, len(same) * entry.stack * math.prod(tile.counts)
            key = entry.group, tile.sizes, entry.factored, entry.dtype
            slots.setdefault(key, []).append(where)
        indices, paths = (sum((getattr(p, n) for p in same), ()) for n in ("indices", "paths"))
        covered.append(entry._replace(indices=indices, paths=paths, tiles=tiles))
    keys = sorted(slots, key=lambda k: (*k[:3], str(k[3])))
    buckets = tuple(_bucket(key, slots[key], keys) for key in keys)
    return Plan(tuple(covered), tuple(uncovered), buckets, stacks=tuple(stacks))


def _bucket(key, entries, all_keys) -> Bucket:
    group, shape, factored, dtype = key
    placed, offset = [], 0
    for leaves, tile, count in entries:
        placed.append(Slot(leaves, tile, offset, count))
        offset += count
    name = "x".join(f"{d}" if f else f"{d}*" for d, f in zip(shape, factored, strict=True))
    if sum(other[:3] == key[:3] for other in all_keys) > 1:  # two factor dtypes
        name = f"{name}:{dtype.name}"
    name = f"{group} {name}" if group else name
    return Bucket(name, group, shape, factored, dtype, tuple(placed), offset)


def _joined(paths, shapes, dtypes, layout: Layout) -> Plan:
    """All included parameters as one vector."""
    covered, uncovered, joined, groups = [], [], [], set()
    for index, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        if 0 in shape or not is_included(layout, path, shape):
            reason = "empty" if 0 in shape else "excluded by Layout.include"
            uncovered.append((index, path, shape, reason))
            continue
        groups.add("" if layout.group is None else layout.group(path, shape))
        joined.append((index, shape))
        order, merged = tuple(range(len(shape))), (math.prod(shape),)
        covered.append(Leaves((index,), (path,), shape, None, shape, order, 1, merged, (True,)))
    if len(groups) > 1:
        raise ValueError(
            f"Layout(joined=True) makes one vector of all parameters, Layout.group gives them to "
            f"several methods: {sorted(groups)}"
        )
    if not joined:
        return Plan((), tuple(uncovered), ())
    size = sum(math.prod(shape) for _, shape in joined)
    dtype = max((np.dtype(dtypes[i]) for i, _ in joined), key=lambda d: jnp.finfo(d).bits)
    group = groups.pop()
    # the order and shapes of what was joined are part of its name
    mark = zlib.crc32(repr([(paths[i], shape) for i, shape in joined]).encode())
    name = f"{group} {size} {mark:08x}".strip()
    bucket = Bucket(name, group, (size,), (True,), dtype, (), 1)
    return Plan(tuple(covered), tuple(uncovered), (bucket,), tuple(joined))


def owners(plan: Plan) -> tuple[dict[str, np.ndarray], int]:
    """Who gets one joint norm: parameter x layer of its stack x part of its split.

    Returns:
      Per bucket the owner of each block, int32 ``(size,)``; the number of owners. They are numbered
      by entry of ``plan.covered``, leaf, stack.
    """
    if plan.joined:
        return {plan.buckets[0].key: np.zeros(1, np.int32)}, 1
    sizes = [len(entry.indices) * entry.stack for entry in plan.covered]
    first = [0, *itertools.accumulate(sizes)]
    out = {}
    for bucket in plan.buckets:
        ids = [
            first[s.leaves] + np.repeat(np.arange(sizes[s.leaves]), math.prod(s.tile.counts))
            for s in bucket.slots
        ]
        out[bucket.key] = np.concatenate(ids).astype(np.int32)
    return out, first[-1]


class Origin(NamedTuple):
    """Where a block comes from; sorts by leaf and, within it, in the order of its entries.

    Attributes:
      index: position of the leaf.
      part: start of the region along the axis that is cut unevenly, 0 elsewhere.
      layer: position in the stack.
      first: first index per merged mode.
    """

    index: int
    part: int
    layer: int
    first: Shape


def block_origins(plan: Plan, slot: Slot) -> list[Origin]:
    """Origin of each block of a slot, in stack order."""
    entry, tile = plan.covered[slot.leaves], slot.tile
    part = 0 if entry.region is None else entry.region[1]
    grid = list(itertools.product(*(range(c) for c in tile.counts)))
    firsts = [
        tuple(o + i * n for o, i, n in zip(tile.starts, g, tile.sizes, strict=True)) for g in grid
    ]
    return [
        Origin(index, part, layer, first)
        for index in entry.indices
        for layer in range(entry.stack)
        for first in firsts
    ]
