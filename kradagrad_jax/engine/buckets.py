"""Moves the blocks of all covered parameters into stacks of equal shape, and back."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.layout import Leaf, Plan, Tile
from kradagrad_jax.engine.sharding import Split


def _cut(x: jax.Array, leaf: Leaf, tile: Tile) -> jax.Array:
    """One tile of a leaf ``(stack, *merged)`` as a stack of blocks ``(count, *sizes)``."""
    whole = all(
        start == 0 and count * size == dim
        for start, count, size, dim in zip(*tile, leaf.merged, strict=True)
    )
    if not whole:
        limits = [s + c * n for s, c, n in zip(*tile, strict=True)]
        x = jax.lax.slice(x, (0, *tile.starts), (leaf.stack, *limits))
    k = len(tile.sizes)
    if math.prod(tile.counts) == 1:
        return x
    pairs = [n for c, s in zip(tile.counts, tile.sizes, strict=True) for n in (c, s)]
    x = x.reshape(leaf.stack, *pairs)
    x = x.transpose(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2))
    return x.reshape(-1, *tile.sizes)


def _paste(blocks: jax.Array, leaf: Leaf, tile: Tile) -> jax.Array:
    """Inverse of the reshaping of :func:`_cut`: the region ``(stack, *counts * sizes)``."""
    k = len(tile.sizes)
    region = tuple(c * n for c, n in zip(tile.counts, tile.sizes, strict=True))
    if math.prod(tile.counts) == 1:
        return blocks
    x = blocks.reshape(leaf.stack, *tile.counts, *tile.sizes)
    x = x.transpose(0, *(a for i in range(k) for a in (1 + i, 1 + k + i)))
    return x.reshape(leaf.stack, *region)


def gather(
    plan: Plan, leaves: Sequence[jax.Array], split: Split | None = None
) -> dict[str, jax.Array]:
    """Blocks of the covered leaves, in factor dtype, by bucket.

    Args:
      plan: the static layout.
      leaves: one array per COVERED leaf, in plan order.
      split: where blocks will be divided over devices, leaves are made whole first: a partitioner
        left to itself sends pieces of them about at every reshape.

    Returns:
      ``{key: (size, *block shape)}``.
    """
    leaves = leaves if split is None else split.whole(list(leaves))
    flat = [
        trees.replicate(x).reshape(leaf.stack, *leaf.merged)
        for x, leaf in zip(leaves, plan.covered, strict=True)
    ]
    out = {}
    for bucket in plan.buckets:
        parts = [
            _cut(flat[slot.leaf], plan.covered[slot.leaf], slot.tile).astype(bucket.dtype)
            for slot in bucket.slots
        ]
        out[bucket.key] = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out


def scatter(plan: Plan, stacks: dict[str, jax.Array]) -> list[jax.Array]:
    """Inverse of :func:`gather`: one array per covered leaf, in its shape, in factor dtype."""
    regions: list[dict[Tile, jax.Array]] = [{} for _ in plan.covered]
    for bucket in plan.buckets:
        for slot in bucket.slots:
            part = jax.lax.slice_in_dim(stacks[bucket.key], slot.offset, slot.offset + slot.count)
            regions[slot.leaf][slot.tile] = _paste(part, plan.covered[slot.leaf], slot.tile)
    return [
        _assemble([parts[t] for t in leaf.tiles], leaf).reshape(leaf.shape)
        for leaf, parts in zip(plan.covered, regions, strict=True)
    ]


def _assemble(parts: list[jax.Array], leaf: Leaf) -> jax.Array:
    """Joins the tiles (row-major over at most two runs per mode) along one mode after another."""
    runs = [len({t.starts[i] for t in leaf.tiles}) for i in range(len(leaf.merged))]
    for axis in reversed(range(len(runs))):
        n = runs[axis]
        if n > 1:
            parts = [
                jnp.concatenate(parts[i : i + n], axis=1 + axis) for i in range(0, len(parts), n)
            ]
    return parts[0]


def _owners(plan: Plan) -> tuple[dict[str, np.ndarray], list[int]]:
    """Per bucket the number of the parameter (or layer of a stacked one) that owns each block."""
    first = list(itertools.accumulate((leaf.stack for leaf in plan.covered), initial=0))
    owners = {}
    for bucket in plan.buckets:
        ids = [
            first[slot.leaf]
            + np.repeat(np.arange(plan.covered[slot.leaf].stack), math.prod(slot.tile.counts))
            for slot in bucket.slots
        ]
        owners[bucket.key] = np.concatenate(ids)
    return owners, first


def rescale(
    plan: Plan, stacks: dict[str, jax.Array], targets: Sequence[jax.Array]
) -> dict[str, jax.Array]:
    """Gives the blocks of each parameter the joint norm of its target.

    Args:
      plan: the static layout.
      stacks: blocks by bucket.
      targets: one array per covered leaf. Layers of a stacked parameter are rescaled one by one.

    Returns:
      Blocks by bucket.
    """
    owners, first = _owners(plan)
    wide = max((x.dtype for x in stacks.values()), key=lambda d: jnp.finfo(d).bits)
    lengths = [
        jnp.sum(jnp.square(trees.replicate(d).reshape(leaf.stack, -1)), axis=1).astype(wide)
        for d, leaf in zip(targets, plan.covered, strict=True)
    ]
    squares = jnp.zeros(first[-1], wide)
    for key, x in stacks.items():
        sums = jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))).astype(wide)
        squares = squares.at[owners[key]].add(sums)
    # a direction of length zero stays zero: dividing by a tiny number would give 0 * inf
    scale = jnp.sqrt(jnp.concatenate(lengths)) / jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return {
        key: x * scale[owners[key]].astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
        for key, x in stacks.items()
    }
