"""Moves the blocks of all covered parameters into stacks of equal shape, and back.

Leaves of one entry of the plan are put together first, then reshaped and transposed together.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.plan import Leaves, Plan, Tile


def cut(plan: Plan, leaves: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Blocks of the covered leaves, in factor dtype, by bucket.

    Args:
      plan: the static layout.
      leaves: ALL leaves, by index; those that are not covered are not looked at.

    Returns:
      ``{bucket.key: (size, *block shape)}``.
    """
    if plan.joined:
        (bucket,) = plan.buckets
        flat = [trees.replicate(leaves[i]).astype(bucket.dtype).ravel() for i, _ in plan.joined]
        return {bucket.key: jnp.concatenate(flat)[None]}
    whole: dict[int, jax.Array] = {}  # by entry
    together: dict[tuple[int, ...], jax.Array] = {}  # by leaves: entries may share them
    out = {}
    for bucket in plan.buckets:
        parts = []
        for slot in bucket.slots:
            entry = plan.covered[slot.leaves]
            if entry.indices not in together:
                together[entry.indices] = _together(
                    [leaves[i] for i in entry.indices], bucket.dtype
                )
            if slot.leaves not in whole:
                whole[slot.leaves] = _matrices(together[entry.indices], entry)
            parts.append(_blocks(whole[slot.leaves], entry, slot.tile).astype(bucket.dtype))
        out[bucket.key] = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out


def _together(leaves: list[jax.Array], dtype: Any) -> jax.Array:
    """Leaves of one shape as one array ``(n, *shape)``; of ``dtype`` where theirs differ."""
    leaves = [trees.replicate(x) for x in leaves]
    if len({x.dtype for x in leaves}) > 1:
        leaves = [x.astype(dtype) for x in leaves]
    return leaves[0][None] if len(leaves) == 1 else jnp.stack(leaves)


def _matrices(x: jax.Array, entry: Leaves) -> jax.Array:
    """``(n, *shape)`` as ``(n * stack, *merged)``."""
    n = len(entry.indices)
    if entry.region is not None:
        axis, start, stop = entry.region
        x = jax.lax.slice_in_dim(x, start, stop, axis=1 + axis)
    x = _transpose(x.reshape(n, *entry.view), (0, *(1 + a for a in entry.order)))
    return x.reshape(n * entry.stack, *entry.merged)


def _transpose(x: jax.Array, order: Sequence[int]) -> jax.Array:
    return x if tuple(order) == tuple(range(x.ndim)) else x.transpose(order)


def _blocks(x: jax.Array, entry: Leaves, tile: Tile) -> jax.Array:
    """One tile of ``(n * stack, *merged)`` as a stack of blocks ``(count, *sizes)``."""
    limits = [s + c * n for s, c, n in zip(*tile, strict=True)]
    if tuple(limits) != entry.merged or any(tile.starts):
        x = jax.lax.slice(x, (0, *tile.starts), (len(x), *limits))
    if math.prod(tile.counts) == 1:
        return x
    grid, sizes = _grid(tile)
    pairs = [n for pair in zip(tile.counts, tile.sizes, strict=True) for n in pair]
    return x.reshape(-1, *pairs).transpose(0, *grid, *sizes).reshape(-1, *tile.sizes)


def _grid(tile: Tile) -> tuple[list[int], list[int]]:
    """Axes of pieces and of sizes of an array ``(n, count, size, count, size, ..)``."""
    k = len(tile.sizes)
    return list(range(1, 2 * k, 2)), list(range(2, 2 * k + 1, 2))


def paste(plan: Plan, stacks: dict[str, jax.Array]) -> dict[int, jax.Array]:
    """Inverse of :func:`cut`: by index the covered leaves in their shapes, in factor dtype."""
    if plan.joined:
        flat = stacks[plan.buckets[0].key][0]
        ends = np.cumsum([math.prod(shape) for _, shape in plan.joined])
        pieces = jnp.split(flat, ends[:-1])
        return {i: x.reshape(s) for (i, s), x in zip(plan.joined, pieces, strict=True)}
    tiles: dict[int, dict[Tile, jax.Array]] = {}
    for bucket in plan.buckets:
        for slot in bucket.slots:
            x = stacks[bucket.key]
            if slot.count != bucket.size:
                x = jax.lax.slice_in_dim(x, slot.offset, slot.offset + slot.count)
            tiles.setdefault(slot.leaves, {})[slot.tile] = _unblock(x, slot.tile)
    regions: dict[int, list[tuple[tuple[int, int, int] | None, jax.Array]]] = {}
    places = _places(plan, stacks)
    for number, found in tiles.items():
        entry = plan.covered[number]
        x = _unmatrices(_assemble([found[t] for t in entry.tiles], entry), entry)
        for index, y in zip(entry.indices, _apart(x, places), strict=True):
            regions.setdefault(index, []).append((entry.region, y))
    return {index: _join(found) for index, found in regions.items()}


def _unblock(x: jax.Array, tile: Tile) -> jax.Array:
    """Inverse of the reshaping of :func:`_blocks`: the region ``(n * stack, *counts * sizes)``."""
    if math.prod(tile.counts) == 1:
        return x
    grid, sizes = _grid(tile)
    x = x.reshape(-1, *tile.counts, *tile.sizes).transpose(np.argsort([0, *grid, *sizes]))
    return x.reshape(-1, *(c * n for c, n in zip(tile.counts, tile.sizes, strict=True)))


def _assemble(parts: list[jax.Array], entry: Leaves) -> jax.Array:
    """Joins the tiles (row-major over at most two runs per mode) along one mode after another."""
    runs = [len({t.starts[i] for t in entry.tiles}) for i in range(len(entry.merged))]
    for axis in reversed(range(len(runs))):
        n = runs[axis]
        if n > 1:
            parts = [
                jnp.concatenate(parts[i : i + n], axis=1 + axis) for i in range(0, len(parts), n)
            ]
    return parts[0]


def _unmatrices(x: jax.Array, entry: Leaves) -> jax.Array:
    """Inverse of :func:`_matrices`: ``(n, *shape)``, or the region of it."""
    n = len(entry.indices)
    x = x.reshape(n, *(entry.view[a] for a in entry.order))
    x = _transpose(x, np.argsort([0, *(1 + a for a in entry.order)]).tolist())
    shape = list(entry.shape)
    if entry.region is not None:
        axis, start, stop = entry.region
        shape[axis] = stop - start
    return x.reshape(n, *shape)


def _places(plan: Plan, stacks: dict[str, jax.Array]) -> Sequence[jax.Array]:
    """The numbers 0, 1, .. of the leaves of an entry, as operands and not as constants.

    XLA compiles equal kernels once, but those that differ in a constant, here the place of a leaf
    in its stack, one by one (18 ms each on CPU). A conditional is what it does not see through.
    """
    most = max((len(entry.indices) for entry in plan.covered), default=0)
    if most < 2:
        return ()
    numbers = [np.int32(i) for i in range(most)]
    first = next(iter(stacks.values()))
    return jax.lax.cond(first[(0,) * first.ndim] > 0, lambda: numbers, lambda: numbers)


def _apart(x: jax.Array, places: Sequence[jax.Array]) -> list[jax.Array]:
    if len(x) == 1:
        return [x[0]]
    return [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for i in places[: len(x)]]


def _join(found: list[tuple[tuple[int, int, int] | None, jax.Array]]) -> jax.Array:
    """The regions of one leaf, along the axis that was cut."""
    if len(found) == 1:
        return found[0][1]
    found = sorted(found, key=lambda pair: pair[0] or (0, 0, 0))
    axis, _, _ = found[0][0] or (0, 0, 0)
    return jnp.concatenate([x for _, x in found], axis=axis)
